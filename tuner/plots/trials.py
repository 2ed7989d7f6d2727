"""The figures of a study's trials: what they reached, how they got there and when they ran.

trials: one row per trial, by number, with the columns number, state (COMPLETE, PRUNED, FAIL, RUNNING, WAITING), value
(several objectives: value_0, value_1 ...), start, end, baseline (whether it is the default config), and parameters.
Only complete trials with finite values count as results; a pruned trial's value is where it was stopped.
goal: "maximize" or "minimize". objective: what the value is called, such as "validation accuracy".
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tuner.plots import style
from tuner.plots.style import BLUE, DEFAULT, GREY, HUGE, MUTED, ORANGE, PAPER, SIGN, STATES


def history(trials: pd.DataFrame, goal: str, objective: str) -> Figure:
    """Values by trial number, the best so far as a line, the default config, and where trials were pruned or failed."""
    done = complete(trials)
    if done.empty:
        return nothing(trials)
    top, default, bounds = best(done, goal), baseline(done), style.focus(done["value"], goal)
    lost = [state for state in ("PRUNED", "FAIL") if (trials["state"] == state).any()]
    figure = style.figure(
        _best_title(top, default, objective), width=10, height=5.5 + 0.3 * len(lost), note=off_scale(done, bounds)
    )
    grid = figure.add_gridspec(2, 1, height_ratios=[4.5, 0.3 * len(lost) or 0.01])
    axes = style.axes(figure, grid[0])
    dots(axes, done["number"], done["value"], bounds, goal)
    so_far = np.maximum if goal == "maximize" else np.minimum
    line = np.clip([*so_far.accumulate(done["value"]), top["value"]], *bounds)
    axes.step([*done["number"], trials["number"].max()], line, color=ORANGE, linewidth=2.5, where="post")
    axes.plot(top["number"], top["value"], "o", color=ORANGE, markersize=10)
    axes.set(ylim=style.limits(*bounds), xlim=style.limits(0, trials["number"].max(), 0.02))
    _name_levels(axes, top, default, goal)
    style.name(axes, y=objective)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if lost:
        axes.tick_params(labelbottom=False)
        axes = style.axes(figure, grid[1], sharex=axes)
        _strip(axes, trials, lost)
    axes.set_xlabel("trial")
    return figure


def intermediate_values(
    trials: pd.DataFrame, curves: Mapping[int, Mapping[int, float]], goal: str, objective: str
) -> Figure:
    """The values that trials reported, by epoch.   curves: trial number -> epoch -> value.

    Complete trials are blue, the best is orange; pruned ones are grey and end in a cross.
    """
    known = {number: _finite(curve) for number, curve in curves.items()}
    known = {number: curve for number, curve in known.items() if len(curve)}
    if not known:
        return style.figure("No trial has reported a value by epoch", height=1)
    done = complete(trials)
    top = None if done.empty else best(done, goal)
    states = trials.set_index("number")["state"]
    title = _summary(trials) if top is None else f"Best {objective} {style.number(top['value'])}, trial {top['number']}"
    note = "Blue: complete. Grey: pruned where it ends in a cross; without one, failed or still running."
    figure = style.figure(title + _pruned_by(known, states), width=10, note=note)
    axes = style.axes(figure)
    others = {number: curve for number, curve in known.items() if top is None or number != top["number"]}
    _draw_curves(axes, others, states)
    every = np.concatenate([*known.values()])
    bounds = style.focus(every[:, 1], goal)
    if top is not None and top["number"] in known:
        curve = known[top["number"]]
        axes.plot(*curve.T, color=ORANGE, linewidth=3, marker="o", markersize=4 if len(curve) < 40 else 0)
        style.annotate(axes, f"trial {top['number']}", curve[-1], (9, 0), va="center", color=ORANGE, fontweight="bold")
    style.name(axes, "epoch", objective)
    axes.set(xlim=style.limits(every[:, 0].min(), every[:, 0].max(), 0.02), ylim=style.limits(*bounds, 0.04))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    return figure


def edf(trials: pd.DataFrame, goal: str, objective: str) -> Figure:
    """The share of complete trials that are at least as good as a value. Better is to the right."""
    done = complete(trials)
    if done.empty:
        return nothing(trials)
    default, bounds = baseline(done), style.focus(done["value"], goal)
    ranked = SIGN[goal] * np.sort(SIGN[goal] * done["value"].to_numpy())[::-1]  # the best first
    note = off_scale(done, bounds, "to the left")
    figure = style.figure(_edf_title(ranked, default, goal, objective), note=note)
    axes = style.axes(figure)
    n, worst = len(ranked), bounds[0] if goal == "maximize" else bounds[1]
    x, share = np.array([*ranked, worst]), np.array([*np.arange(1, n + 1), n]) / n
    shown = np.clip(x, *bounds)
    axes.step(shown, share, where="post", color=BLUE, linewidth=2.5)
    axes.fill_between(shown, share, step="post", color=BLUE, alpha=0.1, linewidth=0)
    shares = {1: "best"} if n < 20 else {-(-n // 2): "half reach", -(-n // 10): "a tenth reach", 1: "best"}
    for rank, word in shares.items():
        place, colour, up = (ranked[rank - 1], rank / n), ORANGE if rank == 1 else BLUE, 0 if rank == 1 else 6
        axes.plot(*place, "o", color=colour, markersize=8)
        text, look = f"{word} {style.number(place[0])}", {"color": colour, "fontweight": "bold"}
        style.annotate(axes, text, place, (9, up), bbox=PAPER, va="bottom" if up else "center", **look)
    if default is not None:
        place, at = (np.clip(default["value"], *bounds), 1), axes.get_xaxis_transform()
        axes.axvline(place[0], color=MUTED, linewidth=1.2, linestyle=":")
        style.annotate(axes, "default config", place, (0, 4), at, ha="center", color=MUTED)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlim=style.limits(*bounds, 0.03)[:: SIGN[goal]], ylim=(-0.05, 1.03))
    style.name(axes, objective, "trials at least as good")
    return figure


def complete(trials: pd.DataFrame, columns: Sequence[str] = ("value",)) -> pd.DataFrame:
    """The trials that count as results: complete, with finite values."""
    values = trials.reindex(columns=list(columns)).astype(float)
    return trials.assign(**values)[(trials["state"] == "COMPLETE") & (values.abs() < HUGE).all(axis=1)]


def best(done: pd.DataFrame, goal: str) -> pd.Series:
    """The best of complete trials, the first if there is a tie."""
    return done.iloc[int((done["value"] * SIGN[goal]).argmax())]


def baseline(done: pd.DataFrame) -> pd.Series | None:
    """The trial of the default config, or None if it is not complete."""
    defaults = done[done["baseline"].astype(bool)]
    return None if defaults.empty else defaults.iloc[0]


def nothing(trials: pd.DataFrame) -> Figure:
    """The figure of a study without a result."""
    return style.figure(_summary(trials), height=1)


def off_scale(done: pd.DataFrame, bounds: tuple[float, float], how: str = "drawn as triangles at the edge") -> str:
    """A note on the values that `focus` left out."""
    out = int((~done["value"].between(*bounds)).sum())
    return f"{out:,} of {len(done):,} complete trials are off the scale, {how}." if out else ""


def dots(axes: Axes, x: Any, values: pd.Series, bounds: tuple[float, float], goal: str) -> None:
    """Draw a blue dot for each value within the bounds, a triangle at the edge for each beyond."""
    x, inside = np.asarray(x), values.between(*bounds).to_numpy()
    size = float(np.clip(2000 / max(1, len(values)), 12, 40))
    blue: dict[str, Any] = {"color": BLUE, "alpha": 0.6 if len(values) < 200 else 0.4, "linewidths": 0}
    axes.scatter(x[inside], values[inside], s=size, **blue)
    axes.scatter(x[~inside], values[~inside].clip(*bounds), s=30, marker="v" if goal == "maximize" else "^", **blue)


def _best_title(top: pd.Series, default: pd.Series | None, objective: str) -> str:
    title = f"Best {objective} {style.number(top['value'])}, trial {top['number']}"
    if default is None:
        return title
    if default["number"] == top["number"]:
        return f"{title}: the default config"
    return f"{title}; default config {style.number(default['value'])}"


def _summary(trials: pd.DataFrame) -> str:
    """Why there is no result: "No complete trial yet: 3 pruned, 1 failed"."""
    counts = [f"{(trials['state'] == state).sum():,} {word}" for state, (word, _) in STATES.items()]
    present = ", ".join(count for count in counts if not count.startswith("0 ")) or "none has started"
    return f"{'No finite value' if 'complete' in present else 'No complete trial'} yet: {present}"


def _edf_title(ranked: np.ndarray, default: pd.Series | None, goal: str, objective: str) -> str:
    n, top = len(ranked), style.number(ranked[0])
    if n == 1:
        return f"The only complete trial reaches {objective} {top}"
    if default is None:
        return f"Half of {n:,} trials reach {objective} {style.number(ranked[-(-n // 2) - 1])}, the best {top}"
    better = int((SIGN[goal] * (ranked - default["value"]) > 0).sum())
    verb = "beats" if better == 1 else "beat"
    return f"{better:,} of {n - 1:,} trials {verb} the default config's {style.number(default['value'])}"


def _name_levels(axes: Axes, top: pd.Series, default: pd.Series | None, goal: str) -> None:
    """Name the best value and that of the default config at the right. The better is above, so they can't overlap."""
    upper, lower = ("bottom", "top") if goal == "maximize" else ("top", "bottom")
    levels = [(top["value"], "best", ORANGE, upper)]
    if default is not None and default["value"] != top["value"]:
        levels += [(default["value"], "default config", MUTED, lower)]
    for value, word, colour, side in levels:
        height = np.clip(value, *axes.get_ylim())
        text, at = f"{word} {style.number(value)}", axes.get_yaxis_transform()
        style.annotate(axes, text, (1, height), (6, 0), at, va=side, color=colour, fontweight="bold")
    if default is not None:
        axes.axhline(default["value"], color=MUTED, linewidth=1.2, linestyle=":", zorder=1)
        axes.plot(default["number"], default["value"], "D", **DEFAULT)


def _strip(axes: Axes, trials: pd.DataFrame, lost: list[str]) -> None:
    """Draw a row per state, with a tick for each of its trials."""
    names = []
    for row, state in enumerate(lost):
        word, colour = STATES[state]
        numbers = trials.loc[trials["state"] == state, "number"]
        axes.scatter(numbers, np.full(len(numbers), row), marker="|", s=60, color=colour, linewidths=1)
        names.append(f"{len(numbers):,} {word}")
    axes.set_yticks(range(len(lost)), names)
    axes.set_ylim(len(lost) - 0.5, -0.5)


def _finite(curve: Mapping[int, float]) -> np.ndarray:
    """[n, 2]: step, value. Values that are not finite are left out."""
    points = np.array(sorted(curve.items()), dtype=float).reshape(-1, 2)
    return points[np.abs(np.nan_to_num(points[:, 1], nan=np.inf)) < HUGE]


def _draw_curves(axes: Axes, curves: Mapping[int, np.ndarray], states: pd.Series) -> None:
    """Draw complete trials first, then pruned ones with their crosses, then failed and running ones."""
    groups: dict[str, list[np.ndarray]] = {"COMPLETE": [], "PRUNED": [], "": []}
    for number, curve in curves.items():
        groups.get(states.get(number, ""), groups[""]).append(curve)
    weight = float(np.clip(12 / np.sqrt(len(curves) or 1), 0.5, 1.5))
    for state, lines in groups.items():
        colour, alpha = (BLUE, 0.4) if state == "COMPLETE" else (GREY, 0.7)
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=weight, alpha=alpha, capstyle="round"))
        cross, alone = state == "PRUNED", [line[-1] for line in lines if state == "PRUNED" or len(line) == 1]
        ends = np.array(alone).reshape(-1, 2)
        area = float(np.clip(1500 / len(ends), 6, 26)) if len(ends) else 0
        marker: dict[str, Any] = {"marker": "x" if cross else "o", "linewidths": 1.2 if area > 10 else 0.7}
        axes.scatter(ends[:, 0], ends[:, 1], s=area, color=MUTED, alpha=0.9, zorder=2.2, **marker)


def _pruned_by(known: Mapping[int, np.ndarray], states: pd.Series) -> str:
    ends = [curve[-1, 0] for number, curve in known.items() if states.get(number) == "PRUNED"]
    if not ends:
        return ""
    half = f", half of them by epoch {np.quantile(ends, 0.5, method='higher'):g}" if len(ends) > 3 else ""
    return f"; {len(ends):,} of {len(known):,} trials were pruned{half}"
