"""A data set: uint8 images, int64 labels, class names, and seeded, stratified, disjoint splits."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from tuner import InputError

log = logging.getLogger(__name__)

TEST_SEED = 20170825  # of hold_out: any number would do, but another one would be another test set


@dataclass(frozen=True)
class Samples:
    """Labelled images.

    images: uint8 [N, C, H, W], C = 1 (grayscale) or 3 (RGB), in memory or memory-mapped.
    labels: int64 [N], each in 0 .. number of classes - 1.
    known: the images' digests, where they were stored with them.
    names: of their files, where they come from files.
    """

    images: torch.Tensor
    labels: torch.Tensor
    known: torch.Tensor | None = None
    names: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digests(self) -> torch.Tensor:
        """What tells images apart, int64 [N]."""
        return digests(self.images) if self.known is None else self.known


def digests(images: torch.Tensor) -> torch.Tensor:
    """The first 64 bits of each image's SHA-256, int64 [N]. images: uint8 [N, C, H, W].

    Among a million different images two would have the same with a probability of 3e-8.
    """
    found = b"".join(hashlib.sha256(image.tobytes()).digest()[:8] for image in images.numpy())
    return torch.frombuffer(bytearray(found), dtype=torch.int64) if found else torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Data:
    """A data set and its splits.

    Training and validation images stay together in `pool`, in the file's order, and `train` and `val` are rows of it:
    another seed draws another validation split, and every feature that was computed once for the pool still serves.

    pool: the images that may be learnt from or chosen by.   test: read once, at the end, for the chosen model.
    train, val: int64, rows of pool, disjoint, together all of it.
    test_duplicates: how many test images have an exact copy in pool.
    fit: how images of another shape were, and in prediction will be, brought to the images' own: crop, pad or stretch.
    """

    pool: Samples
    test: Samples
    train: torch.Tensor
    val: torch.Tensor
    classes: tuple[str, ...]
    test_duplicates: int
    fit: str = "stretch"

    @property
    def hashes(self) -> dict[str, str]:
        """What tells the labelled images of each split, in their order, from others."""
        pool, test = (torch.stack([samples.digests, samples.labels]) for samples in (self.pool, self.test))
        splits = {"train": pool[:, self.train], "val": pool[:, self.val], "test": test}
        return {name: hashlib.sha256(some.numpy().tobytes()).hexdigest()[:16] for name, some in splits.items()}


def split(
    pool: Samples, test: Samples, classes: Sequence[str], *, val_share: float, seed: int, fit: str = "stretch"
) -> Data:
    """Draw the validation images out of the pool: of each class `val_share`, at least one and never all.

    val_share: the share of the pool, above 0 and below 1.
    seed: draws which images; the same seed draws the same ones.
    Raises InputError where a share, a class or the number of classes cannot be split.
    """
    _check_share("val_share", val_share)
    check_classes(pool.labels, classes, parts=("training", "validation"))
    train, val = _draw(pool.labels, val_share, leave=1, seed=seed)
    return joined(pool, test, train, val, classes, fit)


def joined(
    pool: Samples, test: Samples, train: torch.Tensor, val: torch.Tensor, classes: Sequence[str], fit: str = "stretch"
) -> Data:
    """A data set of these splits, as Data has them; copies of test images are counted and reported."""
    duplicates = int(torch.isin(test.digests, pool.digests).sum())
    if duplicates:
        level = logging.WARNING if duplicates > len(test) / 100 else logging.INFO  # the bundled data has a few
        log.log(level, "%d of %d test images have an exact copy in training or validation", duplicates, len(test))
    return Data(pool, test, train, val, tuple(classes), duplicates, fit)


def undivided(pool: Samples, test: Samples | None, classes: Sequence[str], fit: str = "stretch") -> Data:
    """A data set of which no split is drawn, and one image will do: all of the pool are training images."""
    nothing = torch.empty(0, dtype=torch.int64)
    test = Samples(pool.images[:0], nothing) if test is None else test
    return joined(pool, test, torch.arange(len(pool)), nothing, classes, fit)


def hold_out(samples: Samples, classes: Sequence[str], *, test_share: float) -> tuple[Samples, Samples]:
    """Cut the test images out of a data set that has no test split of its own: (pool, test), each in the given order.

    The rows are drawn with a fixed seed: they belong to the data, and no run's seed changes what it is tested on.
    test_share: the share of each class, above 0 and below 1; at least one image, and at least two are left to the pool.
    Raises InputError where the share, a class or the number of classes cannot be split.
    """
    pool, test = held_out(samples.labels, classes, test_share=test_share)
    return Samples(samples.images[pool], samples.labels[pool]), Samples(samples.images[test], samples.labels[test])


def held_out(
    labels: torch.Tensor,
    classes: Sequence[str],
    *,
    test_share: float,
    parts: Sequence[str] = ("training", "validation", "test"),
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that hold_out() gives to pool and to test, int64, each ascending.

    parts: what the images are to be enough for; validation may have images of its own.
    """
    _check_share("test_share", test_share)
    check_classes(labels, classes, parts=parts)
    return _draw(labels, test_share, leave=len(parts) - 1, seed=TEST_SEED)


def _check_share(name: str, share: float) -> None:
    if not (isinstance(share, int | float) and 0 < share < 1):
        raise InputError(f"data.{name} must lie above 0 and below 1, got {share!r}: 0.2 is usual")


def check_classes(labels: torch.Tensor, classes: Sequence[str], parts: Sequence[str]) -> None:
    """Raises InputError for one class only, and for a class that has no image for each of these parts (two or more)."""
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
