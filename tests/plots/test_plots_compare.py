"""The figures that compare runs."""

import numpy as np
import pandas as pd
import pytest
from seen import legible, note, texts

from tuner import plots
from tuner.plots.style import GREY, ORANGE

NAN, INF = float("nan"), float("inf")
LONG = "model=efficientnet_b0,optimizer=adamw,optimizer.lr=0.0003,seed="


def run(last, epochs=5, **columns):
    epoch = np.arange(1, epochs + 1)
    accuracy = last * (1 - 0.5 / epoch) / (1 - 0.5 / epochs)
    default = {
        "train_loss": 1.0,
        "train_accuracy": 0.5,
        "val_loss": 1.1 - accuracy,
        "val_accuracy": accuracy,
        "lr": 0.1,
    }
    return pd.DataFrame({"epoch": epoch, **default, "seconds": 1.0, **columns})


def runs(count, **columns):
    return {f"{LONG}{k}": run(0.8 + 0.1 * k / count, **columns) for k in range(count)}


BEST = "Best of 2 runs:"


@pytest.mark.parametrize(
    ("curves", "best", "expected", "drawn_lines"),
    [
        ({"a": run(0.8), "b": run(0.9), "c": run(0.7)}, None, "Best of 3 runs: b, validation accuracy up to 0.900", 3),
        ({"a": run(0.8), "b": run(0.9)}, "a", "Best of 2 runs: a, validation accuracy up to 0.800", 2),
        ({"a": run(0.8), "b": run(0.9)}, "gone", "Best of 2 runs: b, validation accuracy up to 0.900", 2),
        ({"猫": run(0.8, 1)}, None, "猫, validation accuracy up to 0.800", 1),
        ({"a": run(0.8), "b": run(0.9, val_accuracy=NAN)}, "b", f"{BEST} a, validation accuracy up to 0.800", 1),
        ({"a": run(0.8, val_loss=INF)}, None, "a, validation accuracy up to 0.800", 1),
        ({"a": run(0.8, val_loss=[1, 1, 1, 1, 1e9])}, None, "a, validation accuracy up to 0.800", 1),
        ({"a": run(0.0), "b": run(0.0)}, None, "Best of 2 runs: a, validation accuracy up to 0.000", 2),
        (runs(10), None, "Best of 10 runs: model=effici….0003,seed=9, validation accuracy up to 0.890", 10),
        (runs(200), None, "Best of 200 runs: model=effici…003,seed=199, validation accuracy up to 0.900", 200),
        ({"a": run(0.8, val_accuracy=NAN)}, None, "No run has a validation accuracy", 0),
        ({}, None, "No run has a validation accuracy", 0),
    ],
)  # fmt: skip
def test_curves(curves, best, expected, drawn_lines, tmp_path, monkeypatch):
    figure = plots.curves(curves, best)
    assert legible(figure, tmp_path, monkeypatch) == expected
    if drawn_lines:
        assert len(figure.axes[0].lines) == drawn_lines + 1  # plus the dot on the best run


def test_curves_names_all_of_up_to_ten_runs_else_only_the_best():
    assert (
        sum("run " in text for text in texts(plots.curves({f"run {k}": run(0.1 * k) for k in range(10)}))) == 1 + 2 * 10
    )
    figure = plots.curves({f"run {k}": run(0.05 * k) for k in range(11)})
    assert [text for text in texts(figure) if text.startswith("run ")] == ["run 10", "run 10"]
    assert sorted({line.get_color() for line in figure.axes[0].lines}) == sorted([GREY, ORANGE])


def test_curves_counts_the_runs_left_out():
    figure = plots.curves({"a": run(0.8), "b": run(0.8, val_accuracy=NAN)})
    assert note(figure) == "Left out, without a validation accuracy: 1."


def table(val, **columns):
    return pd.DataFrame({"val_accuracy": val, **columns}, index=[f"{LONG}{k}" for k in range(len(val))])


@pytest.mark.parametrize(
    ("scores", "expected", "dots"),
    [
        (table([0.9, 0.8, 0.7]), "Best validation accuracy 0.900: model=effici…izer.lr=0", [3]),
        (table([0.9, 0.8], val_accuracy_std=[0.01, NAN]), "Best validation accuracy 0.900 ± 0.010: model", [2]),
        (table([0.9, 0.8], test_accuracy=[NAN, 0.7], count=[5, 1]), "Best validation accuracy 0.900: model", [2, 1]),
        (table([NAN, 0.8, INF]), "Best validation accuracy 0.800: model", [1]),
        (table([NAN], test_accuracy=[0.7]), "Best test accuracy 0.700: model", [1]),
        (table([0.9]), "Best validation accuracy 0.900: model", [1]),
        (table([0.5] * 40), "Best validation accuracy 0.500: model", [40]),
        (table(np.linspace(1, 0, 1000)), "Best validation accuracy 1.000: model", [40]),
        (table([NAN]), "No run has an accuracy", []),
        (table([]), "No run has an accuracy", []),
        (pd.DataFrame({"val_accuracy": [0.1, 0.2]}, index=[3, "$猫$"]), "Best validation accuracy 0.200: $猫$", [2]),
    ],
)  # fmt: skip
def test_bars(scores, expected, dots, tmp_path, monkeypatch):
    figure = plots.bars(scores)
    assert legible(figure, tmp_path, monkeypatch).startswith(expected.split("…")[0])
    dots_per_metric = [
        np.isfinite(bar.lines[0].get_xdata().astype(float)).sum() for axes in figure.axes for bar in axes.containers
    ]
    assert dots_per_metric == dots
    assert ("The first 40 of 1,000." in note(figure)) == (len(scores) > 40)


def test_bars_keeps_the_order_from_the_top_and_writes_the_numbers():
    scores = pd.DataFrame(
        {"val_accuracy": [0.7, 0.9], "test_accuracy": [0.65, NAN], "count": [5, 2]}, index=["first", "second"]
    )
    figure = plots.bars(scores)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    assert axes.yaxis_inverted()
    assert [text.get_text() for text in axes.texts] == [
        "validation", "0.700", "0.900", "test", "0.650", "–", "runs", "5", "2",
    ]  # fmt: skip
