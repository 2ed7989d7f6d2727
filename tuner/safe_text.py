"""Text from others, made safe to print and to open in a spreadsheet."""

import html
import logging
import re
from typing import Any

# What a terminal may obey, or what shows text in another order or as several lines: C0 and C1 control characters,
# separators of lines, overrides of the writing direction, and halves of characters
HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
FORMULA = re.compile(r"\s*[=+@-]|'")
LONG = re.compile(r"\S{1000,}")  # longer than most paths
MARKUP = re.compile(r"[\\`*_\[\]|~$#]")  # Markdown's characters, and $ of formulas
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def printable(text: str) -> str:
    r"""The text on one line, with harmful characters as Python writes them: \x1b."""
    return HARMFUL.sub(lambda found: repr(found[0])[1:-1], text)


def legible(text: str) -> str:
    """The same, with very long words cut."""
    return LONG.sub(lambda found: f"{found[0][:200]}... ({len(found[0]):,} characters)", printable(text))


def printable_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


class Formatter(logging.Formatter):
    """Log lines without harmful characters. Only messages of several lines, and tracebacks, keep their line breaks."""

    def format(self, record: logging.LogRecord) -> str:
        """Called by logging."""
        return printable_lines(super().format(record))


def markdown(text: str) -> str:
    """The text as a part of a line of Markdown: it is shown as it is, and is neither markup nor HTML."""
    return MARKUP.sub(r"\\\g<0>", html.escape(printable(text), quote=False))


def cell(value: Any) -> Any:
    """A value for a CSV file. A text that a spreadsheet would take for a formula begins with an apostrophe.

    So does a text that begins with one. Numbers, also as text, and line breaks are unchanged; other harmful characters
    are escaped.
    """
    if not isinstance(value, str):
        return value
    text = printable_lines(value)
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text


def from_cell(text: str) -> str:
    """The text that `cell` wrote."""
    return text.removeprefix("'")
