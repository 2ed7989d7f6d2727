"""What an audit of a data set found, as a table with one row for each image and finding."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from tuner.analysis.label_errors import LabelErrors
from tuner.bank.copies import Copies
from tuner.data import Data
from tuner.data.exclusion import digest_text

COLUMNS = ("kind", "file", "digest", "split", "label", "suggested_label", "score", "group", "exclude")
SPLITS = ("left out", "train", "val", "test")  # the later one keeps the copies that splits share
FAR = 4.0  # deviations from the median of its class: an outlier; benchmarks/audit.py measures it
FEWEST = 10  # images of a class whose outliers are reported


class Images:
    """The images of the pool and then of the test split, numbered one after another.

    split: index into SPLITS of each, int64 [N].   labels, digests: int64 [N].
    """

    def __init__(self, data: Data):
        self.data = data
        self.labels = torch.cat([data.pool.labels, data.test.labels])
        self.digests = torch.cat([data.pool.digests, data.test.digests])
        self.split = torch.zeros(len(self.labels), dtype=torch.int64)
        self.split[data.train], self.split[data.val], self.split[len(data.pool) :] = 1, 2, 3

    def pixels(self, row: int) -> torch.Tensor:
        """uint8 [C, H, W]"""
        pool = self.data.pool
        return pool.images[row] if row < len(pool) else self.data.test.images[row - len(pool)]

    def row(self, kind: str, row: int, **more: Any) -> dict[str, Any]:
        """A row of the table, and the image's number as `row`."""
        pool, test = self.data.pool, self.data.test
        name = pool.name(row) if row < len(pool) else test.name(row - len(pool))
        label, digest = self.data.classes[self.labels[row]], digest_text(int(self.digests[row]))
        about = {"kind": kind, "file": name, "digest": digest, "split": SPLITS[self.split[row]], "label": label}
        return dict.fromkeys(COLUMNS) | about | {"exclude": "no"} | more | {"row": row}


def duplicates(images: Images, copies: Copies) -> list[dict[str, Any]]:
    """A row for each image that has copies, group after group. Images that are left out already do not count.

    If a group is in several splits, its images in train leave for val, and those in train and val for test. If it has
    several labels, all of its images in train and val leave: which label is right is not known.
    """
    used = images.split > 0
    keep = used[copies.pairs].all(1)
    copies = Copies(copies.pairs[keep], copies.residual[keep], copies.mirrored[keep])
    group_of = copies.groups(len(used))
    best: dict[int, tuple[float, bool]] = {}
    for (a, b), residual, mirrored in zip(
        copies.pairs.tolist(), copies.residual.tolist(), copies.mirrored.tolist(), strict=True
    ):
        for row in (a, b):
            best[row] = min(best.get(row, (2.0, False)), (residual, mirrored))
    groups: dict[int, list[int]] = {}
    for row in sorted(best):
        groups.setdefault(int(group_of[row]), []).append(row)
    rows = []
    for number, members in enumerate(groups.values(), start=1):
        splits = images.split[members]
        conflict = len(images.labels[members].unique()) > 1
        for row in members:
            residual, mirrored = best[row]
            kind = "exact copy" if residual == 0 and not mirrored else "mirror image" if mirrored else "near copy"
            leaves = images.split[row] < 3 and (conflict or images.split[row] < splits.max())
            more = {"score": round(residual, 5), "group": number, "exclude": "yes" if leaves else "no"}
            rows.append(images.row(kind, row, **more))
    return rows


def suspected_labels(images: Images, rows: torch.Tensor, errors: LabelErrors) -> list[dict[str, Any]]:
    """A row for each suspected label, the most suspicious first; `score` is the margin.   rows: those judged, int64."""
    columns = (values.tolist() for values in (rows[errors.suspects], errors.suggested, errors.margin))
    return [
        images.row(
            "label", row, suggested_label=images.data.classes[label], score=round(margin, 4), group=None, exclude="yes"
        )
        for row, label, margin in zip(*columns, strict=True)
    ]


def outliers(images: Images, rows: torch.Tensor, distance: torch.Tensor) -> list[dict[str, Any]]:
    """A row for each image that lies far from all others, the farthest first; `score`: see relative_distance().

    rows: those judged, int64 [N].   distance: of each to its nearest others, float [N].
    """
    score = relative_distance(distance, images.labels[rows])
    far = (score > FAR).nonzero().flatten()
    far = far[score[far].argsort(descending=True)]
    return [
        images.row("outlier", row, score=round(value, 2))
        for row, value in zip(rows[far].tolist(), score[far].tolist(), strict=True)
    ]


def left_out(images: Images) -> list[dict[str, Any]]:
    """A row for each image that data.exclude leaves out already: the new list has them, too."""
    return [images.row("left out", row, exclude="yes") for row in (images.split == 0).nonzero().flatten().tolist()]


def relative_distance(distance: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(distance - median of its class) / median absolute deviation of its class, float [N]; 0 in a small class.

    The deviation is scaled to the standard deviation of a normal distribution.
    """
    score = torch.zeros_like(distance)
    for label in labels.unique():
        mine = labels == label
        if mine.sum() >= FEWEST:
            away = distance[mine] - distance[mine].median()
            score[mine] = away / (1.4826 * away.abs().median()).clamp(min=1e-6)
    return score


def confusions(predicted: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], top: int = 10) -> pd.DataFrame:
    """The pairs of label and out-of-fold prediction that occur most often: label, predicted, images, share of label."""
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    counts.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    wrong = counts - torch.diag(counts.diagonal())
    order = wrong.flatten().argsort(descending=True, stable=True)[:top].tolist()
    pairs = [divmod(place, len(classes)) for place in order]
    rows = [
        {
            "label": classes[i],
            "predicted": classes[j],
            "images": int(wrong[i, j]),
            "share": round(float(wrong[i, j] / counts[i].sum()), 4),
        }
        for i, j in pairs
        if wrong[i, j]
    ]
    return pd.DataFrame(rows, columns=["label", "predicted", "images", "share"])
