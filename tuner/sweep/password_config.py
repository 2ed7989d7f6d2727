"""A storage's password, taken out of the config of a sweep and of what its jobs write."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from tuner.sweep import hydra_private
from tuner.sweep.passwords import hidden, leaves, mapped, redacted, secrets
from tuner.sweep.search_space import quoted

STORAGE = "hydra.sweeper.storage"
PLAIN = re.compile(r"[\w./:@*+%-]+")  # needs no quotes as the value of an override
REFERENCE = re.compile(r"\$\{(?:oc\.select:)?([^${}:,]+)")  # to another key of the config


def keys_with_password(config: DictConfig, spec: str | None) -> dict[str, str]:
    """The keys of a sweep's config from which hydra.sweeper.storage has its password: key -> text without it.

    These are that key itself, and keys that it refers to with ${KEY}.
    """
    if not secrets(spec):
        return {}
    raw = OmegaConf.to_container(config, resolve=False)
    texts = {key: (text, hidden(text, spec)) for key, text in _origins(raw, STORAGE, set())}
    return {key: safe for key, (text, safe) in texts.items() if safe != text}


def keep_off_disk(config: DictConfig, arguments: list[str], spec: str | None) -> list[str]:
    """Take a storage's password out of what the jobs of a sweep compose, and so write into their folders.

    config: the sweep's, which is changed. arguments: its overrides of other keys. Returns them without the password.
    """
    if not secrets(spec):
        return arguments
    keys = keys_with_password(config, spec)
    options: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
    options = [line for line in options if not re.match(rf"\+*{re.escape(STORAGE)}[.=]", line)]
    options, arguments = without_password(options, keys, spec), without_password(arguments, keys, spec)
    options.append(f"++{STORAGE}={quoted(str(redacted(spec)))}")  # jobs compose their configs again, from these
    with read_write(config), read_write(config.hydra), open_dict(config):
        for key, text in keys.items():
            if not key.startswith(STORAGE):
                (options if key.startswith("hydra.") else arguments).append(f"++{key}={quoted(text)}")
                OmegaConf.update(config, key, text)
        tasks: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        config.hydra.overrides.task = without_password(tasks, keys, spec)
        config.hydra.sweeper.storage = redacted(spec)
        config.hydra.overrides.hydra = options
    if HydraConfig.initialized():
        HydraConfig.instance().set_config(config)  # launchers send it to worker processes
    return arguments


def without_password(words: Sequence[str], keys: Iterable[str], spec: str | None) -> list[str]:
    """Command-line arguments without the password, in those that set one of `keys`, or a node that has one."""
    safe = []
    for word in words:
        name = re.match(r"[+]*([\w.@/$-]+)=", word)
        if name and any(f"{key}.".startswith(f"{name[1]}.") for key in keys):
            [override] = hydra_private.parse_overrides([word])
            value = mapped(hydra_private.element_value(override.value()), lambda _, text: hidden(text, spec))
            text = value if isinstance(value, str) and PLAIN.fullmatch(value) else _as_override(value)
            word = f"{override.get_key_element()}={text}"
        safe.append(word)
    return safe


def _origins(raw: Any, key: str, seen: set[str]) -> Iterator[tuple[str, str]]:
    """(key, text) of each text that a node of a config has or refers to. raw: the config, not resolved."""
    if key in seen:
        return
    seen.add(key)
    node = raw
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    for name, text in leaves(node):
        yield f"{key}.{name}" if name else key, text
        for reference in REFERENCE.findall(text):
            yield from _origins(raw, reference.strip(), seen)


def _as_override(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_as_override(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_as_override, value))}]"
    return quoted(value) if isinstance(value, str) else hydra_private.element_text(value)
