"""Rules for the values of config keys: each is a test and the words that follow "must be" in an error message."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from tuner import InputError

LEGIBLE = 200  # characters of a value in a message
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # in capitals -> bytes


@dataclass(frozen=True)
class Rule:
    """A test of a value, and its description, which completes "KEY=VALUE must be"."""

    holds: Callable[[Any], bool]
    text: str

    def check(self, key: str, value: Any) -> None:
        """Raises InputError if the value of `key` breaks the rule."""
        if not self.holds(value):
            raise InputError(f"{key}={shown(value)} must be {self.text}")


def shown(value: Any) -> str:
    """A value for a message: long ones are cut."""
    text = str(value)
    return text if len(text) <= LEGIBLE else f"{text[:LEGIBLE]}... ({len(text):,} characters)"


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold, and finite; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def as_number(text: str) -> float:
    """The number in a text. Raises ValueError also for 1_2 and for digits of other scripts, which float() takes."""
    if not text.isascii() or "_" in text:
        raise ValueError(f"{text!r} is not a number")
    return float(text)


def as_bytes(text: str) -> int:
    """The bytes of a size such as 20GB or 1.5 MB. Units are decimal, in any case. Raises ValueError for other text."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?([kmgt]?b)", text, re.IGNORECASE | re.ASCII)
    if not match:
        raise ValueError(f"{text!r} is not a size")
    return round(float(match[1]) * UNITS[match[2].upper()])


def whole(least: int, most: int = 2**62) -> Rule:
    """Ints from `least` to `most`. Bools and floats such as 3.0 break the rule."""
    limit = f" and at most {most:,}" if most < 2**62 else ""
    text = f"a whole number of at least {least}{limit}"
    return Rule(lambda value: type(value) is int and least <= value <= most, text)


def number(holds: Callable[[float], bool], text: str) -> Rule:
    """Finite ints and floats for which `holds` is true."""
    return Rule(lambda value: is_number(value) and holds(value), text)


def one_of(*values: Any) -> Rule:
    """The given values. Types count: 1 is not true."""
    names = [{None: "null", True: "true", False: "false"}.get(value, value) for value in values]
    text = f"{', '.join(names[:-1])} or {names[-1]}"
    return Rule(lambda value: any(type(value) is type(known) and value == known for known in values), text)


def or_null(rule: Rule) -> Rule:
    """None, in addition to the values that `rule` allows."""
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.text}, or null")


TEXT = Rule(lambda value: isinstance(value, str) and "\0" not in value, "text")
POSITIVE = number(lambda v: v > 0, "a number of more than 0")
NOT_NEGATIVE = number(lambda v: v >= 0, "a number of at least 0")
PROBABILITY = number(lambda v: 0 <= v <= 1, "a probability, 0 to 1")
SHARE = number(lambda v: 0 <= v <= 1, "a share, 0 to 1")
SEED = whole(0, 2**32 - 1)  # as numpy and the samplers take it
COUNT = whole(1, 10**6)
BELOW_ONE = number(lambda v: 0 <= v < 1, "at least 0 and less than 1")


SECONDS = {"s": 1, "m": 60, "h": 3600}


def seconds(duration: float | str) -> float:
    """A duration in seconds: a number, or text such as 60s, 10m or 1.5h. Raises ValueError for anything else."""
    if isinstance(duration, str) and duration[-1:] in SECONDS:
        return as_number(duration[:-1]) * SECONDS[duration[-1]]
    if not is_number(duration):
        raise ValueError(f"{duration!r} is not a duration")
    return float(duration)


def _is_duration(value: Any) -> bool:
    try:
        return 0 < seconds(value) <= sys.float_info.max
    except ValueError:
        return False


DURATION = Rule(_is_duration, "a time above 0, in seconds or as 60s, 10m or 2h")


def _is_folder_name(value: Any) -> bool:
    if not isinstance(value, str) or not re.fullmatch(
        r"[^./\\\x00-\x1f\x7f\ud800-\udfff][^/\\\x00-\x1f\x7f\ud800-\udfff]*", value
    ):
        return False
    return len(value.encode()) <= 200 and value == value.strip()  # a file system allows 255, and `-2` may follow


MAX_PIXELS = 50_000_000  # of an image file, by its header
FOLDER_NAME = Rule(
    _is_folder_name,
    "the name of a folder: of at most 200 bytes, without slashes, and with no dot or space at its start",
)


def _is_size(value: Any) -> bool:
    try:
        return isinstance(value, str) and as_bytes(value) > 0
    except ValueError:
        return False


SIZE = Rule(_is_size, "a size with its unit, such as 500MB or 20GB")


def check_fields(instance: Any, prefix: str) -> None:
    """Check the fields of a dataclass whose types are `Annotated[TYPE, Rule]`. prefix: of their keys, as "data."."""
    hints = get_type_hints(type(instance), include_extras=True)
    for field in fields(instance):
        for rule in getattr(hints[field.name], "__metadata__", ()):
            rule.check(f"{prefix}{field.name}", getattr(instance, field.name))
