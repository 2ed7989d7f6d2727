"""The pixels of a CSV table.

numpy's C parser reads the file first. It refuses any pixel that is not a whole number from 0 to 255. A refused file is
read again row by row, which is slow, but names the faulty line and column and accepts values such as 12.0.
"""

import warnings
from collections.abc import Iterator
from itertools import groupby, islice

import numpy as np

from tuner import InputError
from tuner.data.tables.csv_columns import MISSING, Layout
from tuner.data.tables.csv_text import UNREADABLE, open_text
from tuner.rules import as_number


def read(layout: Layout) -> tuple[list[str], list[str], np.ndarray]:
    """The labels as written [N], the ids [N], and the pixels in their order, uint8 [N, P].

    Without such a column, labels or ids are empty. Raises InputError for a faulty line.
    """
    try:
        return _read_fast(layout)
    except (ValueError, Warning, *UNREADABLE):
        return _read_carefully(layout)


def _read_fast(layout: Layout) -> tuple[list[str], list[str], np.ndarray]:
    label = layout.label[0] if len(layout.label) == 1 else None
    texts = {i for i in (label, layout.id) if i is not None}
    runs = [list(run) for _, run in groupby(range(len(layout.columns)), lambda i: i if i in texts else -1)]
    numeric = [run for run in runs if run[0] not in texts]
    row = np.dtype([(str(run[0]), *(("u1", (len(run),)) if run[0] not in texts else ("O",))) for run in runs])
    form = layout.dialect
    with open_text(layout.path, form.encoding) as file, warnings.catch_warnings():
        warnings.filterwarnings("error", "loadtxt")  # older numpy reads 1.5 as 1 and only warns
        lines = _with_ascii_pixels(islice(file, form.starts + layout.header, None), form.delimiter, texts)
        table = np.loadtxt(lines, row, comments=None, delimiter=form.delimiter, quotechar='"', ndmin=1)
    values = np.concatenate([table[str(run[0])] for run in numeric], axis=1)
    place = {column: k for k, column in enumerate(i for run in numeric for i in run)}

    def of(columns: tuple[int, ...]) -> np.ndarray:
        return values if columns == tuple(place) else values[:, [place[i] for i in columns]]

    def text(column: int | None) -> list[str]:
        return [] if column is None else [cell.strip() for cell in table[str(column)]]

    labels = text(label)
    if len(layout.label) > 1:
        ones = of(layout.label)
        if (ones.astype(int).sum(1) != 1).any():
            raise ValueError("a row has no label, or several")
        labels = [layout.columns[layout.label[k]] for k in ones.argmax(1)]
    if any(label.lower() in MISSING for label in labels):
        raise ValueError("a label is missing")
    return labels, text(layout.id), of(layout.pixels)


def _with_ascii_pixels(lines: Iterator[str], delimiter: str, texts: set[int]) -> Iterator[str]:
    """The lines. numpy reads other characters as digits, or from outside of a table. Raises ValueError for them.

    Raises it also for a quoted text in such a line, which may have delimiters in it.   texts: columns that hold text.
    """
    for line in lines:
        if not line.isascii():
            cells = line.split(delimiter)
            if '"' in line or not all(cell.isascii() for i, cell in enumerate(cells) if i not in texts):
                raise ValueError("a pixel is not ASCII")
        yield line


def _read_carefully(layout: Layout) -> tuple[list[str], list[str], np.ndarray]:
    labels, ids, pixels = [], [], []
    for line, cells in layout.full_rows():
        if layout.label:
            labels.append(layout.label_of(line, cells))
        if layout.id is not None:
            ids.append(cells[layout.id].strip())
        pixels.append(_row_of_pixels(layout, line, [layout.cell(cells, i) for i in layout.pixels]))
    return labels, ids, np.stack(pixels)


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
    column = layout.columns[layout.pixels[index]]
    hint = ""
    if fault == "is fractional" and all(_cell_fault(cell) in ("", fault) and float(cell) <= 1 for cell in cells):
        hint = "; the line looks scaled to 0..1: multiply the pixels by 255"
    elif line == 1 and not layout.header:
        hint = "; if line 1 names the columns, set data.header=true"
    elif fault == "is not a number":
        hint = "; if it names an image file, set data.image to that column"
    besides = "the label and the id" if layout.id is not None else "the label"
    return (
        f"line {line} of {layout.name}, column {column!r}: {cells[index][:40]!r} {fault}; every column but {besides} "
        f"is a pixel, a whole number from 0 to 255{hint}"
    )


def _cell_fault(cell: str) -> str:
    if not cell:
        return "is empty"
    try:
        value = as_number(cell)
    except ValueError:
        return "is not a number"
    if not 0 <= value <= 255:  # or nan
        return "is outside 0 to 255" if abs(value) < float("inf") else "is not finite"
    return "" if value.is_integer() else "is fractional"
