"""tuner.plots.run: every figure is drawn and saved, and its title and labels are right."""

import io

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from seen import drawn, texts, title

from tuner import plots

NAN = float("nan")
UNUSUAL = ["$5 to $10", "Ünïcödé 猫 🐈", "a" * 90, "two\nlines", "_hidden", "", "100%", r"\alpha", "tie: a", "tie: b"]


def history(epochs, **columns):
    epoch = np.arange(1, epochs + 1)
    default = {
        "train_loss": 1 / epoch, "train_accuracy": 1 - 0.3 / epoch, "val_loss": 1.1 / epoch,
        "val_accuracy": 1 - 0.4 / epoch, "lr": 1e-3, "seconds": 1.0,
    }  # fmt: skip
    return pd.DataFrame({"epoch": epoch, **default, **columns})


def counts_of(classes, empty=0):
    counts = np.eye(classes, dtype=np.int64) * 9 + np.eye(classes, k=1, dtype=np.int64)
    counts[:empty] = 0
    return counts


def rows_of(classes, empty=0):
    return [
        {"class": f"class {i}", "accuracy": (i + 1) / classes * (i >= empty), "support": 10 * (i >= empty)}
        for i in range(classes)
    ]


@pytest.mark.parametrize(
    ("metrics", "best", "accuracy", "loss"),
    [
        (history(20), 12, "Validation accuracy 0.967 (epoch 12 of 20)", "Validation loss 0.092 (epoch 12 of 20)"),
        (history(1), 1, "Validation accuracy 0.600 (epoch 1 of 1)", "Validation loss 1.100 (epoch 1 of 1)"),
        (history(200), 1, "Validation accuracy 0.600 (epoch 1 of 200)", "Validation loss 1.100 (epoch 1 of 200)"),
        (
            history(3, val_loss=NAN, val_accuracy=NAN), 3,
            "Train accuracy 0.900 (epoch 3 of 3)", "Train loss 0.333 (epoch 3 of 3)",
        ),
        (
            history(3, val_loss=[1, np.inf, NAN], train_loss=[50.0, np.inf, NAN]), 2,
            "Validation accuracy 0.800 (epoch 2 of 3)", "Loss is not a finite number at epoch 2 of 3",
        ),
        (
            history(2, train_loss=NAN, train_accuracy=NAN, val_loss=NAN, val_accuracy=NAN), 1,
            "Accuracy is not a finite number at epoch 1 of 2", "Loss is not a finite number at epoch 1 of 2",
        ),
        (
            history(2, val_accuracy=0.0, train_accuracy=0.0, train_loss=0.0, val_loss=0.0, lr=0.0), 2,
            "Validation accuracy 0.000 (epoch 2 of 2)", "Validation loss 0.000 (epoch 2 of 2)",
        ),
    ],
    ids=["usual", "one epoch", "many epochs", "no validation", "diverged", "nothing finite", "all zero"],
)  # fmt: skip
def test_curves(metrics, best, accuracy, loss, tmp_path):
    assert drawn(plots.accuracy(metrics, best), tmp_path) == accuracy
    assert drawn(plots.loss(metrics, best), tmp_path) == loss


def test_a_saved_epoch_outside_the_run_is_refused():
    with pytest.raises(ValueError, match="saved_epoch=4 must be an epoch of metrics, which end at 3"):
        plots.accuracy(history(3), 4)


def test_the_axis_of_accuracy_stays_in_its_range():
    low, high = plots.accuracy(history(5, val_accuracy=1.0), 5).axes[0].get_ylim()
    assert 0 <= low < 0.7
    assert 1 < high < 1.05


@pytest.mark.parametrize(
    ("accuracies", "expected", "bars"),
    [
        ({"train": 0.958, "validation": 0.92, "test": 0.913}, "Test accuracy 0.913, 4.5 points below train", 3),
        ({"train": 0.9, "test": 0.91}, "Test accuracy 0.910, 1.0 points above train", 2),
        ({"validation": 0.9, "test": 0.9}, "Test accuracy 0.900", 2),
        ({"train": 0.9, "validation": 0.8, "test": None}, "Train accuracy 0.900, validation accuracy 0.800", 2),
        ({"train": NAN}, "No accuracy was measured", 0),
    ],
)
def test_train_vs_test(accuracies, expected, bars, tmp_path):
    figure = plots.train_vs_test(accuracies)
    assert drawn(figure, tmp_path) == expected
    assert len(figure.axes[0].patches) == bars


@pytest.mark.parametrize(
    ("classes", "empty", "expected", "cells"),
    [
        (1, 0, "Test accuracy 1.000 (9 of 9 images)", ["9\n100.0%"]),
        (2, 0, "Test accuracy 0.947 (18 of 19 images)", ["9\n90.0%", "1\n10.0%", "9\n100.0%"]),
        (10, 1, "Test accuracy 0.910 (81 of 89 images)", ["9\n90.0%", "1\n10.0%"] * 8 + ["9\n100.0%"]),
        (20, 0, "Test accuracy 0.905 (180 of 199 images)", ["9", "1"] * 19 + ["9"]),
        (120, 7, "Test accuracy 0.901 (1,017 of 1,129 images)", []),
        (3, 3, "Confusion matrix: no test images", []),
    ],
)
def test_confusion_matrix(classes, empty, expected, cells, tmp_path):
    names = [f"class {i}" for i in range(classes)]
    figure = plots.confusion_matrix(counts_of(classes, empty), names, "test")
    assert drawn(figure, tmp_path) == expected
    assert [text.get_text() for text in figure.axes[0].texts] == cells
    assert ("A grey row is a class without images." in figure.get_supxlabel()) == (empty > 0)


def test_confusion_matrix_names_the_most_frequent_mistake():
    figure = plots.confusion_matrix(np.array([[5, 1], [3, 9]]), ["cat", "dog"], "validation")
    assert figure.get_supxlabel().strip() == "Most frequent mistake: dog taken for cat, 3 of 12 images."


@pytest.mark.parametrize(
    ("classes", "empty", "expected", "bars"),
    [
        (1, 0, "Validation accuracy by class: every image is right", 1),
        (2, 0, "Validation accuracy by class: class 0 is lowest at 0.500", 2),
        (10, 3, "Validation accuracy by class: class 3 is lowest at 0.400", 7),
        (41, 1, "Validation accuracy by class: class 1 is lowest at 0.049", 40),
        (
            120, 19, "Validation accuracy by class: class 19 is lowest at 0.167 "
            "(the 35 lowest and 5 highest of 101 classes)", 40,
        ),
        (2, 2, "No validation images to measure classes on", 0),
    ],
)  # fmt: skip
def test_per_class(classes, empty, expected, bars, tmp_path):
    figure = plots.per_class(rows_of(classes, empty), "validation")
    assert drawn(figure, tmp_path) == expected
    assert title(plots.per_class(pd.DataFrame(rows_of(classes, empty)), "validation")) == expected
    assert sum(len(axes.patches) for axes in figure.axes) == bars


def test_per_class_draws_the_mean_over_images_not_over_classes():
    rows = [{"class": "many", "accuracy": 1.0, "support": 30}, {"class": "few", "accuracy": 0.0, "support": 10}]
    figure = plots.per_class(rows, "test")
    assert "all images 0.750" in texts(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["few", "many"]  # from bottom to top


@pytest.mark.parametrize(
    ("n", "shape", "shown", "expected"),
    [
        (0, (1, 28, 28), 0, "No mistakes on the test images"),
        (1, (1, 28, 28), 1, "The most confident mistake on the test images"),
        (7, (3, 24, 40), 7, "The 7 most confident mistakes on the test images"),
        (30, (1, 28, 28), 25, "The 25 most confident mistakes on the test images"),
    ],
    ids=["none", "one gray", "seven RGB", "more than there is room for"],
)
def test_examples(n, shape, shown, expected, tmp_path):
    images = torch.randint(0, 256, (n, *shape), dtype=torch.uint8)
    figure = plots.examples(images, ["Shirt"] * n, ["Coat"] * n, [0.875] * n, "test")
    assert drawn(figure, tmp_path) == expected
    assert len(figure.axes) == shown
    assert all(axes.get_title() == "Shirt" and axes.get_xlabel() == "Coat\n0.875" for axes in figure.axes)


def test_unusual_class_names_are_drawn_unchanged(tmp_path):
    n = len(UNUSUAL)
    rows = [{**row, "class": name} for row, name in zip(rows_of(n), UNUSUAL, strict=True)]
    images = np.zeros((n, 3, 8, 8), np.uint8)
    for figure in (
        plots.confusion_matrix(counts_of(n), UNUSUAL, "test"),
        plots.per_class(rows, "test"),
        plots.examples(images, UNUSUAL, UNUSUAL[::-1], [1.0] * n, "test"),
    ):
        drawn(figure, tmp_path)
        assert any("$5 to $10" in text for text in texts(figure))
        assert max(len(line) for text in texts(figure) for line in text.split("\n")) < 100


def test_save_replaces_the_file_or_leaves_it_intact(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    plots.save(plots.train_vs_test({"test": 0.5}), path)
    before = path.read_bytes()
    figure = plots.train_vs_test({"test": 0.9})

    def breaks_off(file, **_):
        file.write(b"\x89PNG half")
        raise OSError("no space left on device")

    monkeypatch.setattr(figure, "savefig", breaks_off)
    with pytest.raises(OSError, match="no space left"):
        plots.save(figure, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

    monkeypatch.undo()
    plots.save(figure, path)
    assert path.read_bytes() != before


def test_a_notebook_shows_a_figure_as_a_picture():
    data = plots.accuracy(history(3), 1)._repr_png_()
    width, height = Image.open(io.BytesIO(data)).size
    assert (width, height) == (900, 550)


def test_drawing_does_not_change_the_global_state(tmp_path):
    def state():  # reading the backend would choose one
        return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}

    before = state()
    drawn(plots.accuracy(history(3), 2), tmp_path)
    assert state() == before
