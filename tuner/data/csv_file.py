"""Images from a CSV file with labels. The other columns are pixels (0 to 255), or one names image files."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tuner import InputError
from tuner.cache_files import Cache
from tuner.data import Data, Samples, check_share, hold_out, split, without_splits
from tuner.data.files import image_array
from tuner.data.files.image_file import MAX_PIXELS
from tuner.data.tables import csv_images, csv_labels
from tuner.data.tables.csv_columns import Layout, layout, matched, shortened
from tuner.data.tables.csv_images import Place
from tuner.data.tables.csv_table import read
from tuner.rules import or_null, whole

log = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    test_path: str | Path | None = None,
    label: str | int | Sequence[str | int] = "label",
    id: str | int | None = None,
    classes: Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    channels: int | None = None,
    header: bool = True,
    image: str | int | None = None,
    folder: str | Path | None = None,
    suffix: str | None = None,
    columns: Sequence[str] | None = None,
    size: int | Sequence[int] = 224,
    fit: str = "crop",
    skip_broken: bool = False,
    max_pixels: int = MAX_PIXELS,
    range: int | None = None,
    cache_dir: str | Path = "~/.cache/tuner",
    cache_limit: str | None = None,
    divide: bool = True,
    val_share: float = 0.125,
    test_share: float = 0.2,
    seed: int = 0,
) -> Data:
    """Read labelled images from a CSV file in UTF-8 or UTF-16, plain or compressed (.gz, .xz, .bz2).

    Cells are separated by commas, semicolons or tabs.
    path: one line per image. Pixels are in row-major order; the three values of an RGB pixel are adjacent (H, W, C).
    test_path: the test split, a file with the same columns, in any order. None: hold `test_share` of `path` out.
    label: the name of the label column; without a header its number, from 0 (-1 is the last). A list: one column for
        each class, of which one is 1 in each row.
    id: the column that names the rows, likewise. None: a column that is called so, see tables.csv_columns.IDS.
    classes: the class names. A label is a name or, unless a name is a number, an index into the list. None: the class
        names are the labels, sorted; whole numbers by value.
    height, width, channels: of an image, in pixels. None: square images, gray if the number of pixels allows, else RGB.
    header: whether the first line names the columns.
    image: the column of image files, given as `label` is. None: the only column besides the label and the id, if it
        does not hold numbers. With image files the remaining columns are ignored, and size, fit, skip_broken,
        max_pixels, range, cache_dir and cache_limit apply as in tuner.data.image_folder.load.
    folder, suffix: of image files, see csv_images.Place.
    columns: names of the pixel columns, in the order of the pixels. None: their order in `path`.
    divide: False draws no splits, see tuner.data.without_splits.
    val_share: the share of the images outside the test split that `seed` draws for validation.
    Raises InputError if a file does not match this description; it names the file and the line (the header is line 1).
    """
    if divide and test_path is None:
        check_share("test_share", test_share)
    table = layout(path, label, header, id)
    test_table = None if test_path is None else layout(test_path, label, header, id, key="data.test_path")
    column = csv_images.column_of(table, image)
    if column is None:
        if columns is not None:
            table = matched(table, columns, "the run")
        shape = _shape(table, height, width, channels)
        pool, test, names = _pixels(table, test_table, shape, classes, test_share if divide else None)
        about: dict[str, Any] = {"columns": table.pixel_names}
    else:
        if height or width or channels:
            raise InputError("data.height, data.width and data.channels apply to pixel columns; set data.size instead")
        place = Place(folder, suffix)
        files, names = csv_images.parts(table, test_table, column, classes, test_share if divide else None, place)
        arrays = image_array.load(
            files,
            size=size,
            fit=fit,
            cache=Cache.of(cache_dir, cache_limit, "data."),
            skip_broken=skip_broken,
            max_pixels=max_pixels,
            value_range=range,
        )
        pool, test = arrays[0][0], arrays[1][0] if len(arrays) > 1 else None
        about = {"fit": fit}
    if test is None or not divide:
        return without_splits(pool, test, names, **about)
    return split(pool, test, names, val_share=val_share, seed=seed, **about)


def _pixels(
    table: Layout,
    test_table: Layout | None,
    shape: tuple[int, int, int],
    classes: Sequence[str] | None,
    test_share: float | None,
) -> tuple[Samples, Samples | None, tuple[str, ...]]:
    """(the pool, the test images, class names).

    test_share: held out if there is no test_table; None holds nothing out, and the second value is None.
    """
    texts, ids, images = _read(table, shape)
    names = csv_labels.infer_classes(table, texts) if classes is None else csv_labels.check_names(classes)
    by_index = classes is not None
    pool = Samples(images, csv_labels.encode(table, texts, names, by_index=by_index), names=ids or None)
    if test_table is None:
        if test_share is None:
            return pool, None, names
        return *hold_out(pool, names, test_share=test_share), names
    test_table = matched(test_table, table.pixel_names, table.name)
    if test_table.n_pixels != table.n_pixels:
        raise InputError(
            f"{test_table.name} has {test_table.n_pixels} pixel columns and {table.name} has {table.n_pixels}: "
            "data.test_path must have the columns of data.path"
        )
    texts, ids, images = _read(test_table, shape)
    labels = csv_labels.encode(test_table, texts, names, by_index=by_index)
    return pool, Samples(images, labels, names=ids or None), names


def _read(table: Layout, shape: tuple[int, int, int]) -> tuple[list[str], list[str], torch.Tensor]:
    """The labels as they are written [N], the ids [N] or [], and the images, uint8 [N, C, H, W]."""
    texts, ids, pixels = read(table)
    if pixels.max() <= 1:
        log.warning("%s has no pixel above 1, so its images are almost black: should pixels reach 255?", table.name)
    return texts, ids, as_images(pixels, shape)


def as_images(pixels: np.ndarray, shape: tuple[int, int, int]) -> torch.Tensor:
    """Pixels as in the columns, uint8 [N, P] -> uint8 [N, C, H, W].   shape: (H, W, C)."""
    images = pixels.reshape(-1, *shape).transpose(0, 3, 1, 2)  # [N, H, W, C] -> [N, C, H, W]
    return torch.from_numpy(np.ascontiguousarray(images))


def _shape(table: Layout, height: int | None, width: int | None, channels: int | None) -> tuple[int, int, int]:
    """(height, width, channels) of an image, as given or derived from the number of pixel columns."""
    for name, value in (("height", height), ("width", width)):
        or_null(whole(1)).check(f"data.{name}", value)
    if channels not in (None, 1, 3):
        raise InputError(f"data.channels must be 1 (gray) or 3 (RGB), got {channels!r}")
    if (height is None) != (width is None):
        raise InputError(f"got data.height={height} and data.width={width}: give both or, for square images, neither")
    n = table.n_pixels
    if n <= 1 and height != 1:
        _refuse_one_pixel(table)
    choices = (channels,) if channels else (1, 3)
    for c in choices:
        h, w = (height, width) if height and width else (math.isqrt(n // c),) * 2
        if n and h * w * c == n:
            return h, w, c
    if height and width:
        raise InputError(
            f"{table.name} has {n} pixel columns; data.height={height} x data.width={width} needs "
            + " or ".join(f"{height * width * c} ({'gray' if c == 1 else 'RGB'})" for c in choices)
        )
    raise InputError(
        f"{table.name} has {n} pixel columns, not a square image of {channels or '1 or 3'} channels: set data.height "
        "and data.width, remove columns that are not pixels, or set data.image to the column of image files; the "
        f"columns are {shortened(table.columns)}"
    )


def _refuse_one_pixel(table: Layout) -> None:
    """Raises InputError if there is one column beside the label: it seldom is a pixel."""
    others = [i for i in range(len(table.columns)) if i not in table.label]
    if others:
        name = table.columns[others[0]]
        raise InputError(
            f"{table.name} has one pixel column at most: is {name!r} a file name? Set data.image={name}, and "
            "data.suffix=.jpg if the names lack it; for images of one pixel set data.height=1 data.width=1"
        )
