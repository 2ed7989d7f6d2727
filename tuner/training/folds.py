"""Cross-validation: the training and validation images in folds, a head for each, and the means over the heads.

The heads of all folds, and of all trials that train together, form one stack over the same features.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tuner import InputError
from tuner.data import Data
from tuner.training.spec import Metrics


@dataclass(frozen=True)
class Fold:
    """The images of a fold, and those that its head is trained on: int64 row numbers of the pool.

    images: all of the fold.   train, val: equally many in each fold, as the heads of a stack have batches in common;
    `val` are the images of the fold that an epoch is scored on.
    """

    images: torch.Tensor
    train: torch.Tensor
    val: torch.Tensor


def fold_numbers(labels: torch.Tensor, groups: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """The fold of each image, int64 [N]: stratified by label, and one fold for the images of a group.

    groups: int64 [N]; copies of an image have the same number, or a head would know the image that it scores.
    """
    generator = torch.Generator().manual_seed(seed)
    _, group = groups.unique(return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(labels)).scatter_reduce(0, group, torch.arange(len(labels)), "amin")
    order = torch.randperm(len(first), generator=generator)
    order = order[labels[first[order]].argsort(stable=True)]  # class after class: folds differ by one image of each
    fold_of_group = torch.empty_like(order)
    fold_of_group[order] = torch.arange(len(order)) % count
    return fold_of_group[group]


def equally_many(parts: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Each part without a few of its rows, drawn at random, so that all have as many as the smallest; ascending."""
    least = min(map(len, parts))
    drawn = []
    for number, rows in enumerate(parts):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + number))
        drawn.append(rows[order][:least].sort().values)
    return drawn


def folds_of(data: Data, count: int, seed: int) -> list[Fold]:
    """The training and validation images in `count` folds; exact copies are in the same one.

    Raises InputError for a class with fewer images than folds.
    """
    rows = torch.cat([data.train, data.val]).sort().values
    labels = data.pool.labels[rows]
    counts = torch.bincount(labels, minlength=len(data.classes))
    if int(counts.min()) < count:
        name, least = data.classes[int(counts.argmin())], int(counts.min())
        raise InputError(
            f"data.folds={count} needs {count} images of each class for training and validation; {name!r} has {least}: "
            "lower data.folds, or add images"
        )
    _, groups = data.pool.digests[rows].unique(return_inverse=True)
    fold = fold_numbers(labels, groups, count, seed)
    images = [rows[fold == k] for k in range(count)]
    train = equally_many([rows[fold != k] for k in range(count)], seed)
    return [Fold(*parts) for parts in zip(images, train, equally_many(images, seed), strict=True)]


def means(metrics: Sequence[Metrics]) -> Metrics:
    """The mean of each metric over the folds."""
    return {name: statistics.fmean(fold[name] for fold in metrics) for name in metrics[0]}


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean over the folds. Their heads share training images, so it is only approximate."""
    return statistics.stdev(values) / math.sqrt(len(values))
