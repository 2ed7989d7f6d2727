"""tuner.runs.metrics: small cases worked out by hand."""

import numpy as np
import pytest
import torch

from tuner.runs.metrics import confusion_matrix, most_confident_mistakes, per_class

LABELS, PREDICTED = [0, 0, 0, 1, 1, 3], [0, 0, 1, 1, 0, 3]  # class 2 has no image


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_confusion_matrix_has_true_rows_and_predicted_columns(kind):
    counts = confusion_matrix(kind(LABELS), kind(PREDICTED), 4)
    assert counts.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert counts.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "predicted", "num_classes", "expected"),
    [([0, 0], [0, 0], 1, [[2]]), ([1, 1], [1, 1], 2, [[0, 0], [0, 2]]), ([0], [1], 2, [[0, 1], [0, 0]])],
    ids=["one class", "one class of two", "all wrong"],
)
def test_confusion_matrix_at_the_edges(labels, predicted, num_classes, expected):
    assert confusion_matrix(np.array(labels), np.array(predicted), num_classes).tolist() == expected


@pytest.mark.parametrize(
    ("labels", "predicted", "message"),
    [
        ([0, 2], [0, 1], "labels must be class numbers 0 to 1; they run from 0 to 2"),
        ([0, 1], [-1, 1], "predicted must be class numbers 0 to 1; they run from -1 to 1"),
    ],
)
def test_an_unknown_class_is_refused_rather_than_dropped(labels, predicted, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(labels), np.array(predicted), 2)


def test_per_class_reports_every_class_in_order():
    rows = per_class(torch.tensor(LABELS), torch.tensor(PREDICTED), ["a", "b", "c", "d"])
    two_thirds = pytest.approx(2 / 3)
    assert rows == [
        {"class": "a", "accuracy": two_thirds, "precision": two_thirds, "f1": two_thirds, "support": 3},
        {"class": "b", "accuracy": 0.5, "precision": 0.5, "f1": 0.5, "support": 2},
        {"class": "c", "accuracy": 0, "precision": 0, "f1": 0, "support": 0},
        {"class": "d", "accuracy": 1, "precision": 1, "f1": 1, "support": 1},
    ]


def test_per_class_agrees_with_the_confusion_matrix():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    counts = confusion_matrix(labels, predicted, 5)
    rows = per_class(labels, predicted, list("abcde"))
    assert [row["accuracy"] for row in rows] == pytest.approx(np.diag(counts) / counts.sum(1))
    assert [row["precision"] for row in rows] == pytest.approx(np.diag(counts) / counts.sum(0))
    assert [row["support"] for row in rows] == counts.sum(1).tolist()


@pytest.mark.parametrize(("n", "expected"), [(0, []), (2, [4, 2]), (9, [4, 2, 3, 1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mistakes_come_most_confident_first(n, expected, dtype):
    labels, predicted = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 1, 0, 0])
    confidence = torch.tensor([1.0, 0.25, 0.5, 0.5, 0.75], dtype=dtype)  # 2 and 3 are equal: they keep their order
    assert most_confident_mistakes(labels, predicted, confidence, n).tolist() == expected


def test_no_mistakes_give_no_indices():
    labels = np.arange(3)
    assert most_confident_mistakes(labels, labels, np.ones(3), 5).shape == (0,)
