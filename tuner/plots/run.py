"""The figures of one run: numbers in, `matplotlib.figure.Figure` out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tuner.plots import style
from tuner.plots.style import BLUE, BLUES, COLOURS, GRID, INK, MUTED, NAME, ORANGE, PAPER, TEXT, TITLE

LOWEST, HIGHEST, EXAMPLES = 35, 5, 25


def accuracy(metrics: pd.DataFrame, saved_epoch: int) -> Figure:
    """Train and validation accuracy by epoch; saved_epoch: the one, from 1, whose weights are saved.

    metrics: one row per epoch, with the columns of metrics.csv. Values may be NaN, even in a whole column.
    """
    note = "Train accuracy is the running mean over the epoch, with dropout on; validation is measured after it."
    figure = style.figure(_curve_title(metrics, saved_epoch, "accuracy"), note=note)
    axes = style.axes(figure)
    low, high = _curves(axes, metrics, saved_epoch, "accuracy")
    room = max(high - low, 0.05)
    axes.set_ylim(max(low - 0.2 * room, -0.01), min(high + 0.1 * room, 1.01))
    _mark_saved(axes, saved_epoch, height=0.03)
    axes.set(xlabel="epoch", ylabel="accuracy")
    return figure


def loss(metrics: pd.DataFrame, saved_epoch: int) -> Figure:
    """Train and validation loss by epoch, with the learning rate below. Arguments as for `accuracy`."""
    note = "Train loss is the running mean over the epoch, with dropout on; validation is measured after it."
    figure = style.figure(_curve_title(metrics, saved_epoch, "loss"), height=6.2, note=note)
    grid = figure.add_gridspec(2, 1, height_ratios=[4, 1])
    axes = style.axes(figure, grid[0])
    low, high = _curves(axes, metrics, saved_epoch, "loss")
    if high > 20 * low > 0:  # a single high value must not flatten the curve
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0, 1.25 * high or 1)
    _mark_saved(axes, saved_epoch, height=0.93)
    axes.set(ylabel="loss")

    rates = style.axes(figure, grid[1], sharex=axes)
    rates.plot(metrics["epoch"], metrics["lr"], color=INK, linewidth=2, marker="o", markersize=3)
    rates.set(xlabel="epoch", ylabel="lr", ylim=(0, 1.2 * metrics["lr"].max() or 1))
    rates.set_yticks([0, metrics["lr"].max()])
    rates.yaxis.set_major_formatter("{x:.2g}")
    axes.tick_params(labelbottom=False)
    figure.align_ylabels()
    return figure


def train_vs_test(accuracies: Mapping[str, float | None]) -> Figure:
    """Bars of accuracy, 0..1, by split, in the given order. A split whose accuracy is None or NaN is left out."""
    known = {split: value for split, value in accuracies.items() if value is not None and np.isfinite(value)}
    figure = style.figure(_gap_title(known), width=7.5, height=5)
    axes = style.axes(figure)
    bars = axes.bar(list(known), list(known.values()), width=0.6, color=[COLOURS.get(s, BLUE) for s in known])
    axes.bar_label(bars, fmt="{:.3f}", fontsize=TITLE, fontweight="bold", color=INK, padding=4, bbox=PAPER)
    axes.grid(False, axis="x")
    axes.tick_params(axis="x", labelsize=TITLE)
    axes.set(ylim=(0, 1.1), yticks=np.linspace(0, 1, 6), ylabel="accuracy")
    return figure


def confusion_matrix(counts: np.ndarray, classes: Sequence[str], split: str) -> Figure:
    """Counts of images, int [C, C]: rows true and columns predicted classes. Colours are shares of the true class.

    Up to 20 classes the cells show their counts, up to 10 also percentages; beyond 20 only colours.
    """
    counts, size = np.asarray(counts), len(classes)
    totals = counts.sum(axis=1, keepdims=True).repeat(size, axis=1)
    share = np.ma.masked_array(counts / np.maximum(totals, 1), mask=totals == 0)
    side = float(np.clip(0.65 * size, 4, 9 if size <= 20 else 12))  # of the matrix itself, in inches
    figure = style.figure(_confusion_title(counts, split), side + 3.5, side + 2.2, _confusion_note(counts, classes))
    axes = style.axes(figure)
    norm = PowerNorm(0.5, 0, 1)  # makes rare confusions visible
    image = axes.imshow(share, cmap=BLUES, norm=norm)
    bar = figure.colorbar(image, shrink=0.7, aspect=30, ticks=[0, 0.05, 0.25, 0.5, 1], format=PercentFormatter(1))
    bar.set_label("share of the true class's images", fontsize=TEXT, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=TEXT - 1, labelcolor=INK)
    axes.set(xlabel="predicted class", ylabel="true class")
    _name_cells(axes, classes, points=float(np.clip(58 * side / size, 5, TEXT)))
    if size <= 20:
        _count_cells(axes, counts, share, points=72 * side / size)
    return figure


def per_class(rows: Sequence[Mapping[str, Any]] | pd.DataFrame, split: str) -> Figure:
    """Accuracy of each class as bars, the highest on top, with its support, and a line at the overall accuracy.

    rows: of `tuner.runs.metrics.per_class`. Of more than 40 classes only the 35 lowest and the 5 highest are drawn.
    """
    table = pd.DataFrame(rows).sort_values(["accuracy", "support"], ascending=[True, False], kind="stable")
    tested = table[table["support"] > 0]
    if tested.empty:
        return style.figure(f"No {split} images to measure classes on", height=1)
    worst, between = tested.iloc[0], max(0, len(tested) - LOWEST - HIGHEST)
    lowest = f"{style.short(worst['class'])} is lowest at {worst['accuracy']:.3f}"
    title = f"{split.capitalize()} accuracy by class: {lowest if worst['accuracy'] < 1 else 'every image is right'}"
    if between:
        title += f" (the {LOWEST} lowest and {HIGHEST} highest of {len(tested)} classes)"
    untested = len(table) - len(tested)
    note = f"Left out: {untested} of {len(table)} classes, without {split} images." if untested else ""
    shown = pd.concat([tested[:LOWEST], tested[LOWEST + between :]])
    figure = style.figure(title, height=max(3.5, 0.33 * len(shown) + 2), note=note)
    axes = style.axes(figure)
    _class_bars(axes, shown, between)
    overall = np.average(tested["accuracy"], weights=tested["support"])
    axes.axvline(overall, color=ORANGE, linewidth=2)
    text, side = f"all images {overall:.3f}", "right" if overall > 0.5 else "left"
    style.annotate(
        axes, text, (overall, 1), (0, 4), axes.get_xaxis_transform(), ha=side, color=ORANGE, fontweight="bold"
    )
    return figure


def examples(
    images: Any, true: Sequence[str], predicted: Sequence[str], confidence: Sequence[float], split: str
) -> Figure:
    """The first 25 of the given mistakes, which come most confident first, as a grid of up to 5 x 5.

    images: uint8 [n, C, H, W], C = 1 gray or 3 RGB, torch (any device) or numpy; n may be 0. The others have n entries.
    confidence: the probability given to the predicted class, 0..1.
    """
    images = np.asarray(images.cpu() if hasattr(images, "cpu") else images)[:EXAMPLES]
    n, columns = len(images), 5
    if n == 0:
        return style.figure(f"No mistakes on the {split} images", height=1)
    rows = -(-n // columns)
    height = 1.7 * float(np.clip(images.shape[2] / images.shape[3], 0.3, 2)) + 0.75  # the image and its three lines
    which = f"{n} most confident mistakes" if n > 1 else "most confident mistake"
    note = "Above each image its true class; below it the predicted class and the confidence in it."
    figure = style.figure(f"The {which} on the {split} images", 1.8 * columns, rows * height + 0.9, note)
    small = max(len(name) for name in [*true[:n], *predicted[:n]]) > 17
    points, limit = (9, 24) if small else (TEXT, 17)
    for place, image in enumerate(images):
        axes = figure.add_subplot(rows, columns, place + 1, xticks=[], yticks=[])
        axes.imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)  # [C, H, W] -> [H, W, C]
        axes.spines[:].set_color(GRID)
        axes.set_title(style.short(true[place], limit), fontsize=points, color=INK, pad=4, **NAME)
        label = f"{style.short(predicted[place], limit)}\n{confidence[place]:.3f}"
        axes.set_xlabel(label, fontsize=points, color=ORANGE, labelpad=3, **NAME)
    return figure


def _curve_title(metrics: pd.DataFrame, saved_epoch: int, quantity: str) -> str:
    best, last = metrics[metrics["epoch"] == saved_epoch], metrics["epoch"].max()
    if best.empty:
        raise ValueError(f"saved_epoch={saved_epoch} must be an epoch of metrics, which end at {last}")
    for split, column in (("Validation", f"val_{quantity}"), ("Train", f"train_{quantity}")):
        if np.isfinite(value := float(best[column].iloc[0])):
            return f"{split} {quantity} {value:.3f} (epoch {saved_epoch} of {last})"
    return f"{quantity.capitalize()} is not a finite number at epoch {saved_epoch} of {last}"


def _curves(axes: Axes, metrics: pd.DataFrame, saved_epoch: int, quantity: str) -> tuple[float, float]:
    """Draw both curves with their names at their right ends. Returns the lowest and the highest value."""
    curves = {}
    for split, column in (("train", f"train_{quantity}"), ("validation", f"val_{quantity}")):
        values = metrics.set_index("epoch")[column].astype(float)
        if np.isfinite(values).any():
            curves[split] = values[np.isfinite(values)]
    upper = max(curves, key=lambda split: curves[split].iloc[-1], default=None)
    for split, values in curves.items():
        dots: dict[str, Any] = {"color": COLOURS[split], "marker": "o"}
        axes.plot(values.index, values, linewidth=2.5, markersize=6 if len(metrics) <= 40 else 0, **dots)
        if saved_epoch in values:
            axes.plot(saved_epoch, values[saved_epoch], markersize=10, **dots)
        # One name stands on its curve's height and the other hangs from it: they cannot overlap.
        end, side = values.index[-1], "bottom" if split == upper else "top"
        label = f"{split} {values[end]:.3f}"
        style.annotate(axes, label, (end, values[end]), (9, 0), va=side, color=COLOURS[split], fontweight="bold")
    first, last = metrics["epoch"].min(), metrics["epoch"].max()
    margin = 0.03 * (last - first) or 0.5
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    every = np.concatenate([*curves.values()]) if curves else np.array([0.0, 1.0])
    return float(every.min()), float(every.max())


def _mark_saved(axes: Axes, saved_epoch: int, height: float) -> None:
    """A line at the saved epoch, named at `height`, 0..1 of the axes, on its roomier side."""
    axes.axvline(saved_epoch, color=MUTED, linewidth=1.2, linestyle=":", zorder=1)
    side, sign = ("right", -1) if saved_epoch > np.mean(axes.get_xlim()) else ("left", 1)
    text, place = f"saved weights: epoch {saved_epoch}", (saved_epoch, height)
    style.annotate(axes, text, place, (8 * sign, 0), axes.get_xaxis_transform(), ha=side, color=MUTED, bbox=PAPER)


def _gap_title(known: Mapping[str, float]) -> str:
    if "test" not in known:
        title = ", ".join(f"{split} accuracy {value:.3f}" for split, value in known.items())
        return title.capitalize() or "No accuracy was measured"
    title = f"Test accuracy {known['test']:.3f}"
    if "train" not in known:
        return title
    gap = round(known["train"], 3) - round(known["test"], 3)  # of the rounded values, which readers see
    return f"{title}, {abs(100 * gap):.1f} points {'below' if gap >= 0 else 'above'} train"


def _confusion_title(counts: np.ndarray, split: str) -> str:
    right, total = int(np.trace(counts)), int(counts.sum())
    if total == 0:
        return f"Confusion matrix: no {split} images"
    return f"{split.capitalize()} accuracy {right / total:.3f} ({right:,} of {total:,} images)"


def _confusion_note(counts: np.ndarray, classes: Sequence[str]) -> str:
    wrong = counts - np.diag(np.diag(counts))
    row, column = np.unravel_index(wrong.argmax(), wrong.shape)
    note = ""
    if wrong.any():
        pair = f"{style.short(classes[row])} taken for {style.short(classes[column])}"
        note = f"Most frequent mistake: {pair}, {wrong[row, column]:,} of {counts[row].sum():,} images. "
    return note + ("" if counts.sum(axis=1).all() else "A grey row is a class without images.")


def _name_cells(axes: Axes, classes: Sequence[str], points: float) -> None:
    size = len(classes)
    step = -(-size // 120)  # past 120 the names would overlap
    ticks, names = range(0, size, step), [style.short(name) for name in classes[::step]]
    tilt: dict[str, Any] = {"rotation": 90 if size > 20 else 0}
    if 3 < size <= 20:
        tilt = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(ticks, names, **tilt, **NAME)
    axes.set_yticks(ticks, names, **NAME)
    axes.tick_params(labelsize=points)
    axes.grid(False)
    if size <= 40:  # faint lines between the cells lead the eye from a name to its row
        for set_ticks in (axes.set_xticks, axes.set_yticks):
            set_ticks(np.arange(size + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=GRID, linewidth=0.8)
    axes.spines[:].set(visible=True, color=GRID)


def _count_cells(axes: Axes, counts: np.ndarray, share: np.ndarray, points: float) -> None:
    """Write the counts into cells that are `points` wide; zeros stay empty."""
    with_parts = len(counts) <= 10
    longest = max(len(f"{counts.max():,}"), len("100.0%") if with_parts else 3)
    written: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": min(18, points / (0.72 * longest))}
    for row, column in np.argwhere(counts):
        part = share[row, column]
        text = f"{counts[row, column]:,}" + (f"\n{part:.1%}" if with_parts else "")
        axes.text(column, row, text, color="white" if part > 0.3 else INK, **written)


def _class_bars(axes: Axes, table: pd.DataFrame, between: int) -> None:
    rows = np.arange(len(table), dtype=float)
    if between:
        rows[LOWEST:] += 1
        axes.text(0.01, LOWEST, f"{between} classes between", va="center", color=MUTED, fontsize=TEXT - 1)
    axes.barh(rows, table["accuracy"], height=0.72, color=BLUE)
    axes.set_yticks(rows, [style.short(name) for name in table["class"]], **NAME)
    axes.set(xlim=(0, 1), ylim=(-0.6, rows[-1] + 0.6), xlabel="accuracy: the share of the class's images got right")
    axes.grid(False, axis="y")
    # Two columns of numbers beside the bars, where the line can't cross them.
    for points, colour, column, layout in ((70, INK, "accuracy", ".3f"), (128, MUTED, "support", ",")):
        written = {"ha": "right", "color": colour}
        style.annotate(axes, column, (1, 1), (points, 4), "axes fraction", **written)
        for row, value in zip(rows, table[column], strict=True):
            style.annotate(axes, format(value, layout), (1, row), (points, 0), va="center", **written)
