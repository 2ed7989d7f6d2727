"""Exact copies of images in several splits or classes: counted, and reported in the log."""

import logging

import torch

from tuner.data import Data

log = logging.getLogger(__name__)


def report(data: Data) -> None:
    """Log copies of test and validation images in other splits, and an image that is in two classes."""
    _log("test", "training or validation", data.test_duplicates, len(data.test))
    _log("validation", "training", data.val_duplicates, len(data.val))
    digests, labels, rows = _used(data)
    in_two = _in_two_classes(digests, labels)
    if not len(in_two):
        return
    same = digests == digests[in_two[0]]
    pair = [int(in_two[0]), int((same & (labels != labels[in_two[0]])).nonzero()[0])]
    log.warning(
        "%d images have an exact copy in another class; %s and %s are the same image: correct the labels",
        len(in_two),
        *(f"{_called(data, int(rows[i]))} ({data.classes[int(labels[i])]})" for i in pair),
    )


def conflicts(data: Data) -> int:
    """The number of images with an exact copy in another class, in all splits."""
    digests, labels, _ = _used(data)
    return len(_in_two_classes(digests, labels))


def _log(split: str, others: str, count: int, images: int) -> None:
    if count:
        level = logging.WARNING if count > images / 100 else logging.INFO  # Fashion-MNIST has a few
        log.log(level, "%d of %d %s images have an exact copy in %s", count, images, split, others)


def _used(data: Data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Digests, labels and row numbers of the images in a split, int64 [N]; test images are numbered after the pool."""
    kept = torch.cat([data.train, data.val]).sort().values
    rows = torch.cat([kept, torch.arange(len(data.test)) + len(data.pool)])
    digests = torch.cat([data.pool.digests[kept], data.test.digests])
    return digests, torch.cat([data.pool.labels[kept], data.test.labels]), rows


def _in_two_classes(digests: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The places of images that are in several classes, ascending, int64."""
    order = torch.argsort(digests, stable=True)
    differs = (digests[order][1:] == digests[order][:-1]) & (labels[order][1:] != labels[order][:-1])
    return torch.isin(digests, digests[order][1:][differs]).nonzero().flatten()


def _called(data: Data, row: int) -> str:
    """What an image is called in a message."""
    samples, split = (data.pool, "image") if row < len(data.pool) else (data.test, "test image")
    row -= 0 if samples is data.pool else len(data.pool)
    return samples.names[row] if samples.names else f"{split} {row}"
