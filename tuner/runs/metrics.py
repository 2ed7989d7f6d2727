"""What a classifier got right and wrong, from the true and the predicted class of each image."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn import metrics as sk

Array = np.ndarray | torch.Tensor


def confusion_matrix(labels: Array, predicted: Array, num_classes: int) -> np.ndarray:
    """Counts of images, int64 [C, C]: rows are the true classes, columns the predicted ones.

    labels, predicted: class numbers 0..C-1, integers [N], N at least 1.
    """
    labels, predicted = _numpy(labels), _numpy(predicted)
    for name, values in (("labels", labels), ("predicted", predicted)):  # scikit-learn drops strangers silently
        if len(values) and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(
                f"{name} must be class numbers 0 to {num_classes - 1}; they run from {values.min()} to {values.max()}"
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found")  # all the classes are passed: there is but one
        return sk.confusion_matrix(labels, predicted, labels=np.arange(num_classes)).astype(np.int64)


def per_class(labels: Array, predicted: Array, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row a class, in the order of `classes`: class, accuracy, precision, f1, support.

    accuracy: the share of the class's own images that were got right (its recall).
    support: how many images the class has; a class with none scores 0.
    """
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        _numpy(labels), _numpy(predicted), labels=np.arange(len(classes)), zero_division=0
    )
    columns = zip(classes, recall.tolist(), precision.tolist(), f1.tolist(), support.tolist(), strict=True)
    return [{"class": name, "accuracy": a, "precision": p, "f1": f, "support": int(n)} for name, a, p, f, n in columns]


def over_classes(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of per_class(): balanced_accuracy and macro_f1, means over the classes that have images, however few."""
    present = [row for row in rows if row["support"]]
    return {
        "balanced_accuracy": sum(row["accuracy"] for row in present) / len(present),
        "macro_f1": sum(row["f1"] for row in present) / len(present),
    }


def most_confident_mistakes(labels: Array, predicted: Array, confidence: Array, n: int) -> np.ndarray:
    """Indices, int64 [at most n], of wrongly classified images, the most confident first.

    confidence: the probability given to the predicted class, float [N]. Equals keep their order.
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
