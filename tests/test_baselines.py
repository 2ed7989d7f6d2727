"""What a trained head should beat: the majority class, nearest neighbours, ridge regression."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import TINY, result
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from tuner.bank import baselines as simple
from tuner.runs import baselines

RECORD = {
    **{"metric": "accuracy", "majority_class": 0.1, "nearest_neighbours": 0.8, "ridge_regression": 0.9},
    **{"neighbours": 5, "penalty": 0.1, "n_train": 100, "n_train_available": 100},
}


def images(count=120, size=20, classes=3, views=1, seed=0):
    """Features, labels, training and validation rows; two thirds of the images train."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    x = 1 + torch.randn(count, size, generator=generator) + F.one_hot(labels, size)
    rows = torch.randperm(count, generator=generator)
    return x.repeat_interleave(views, 0), labels, rows[count // 3 :], rows[: count // 3]


def features(x, train, views=1):
    return simple.Features(x, views, train, torch.device("cpu"))


def as_sklearn_gets_them(x, train):
    normalised = F.layer_norm(x, x.shape[1:])
    return (normalised - normalised[train].mean(0)).double()


@pytest.mark.parametrize("size", [20, 200], ids=["fewer features than images", "more features than images"])
def test_ridge_regression_is_that_of_sklearn(size):
    x, labels, train, val = images(size=size)
    predicted = simple.ridge(features(x, train), labels, train, val)
    theirs = as_sklearn_gets_them(x, train)
    unknowns = min(size, len(train))
    assert list(predicted) == list(simple.PENALTIES)
    for penalty, classes in predicted.items():
        alpha = penalty * float((theirs[train] ** 2).sum()) / unknowns
        ridge = Ridge(alpha).fit(theirs[train], F.one_hot(labels[train]).double())
        assert classes.tolist() == ridge.predict(theirs[val]).argmax(1).tolist()


def test_nearest_neighbours_are_those_of_sklearn():
    x, labels, train, val = images(classes=2)
    predicted = simple.neighbours(features(x, train), labels, train, val)
    theirs = as_sklearn_gets_them(x, train)
    for k in (1, 5):  # odd: no ties
        knn = KNeighborsClassifier(k, metric="cosine").fit(theirs[train], labels[train])
        assert predicted[k].tolist() == knn.predict(theirs[val]).tolist()


def test_of_as_many_neighbours_the_nearer_class_wins():
    x = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 0.9]])
    labels, train = torch.tensor([0, 1, 2, 3, 2]), torch.arange(4)
    assert {int(p) for p in simple.neighbours(features(x, train), labels, train, torch.tensor([4])).values()} == {2}


def test_the_majority_class_is_that_of_the_training_images():
    labels = torch.tensor([0, 1, 1, 0, 0, 0])
    assert simple.majority(labels, torch.tensor([0, 1, 2]), torch.tensor([3, 4])).tolist() == [1, 1]


@pytest.mark.parametrize("size", [20, 200])
@pytest.mark.parametrize("method", [simple.neighbours, simple.ridge])
def test_small_blocks_and_views_change_nothing(method, size, monkeypatch):
    x, labels, train, val = images(size=size)
    whole = method(features(x, train), labels, train, val)
    monkeypatch.setattr(simple, "BLOCK", 7 * size)
    viewed = x.repeat_interleave(2, 0)
    viewed[1::2] = 0  # only the first view counts
    parts = method(features(viewed, train, views=2), labels, train, val)
    assert {k: p.tolist() for k, p in parts.items()} == {k: p.tolist() for k, p in whole.items()}


def test_features_that_are_all_equal_give_predictions():
    x, labels, train, val = torch.ones(12, 5), torch.arange(12) % 3, torch.arange(9), torch.arange(9, 12)
    for method in (simple.neighbours, simple.ridge):
        predicted = method(features(x, train), labels, train, val)
        assert all(p.shape == (3,) and p.max() < 3 for p in predicted.values())


def test_of_many_images_a_share_of_each_class_is_used(monkeypatch):
    labels = torch.tensor([0] * 300 + [1] * 100)
    train = torch.arange(400)
    assert simple.sampled(labels, train, size=10, validated=50).tolist() == train.tolist()
    monkeypatch.setattr(simple, "OPERATIONS", 200 * 10 * (10 + 50))
    rows = simple.sampled(labels, train, size=10, validated=50)
    assert 195 <= len(rows) <= 200
    assert rows.unique().tolist() == rows.tolist()
    assert float((labels[rows] == 0).float().mean()) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize(
    ("objective", "metric", "score", "k"),
    [
        ("accuracy", "accuracy", 0.75, 5),
        ("balanced_accuracy", "balanced_accuracy", 2 / 3, 1),
        ("auroc", "accuracy", 0.75, 5),
    ],
)
def test_the_best_setting_by_the_metric_of_the_search_counts(objective, metric, score, k):
    labels = torch.tensor([0, 0, 0, 1])
    predictions = {
        "majority_class": {0: torch.zeros(4, dtype=torch.int64)},
        "nearest_neighbours": {1: torch.tensor([0, 1, 1, 1]), 5: torch.tensor([0, 0, 0, 0])},
        "ridge_regression": {0.1: labels},
    }
    found = baselines.record(objective, predictions, labels, 2)
    assert (found["metric"], found["nearest_neighbours"], found["neighbours"]) == (metric, pytest.approx(score), k)
    assert (found["ridge_regression"], found["penalty"]) == (1, 0.1)


@pytest.mark.parametrize(
    ("changes", "value", "verdict"),
    [
        ({}, 0.91, None),
        ({}, None, None),
        ({}, 0.9, "the head does not beat ridge regression on the features: validation accuracy 0.9000 against 0.9000"),
        (
            {"nearest_neighbours": 0.95, "neighbours": 1, "metric": "macro_f1"},
            0.91,
            "the head does not beat 1 nearest neighbour: validation macro F1 score 0.9100 against 0.9500",
        ),
    ],
)
def test_a_head_that_is_no_better_is_told_so(changes, value, verdict):
    lines = baselines.lines(RECORD | changes, value, "the head")
    assert lines[0].startswith("for comparison, validation ")
    assert lines[1:] == ([] if verdict is None else [verdict])


def test_a_sample_of_the_training_images_is_said():
    [line] = baselines.lines(RECORD | {"n_train_available": 1000}, 1.0, "the head")
    assert line.endswith("(from 100 of 1,000 training images)")


@pytest.mark.parametrize(
    "found", [None, [], {}, RECORD | {"metric": ["accuracy"]}, RECORD | {"penalty": "x"}, RECORD | {"n_train": None}]
)
def test_a_damaged_record_is_none(found):
    assert baselines.of_result({"baselines": found}) is None


# Runs and searches


def test_a_run_shows_them_and_says_if_its_head_is_no_better(command):
    code, output = command(*TINY, "test=false", "optimizer.lr=1e-7", "hydra.run.dir=run")
    assert code == 0, output
    found = result("run")["baselines"]
    assert baselines.of_result(result("run")) == found
    assert (found["n_train"], found["n_train_available"]) == (256, 256)
    assert "for comparison, validation accuracy of the majority class" in output
    assert "the trained head does not beat " in output
    assert output.splitlines()[-1].split("] INFO ")[-1].startswith("validation accuracy ")


def test_a_run_that_trains_blocks_has_none(command):
    code, output = command(*TINY, "model.frozen=block1", "epochs=1", "hydra.run.dir=run")
    assert code == 0, output
    assert result("run")["baselines"] is None
    assert "for comparison" not in output


def test_a_search_shows_those_of_its_best_trial_once(command, call):
    search = ("-m", "hparams_search=random", "study=mine", "hydra.sweeper.n_trials=3", "final.seeds=1", *TINY)
    code, output = command(*search, "optimizer.lr=1e-7")
    assert code == 0, output
    folder = Path("multirun/mine")
    assert all("baselines" not in result(folder / str(number)) for number in range(3))
    written = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    found = written["baselines"]
    assert found == result(folder / "best")["baselines"] | {"best_trial": written["best_value"]}
    assert (found["n_train"], found["n_train_available"]) == (256, 256)  # the trials' split, not train + validation
    assert output.count("for comparison, validation accuracy of the majority class") == 1
    assert output.count("the best trial does not beat ") == 1

    code, out, err = call("study", folder)
    assert code == 0, err
    assert out.count("for comparison, validation accuracy of the majority class") == 1
    assert out.count("the best trial does not beat ") == 1
