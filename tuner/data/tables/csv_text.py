"""CSV files as text: UTF-8, or UTF-16 with a byte order mark; plain or compressed; with commas, semicolons or tabs."""

import bz2
import codecs
import csv
import gzip
import lzma
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tuner import InputError

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error)
DELIMITERS = (",", ";", "\t")
DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")  # where cells are separated by semicolons or tabs
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # the first line of some files of Excel
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Dialect(NamedTuple):
    """encoding: Python's name.   delimiter: of cells.   starts: the number of lines before the table."""

    encoding: str
    delimiter: str
    starts: int = 0


def dialect(path: Path) -> Dialect:
    """The encoding and the delimiter of a file, from its first bytes and its first line that is not blank."""
    with readable(path):
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            encoding = "utf-16" if file.read(2) in UTF_16 else "utf-8-sig"  # both drop the byte order mark
        with open_text(path, encoding) as text:
            for number, line in enumerate(text):
                if found := SEPARATOR_LINE.fullmatch(line):
                    return Dialect(encoding, found[1], number + 1)
                if line.strip():
                    return Dialect(encoding, _delimiter(line))
    return Dialect(encoding, ",")


def _delimiter(line: str) -> str:
    """A semicolon or a tab if it divides the line into cells without further delimiters, or else a comma.

    A comma may also be a decimal comma in such a cell.
    """
    for delimiter in DELIMITERS[1:]:
        [cells] = csv.reader([line.strip("\r\n")], delimiter=delimiter)
        others = "".join(DELIMITERS).replace(delimiter, "")
        if len(cells) > 1 and not any(
            set(others) & set(cell) and not DECIMAL_COMMA.fullmatch(cell.strip()) for cell in cells
        ):
            return delimiter
    return ","


def open_text(path: Path, encoding: str) -> TextIO:
    """Open a file, decompressed if its name ends in .gz, .xz or .bz2. Line breaks are left to the csv module."""
    opened: TextIO = OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding=encoding, newline="")
    return opened


def rows(path: Path, form: Dialect) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each row that is not blank. Numbers start at 1 and count every line of the file."""
    with readable(path), open_text(path, form.encoding) as file:
        for _ in range(form.starts):
            next(file)
        reader = csv.reader(file, delimiter=form.delimiter)
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                yield form.starts + reader.line_num, cells


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the errors of a file that is not text, or damaged, into InputErrors."""
    try:
        yield
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if "16" in error.encoding else "UTF-8"
        raise InputError(
            f"{path.name} is not {encoding} text (byte 0x{error.object[error.start]:02x}): save it as UTF-8 or, if it "
            "is compressed, let its name end in .gz, .xz or .bz2"
        ) from error
    except UNREADABLE as error:
        raise InputError(
            f"{path.name} cannot be read ({error}): it must be a whole CSV file, plain or compressed as its name says"
        ) from error


def existing(path: str | Path, key: str = "data.path") -> Path:
    """The path of a regular file, with ~ expanded. Raises InputError if it is not one. key: what named it."""
    if not str(path):
        raise InputError(f"{key} is empty: set it to your CSV file")
    try:
        path = Path(path).expanduser()
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path} (relative to {Path.cwd()}): set {key} to your CSV file") from error
    except (OSError, RuntimeError, ValueError) as error:  # no such home directory, or a null byte in the name
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder: name a CSV file in it")
    if not stat.S_ISREG(mode):  # a device has no end, and a pipe may have no content
        raise InputError(f"{path} is not a regular file: name a CSV file")
    return path
