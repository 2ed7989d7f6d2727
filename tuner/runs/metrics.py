"""Metrics of classifiers: METRICS has every score by its name. Below are the tables behind the plots.

To add a metric, write its function and add a line to METRICS. It is then in result.json, in `tuner.evaluate`, in the
columns of `tuner.compare`, and may be the objective.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn import metrics as sk

from tuner.device import widest_float

Array = np.ndarray | torch.Tensor

# Scores of K heads at once. Each function takes log_p, log-probabilities float32 [K, N, C], and labels, int64 [K, N],
# on one device, and returns [K] there, in the widest float type of the device. If log_p is finite and N at least 1,
# the scores are finite. A class without images does not count in means over classes.


def accuracy(log_p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of images whose label has the highest probability; the first class wins a tie."""
    return _mean(log_p.argmax(2) == labels)


def balanced_accuracy(log_p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over classes of the class's own accuracy, its recall."""
    right, images, _ = _counts(log_p, labels)
    return (right / images).nanmean(1)  # 0 / 0 for a class without images


def macro_f1(log_p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over classes of the F1 score, the harmonic mean of precision and recall."""
    right, images, predictions = _counts(log_p, labels)
    f1 = 2 * right / (images + predictions)
    return f1.where(images > 0, torch.nan).nanmean(1)


def top5_accuracy(log_p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of images whose label is among the five most probable classes; the first class wins a tie."""
    own = log_p.gather(2, labels[..., None])
    classes = torch.arange(log_p.shape[2], device=log_p.device)
    below = (log_p < own) | ((log_p == own) & (classes >= labels[..., None]))  # itself among them
    return _mean((~below).sum(2) < 5)


def auroc(log_p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The area under the ROC curve, one class against the rest, averaged over classes.

    That is the probability that an image of the class gets a higher log-probability for it than an image of another
    class; a tie counts half. A class counts if some images have it and some don't. If there is none, the score is 0.5.
    """
    total = torch.zeros(len(log_p), dtype=widest_float(log_p.device), device=log_p.device)
    counted = torch.zeros_like(total)
    for number in range(log_p.shape[2]):
        of_class = labels == number  # [K, N]
        values = log_p[:, :, number].contiguous()
        ordered = values.sort(dim=1).values
        # Twice an image's rank, in which images with equal values share their mean rank. Integers, so exact anywhere.
        ranks = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True) + 1
        positives = of_class.sum(1)
        pairs = positives * (labels.shape[1] - positives)
        wins = (ranks * of_class).sum(1) - positives * (positives + 1)  # twice the pairs in the right order
        both = pairs > 0
        total += (wins.to(total.dtype) / (2 * pairs).to(total.dtype)).where(both, 0)
        counted += both
    return (total / counted).where(counted > 0, 0.5)


def log_loss(log_p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy: the mean of -log p of the label, in nats. Infinite if a label has probability 0."""
    return _mean(-log_p.gather(2, labels[..., None])[..., 0])


@dataclass(frozen=True)
class Metric:
    """A score of a classifier. It applies to data with at least `min_classes` classes."""

    name: str
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    larger_is_better: bool = True
    min_classes: int = 1


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", accuracy),
        Metric("balanced_accuracy", balanced_accuracy),
        Metric("macro_f1", macro_f1),
        Metric("top5_accuracy", top5_accuracy, min_classes=6),  # with five classes it is always 1
        Metric("auroc", auroc, min_classes=2),
        Metric("log_loss", log_loss, larger_is_better=False),
    )
}
# The values of `objective=`, and the metric of each. Objectives are maximised. If smaller is better, the objective is
# the metric times -1, with the prefix that scikit-learn uses: neg_log_loss.
OBJECTIVES = {m.name if m.larger_is_better else f"neg_{m.name}": m for m in METRICS.values()} | {
    "accuracy_and_cost": METRICS["accuracy"]  # the second objective is the multiply-adds of an image
}


def applicable(num_classes: int) -> list[str]:
    """The names of the metrics that data with so many classes has."""
    return [metric.name for metric in METRICS.values() if num_classes >= metric.min_classes]


def scores(log_p: torch.Tensor, labels: torch.Tensor, names: Iterable[str] | None = None) -> dict[str, list[float]]:
    """Metrics by name, a value for each of K heads.

    log_p: log-probabilities, float [K, N, C].   labels: int64 [N], the same for all heads, or [K, N].
    names: of METRICS; None takes all that apply to C classes.
    Raises ValueError for a metric that needs more classes.
    """
    heads, images, classes = log_p.shape
    labels = labels.to(log_p.device).expand(heads, images)
    chosen = [METRICS[name] for name in (applicable(classes) if names is None else names)]
    for metric in chosen:
        if classes < metric.min_classes:
            raise ValueError(f"{metric.name} needs at least {metric.min_classes} classes; there are {classes}")
    if not chosen:
        return {}
    values = torch.stack([metric.function(log_p, labels) for metric in chosen]).tolist()  # waits for the device once
    return {metric.name: of_heads for metric, of_heads in zip(chosen, values, strict=True)}


def objective_value(objective: str, scores: Mapping[str, float]) -> float:
    """The value of one of OBJECTIVES, to be maximised.   scores: by the names of METRICS."""
    metric = OBJECTIVES[objective]
    return scores[metric.name] if metric.larger_is_better else -scores[metric.name]


def _mean(values: torch.Tensor) -> torch.Tensor:
    """[K, N] -> [K]"""
    return values.to(widest_float(values.device)).mean(1)


def _counts(log_p: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of images for each head and class, [K, C]: correct ones, all of the class, and predicted as the class."""
    heads, _, classes = log_p.shape
    predicted = log_p.argmax(2)
    first = classes * torch.arange(heads, device=labels.device)[:, None]  # of the head's cells

    def count(cells: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(heads * classes, dtype=values.dtype, device=values.device)
        return sums.index_add_(0, (first + cells).flatten(), values.flatten()).view(heads, classes)

    hits = (predicted == labels).to(widest_float(log_p.device))
    ones = torch.ones_like(hits)
    return count(labels, hits), count(labels, ones), count(predicted, ones)


# Tables


def confusion_matrix(labels: Array, predicted: Array, num_classes: int) -> np.ndarray:
    """Counts of images, int64 [C, C]: rows are the true classes, columns the predicted ones.

    labels, predicted: class numbers 0..C-1, integers [N], N at least 1.
    """
    labels, predicted = _numpy(labels), _numpy(predicted)
    for name, values in (("labels", labels), ("predicted", predicted)):  # scikit-learn drops unknown classes silently
        if len(values) and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(
                f"{name} must be class numbers 0 to {num_classes - 1}; they run from {values.min()} to {values.max()}"
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found")  # also if there is only one class
        return sk.confusion_matrix(labels, predicted, labels=np.arange(num_classes)).astype(np.int64)


def per_class(labels: Array, predicted: Array, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row per class, in the order of `classes`: class, accuracy, precision, f1, support.

    labels, predicted: class numbers 0..C-1, integers [N].

    accuracy: the class's recall, the share of its images that are predicted correctly.
    support: the number of its images. A class without images scores 0.
    """
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        _numpy(labels), _numpy(predicted), labels=np.arange(len(classes)), zero_division=0
    )
    columns = zip(classes, recall.tolist(), precision.tolist(), f1.tolist(), support.tolist(), strict=True)
    return [{"class": name, "accuracy": a, "precision": p, "f1": f, "support": int(n)} for name, a, p, f, n in columns]


def most_confident_mistakes(labels: Array, predicted: Array, confidence: Array, n: int) -> np.ndarray:
    """Indices of at most n wrongly classified images, int64, the most confident first.

    confidence: the probability given to the predicted class, float [N]. Ties keep their order.
    """
    wrong = np.flatnonzero(_numpy(labels) != _numpy(predicted))
    order = np.argsort(-_numpy(confidence)[wrong], kind="stable")
    return wrong[order[:n]]


def _numpy(values: Array) -> np.ndarray:
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    if values.is_floating_point():
        values = values.float()  # numpy has no bfloat16
    return values.detach().cpu().numpy()
