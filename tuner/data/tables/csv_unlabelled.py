"""Images without labels, to be predicted: files, or the rows of a CSV file."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tuner import InputError
from tuner.data.csv_file import as_images
from tuner.data.tables.csv_columns import LABELS, NUMBER, Layout, layout, matched, shortened
from tuner.data.tables.csv_images import Place, column_of
from tuner.data.tables.csv_images import read as read_files
from tuner.data.tables.csv_table import read as read_pixels

log = logging.getLogger(__name__)

ENDINGS = (".csv", ".tsv", ".txt")  # of tables, before .gz, .xz or .bz2
FILES = ("image", "file", "filename", "file_name", "filepath", "file_path", "path", "image_path", "image_name")


@dataclass(frozen=True)
class Inputs:
    """N images.

    names: what identifies them, as columns: file, or the id or line of a row.
    paths: of files.   images: uint8 [N, C, H, W], instead of files.
    """

    names: Mapping[str, list[Any]]
    paths: list[Path] = field(default_factory=list)
    images: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.names.values())))


def is_table(path: Path) -> bool:
    """Whether a file is a table, by its name."""
    return path.with_suffix("" if path.suffix in (".gz", ".xz", ".bz2") else path.suffix).suffix.lower() in ENDINGS


def of_files(paths: Sequence[Path]) -> Inputs:
    """Image files."""
    return Inputs({"file": [str(path) for path in paths]}, list(paths))


def read(
    path: Path,
    shapes: Collection[tuple[int, int, int]],
    columns: Sequence[str] | None,
    image: str | None,
    place: Place,
) -> Inputs:
    """The rows of a table of pixels or of image files. Labels, if it has some, are not used.

    shapes: [C, H, W] of the models' images.   columns: names of the pixel columns that the model was trained on.
    image: the column of image files; None: the table has pixels, or a column that is named like one (FILES).
    Raises InputError if the table is neither.
    """
    table = _layout(path)
    pixels = None if image else _pixel_columns(table, shapes, columns)
    if pixels is not None:
        _, ids, values = read_pixels(pixels)
        [(c, h, w)] = shapes
        return Inputs(_names(pixels, ids), images=as_images(values, (h, w, c)))
    column = _file_column(table, image, place)
    _, names = read_files(table, column, place)
    paths = [place.root(table) / name for name in names]
    files: dict[str, list[Any]] = {"file": [str(path) for path in paths]}
    if table.id is None or table.id == column:
        return Inputs(files, paths)
    ids = [cells[table.id].strip() for _, cells in table.data_rows()]
    return Inputs(_names(table, ids) | files, paths)


def _layout(path: Path) -> Layout:
    table = layout(path, None, header=True, key="FILE")
    if all(NUMBER.fullmatch(name) for name in table.columns) and table.columns != list(
        map(str, range(len(table.columns)))
    ):
        log.info("%s: line 1 holds numbers alone, so there is no header", table.name)
        return layout(path, None, header=False, key="FILE")
    return table


def _pixel_columns(
    table: Layout, shapes: Collection[tuple[int, int, int]], columns: Sequence[str] | None
) -> Layout | None:
    """The table with the pixel columns of the model; None if it has none."""
    unlabelled = [i for i in table.pixels if table.columns[i].lower() not in LABELS]
    sizes = {c * h * w for c, h, w in shapes}
    common = set(columns or ()) & set(table.columns)
    if not common and not ({len(unlabelled), table.n_pixels} & sizes):
        return None
    if len(shapes) > 1:
        raise InputError(f"{table.name} holds pixels, and the runs take images of different shapes: leave some out")
    if len(unlabelled) in sizes:
        table = replace(table, pixels=tuple(unlabelled))
    return matched(table, columns, "the run")


def _names(table: Layout, ids: list[str]) -> dict[str, list[Any]]:
    """The ids, under the name of their column, or line numbers."""
    if table.id is not None:
        return {table.columns[table.id] or "id": ids}
    return {"line": [line for line, _ in table.data_rows()]}


def _file_column(table: Layout, image: str | None, place: Place) -> int:
    """The column of image files: as given, named like one, with the first cell of a file, or as in training."""
    if image is None and (named := [i for i, name in enumerate(table.columns) if name.lower() in FILES]):
        return named[0]
    _, first = next(table.data_rows(), (0, []))
    if image is None and (found := [i for i, cell in enumerate(first) if place.has(table, cell.strip())]):
        return found[0]
    column = column_of(table, image, option="--")
    if column is None:
        raise InputError(
            f"{table.name} has neither the pixel columns of the run nor a column that names images: name that column "
            f"with --image; the columns are {shortened(table.columns)}"
        )
    return column
