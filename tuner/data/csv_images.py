"""A CSV table of labels and image files."""

import logging
from collections.abc import Sequence

from tuner import InputError
from tuner.data import csv_labels, held_out
from tuner.data.csv_table import MISSING, NUMBER, Layout, data_rows, shortened
from tuner.data.image_array import Files

log = logging.getLogger(__name__)


def column_of(table: Layout, image: str | int | None) -> int | None:
    """The place of the column of image files; None where all but the labels are pixels.

    image: its name, or without a header its number; None: the only column beside the labels, if it holds no numbers.
    Raises InputError for a column that isn't there.
    """
    others = [i for i in range(len(table.columns)) if i != table.label]
    if image is not None:
        named = {table.columns[i]: i for i in others}
        if str(image) not in named:
            raise InputError(
                f"data.image={image} is no column of {table.name} beside the labels: {shortened([*named])}"
            )
        return named[str(image)]
    _, first = next(data_rows(table), (0, []))
    if (
        len(others) != 1
        or len(first) != 2
        or not first[others[0]].strip()
        or NUMBER.fullmatch(first[others[0]].strip())
    ):
        return None
    log.info("%s: column %r holds image files (it is the only one, and holds no numbers)", *_names(table, others[0]))
    return others[0]


def parts(
    table: Layout, test_table: Layout | None, column: int, classes: Sequence[str] | None, test_share: float | None
) -> tuple[Files, Files | None, tuple[str, ...]]:
    """The files to learn from, those to test on, and the class names. Raises InputError, which names the line.

    test_share: where there is no test_table; None: nothing is held out.
    """
    texts, files = _read(table, column)
    names = csv_labels.found(table, texts) if classes is None else csv_labels.given(classes)
    by_place = classes is not None
    pool = Files(table.path.parent, files, csv_labels.encode(table, texts, names, by_place=by_place))
    if test_table is None:
        if test_share is None:
            return pool, None, names
        rows, test_rows = held_out(pool.labels, names, test_share=test_share)
        return pool.rows(rows), pool.rows(test_rows), names
    texts, files = _read(test_table, _same(table, test_table, column))
    labels = csv_labels.encode(test_table, texts, names, by_place=by_place)
    return pool, Files(test_table.path.parent, files, labels), names


def _same(table: Layout, test_table: Layout, column: int) -> int:
    if table.columns[column] not in test_table.columns:
        raise InputError(
            f"{test_table.name} has no column {table.columns[column]!r}, which {table.name} has: rename it"
        )
    return test_table.columns.index(table.columns[column])


def _read(table: Layout, column: int) -> tuple[list[str], list[str]]:
    """The labels as they are written, and the files, seen from the table's folder."""
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
        raise InputError(f"{table.name} has a header and no rows: it needs a line an image")
    return texts, files


def _names(table: Layout, column: int) -> tuple[str, str]:
    return table.name, table.columns[column]
