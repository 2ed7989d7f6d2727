"""tuner.runs.metrics: scores against scikit-learn, and small cases worked out by hand."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from tuner.runs.metrics import (
    METRICS,
    OBJECTIVES,
    applicable,
    confusion_matrix,
    most_confident_mistakes,
    objective_value,
    per_class,
    scores,
)


def by_sklearn(log_p, labels):
    """The scores of one head, log_p [N, C] and labels [N], as scikit-learn has them."""
    log_p, labels = log_p.double().clamp(min=-1e9).numpy(), labels.numpy()  # it takes no infinity
    classes, predicted = log_p.shape[1], log_p.argmax(1)
    present = np.unique(labels)
    mixed = [c for c in range(classes) if 0 < (labels == c).sum() < len(labels)]
    areas = [sk.roc_auc_score(labels == c, log_p[:, c]) for c in mixed]
    # Of equals its top-k takes the last class, argmax the first: so the classes are passed in reverse.
    top5 = (
        sk.top_k_accuracy_score(classes - 1 - labels, log_p[:, ::-1], k=5, labels=range(classes)) if classes > 5 else 1
    )
    return {
        "accuracy": sk.accuracy_score(labels, predicted),
        "balanced_accuracy": sk.recall_score(labels, predicted, labels=present, average="macro"),
        "macro_f1": sk.f1_score(labels, predicted, labels=present, average="macro"),
        "top5_accuracy": top5,
        "auroc": np.mean(areas) if areas else 0.5,
        "log_loss": -log_p[np.arange(len(labels)), labels].mean(),
    }


def heads(k, n, classes, scale=2.0, seed=0):
    """Log-probabilities [k, n, classes] and labels [k, n], which the first head knows best."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (k, n), generator=generator)
    right = torch.nn.functional.one_hot(labels, classes) * torch.arange(k, 0, -1)[:, None, None]
    return torch.log_softmax(scale * torch.randn(k, n, classes, generator=generator) + right, 2), labels


RANDOM = heads(5, 300, 10)
ROUNDED = (RANDOM[0].round(), RANDOM[1])  # many ties
CASES = {
    "random": RANDOM,
    "ties": ROUNDED,
    "all equal": (torch.full((2, 40, 7), 1 / 7).log(), heads(2, 40, 7)[1]),
    "a class without images": (RANDOM[0], RANDOM[1].clamp(max=8)),
    "three classes of ten": (RANDOM[0], RANDOM[1].clamp(3, 5)),
    "one class of ten": (RANDOM[0], torch.full_like(RANDOM[1], 4)),
    "one image": (RANDOM[0][:, :1], RANDOM[1][:, :1]),
    "two images": (RANDOM[0][:, :2], RANDOM[1][:, :2]),
    "one head": heads(1, 50, 6),
    "five classes": heads(3, 50, 5),
    "two classes": heads(3, 50, 2),
    "one class": (torch.zeros(2, 9, 1), torch.zeros(2, 9, dtype=torch.int64)),
    "sure of everything": heads(3, 60, 6, scale=1e3),
    "some probabilities are 0": (RANDOM[0].where(RANDOM[0] > -6, -torch.inf), RANDOM[0].argmax(2)),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_scikit_learn(case):
    log_p, labels = CASES[case]
    found = scores(log_p, labels)
    expected = [by_sklearn(*head) for head in zip(log_p, labels, strict=True)]
    assert list(found) == applicable(log_p.shape[2])
    assert found == {name: pytest.approx([head[name] for head in expected], rel=1e-6, abs=1e-12) for name in found}
    assert all(np.isfinite(values).all() for values in found.values())


def test_the_chosen_scores_of_labels_that_all_heads_share():
    log_p, labels = RANDOM
    found = scores(log_p, labels[0], ["auroc", "accuracy"])
    assert list(found) == ["auroc", "accuracy"]
    assert found["auroc"] == pytest.approx([by_sklearn(head, labels[0])["auroc"] for head in log_p])
    assert scores(log_p, labels, []) == {}


def test_a_diverged_head_leaves_the_scores_of_the_others():
    log_p, labels = RANDOM
    diverged = log_p.clone()
    diverged[1] = torch.nan
    found, expected = scores(diverged, labels), scores(log_p, labels)
    assert np.isnan(found["log_loss"][1])
    for name in METRICS:
        assert [found[name][k] for k in (0, 2, 3, 4)] == [expected[name][k] for k in (0, 2, 3, 4)]


def test_metrics_apply_from_a_number_of_classes_on():
    assert set(METRICS) - set(applicable(5)) == {"top5_accuracy"}
    assert set(METRICS) - set(applicable(1)) == {"top5_accuracy", "auroc"}
    assert applicable(6) == list(METRICS)
    with pytest.raises(ValueError, match="top5_accuracy needs at least 6 classes; there are 2"):
        scores(*CASES["two classes"], ["accuracy", "top5_accuracy"])


def test_every_objective_is_larger_for_the_better_head():
    log_p, labels = heads(2, 400, 10)
    better, worse = ({name: values[k] for name, values in scores(log_p, labels).items()} for k in (0, 1))
    assert set(OBJECTIVES) == {*METRICS, "neg_log_loss", "accuracy_and_cost"} - {"log_loss"}
    for objective in OBJECTIVES:
        assert objective_value(objective, better) > objective_value(objective, worse), objective
    assert objective_value("neg_log_loss", {"log_loss": 0.25}) == -0.25


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
