"""The figures that compare runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tuner.plots import style
from tuner.plots.style import COLOURS, GREY, MUTED, NAME, ORANGE, TEXT

NAMED, ROWS = 10, 40  # runs that have a colour and a name, rows that are drawn
# Okabe and Ito's colours for colour-blind readers, without yellow, and three darker ones.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#222222", "#E69F00", "#56B4E9", "#7A4B94", "#8C8C8C", "#8C510A"]


def curves(runs: Mapping[str, pd.DataFrame], best: str | None = None) -> Figure:
    """Validation accuracy and loss of runs by epoch. Up to ten are coloured and named; if more, only the best.

    runs: label -> metrics.csv as a table; values may be NaN.   best: the label to highlight; default: the run with the
    highest validation accuracy of all epochs.
    """
    every = {label: _points(table, "val_accuracy") for label, table in runs.items()}
    drawn = {label: line for label, line in every.items() if len(line)}
    if not drawn:
        return style.figure("No run has a validation accuracy", height=1)
    peaks = {label: line[line[:, 1].argmax()] for label, line in drawn.items()}
    best = best if best in drawn else max(peaks, key=lambda label: peaks[label][1])
    epoch, accuracy = peaks[best]
    of = f"Best of {len(runs):,} runs: " if len(runs) > 1 else ""
    title = f"{of}{style.short(best)}, validation accuracy up to {accuracy:.3f}"
    lost = len(runs) - len(drawn)
    figure = style.figure(title, 10, 8, f"Left out, without a validation accuracy: {lost:,}." if lost else "")
    grid = figure.add_gridspec(2, 1)
    upper, lower = style.axes(figure, grid[0]), style.axes(figure, grid[1])
    losses = {label: _points(runs[label], "val_loss") for label in drawn}
    _overlay(upper, drawn, best, "maximize")
    upper.plot(epoch, accuracy, "o", color=_colours(drawn, best)[best], markersize=9, zorder=2.4)
    _overlay(lower, losses, best, "minimize")
    style.name(upper, y="validation accuracy")
    style.name(lower, "epoch", "validation loss")
    upper.tick_params(labelbottom=False)
    lower.set_xlim(upper.get_xlim())
    figure.align_ylabels()
    return figure


def bars(table: pd.DataFrame) -> Figure:
    """The accuracies of runs or of groups of runs, one row each, in the given order.

    table: by label; val_accuracy and, if known, test_accuracy, val_accuracy_std, test_accuracy_std, count.
    They are dots on guide lines and not bars: the axis need not start at 0, so a difference of a point is visible.
    """
    kinds = [kind for kind in ("val", "test") if _column(table, f"{kind}_accuracy").notna().any()]
    if not kinds:
        return style.figure("No run has an accuracy", height=1)
    shown = table[:ROWS]
    note = f"The first {ROWS} of {len(table):,}." if len(table) > ROWS else ""
    spread = any(_column(shown, f"{kind}_accuracy_std").gt(0).any() for kind in kinds)
    note += " Whiskers: one standard deviation to either side." if spread else ""
    figure = style.figure(_bars_title(table, kinds[0]), width=10, height=max(3.2, 0.34 * len(shown) + 2), note=note)
    axes = style.axes(figure)
    axes.grid(False, axis="y")
    ends = []
    for place, kind in enumerate(kinds):
        rows = np.arange(len(shown)) + 0.16 * (2 * place - len(kinds) + 1)
        value = _column(shown, f"{kind}_accuracy").to_numpy()
        about = _column(shown, f"{kind}_accuracy_std").fillna(0).to_numpy()
        colour = COLOURS["validation" if kind == "val" else kind]
        axes.hlines(rows, -1, value, color=colour, alpha=0.25, linewidth=1.2)
        axes.errorbar(value, rows, xerr=about, fmt="o", color=colour, markersize=7, elinewidth=2)
        ends += [value - about, value + about]
    _figures(axes, shown, kinds)
    every = np.concatenate(ends)
    low, high = style.limits(np.nanmin(every), np.nanmax(every))
    axes.set(xlim=(max(low, -0.01), min(high, 1.01)), ylim=(len(shown) - 0.4, -0.6), xlabel="accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_yticks(range(len(shown)), [style.short(label, 34) for label in shown.index], **NAME)
    return figure


def _points(table: pd.DataFrame, column: str) -> np.ndarray:
    """[n, 2]: epoch, value. Values that are not finite are left out."""
    points = table.reindex(columns=["epoch", column]).to_numpy(dtype=float)
    return points[np.isfinite(points).all(axis=1)]


def _colours(lines: Iterable[str], best: str) -> dict[str, str]:
    labels = list(lines)
    if len(labels) <= NAMED:
        return dict(zip(labels, PALETTE, strict=False))
    return dict.fromkeys(labels, GREY) | {best: ORANGE}


def _overlay(axes: Axes, lines: Mapping[str, np.ndarray], best: str, goal: str) -> None:
    colours, few = _colours(lines, best), len(lines) <= NAMED
    known = {label: line for label, line in lines.items() if len(line)}
    for label, line in known.items():
        look: dict[str, Any] = {"linewidth": 2 if few else 1, "alpha": 1 if few else 0.5, "zorder": 2}
        if label == best:
            look = {"linewidth": 3, "zorder": 2.3}
        axes.plot(*line.T, color=colours[label], marker="o" if len(line) == 1 else "", **look)
    if known:
        _fit(axes, list(known.values()), goal)
        _name_lines(axes, known if few else {best: known[best]} if best in known else {}, colours, best)


def _fit(axes: Axes, lines: Sequence[np.ndarray], goal: str) -> None:
    """Limits that show the end of every line. The first epochs and outliers may be cut off."""
    every = np.concatenate(lines)
    ends = [*style.focus(every[:, 1], goal), *(line[-1, 1] for line in lines)]
    low, high = min(ends), max(ends)
    if high > 20 * low > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        low, high = low / 1.2, high * 1.2
    else:
        low, high = style.limits(low, high)
    axes.set(xlim=style.limits(every[:, 0].min(), every[:, 0].max(), 0.02), ylim=(low, high))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def _name_lines(axes: Axes, lines: Mapping[str, np.ndarray], colours: Mapping[str, str], best: str) -> None:
    """Write names to the right, each as near the end of its line as the others allow."""
    to_share = axes.transData + axes.transAxes.inverted()
    ends = [float(to_share.transform(line[-1])[1]) for line in lines.values()]
    heights = style.spread(ends, 17 / style.size(axes)[1])
    heights -= max(0, heights.max(initial=0) - 1.02)
    for (label, line), height in zip(lines.items(), heights, strict=True):
        colour, weight = colours[label], "bold" if label == best else "normal"
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "alpha": 0.6, "relpos": (0, 0.5), "shrinkA": 0}
        at: dict[str, Any] = {"xytext": (1.04, height), "textcoords": "axes fraction", "va": "center"}
        look: dict[str, Any] = {"color": colour, "fontweight": weight, "fontsize": TEXT, "arrowprops": arrow, **NAME}
        axes.annotate(style.short(label), line[-1], annotation_clip=False, **at, **look)


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    column = pd.to_numeric(table[name], errors="coerce") if name in table else pd.Series(np.nan, index=table.index)
    return column.astype(float).where(lambda values: np.isfinite(values))


def _bars_title(table: pd.DataFrame, kind: str) -> str:
    word = "validation" if kind == "val" else kind
    row = int(np.nanargmax(_column(table, f"{kind}_accuracy")))
    about = _column(table, f"{kind}_accuracy_std").iloc[row]
    spread = f" ± {about:.3f}" if about > 0 else ""
    value = _column(table, f"{kind}_accuracy").iloc[row]
    return f"Best {word} accuracy {value:.3f}{spread}: {style.short(table.index[row])}"


def _figures(axes: Axes, table: pd.DataFrame, kinds: list[str]) -> None:
    """Write columns of numbers to the right of the dots."""
    words = {"val": ("validation", COLOURS["validation"]), "test": ("test", COLOURS["test"])}
    columns = [(*words[kind], _column(table, f"{kind}_accuracy"), ".3f") for kind in kinds]
    if "count" in table:
        columns.append(("runs", MUTED, _column(table, "count"), ",.0f"))
    at = 6
    for name, colour, values, layout in columns:
        at += 8 * max(len(name), 5) + 6
        style.annotate(axes, name, (1, 1), (at, 6), "axes fraction", ha="right", color=colour)
        for row, value in enumerate(values):
            text = "–" if np.isnan(value) else format(value, layout)
            style.annotate(
                axes, text, (1, row), (at, 0), axes.get_yaxis_transform(), ha="right", va="center", color=colour
            )
