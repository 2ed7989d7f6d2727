"""Passwords of storages: never in a log, and never in a file of a sweep, however the storage was given."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, unquote

from tuner import InputError

IN_URL = re.compile(r"(://[^:/@\s]*:).*@")  # up to the last @: SQLAlchemy's own masking shows half of pa@ss
IN_YAML = re.compile(r"(?im)^(\s*\S*(?:pass|pwd|pw|secret|token)\S*:) .*$")
VARIABLE = "TUNER_STORAGE"
HIDDEN = "***"
SECRET = re.compile(r"pass|pwd|secret|token", re.IGNORECASE)  # in the name of an option
CREDENTIALS = re.compile(r"[\w+.-]+://[^:/@]*:([^@]*)@([^?]*)")  # as SQLAlchemy reads them: up to the first @


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
        return json.dumps(mapped(json.loads(spec), _redacted_option))
    spec = IN_URL.sub(rf"\1{HIDDEN}@", spec)
    return re.sub(rf"([?&;]\w*(?:{SECRET.pattern})\w*=)[^&\"'\s]*", rf"\1{HIDDEN}", spec, flags=re.IGNORECASE)


def _redacted_option(name: str, text: str) -> str:
    return HIDDEN if SECRET.search(name) else str(redacted(text))


def secrets(spec: str | None) -> list[str]:
    """The passwords in a storage, the longest first: as they are written there, and decoded."""
    found: set[str] = set()
    for name, text in leaves(json.loads(spec) if spec and spec.startswith("{") else spec):
        match = CREDENTIALS.match(text)
        written = [match[1]] if match else []
        written += [value for key, value in parse_qsl(text.partition("?")[2]) if SECRET.search(key)]
        written += [text] if SECRET.search(name) else []
        found |= {*written, *map(unquote, written)}
    return sorted(found - {"", HIDDEN}, key=lambda secret: (-len(secret), secret))


def hidden(text: str, spec: str | None) -> str:
    """A text without the passwords of a storage."""
    text = str(redacted(text) if not text.startswith("{") else text)
    for secret in secrets(spec):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    return text


class Filter(logging.Filter):
    """For Hydra's log, which at hydra.verbose=true lists the overrides and prints the config."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for an override, which may be spelled in any way. Changes lines of YAML that have a password."""
        record.msg = IN_YAML.sub(rf"\1 {HIDDEN}", IN_URL.sub(rf"\1{HIDDEN}@", str(record.msg)))
        return record.msg != "%s -> %s"


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


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of each value in nested dicts and lists."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, str(value)


def mapped(value: Any, change: Callable[[str, str], str], name: str = "") -> Any:
    """Nested dicts and lists with `change(key, text)` for each text and number, where that differs."""
    if isinstance(value, dict):
        return {key: mapped(inner, change, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [mapped(inner, change, name) for inner in value]
    if value is None or isinstance(value, bool) or change(name, str(value)) == str(value):
        return value
    return change(name, str(value))
