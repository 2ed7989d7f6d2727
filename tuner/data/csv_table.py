"""A CSV table of labels and pixels.

numpy's C parser reads the file first. It refuses any pixel that is not a whole number from 0 to 255. A refused file is
read again row by row, which is slow, but names the faulty line and column and accepts values such as 12.0.
"""

import bz2
import csv
import gzip
import lzma
import re
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tuner import InputError
from tuner.rules import as_number

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error)
# nan, inf, 1_000 and digits of other scripts may be class names; so may numbers that are too long for int()
NUMBER = re.compile(r"[+-]?([0-9]{1,1000}\.?[0-9]{0,1000}|\.[0-9]{1,1000})([eE][+-]?[0-9]{1,2})?")
MISSING = ("", "nan")  # a missing label, as people and numpy write it


@dataclass(frozen=True)
class Layout:
    """The columns of a table.

    columns: names from the header or, without one, numbers from 0.   label: index of the label column.
    """

    path: Path
    columns: list[str]
    label: int
    header: bool

    @property
    def name(self) -> str:
        """The file's name without its folder, for messages."""
        return self.path.name

    @property
    def n_pixels(self) -> int:
        """The number of columns other than the label."""
        return len(self.columns) - 1


def layout(path: str | Path, label: str | int, header: bool) -> Layout:
    """Read the columns of a file from its first line. label: a column name; without a header, a number from 0.

    Raises InputError if the file does not exist, is empty, or has no such label column.
    """
    path = _existing(path)
    first = next(rows(path), None)
    if first is None:
        raise InputError(f"{path.name} is empty: it needs one line per image, with a label and pixels")
    if header:
        columns = [cell.strip() for cell in first[1]]
        if str(label) not in columns:
            raise InputError(f"{path.name} has no column {label!r}, only {shortened(columns)}: {_hint(columns)}")
        return Layout(path, columns, columns.index(str(label)), header)
    columns = [str(i) for i in range(len(first[1]))]
    if not isinstance(label, int) or not -len(columns) <= label < len(columns):
        raise InputError(
            f"data.header=false, so data.label must be a column number from 0 to {len(columns) - 1}, got {label!r}"
        )
    return Layout(path, columns, label % len(columns), header)


def read(layout: Layout) -> tuple[list[str], np.ndarray]:
    """The labels as written [N], and the pixels in column order, uint8 [N, P]. Raises InputError for a faulty line."""
    try:
        return _read_fast(layout)
    except (ValueError, Warning, *UNREADABLE):
        return _read_carefully(layout)


def rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each row that is not blank. Numbers start at 1 and count blank lines."""
    try:
        with _open(path) as file:
            reader = csv.reader(file)
            for cells in reader:
                if len(cells) > 1 or "".join(cells).strip():
                    yield reader.line_num, cells
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path.name} is not UTF-8 text (byte 0x{error.object[error.start]:02x}): save it as UTF-8 or, if it is "
            "compressed, let its name end in .gz, .xz or .bz2"
        ) from error
    except UNREADABLE as error:
        raise InputError(
            f"{path.name} cannot be read ({error}): it must be a whole CSV file, plain or compressed as its name says"
        ) from error


def data_rows(layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """`rows` without the header."""
    return islice(rows(layout.path), int(layout.header), None)


def shortened(names: Sequence[str], most: int = 5) -> str:
    """The first few names, for a message."""
    return ", ".join(repr(name[:40]) for name in names[:most]) + (f", ... ({len(names)})" if len(names) > most else "")


def _existing(path: str | Path) -> Path:
    if not str(path):
        raise InputError("data.path is empty: set it to your CSV file")
    try:
        path = Path(path).expanduser()
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise InputError(
            f"there is no file {path} (relative to {Path.cwd()}): set data.path to your CSV file"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # no such home directory, or a null byte in the name
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder: name a CSV file in it")
    if not stat.S_ISREG(mode):  # a device has no end, and a pipe may have no content
        raise InputError(f"{path} is not a regular file: name a CSV file")
    return path


def _hint(columns: list[str]) -> str:
    if len(columns) == 1:
        return "the cells of a row must be separated by commas"
    if all(NUMBER.fullmatch(column) for column in columns):
        return "if it has no header, set data.header=false and data.label=0 (the number of the label's column)"
    return "set data.label to the name of the label's column"


def _open(path: Path) -> TextIO:
    # utf-8-sig drops the byte order mark that Excel writes; the csv module requires newline=""
    opened: TextIO = OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig", newline="")
    return opened


def _read_fast(layout: Layout) -> tuple[list[str], np.ndarray]:
    left, right = layout.label, layout.n_pixels - layout.label  # pixel columns on each side of the label
    row = np.dtype([("left", "u1", (left,)), ("label", "O"), ("right", "u1", (right,))])
    with _open(layout.path) as file, warnings.catch_warnings():
        warnings.filterwarnings("error", "loadtxt")  # older numpy reads 1.5 as 1 and only warns
        lines = _with_ascii_pixels(islice(file, int(layout.header), None), layout.label)
        table = np.loadtxt(lines, row, comments=None, delimiter=",", quotechar='"', ndmin=1)
    labels = [label.strip() for label in table["label"]]
    if any(label.lower() in MISSING for label in labels):
        raise ValueError("a label is missing")
    return labels, np.concatenate([table["left"], table["right"]], axis=1)


def _with_ascii_pixels(lines: Iterator[str], label: int) -> Iterator[str]:
    """The lines. numpy reads other characters as digits, or from outside of a table. Raises ValueError for them.

    Raises it also for a quoted label in such a line, which may have commas in it.
    """
    for line in lines:
        if not line.isascii():
            cells = line.split(",", label + 1)
            if '"' in line or not "".join(cells[:label] + cells[label + 1 :]).isascii():
                raise ValueError("a pixel is not ASCII")
        yield line


def _read_carefully(layout: Layout) -> tuple[list[str], np.ndarray]:
    labels, pixels = [], []
    for line, cells in data_rows(layout):
        if len(cells) != len(layout.columns):
            raise InputError(
                f"line {line} of {layout.name} has {len(cells)} values; {len(layout.columns)} expected "
                f"(label and {layout.n_pixels} pixels)"
            )
        labels.append(cells.pop(layout.label).strip())
        if labels[-1].lower() in MISSING:
            raise InputError(f"line {line} of {layout.name} has no label: fill it in or remove the line")
        pixels.append(_row_of_pixels(layout, line, cells))
    if not labels:
        raise InputError(f"{layout.name} has a header and no rows: it needs one line per image")
    return labels, np.stack(pixels)


def _row_of_pixels(layout: Layout, line: int, cells: list[str]) -> np.ndarray:
    try:
        values = np.array([as_number(cell) for cell in cells], dtype=np.float64)
    except ValueError:
        values = np.full(len(cells), np.nan)  # a cell is not a number: check each
    if not ((values >= 0) & (values <= 255) & (values == np.floor(values))).all():
        raise InputError(_fault(layout, line, cells))
    return values.astype(np.uint8)


def _fault(layout: Layout, line: int, cells: list[str]) -> str:
    index, fault = next((i, fault) for i, fault in enumerate(map(_cell_fault, cells)) if fault)
    columns = layout.columns[: layout.label] + layout.columns[layout.label + 1 :]
    hint = ""
    if fault == "is fractional" and all(_cell_fault(cell) in ("", fault) and float(cell) <= 1 for cell in cells):
        hint = "; the line looks scaled to 0..1: multiply the pixels by 255"
    elif line == 1 and not layout.header:
        hint = "; if line 1 names the columns, set data.header=true"
    elif fault == "is not a number":
        hint = "; if it names an image file, set data.image to that column"
    return (
        f"line {line} of {layout.name}, column {columns[index]!r}: {cells[index][:40]!r} {fault}; every column but the "
        f"label is a pixel, a whole number from 0 to 255{hint}"
    )


def _cell_fault(cell: str) -> str:
    if not cell.strip():
        return "is empty"
    try:
        value = as_number(cell)
    except ValueError:
        return "is not a number"
    if not 0 <= value <= 255:  # or nan
        return "is outside 0 to 255" if abs(value) < float("inf") else "is not finite"
    return "" if value.is_integer() else "is fractional"
