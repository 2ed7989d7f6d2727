"""Images from a CSV file: one column of labels, every other column a pixel from 0 to 255."""

import logging
import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch

from tuner import InputError
from tuner.data import Data, Samples, hold_out, split
from tuner.data.csv_table import NUMBER, Layout, data_rows, layout, read, shortened

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
    val_share: float = 0.125,
    test_share: float = 0.2,
    seed: int = 0,
) -> Data:
    """Read labelled images from a CSV file in UTF-8, plain or compressed (.gz, .xz, .bz2).

    path: one image a line. Gray pixels row by row; RGB likewise, the three values of a pixel together (H, W, C).
    test_path: a file with the same columns, the test split; without one, `test_share` of `path` is held out.
    label: the name of the label column; without a header its number, from 0 (-1 is the last).
    classes: the names of the classes. A label is one of them or, unless a name is a number, its place in the list, from
        0. Without `classes` they are the labels found, sorted; whole numbers by their value.
    height, width, channels: of an image, in pixels; without them it is a square, gray or else RGB.
    header: whether the first line names the columns.
    val_share: the share of the images that are not test which `seed` draws for validation.
    Raises InputError, which names the file and the line (the header is line 1), where a file is not as said here.
    """
    table = layout(path, label, header)
    shape = _shape(table, height, width, channels)
    texts, images = _read(table, shape)
    names = _found(table, texts) if classes is None else _given(classes)
    samples = Samples(images, _encode(table, texts, names, by_place=classes is not None))
    if test_path is None:
        return split(*hold_out(samples, names, test_share=test_share), names, val_share=val_share, seed=seed)

    test_table = layout(test_path, label, header)
    if test_table.n_pixels != table.n_pixels:
        raise InputError(
            f"{test_table.name} has {test_table.n_pixels} pixel columns and {table.name} has {table.n_pixels}: "
            "data.test_path must have the columns of data.path"
        )
    texts, images = _read(test_table, shape)
    test = Samples(images, _encode(test_table, texts, names, by_place=classes is not None))
    return split(samples, test, names, val_share=val_share, seed=seed)


def _read(table: Layout, shape: tuple[int, int, int]) -> tuple[list[str], torch.Tensor]:
    """The labels as they are written [N], and the images, uint8 [N, C, H, W]."""
    texts, pixels = read(table)
    if pixels.max() <= 1:
        log.warning("%s has no pixel above 1: images all but black; were the pixels meant to reach 255?", table.name)
    images = pixels.reshape(-1, *shape).transpose(0, 3, 1, 2)  # [N, H, W, C] -> [N, C, H, W]
    return texts, torch.from_numpy(np.ascontiguousarray(images))


def _shape(table: Layout, height: int | None, width: int | None, channels: int | None) -> tuple[int, int, int]:
    """(height, width, channels) of an image, as given or as the number of pixels implies."""
    for name, value in (("height", height), ("width", width)):
        if value is not None and not (isinstance(value, int) and value > 0):
            raise InputError(f"data.{name} must be a whole number above 0, got {value!r}")
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
        f"{table.name} has {n} pixel columns, no square image of {channels or '1 or 3'} channels: set data.height and "
        f"data.width, or remove a column that is no pixel; the columns are {shortened(table.columns)}"
    )


# --- labels -----------------------------------------------------------------------------------------------------------


def _given(classes: Sequence[str]) -> tuple[str, ...]:
    names = tuple(str(name) for name in classes)
    if isinstance(classes, str) or not names or len(set(names)) < len(names):
        raise InputError(f"data.classes must be a list of different names, such as [cat,dog], got {classes!r}")
    return names


def _found(table: Layout, texts: Sequence[str]) -> tuple[str, ...]:
    labels = set(texts)
    if not all(NUMBER.fullmatch(text) for text in labels):
        return tuple(sorted(labels))
    fractional = {text for text in labels if not _whole(text).lstrip("-").isdigit()}
    if fractional:
        raise InputError(
            f"label {_first(table, fractional)} is fractional; labels are text or whole numbers: is data.label the "
            "right column?"
        )
    return tuple(sorted({_whole(text) for text in labels}, key=int))


def _encode(table: Layout, texts: Sequence[str], names: Sequence[str], *, by_place: bool) -> torch.Tensor:
    """The labels as places in `names`, int64 [N].

    by_place: whether a label may be such a place itself; it never may where a name is a number.
    """
    places = {name: i for i, name in enumerate(names)}
    by_place = by_place and not any(NUMBER.fullmatch(name) for name in names)
    if by_place:
        places |= {str(i): i for i in range(len(names))}
    places |= {text: places[_whole(text)] for text in set(texts) - places.keys() if _whole(text) in places}
    unknown = set(texts) - places.keys()
    if unknown:
        rule = f"a number from 0 to {len(names) - 1} or one of" if by_place else "one of"
        raise InputError(
            f"label {_first(table, unknown)} is no class; it must be {rule} {shortened(names, 10)}: correct it, or set "
            "data.classes to the names of all classes"
        )
    return torch.tensor([places[text] for text in texts], dtype=torch.int64)


def _first(table: Layout, labels: set[str]) -> str:
    """Where the first of these labels stands."""
    cells = ((line, cells[table.label].strip()) for line, cells in data_rows(table))
    return next(f"{text} in line {line} of {table.name}" for line, text in cells if text in labels)


def _whole(text: str) -> str:
    """A whole number as plain digits ("3.0", "+3" and "03" are "3"); any other text as it is."""
    if not NUMBER.fullmatch(text) or Decimal(text) != Decimal(text).to_integral_value():
        return text
    return str(int(Decimal(text)))
