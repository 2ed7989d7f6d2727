"""Images from a CSV file with a column of labels. The other columns are pixels (0 to 255), or one names image files."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tuner import InputError
from tuner.data import Data, Samples, check_share, csv_images, csv_labels, hold_out, image_array, split, without_splits
from tuner.data.csv_table import Layout, layout, read, shortened
from tuner.data.image_file import MAX_PIXELS
from tuner.rules import or_null, whole

log = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    test_path: str | Path | None = None,
    label: str | int = "label",
    classes: Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    channels: int | None = None,
    header: bool = True,
    image: str | int | None = None,
    size: int | Sequence[int] = 224,
    fit: str = "crop",
    skip_broken: bool = False,
    max_pixels: int = MAX_PIXELS,
    range: int | None = None,
    cache_dir: str | Path = "~/.cache/tuner",
    divide: bool = True,
    val_share: float = 0.125,
    test_share: float = 0.2,
    seed: int = 0,
) -> Data:
    """Read labelled images from a CSV file in UTF-8, plain or compressed (.gz, .xz, .bz2).

    path: one line per image. Pixels are in row-major order; the three values of an RGB pixel are adjacent (H, W, C).
    test_path: the test split, a file with the same columns. None: hold `test_share` of `path` out instead.
    label: the name of the label column; without a header its number, from 0 (-1 is the last).
    classes: the class names. A label is a name or, unless a name is a number, an index into the list. None: the class
        names are the labels, sorted; whole numbers by value.
    height, width, channels: of an image, in pixels. None: square images, gray if the number of pixels allows, else RGB.
    header: whether the first line names the columns.
    image: the column of image files, given as `label` is. Paths are absolute or relative to the CSV file's folder.
        None: the only column besides the label, if it does not hold numbers. With image files the remaining columns are
        ignored, and size, fit, skip_broken, max_pixels, range and cache_dir apply as in tuner.data.image_folder.load.
    divide: False draws no splits, see tuner.data.without_splits.
    val_share: the share of the images outside the test split that `seed` draws for validation.
    Raises InputError if a file does not match this description; it names the file and the line (the header is line 1).
    """
    if divide and test_path is None:
        check_share("test_share", test_share)
    table = layout(path, label, header)
    column = csv_images.column_of(table, image)
    if column is not None:
        if height or width or channels:
            raise InputError("data.height, data.width and data.channels apply to pixel columns; set data.size instead")
        test_table = None if test_path is None else layout(test_path, label, header)
        pool, held, names = csv_images.parts(table, test_table, column, classes, test_share if divide else None)
        files = [part for part in (pool, held) if part is not None]
        arrays = image_array.load(
            files,
            size=size,
            fit=fit,
            cache_dir=cache_dir,
            skip_broken=skip_broken,
            max_pixels=max_pixels,
            value_range=range,
        )
        samples, test = arrays[0][0], None if held is None else arrays[1][0]
        if test is None or not divide:
            return without_splits(samples, test, names, fit)
        return split(samples, test, names, val_share=val_share, seed=seed, fit=fit)
    shape = _shape(table, height, width, channels)
    texts, images = _read(table, shape)
    names = csv_labels.infer_classes(table, texts) if classes is None else csv_labels.check_names(classes)
    samples = Samples(images, csv_labels.encode(table, texts, names, by_index=classes is not None))
    if test_path is None and not divide:
        return without_splits(samples, None, names)
    if test_path is None:
        return split(*hold_out(samples, names, test_share=test_share), names, val_share=val_share, seed=seed)

    test_table = layout(test_path, label, header)
    if test_table.n_pixels != table.n_pixels:
        raise InputError(
            f"{test_table.name} has {test_table.n_pixels} pixel columns and {table.name} has {table.n_pixels}: "
            "data.test_path must have the columns of data.path"
        )
    texts, images = _read(test_table, shape)
    test = Samples(images, csv_labels.encode(test_table, texts, names, by_index=classes is not None))
    if not divide:
        return without_splits(samples, test, names)
    return split(samples, test, names, val_share=val_share, seed=seed)


def _read(table: Layout, shape: tuple[int, int, int]) -> tuple[list[str], torch.Tensor]:
    """The labels as they are written [N], and the images, uint8 [N, C, H, W]."""
    texts, pixels = read(table)
    if pixels.max() <= 1:
        log.warning("%s has no pixel above 1, so its images are almost black: should pixels reach 255?", table.name)
    images = pixels.reshape(-1, *shape).transpose(0, 3, 1, 2)  # [N, H, W, C] -> [N, C, H, W]
    return texts, torch.from_numpy(np.ascontiguousarray(images))


def _shape(table: Layout, height: int | None, width: int | None, channels: int | None) -> tuple[int, int, int]:
    """(height, width, channels) of an image, as given or derived from the number of pixel columns."""
    for name, value in (("height", height), ("width", width)):
        or_null(whole(1)).check(f"data.{name}", value)
    if channels not in (None, 1, 3):
        raise InputError(f"data.channels must be 1 (gray) or 3 (RGB), got {channels!r}")
    if (height is None) != (width is None):
        raise InputError(f"got data.height={height} and data.width={width}: give both or, for square images, neither")
    n = table.n_pixels
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
