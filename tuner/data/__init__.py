"""A data set in memory: uint8 images, int64 labels, class names, and seeded, stratified, disjoint splits."""

from dataclasses import dataclass

import torch


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
    """

    pool: Samples
    test: Samples
    train: torch.Tensor
    val: torch.Tensor
    classes: tuple[str, ...]
    test_duplicates: int
