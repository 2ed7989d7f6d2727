"""A data set in memory: uint8 images, int64 labels, class names, and seeded, stratified, disjoint splits."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tuner import InputError

log = logging.getLogger(__name__)

TEST_SEED = 20170825  # of hold_out: any number would do, but another one would be another test set


@dataclass(frozen=True)
class Samples:
    """Labelled images.

    images: uint8 [N, C, H, W], C = 1 (grayscale) or 3 (RGB).
    labels: int64 [N], each in 0 .. number of classes - 1.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A data set and its splits.

    Training and validation images stay together in `pool`, in the file's order, and `train` and `val` are rows of it:
    another seed draws another validation split, and every feature that was computed once for the pool still serves.

    pool: the images that may be learnt from or chosen by.   test: read once, at the end, for the chosen model.
    train, val: int64, rows of pool, disjoint, together all of it.
    test_duplicates: how many test images have an exact copy in pool.
    fit: how another image gets the shape of these, one of `image_file.FITS`.
    """

    pool: Samples
    test: Samples
    train: torch.Tensor
    val: torch.Tensor
    classes: tuple[str, ...]
    test_duplicates: int
    fit: str = "stretch"


def split(pool: Samples, test: Samples, classes: Sequence[str], *, val_share: float, seed: int) -> Data:
    """Draw the validation images out of the pool: of each class `val_share`, at least one and never all.

    val_share: the share of the pool, above 0 and below 1.
    seed: draws which images; the same seed draws the same ones.
    Raises InputError where a share, a class or the number of classes cannot be split.
    """
    _check_share("val_share", val_share)
    _check_classes(pool.labels, classes, parts=("training", "validation"))
    train, val = _draw(pool.labels, val_share, leave=1, seed=seed)
    duplicates = _count_copies(test.images, pool.images)
    if duplicates:
        log.info("%d of %d test images have an exact copy in training or validation", duplicates, len(test))
    return Data(pool, test, train, val, tuple(classes), duplicates)


def hold_out(samples: Samples, classes: Sequence[str], *, test_share: float) -> tuple[Samples, Samples]:
    """Cut the test images out of a data set that has no test split of its own: (pool, test), each in the given order.

    The rows are drawn with a fixed seed: they belong to the data, and no run's seed changes what it is tested on.
    test_share: the share of each class, above 0 and below 1; at least one image, and at least two are left to the pool.
    Raises InputError where the share, a class or the number of classes cannot be split.
    """
    _check_share("test_share", test_share)
    _check_classes(samples.labels, classes, parts=("training", "validation", "test"))
    pool, test = _draw(samples.labels, test_share, leave=2, seed=TEST_SEED)
    return Samples(samples.images[pool], samples.labels[pool]), Samples(samples.images[test], samples.labels[test])


def _check_share(name: str, share: float) -> None:
    if not (isinstance(share, int | float) and 0 < share < 1):
        raise InputError(f"data.{name} must lie above 0 and below 1, got {share!r}: 0.2 is usual")


def _check_classes(labels: torch.Tensor, classes: Sequence[str], parts: Sequence[str]) -> None:
    if len(classes) < 2:
        raise InputError(f"one class only ({', '.join(classes) or 'none'}): give images of at least two classes")
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    for name, count in zip(classes, counts, strict=True):
        if count < len(parts):
            raise InputError(
                f"class {name!r} has {count} image{'s' * (count != 1)}; at least {len(parts)} are needed, one each for "
                f"{', '.join(parts[:-1])} and {parts[-1]}: add images of it or leave the class out"
            )


def _draw(labels: torch.Tensor, share: float, *, leave: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two disjoint sets of rows, each ascending: what is left, and the share of each class that was drawn."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        count = min(max(1, round(share * len(rows))), len(rows) - leave)
        drawn[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return (~drawn).nonzero().flatten(), drawn.nonzero().flatten()


def _count_copies(images: torch.Tensor, among: torch.Tensor) -> int:
    # 64-bit hashes instead of the images' bytes: a set of 8 bytes an image, also where `among` is memory-mapped
    known = {hash(image.tobytes()) for image in among.numpy()}
    return sum(hash(image.tobytes()) in known for image in images.numpy())
