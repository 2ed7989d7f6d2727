"""A data set: uint8 images, int64 labels, class names, and seeded, stratified, disjoint splits."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tuner import InputError
from tuner.rules import SEED, is_number, shown

TEST_SEED = 20170825  # arbitrary, but fixed: a change would change every test split that hold_out() draws


@dataclass(frozen=True)
class FileStatistics:
    """What the image files of samples hold.

    modes: Pillow's modes, with the number of files.   widths, heights: the least, the median, the most, in pixels.
    skipped: files that cannot be used.   highest_16: the highest value of files with 16 bits per value, if any.
    value_range: the value of those files that was made white.
    """

    modes: Mapping[str, int]
    widths: tuple[int, int, int]
    heights: tuple[int, int, int]
    skipped: int
    highest_16: int | None
    value_range: int


@dataclass(frozen=True)
class Samples:
    """Labelled images.

    images: uint8 [N, C, H, W], C = 1 (grayscale) or 3 (RGB), in memory or memory-mapped.
    labels: int64 [N], each from 0 to the number of classes - 1.
    stored_digests: int64 [N], if they were stored with the images.
    names: what the images are called: file names, or the ids of a table.
    files: what these hold; of the whole array that the samples were read from.
    read_at: reads files again: their names, and the side of the squares in pixels -> uint8 [n, C, side, side].
    """

    images: torch.Tensor
    labels: torch.Tensor
    stored_digests: torch.Tensor | None = None
    names: Sequence[str] | None = None
    files: FileStatistics | None = None
    read_at: Callable[[Sequence[str], int], torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: torch.Tensor) -> "Samples":
        """The images with these row numbers, in this order, in memory. rows: int64."""
        names = None if self.names is None else [self.names[row] for row in rows.tolist()]
        return Samples(self.images[rows], self.labels[rows], names=names)

    @cached_property
    def digests(self) -> torch.Tensor:
        """A digest of each image's pixels, int64 [N]."""
        return digests(self.images) if self.stored_digests is None else self.stored_digests

    def name(self, row: int) -> str:
        """The file name of an image. One without a name is called by its row."""
        return self.names[row] if self.names else str(row)


def digests(images: torch.Tensor) -> torch.Tensor:
    """The first 64 bits of each image's SHA-256, int64 [N]. images: uint8 [N, C, H, W].

    Two of a million different images share a digest with a probability of 3e-8.
    """
    joined = b"".join(hashlib.sha256(image.tobytes()).digest()[:8] for image in images.numpy())
    return torch.frombuffer(bytearray(joined), dtype=torch.int64) if joined else torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Data:
    """A data set and its splits.

    Training and validation images stay together in `pool`, in file order; `train` and `val` are row numbers of it.
    Another seed draws another validation split, and features computed for the pool stay valid.

    pool: the training and validation images.   test: read once, at the end, for the chosen model.
    train, val: int64 row numbers of pool; disjoint. Together they cover it, but for images that data.exclude lists.
    columns: the names of the columns of pixels, if the images come from a table that names them.
    fit: how images of another shape are resized, here and in prediction: crop, pad or stretch.
    excluded: the number of images of pool that are in neither train nor val.
    """

    pool: Samples
    test: Samples
    train: torch.Tensor
    val: torch.Tensor
    classes: tuple[str, ...]
    fit: str = "stretch"
    columns: tuple[str, ...] | None = None
    excluded: int = 0

    @property
    def is_uneven(self) -> bool:
        """Whether a class has more than twice the images of another."""
        counts = torch.bincount(self.pool.labels, minlength=len(self.classes))
        return bool(counts.max() > 2 * counts.min())

    @cached_property
    def test_duplicates(self) -> int:
        """The number of test images with an exact copy among the training and validation images."""
        seen = torch.cat([self.train, self.val])
        return int(torch.isin(self.test.digests, self.pool.digests[seen]).sum())

    @cached_property
    def val_duplicates(self) -> int:
        """The number of validation images with an exact copy among the training images."""
        digests = self.pool.digests
        return int(torch.isin(digests[self.val], digests[self.train]).sum())

    @property
    def hashes(self) -> dict[str, str]:
        """A hash of each split's images and labels, in order; the keys are train, val and test."""
        pool, test = (torch.stack([samples.digests, samples.labels]) for samples in (self.pool, self.test))  # [2, N]
        splits = {"train": pool[:, self.train], "val": pool[:, self.val], "test": test}
        return {name: hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16] for name, rows in splits.items()}


def split(pool: Samples, test: Samples, classes: Sequence[str], *, val_share: float, seed: int, **about: Any) -> Data:
    """Draw the validation split from the pool: `val_share` of each class, at least one image and never all.

    val_share: above 0 and below 1.   seed: the same seed draws the same images.   about: further fields of Data.
    Raises InputError for an invalid share, a single class, or a class with too few images.
    """
    check_share("val_share", val_share)
    SEED.check("data.seed", seed)
    check_classes(pool.labels, classes, parts=("training", "validation"))
    train, val = _draw(pool.labels, val_share, leave=1, seed=seed)
    return from_splits(pool, test, train, val, classes, **about)


def from_splits(
    pool: Samples, test: Samples, train: torch.Tensor, val: torch.Tensor, classes: Sequence[str], **about: Any
) -> Data:
    """A data set with these splits; arguments as in Data."""
    return Data(pool, test, train, val, tuple(classes), **about)


def without_splits(pool: Samples, test: Samples | None, classes: Sequence[str], **about: Any) -> Data:
    """A data set without a validation split, for evaluation: the whole pool counts as training images.

    One image or one class is enough. test: None gives an empty test split.   about: further fields of Data.
    """
    no_rows = torch.empty(0, dtype=torch.int64)
    test = Samples(pool.images[:0], no_rows) if test is None else test
    return from_splits(pool, test, torch.arange(len(pool)), no_rows, classes, **about)


def hold_out(samples: Samples, classes: Sequence[str], *, test_share: float) -> tuple[Samples, Samples]:
    """Draw a test split from data that has none: (pool, test), each in the given order.

    The seed is fixed, because the test split belongs to the data: no run's seed changes it.
    test_share: of each class, above 0 and below 1; at least one image, and at least two stay in the pool.
    Raises InputError for an invalid share, a single class, or a class with too few images.
    """
    pool, test = hold_out_rows(samples.labels, classes, test_share=test_share)
    return samples.rows(pool), samples.rows(test)


def hold_out_rows(
    labels: torch.Tensor,
    classes: Sequence[str],
    *,
    test_share: float,
    parts: Sequence[str] = ("training", "validation", "test"),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers of the pool and of the test split that hold_out() draws: two int64 tensors, each ascending.

    parts: the splits that each class must have an image for; leave out validation if it has images of its own.
    Raises InputError as hold_out() does.
    """
    check_share("test_share", test_share)
    check_classes(labels, classes, parts=parts)
    return _draw(labels, test_share, leave=len(parts) - 1, seed=TEST_SEED)


def check_share(name: str, share: Any) -> None:
    """Raises InputError unless a share lies above 0 and below 1."""
    if not (is_number(share) and 0 < share < 1):
        raise InputError(f"data.{name} must lie above 0 and below 1, got {shown(repr(share))}: 0.2 is usual")


def check_classes(labels: torch.Tensor, classes: Sequence[str], parts: Sequence[str]) -> None:
    """Raises InputError for a single class, and for a class with fewer images than `parts`, which has two or more."""
    if len(classes) < 2:
        raise InputError(f"only one class ({', '.join(classes) or 'none'}): give images of at least two classes")
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    for name, count in zip(classes, counts, strict=True):
        if count < len(parts):
            raise InputError(
                f"class {name!r} has {count} image{'s' * (count != 1)}; at least {len(parts)} are needed, one each for "
                f"{', '.join(parts[:-1])} and {parts[-1]}: add images or leave the class out"
            )


def _draw(labels: torch.Tensor, share: float, *, leave: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a share of each class: (other rows, drawn rows), each ascending.

    leave: the number of images of each class that are never drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        count = min(max(1, round(share * len(rows))), len(rows) - leave)
        drawn[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return (~drawn).nonzero().flatten(), drawn.nonzero().flatten()
