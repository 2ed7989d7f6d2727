"""A CSV table of labels and image files."""

import logging
from collections.abc import Sequence

from tuner import InputError
from tuner.data import csv_labels, hold_out_rows
from tuner.data.csv_table import MISSING, NUMBER, Layout, data_rows, shortened
from tuner.data.image_array import Files

log = logging.getLogger(__name__)


def column_of(table: Layout, image: str | int | None) -> int | None:
    """The index of the column of image files; None if the columns are pixels.

    image: its name, or its number if there is no header. None: the only column besides the label, if it does not hold
        numbers.
    Raises InputError for a column that does not exist.
    """
    others = [i for i in range(len(table.columns)) if i != table.label]
    if image is not None:
        index_of = {table.columns[i]: i for i in others}
        if str(image) not in index_of:
            raise InputError(
                f"data.image={image} must be a column of {table.name} other than the label: {shortened([*index_of])}"
            )
        return index_of[str(image)]
    _, first = next(data_rows(table), (0, []))
    if (
        len(others) != 1
        or len(first) != 2
        or not first[others[0]].strip()
        or NUMBER.fullmatch(first[others[0]].strip())
    ):
        return None
    column = table.columns[others[0]]
    log.info("%s: column %r names image files (it is the only other column and holds no numbers)", table.name, column)
    return others[0]


def parts(
    table: Layout, test_table: Layout | None, column: int, classes: Sequence[str] | None, test_share: float | None
) -> tuple[Files, Files | None, tuple[str, ...]]:
    """(files of the pool, files of the test split, class names). Raises InputError, which names the line.

    test_share: held out if there is no test_table; None holds nothing out, and the second value is None.
    """
    texts, files = _read(table, column)
    names = csv_labels.infer_classes(table, texts) if classes is None else csv_labels.check_names(classes)
    by_index = classes is not None
    pool = Files(table.path.parent, files, csv_labels.encode(table, texts, names, by_index=by_index))
    if test_table is None:
        if test_share is None:
            return pool, None, names
        rows, test_rows = hold_out_rows(pool.labels, names, test_share=test_share)
        return pool.rows(rows), pool.rows(test_rows), names
    texts, files = _read(test_table, _same_column(table, test_table, column))
    labels = csv_labels.encode(test_table, texts, names, by_index=by_index)
    return pool, Files(test_table.path.parent, files, labels), names


def _same_column(table: Layout, test_table: Layout, column: int) -> int:
    if table.columns[column] not in test_table.columns:
        raise InputError(
            f"{test_table.name} has no column {table.columns[column]!r}, but {table.name} has: rename the column"
        )
    return test_table.columns.index(table.columns[column])


def _read(table: Layout, column: int) -> tuple[list[str], list[str]]:
    """The labels as written, and the file names relative to the table's folder."""
    texts, files = [], []
    for line, cells in data_rows(table):
        if len(cells) != len(table.columns):
            raise InputError(f"line {line} of {table.name} has {len(cells)} values; {len(table.columns)} expected")
        text, file = cells[table.label].strip(), cells[column].strip()
        if text.lower() in MISSING:
            raise InputError(f"line {line} of {table.name} has no label: fill it in or remove the line")
        if not file:
            raise InputError(f"line {line} of {table.name} names no file: fill it in or remove the line")
        texts.append(text)
        files.append(file)
    if not texts:
        raise InputError(f"{table.name} has a header and no rows: it needs one line per image")
    return texts, files
