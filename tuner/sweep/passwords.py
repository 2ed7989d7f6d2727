"""Passwords of storages: never in a log, and never in a file of a sweep, however the storage was given."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, unquote

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from tuner import InputError
from tuner.sweep import hydra_private
from tuner.sweep.search_space import quoted

VARIABLE = "TUNER_STORAGE"
STORAGE = "hydra.sweeper.storage"
HIDDEN = "***"
SECRET = re.compile(r"pass|pwd|secret|token", re.IGNORECASE)  # in the name of an option
CREDENTIALS = re.compile(r"[\w+.-]+://[^:/@]*:([^@]*)@([^?]*)")  # as SQLAlchemy reads them: up to the first @
REFERENCE = re.compile(r"\$\{(?:oc\.select:)?([^${}:,]+)")  # to another key of the config


def check(url: str) -> None:
    """Raises InputError for a URL whose password has an @: SQLAlchemy would take the rest of it for the host."""
    match = CREDENTIALS.match(url)
    if match and "@" in match[2]:
        raise InputError(
            f"the storage {redacted(url)} has an @ in its user or password; write it as %40 there "
            "(and : as %3A, / as %2F, % as %25)"
        )


def redacted(spec: str | None) -> str | None:
    """A storage, or a text with one in it, without the password."""
    if spec is None:
        return None
    if spec.startswith("{"):
        return json.dumps(_mapped(json.loads(spec), _redacted_option))
    # up to the last @: SQLAlchemy's URL.render_as_string shows half of pa@ss
    spec = re.sub(r"(://[^:/@\s]*:).*@", rf"\1{HIDDEN}@", spec)
    return re.sub(rf"([?&;]\w*(?:{SECRET.pattern})\w*=)[^&\"'\s]*", rf"\1{HIDDEN}", spec, flags=re.IGNORECASE)


def _redacted_option(name: str, text: str) -> str:
    return HIDDEN if SECRET.search(name) else str(redacted(text))


def secrets(spec: str | None) -> list[str]:
    """The passwords in a storage, the longest first: as they are written there, and decoded."""
    found: set[str] = set()
    for name, text in _leaves(json.loads(spec) if spec and spec.startswith("{") else spec):
        match = CREDENTIALS.match(text)
        written = [match[1]] if match else []
        written += [value for key, value in parse_qsl(text.partition("?")[2]) if SECRET.search(key)]
        written += [text] if SECRET.search(name) else []
        found |= {*written, *map(unquote, written)}
    return sorted(found - {"", HIDDEN}, key=len, reverse=True)


def hidden(text: str, spec: str | None) -> str:
    """A text without the passwords of a storage."""
    text = str(redacted(text) if not text.startswith("{") else text)
    for secret in secrets(spec):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    return text


# On the way to worker processes


@contextmanager
def in_environment(spec: str | None) -> Iterator[None]:
    """Processes that are started in this context have the storage with its password in their environment."""
    if not secrets(spec):
        yield
        return
    os.environ[VARIABLE] = str(spec)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)


def from_environment(spec: str | None) -> str | None:
    """A redacted storage with its password, see `in_environment`. Raises InputError if that lacks it."""
    if spec is None or HIDDEN not in spec:
        return spec
    whole = os.environ.get(VARIABLE)
    if redacted(whole) != spec:
        raise InputError(
            f"this worker cannot open the storage {spec}, as its environment lacks {VARIABLE}, the storage with the "
            "password: let the launcher pass the sweep's environment on"
        )
    return whole


# In the configs of a sweep's jobs


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

    config: the sweep's, whose node `hydra` is changed. arguments: its overrides of other keys. Returns them without
    the password.
    """
    if not secrets(spec):
        return arguments
    keys = keys_with_password(config, spec)
    options: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
    options = [line for line in options if not re.match(rf"\+*{re.escape(STORAGE)}[.=]", line)]
    options.append(f"++{STORAGE}={quoted(str(redacted(spec)))}")  # jobs compose their configs again, from these
    arguments = without_password(arguments, keys, spec)
    for key, text in keys.items():
        if not key.startswith(STORAGE):
            (options if key.startswith("hydra.") else arguments).append(f"++{key}={quoted(text)}")
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.sweeper.storage = redacted(spec)
        config.hydra.overrides.hydra = without_password(options, keys, spec)
    return arguments


def without_password(words: Sequence[str], keys: Iterable[str], spec: str | None) -> list[str]:
    """Command-line arguments without the password, in those that set one of `keys`, or a node that has one."""
    safe = []
    for word in words:
        name = re.match(r"[+]*([\w.@/$-]+)=", word)
        if name and any(f"{key}.".startswith(f"{name[1]}.") for key in keys):
            [override] = hydra_private.parse_overrides([word])
            value = _mapped(hydra_private.element_value(override.value()), lambda _, text: hidden(text, spec))
            word = f"{override.get_key_element()}={hydra_private.element_text(value)}"
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
    for name, text in _leaves(node):
        yield f"{key}.{name}" if name else key, text
        for reference in REFERENCE.findall(text):
            yield from _origins(raw, reference.strip(), seen)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of each value in nested dicts and lists."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, str(value)


def _mapped(value: Any, change: Callable[[str, str], str], name: str = "") -> Any:
    """Nested dicts and lists with `change(key, text)` for each text and number, where that differs."""
    if isinstance(value, dict):
        return {key: _mapped(inner, change, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mapped(inner, change, name) for inner in value]
    if value is None or isinstance(value, bool) or change(name, str(value)) == str(value):
        return value
    return change(name, str(value))
