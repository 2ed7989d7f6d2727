"""The columns of a CSV table: which one is the label, which one names the rows, and which are pixels."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tuner import InputError
from tuner.data.tables.csv_text import DECIMAL_COMMA, Dialect, dialect, existing, rows

log = logging.getLogger(__name__)

# nan, inf, 1_000 and digits of other scripts may be class names; so may numbers that are too long for int()
NUMBER = re.compile(r"[+-]?([0-9]{1,1000}\.?[0-9]{0,1000}|\.[0-9]{1,1000})([eE][+-]?[0-9]{1,2})?")
MISSING = ("", "nan")  # a missing label, as people and numpy write it
IDS = {"id", "ids", "image_id", "imageid", "img_id", "imgid", "row_id", "rowid", "index", "unnamed: 0"}
LABELS = ("label", "labels", "class", "classes", "target", "category", "y")  # usual names of a label column
PROBE = 100  # rows that are looked at to explain a mistake


@dataclass(frozen=True)
class Layout:
    """The columns of a table, each by its index.

    columns: names from the header or, without one, numbers from 0.
    label: one column with the label; several, one for each class, of which one is 1 in each row (one-hot); or none.
    id: a column that names the rows.   pixels: the columns of an image, in its order.
    """

    path: Path
    dialect: Dialect
    columns: list[str]
    header: bool
    label: tuple[int, ...]
    id: int | None
    pixels: tuple[int, ...]

    @property
    def name(self) -> str:
        """The file's name without its folder, for messages."""
        return self.path.name

    @property
    def n_pixels(self) -> int:
        """The number of pixel columns."""
        return len(self.pixels)

    @property
    def pixel_names(self) -> tuple[str, ...] | None:
        """The names of the pixel columns, if the table has a header that tells them apart."""
        names = tuple(self.columns[i] for i in self.pixels)
        return names if self.header and len({*names}) == len(names) else None

    def data_rows(self) -> Iterator[tuple[int, list[str]]]:
        """(line number, cells) of each row after the header."""
        return islice(rows(self.path, self.dialect), int(self.header), None)

    def full_rows(self) -> Iterator[tuple[int, list[str]]]:
        """The same. Raises InputError for a row with another number of cells, and for a table without rows."""
        line = 0
        for line, cells in self.data_rows():
            if len(cells) != len(self.columns):
                what = [*["label"] * (len(self.label) == 1), *["id"] * (self.id is not None)]
                shape = f" ({', '.join([*what, ''])[:-2]} and {self.n_pixels} pixels)" if self.pixels and what else ""
                raise InputError(
                    f"line {line} of {self.name} has {len(cells)} values; {len(self.columns)} expected{shape}"
                )
            yield line, cells
        if not line:
            raise InputError(f"{self.name} has a header and no rows: it needs one line per image")

    def label_of(self, line: int, cells: Sequence[str]) -> str:
        """The label of a row, as it is written, or the name of the column that is 1. Raises InputError without one."""
        if len(self.label) == 1:
            text = cells[self.label[0]].strip()
            if text.lower() in MISSING:
                raise InputError(f"line {line} of {self.name} has no label: fill it in or remove the line")
            return text
        values = [self.cell(cells, i) for i in self.label]
        if sorted(map(_one_hot, values)) != [0] * (len(values) - 1) + [1]:
            raise InputError(
                f"line {line} of {self.name} has {', '.join(values)[:80]} in the columns of the labels: one must be 1 "
                "and the others 0"
            )
        return self.columns[self.label[[_one_hot(value) for value in values].index(1)]]

    def cell(self, cells: Sequence[str], i: int) -> str:
        """A number of a row as Python writes it: Excel writes 12,0 where cells are not separated by commas."""
        text = cells[i].strip(" \t\r\n")  # not \xa0: that is a mistake
        return text.replace(",", ".") if DECIMAL_COMMA.fullmatch(text) else text


def _one_hot(text: str) -> int:
    """0 or 1; -1 for another text."""
    return int(float(text)) if NUMBER.fullmatch(text) and float(text) in (0, 1) else -1


def layout(
    path: str | Path,
    label: str | int | Sequence[str | int] | None,
    header: bool,
    id: str | int | None = None,
    key: str = "data.path",
) -> Layout:
    """Read the columns of a file from its first line.

    label, id: a column's name; without a header, its number from 0. A list of labels: one column for each class. None:
        no label; the id is the column that is named like one (IDS), if there is one.
    Raises InputError if the file does not exist, is empty, or has no such column.
    """
    path = existing(path, key)
    form = dialect(path)
    first = next(rows(path, form), None)
    if first is None:
        raise InputError(f"{path.name} is empty: it needs one line per image, with a label and pixels")
    if form.delimiter != ",":
        log.info("%s: cells are separated by %s", path.name, {";": "semicolons", "\t": "tabs"}.get(form.delimiter))
    columns = [cell.strip() for cell in first[1]] if header else [str(i) for i in range(len(first[1]))]
    table = Layout(path, form, columns, header, (), None, ())
    given = [] if label is None else [label] if isinstance(label, str | int) else list(label)
    if len({*map(str, given)}) < len(given) or (label is not None and not given):
        raise InputError(f"data.label={label} must be a column, or a list of different columns, one for each class")
    if key == "data.test_path" and header and not {*map(str, given)} & {*columns}:
        raise InputError(
            f"{path.name} has no column {str(given[0])!r}: without labels nothing can be tested on it. Leave "
            f"data.test_path out, and use `python -m tuner.predict RUN {path.name}`"
        )
    labels = tuple(_index(table, "label", name) for name in given)
    id_column = _index(table, "id", id) if id is not None else _id_column(table, labels)
    if id_column in labels:
        raise InputError(f"data.id={id} is the column of the label: name another column of {path.name}")
    others = [i for i in range(len(columns)) if i not in labels and i != id_column]
    return replace(table, label=labels, id=id_column, pixels=tuple(others))


def _index(table: Layout, key: str, name: Any) -> int:
    n = len(table.columns)
    if table.header:
        if str(name) not in table.columns:
            raise InputError(
                f"{table.name} has no column {str(name)!r}, only {shortened(table.columns)}: {_hint(table, key)}"
            )
        return table.columns.index(str(name))
    if not isinstance(name, int) or not -n <= name < n:
        raise InputError(f"data.header=false, so data.{key} must be a column number from 0 to {n - 1}, got {name!r}")
    return name % n


def _id_column(table: Layout, labels: Sequence[int]) -> int | None:
    named = [i for i, name in enumerate(table.columns) if name.lower() in IDS and i not in labels]
    if not named and not table.columns[0] and 0 not in labels:
        named = [0]  # as pandas writes its index
    if not table.header or len(named) != 1 or len(table.columns) - len(labels) == 1:
        return None
    log.info("%s: column %r is the id of a row, not a pixel (data.id)", table.name, table.columns[named[0]])
    return named[0]


def _hint(table: Layout, key: str) -> str:
    """How to name the column of the label, for a message."""
    columns = table.columns
    if any("\0" in name for name in columns):
        return "it looks like UTF-16 without a byte order mark; save it as UTF-8"
    if len(columns) == 1:
        return "the cells of a row must be separated by commas, semicolons or tabs"
    if all(NUMBER.fullmatch(column) for column in columns):
        return f"if it has no header, set data.header=false and data.{key}=0 (the number of the {key}'s column)"
    if key == "label":
        if usual := next((name for name in columns if name.lower() in LABELS), None):
            return f"set data.label={usual}"
        if (classes := _one_hot_columns(table)) and len(classes) > 1:
            return f"one of these is 1 in each row, so set data.label=[{','.join(classes)}]"
    return f"set data.{key} to the name of the {key}'s column"


def _one_hot_columns(table: Layout) -> list[str]:
    """The names of the columns that look like a column for each class."""
    probe = [cells for _, cells in islice(table.data_rows(), PROBE) if len(cells) == len(table.columns)]
    binary = [i for i in range(len(table.columns)) if all(_one_hot(table.cell(cells, i)) >= 0 for cells in probe)]
    is_one_hot = probe and all(sum(_one_hot(table.cell(cells, i)) for i in binary) == 1 for cells in probe)
    return [table.columns[i] for i in binary] if is_one_hot else []


def matched(table: Layout, names: Sequence[str] | None, source: str) -> Layout:
    """A table whose pixel columns are in the order of `names`, those of another table, called `source`.

    By name if both have headers; otherwise, and if they share no name, by position, which is logged.
    Raises InputError if a column is missing.
    """
    own = {table.columns[i]: i for i in table.pixels}
    missing = [name for name in names or () if name not in own]
    by_name = names is not None and table.pixel_names is not None and len(missing) < len(names)
    if by_name and names is not None:
        if missing:
            raise InputError(
                f"{table.name} has no column {missing[0]!r}, a pixel of {source}: it must have the pixel columns of "
                f"{source}, in any order"
            )
        if table.pixel_names != tuple(names):
            extra = shortened([name for name in own if name not in set(names)])
            others = f"; not used: {extra}" if extra else ", in another order"
            log.info("the columns of %s are matched to those of %s by name%s", table.name, source, others)
        return replace(table, pixels=tuple(own[name] for name in names))
    if names is not None and len(names) != table.n_pixels:
        return table  # the caller's message has the numbers
    why = "its pixel columns have other names" if names and table.pixel_names else "there are no names"
    if table.header and not (names and table.pixel_names):
        why = "names of columns are repeated"
    level = logging.WARNING if table.header else logging.INFO
    log.log(level, "the columns of %s are matched to those of %s by position (%s)", table.name, source, why)
    return table


def shortened(names: Sequence[str], most: int = 5) -> str:
    """The first few names, for a message."""
    return ", ".join(repr(name[:40]) for name in names[:most]) + (f", ... ({len(names)})" if len(names) > most else "")
