"""Classifiers over frozen features that need no tuning: the majority class, nearest neighbours, ridge regression.

A trained head should beat them. They are deterministic, and read the features in blocks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

NEIGHBOURS = (1, 5, 10, 20)
PENALTIES = (0.01, 0.1, 1.0, 10.0)  # in units of the mean eigenvalue of the Gram matrix
OPERATIONS = 35 * 10**10  # multiply-adds, about ten seconds on two CPU cores: of more training images, a sample
BLOCK = 2**24  # numbers read or computed at a time
Predictions = dict[float, torch.Tensor]  # number of neighbours, or penalty -> classes, int64 [len(val)]


class Features:
    """Features as a head gets them: the first view of each image, normalised. The mean of `train` is subtracted.

    x: [N * views, ...], on any device.   train: image numbers, int64.   device: where features are computed with.
    """

    def __init__(self, x: torch.Tensor, views: int, train: torch.Tensor, device: torch.device):
        self.x, self.views, self.device, self.size = x, views, device, x[0].numel()
        total = self.mean = torch.zeros(self.size, device=device)
        for part in self.parts(train):
            total = total + self[part].sum(0)
        self.mean = total / len(train)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 [len(rows), size], on the device."""
        x = self.x[(rows * self.views).to(self.x.device)].to(self.device)
        return F.layer_norm(x.flatten(1).float(), [self.size]).sub_(self.mean)

    def parts(self, rows: torch.Tensor, width: int = 1) -> tuple[torch.Tensor, ...]:
        """Row numbers in parts of BLOCK numbers at most.   width: of what is computed for each row."""
        return rows.split(max(1, BLOCK // max(self.size, width)))

    def products(self, rows: torch.Tensor, others: torch.Tensor, *, cosine: bool = False) -> torch.Tensor:
        """Products, or cosines, of the features of each pair: float32 [len(rows), len(others)]."""
        own, blocks = self[rows], []
        for part in self.parts(others):
            block = self[part]
            blocks.append(own @ (F.normalize(block) if cosine else block).T)
        products = torch.cat(blocks, dim=1)
        return products / own.norm(dim=1, keepdim=True).clamp(min=1e-12) if cosine else products


def of_splits(
    x: torch.Tensor,
    views: int,
    labels: torch.Tensor,
    splits: Sequence[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
) -> tuple[dict[str, Predictions], int]:
    """The predictions of each classifier, by its name in result.json, and the number of training images used.

    x, views, device: see Features.   labels: int64, of all images.
    splits: training and validation images, row numbers. The predictions are for the validation images of all, in order.
    """
    by_split: list[dict[str, Predictions]] = []
    for train, val in splits:
        used = sampled(labels, train, size=x[0].numel(), validated=len(val), splits=len(splits))
        features = Features(x, views, used, device)
        by_split.append(
            {
                "majority_class": {0: majority(labels, used, val)},
                "nearest_neighbours": neighbours(features, labels, used, val),
                "ridge_regression": ridge(features, labels, used, val),
            }
        )
    predictions = {name: _joined([found[name] for found in by_split]) for name in by_split[0]}
    return predictions, len(used)


def _joined(parts: Sequence[Predictions]) -> Predictions:
    settings = [setting for setting in parts[0] if all(setting in part for part in parts)]
    return {setting: torch.cat([part[setting] for part in parts]) for setting in settings}


def sampled(labels: torch.Tensor, train: torch.Tensor, *, size: int, validated: int, splits: int = 1) -> torch.Tensor:
    """As many rows of `train` as OPERATIONS allow, with the same share of each class.

    labels: int64, of all images.   size: number of features.   validated: number of validation images.
    splits: that share OPERATIONS.
    """
    count = len(train)
    while count > 1 and count * size * (min(count, size) + validated) * splits > OPERATIONS:
        count = count * 99 // 100
    by_class = train[labels[train].argsort(stable=True)]
    return by_class[torch.arange(count) * len(train) // count].sort().values


def majority(labels: torch.Tensor, train: torch.Tensor, val: torch.Tensor) -> torch.Tensor:
    """The most frequent class of the training images, for each validation image: int64 [len(val)]."""
    return torch.bincount(labels[train]).argmax().expand(len(val))


def neighbours(features: Features, labels: torch.Tensor, train: torch.Tensor, val: torch.Tensor) -> Predictions:
    """The class of most of the k nearest training images, by cosine. A tie goes to the class that is nearer."""
    ks, classes = sorted({min(k, len(train)) for k in NEIGHBOURS}), int(labels.max()) + 1
    of_train = labels[train].to(features.device)
    predicted: dict[float, list[torch.Tensor]] = {k: [] for k in ks}
    for part in features.parts(val, len(train)):
        cosines, nearest = features.products(part, train, cosine=True).topk(ks[-1], dim=1)
        for k in ks:
            votes = torch.zeros(len(part), classes, device=features.device)
            votes.scatter_add_(1, of_train[nearest[:, :k]], 1 + cosines[:, :k] / (2.01 * k))  # cosines only break ties
            predicted[k].append(votes.argmax(1).cpu())
    return {k: torch.cat(parts) for k, parts in predicted.items()}


def ridge(features: Features, labels: torch.Tensor, train: torch.Tensor, val: torch.Tensor) -> Predictions:
    """The class with the highest output of ridge regression on one-hot targets. The intercept is not penalised.

    There is a weight for each feature or, if these are more, for each training image. A penalty that is too small for
    float32 is left out.
    """
    primal = features.size <= len(train)
    gram, right, intercept = (_primal if primal else _dual)(features, labels, train)
    unit = gram.diagonal().mean().clamp(min=1e-12)
    predicted: Predictions = {}
    for penalty in PENALTIES:
        shifted = gram.clone()
        shifted.diagonal().add_(penalty * unit)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if failed:
            continue
        weights = torch.cholesky_solve(right, factor)
        parts = features.parts(val, 1 if primal else len(train))
        outputs = [(features[part] if primal else features.products(part, train)) @ weights for part in parts]
        predicted[penalty] = (torch.cat(outputs) + intercept).argmax(1).cpu()
    return predicted


def _primal(features: Features, labels: torch.Tensor, train: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gram matrix of the features [size, size], their products with the centred targets [size, classes], intercept."""
    intercept = _intercept(labels, train).to(features.device)
    gram = torch.zeros(features.size, features.size, device=features.device)
    right = torch.zeros(features.size, len(intercept), device=features.device)
    for part in features.parts(train):
        x, targets = features[part], F.one_hot(labels[part], len(intercept)).float().to(features.device)
        gram.addmm_(x.T, x)
        right.addmm_(x.T, targets - intercept)
    return gram, right, intercept


def _dual(features: Features, labels: torch.Tensor, train: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gram matrix of the images [len(train), len(train)], their centred targets [len(train), classes], intercept."""
    intercept = _intercept(labels, train).to(features.device)
    gram = torch.cat([features.products(part, train) for part in features.parts(train)])
    return gram, F.one_hot(labels[train], len(intercept)).float().to(features.device) - intercept, intercept


def _intercept(labels: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """The share of each class, float32 [classes]."""
    return torch.bincount(labels[train], minlength=int(labels.max()) + 1).float() / len(train)
