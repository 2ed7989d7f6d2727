"""The figures of a study's search space: which parameters mattered, and where in their ranges the good values lie.

trials, goal and objective are those of `tuner.plots.trials`; parameters are drawn in the order given.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from tuner.plots import style
from tuner.plots.space import Parameter, Scale, scale, value_scale, value_text, wrapped, write_ticks
from tuner.plots.style import BLUE, DEFAULT, GREY, INK, LIGHT, NAME, ORANGE, PAPER, SIGN, SMALL, TEXT
from tuner.plots.trials import complete, dots, nothing, off_scale

SHADES = LinearSegmentedColormap.from_list("shades", ["#DCEBF5", LIGHT, BLUE, "#00395E"])  # darker is better
AXES, PAIRED, ENOUGH = 15, 4, 10  # parallel axes, parameters in pairs, trials for a local mean


def importances(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bars of the share, 0..1, that each parameter has in the differences between trials, the most important on top.

    shares: evaluator, such as "fANOVA", or "fANOVA, accuracy" of one of several objectives -> parameter -> share.
    """
    table = pd.DataFrame({name: pd.Series(dict(by_parameter), dtype=float) for name, by_parameter in shares.items()})
    table = table.where(np.isfinite(table)).dropna(how="all").dropna(axis=1, how="all")
    if table.empty:
        return style.figure("Too few trials to tell which parameters matter", height=1)
    table = table.iloc[np.argsort(-table.mean(axis=1).to_numpy(), kind="stable")]
    thick = 0.8 / len(table.columns)
    whose = "objective" if _objectives(table) else "method"
    note = f"A share holds for the ranges that were searched. Those of one {whose} add up to 1."
    height = max(3.5, 0.25 * (len(table.columns) + 0.5) * len(table) + 2)
    figure = style.figure(_importance_title(table), height=height, note=note)
    axes = style.axes(figure)
    for place, (evaluator, colour) in enumerate(zip(table, _colours(len(table.columns)), strict=True)):
        rows = np.arange(len(table)) + (place + 0.5) * thick - 0.4
        axes.barh(rows, table[evaluator].fillna(0), height=0.9 * thick, color=colour)
        for row, share in zip(rows, table[evaluator], strict=True):
            text = "" if np.isnan(share) else f"{share:.2f}" + (f"  {evaluator}" if row < 0.5 else "")
            style.annotate(axes, text, (np.nan_to_num(share), row), (5, 0), va="center", color=INK, **NAME)
    axes.set_yticks(range(len(table)), [style.short(name, 34) for name in table.index], **NAME)
    axes.set(xlim=(0, np.nanmax(table.to_numpy()) or 1), ylim=(len(table) - 0.5, -0.5))
    axes.set_xlabel("share of the differences between trials")
    axes.grid(False, axis="y")
    return figure


def parallel_coordinates(trials: pd.DataFrame, parameters: Sequence[Parameter], goal: str, objective: str) -> Figure:
    """One line per complete trial, through its parameters to its value. Darker and higher is better."""
    done = complete(trials)
    if done.empty or not parameters:
        return nothing(trials)
    shown, bounds = parameters[:AXES], style.focus(done["value"], goal)
    value = done["value"].clip(*bounds).to_numpy()
    scales = [*(scale(parameter, done) for parameter in shown), value_scale(value, *bounds, falling=goal == "minimize")]
    lines = np.column_stack([each.share() for each in scales])  # [trials, axes]
    notes = [f"The first {AXES} of {len(parameters)} parameters."] if len(parameters) > AXES else []
    if np.isnan(lines).any():
        notes.append("A line breaks where its trial does not have the parameter.")
    notes.append(off_scale(done, bounds, "drawn at the edge"))
    width = max(9, 1.8 * len(scales))
    figure = style.figure(
        _best_title(done, parameters, goal, objective), width, max(5.8, 0.32 * width), " ".join(notes)
    )
    axes = style.axes(figure)
    axes.grid(False)
    _lines(axes, lines, value, goal)
    limit = int((72 * 0.9 * width / len(scales) - 16) / 13)  # letters on either side of an axis
    for place, each in enumerate(scales):
        _upright(axes, place, each, limit)
    row = _best_row(done, goal)
    words = [
        *(value_text(done[p.name].iloc[row]) if p.name in done else "" for p in shown),
        style.number(done["value"].iloc[row]),
    ]
    axes.plot(lines[row], color=ORANGE, linewidth=3, marker="o")
    look: dict[str, Any] = {"color": ORANGE, "fontweight": "bold", "fontsize": SMALL, "bbox": PAPER, **NAME}
    for place in map(int, np.flatnonzero(np.isfinite(lines[row]))):
        text = style.short(words[place], limit) if scales[place].categorical else words[place]
        axes.annotate(
            text, (place, lines[row, place]), (9, 0), textcoords="offset points", va="center", zorder=4, **look
        )
    names = [wrapped(name, 18) for name in [*(parameter.name for parameter in shown), objective]]
    axes.set_xticks(range(len(scales)), names, **NAME)
    axes.tick_params(labelsize=SMALL, labeltop=True, labelbottom=False)
    axes.set(yticks=[], ylim=(-0.04, 1.04), xlim=(-0.4, len(scales) - 0.5))
    return figure


def slices(trials: pd.DataFrame, parameters: Sequence[Parameter], goal: str, objective: str) -> Figure:
    """The values of complete trials against each parameter, with the local mean if there are enough trials."""
    done = complete(trials)
    if done.empty or not parameters:
        return nothing(trials)
    bounds, special = style.focus(done["value"], goal), _special(done, goal)
    means = " Line: the local mean." if len(done) >= ENOUGH else ""
    note = f"{_key(special)}{means} {off_scale(done, bounds)}"
    figure, grid = style.panels(_best_title(done, parameters, goal, objective), len(parameters), note)
    value = done["value"].clip(*bounds).to_numpy()
    for place, (parameter, axes) in enumerate(zip(parameters, grid, strict=True)):
        along = scale(parameter, done)
        x = along.scattered(0)
        has = np.isfinite(x)
        dots(axes, x[has], done["value"][has], bounds, goal)
        if has.sum() >= ENOUGH:
            _local_mean(axes, along, value)
        for row, mark in special:
            axes.plot(x[row], value[row], **mark)
        write_ticks(axes.xaxis, along, points=230)
        axes.set(xlim=style.limits(along.low, along.high, 0.04), ylim=style.limits(*bounds))
        style.name(axes, wrapped(parameter.name, 30), objective if place % 3 == 0 else "")
        axes.tick_params(labelleft=place % 3 == 0)
    return figure


def contours(trials: pd.DataFrame, parameters: Sequence[Parameter], goal: str, objective: str) -> Figure:
    """The trials and the local mean of their values over each pair of the first four parameters."""
    done = complete(trials)
    if done.empty:
        return nothing(trials)
    scales = [(parameter.name, scale(parameter, done)) for parameter in parameters[:PAIRED]]
    every = [(x, y, _both(x[1], y[1])) for x, y in combinations(scales, 2)]
    pairs = [pair for pair in every if pair[2]]
    if not pairs:
        why = "No trial has two of the parameters" if every else "Two parameters are needed for a pair"
        return style.figure(why, height=1)
    bounds, special = style.focus(done["value"], goal), _special(done, goal)
    notes = [_key(special)]
    if any(trials_of_both >= ENOUGH for *_, trials_of_both in pairs):
        notes.append("Areas: the local mean, where trials are near.")
    if len(parameters) > PAIRED:
        notes.append(f"The first {PAIRED} of {len(parameters)} parameters.")
    if len(pairs) < len(every):
        notes.append("Left out: pairs that no trial has both of.")
    notes.append(off_scale(done, bounds, "drawn in the colour of the end"))
    figure, grid = style.panels(_best_title(done, parameters, goal, objective), len(pairs), " ".join(notes))
    value = done["value"].clip(*bounds).to_numpy()
    shades: dict[str, Any] = {"cmap": _shades(goal), "norm": _norm(*bounds)}
    for ((across, x), (up, y), trials_of_both), axes in zip(pairs, grid, strict=True):
        _pair(axes, x, y, value, special, shades, areas=trials_of_both >= ENOUGH)
        style.name(axes, wrapped(across, 30), wrapped(up, 30))
    bar = figure.colorbar(ScalarMappable(**shades), ax=grid, aspect=30, shrink=0.9)
    bar.set_label(objective, fontsize=TEXT, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=TEXT - 1, labelcolor=INK)
    return figure


def _both(x: Scale, y: Scale) -> int:
    """The number of trials that have both parameters."""
    return int((np.isfinite(x.places) & np.isfinite(y.places)).sum())


def _best_row(done: pd.DataFrame, goal: str) -> int:
    return int((SIGN[goal] * done["value"]).argmax())


def _best_title(done: pd.DataFrame, parameters: Sequence[Parameter], goal: str, objective: str) -> str:
    """The best trial, with its parameters if they are few. They are called by the last part of their names."""
    top = done.iloc[_best_row(done, goal)]
    has = [p for p in parameters if p.name in done and (pd.notna(top[p.name]) or None in (p.choices or ()))]
    names = [parameter.name for parameter in has]
    if not 0 < len(names) <= 4:
        return f"Best {objective} {style.number(top['value'])}, trial {top['number']}"
    ends = [name.rsplit(".", 1)[-1] for name in names]
    ends = ends if len(set(ends)) == len(ends) else names
    values = [f"{style.short(end)} {value_text(top[name])}" for name, end in zip(names, ends, strict=True)]
    return f"Trial {top['number']} is best, {style.number(top['value'])}: {', '.join(values)}"


def _special(done: pd.DataFrame, goal: str) -> list[tuple[int, dict[str, Any]]]:
    """(row, marker) of the best trial and of the default config."""
    marks = [(_best_row(done, goal), {"marker": "o", "color": ORANGE, "markersize": 12})]
    return marks + [(int(row), {"marker": "D", **DEFAULT}) for row in np.flatnonzero(done["baseline"].astype(bool))[:1]]


def _key(special: Sequence[Any]) -> str:
    return "Orange: the best." + (" Diamond: the default config." if len(special) > 1 else "")


def _shades(goal: str) -> Colormap:
    return SHADES if goal == "maximize" else SHADES.reversed()


def _norm(low: float, high: float) -> Normalize:
    return Normalize(low, high) if high > low else Normalize(*style.limits(low, high))


def _lines(axes: Axes, lines: np.ndarray, value: np.ndarray, goal: str) -> None:
    """One line for each row of [trials, axes], the best on top."""
    order = np.argsort(SIGN[goal] * value, kind="stable")
    paths = np.stack(np.broadcast_arrays(np.arange(lines.shape[1]), lines), axis=2)[order]  # [trials, axes, (x, y)]
    drawn = LineCollection(list(paths), cmap=_shades(goal), norm=_norm(value.min(), value.max()), alpha=0.75)
    drawn.set(array=value[order], linewidths=float(np.clip(16 / np.sqrt(len(value)), 0.6, 1.8)))
    axes.add_collection(drawn, autolim=False)


def _upright(axes: Axes, place: int, scale: Scale, limit: int) -> None:
    """An axis of parallel coordinates, with its ticks to the left."""
    axes.axvline(place, 0.04, 0.96, color=GREY, linewidth=1.2, zorder=2.1)
    step = -(-len(scale.ticks) // 16)
    for tick, name in list(scale.ticks.items())[::step]:
        at = (place, (tick - scale.low) / (scale.high - scale.low))
        look: dict[str, Any] = {"fontsize": SMALL, "color": INK, "bbox": {**PAPER, "alpha": 0.8}, "zorder": 3, **NAME}
        text = style.short(name, limit)
        axes.annotate(text, at, (-5, 0), textcoords="offset points", ha="right", va="center", **look)


def _local_mean(axes: Axes, along: Scale, value: np.ndarray) -> None:
    marks, near = along.kernel(len(value))
    amount = near.sum(axis=1)
    mean = np.where(amount >= 2, near @ value / np.maximum(amount, 1e-9), np.nan)
    look: dict[str, Any] = {"marker": "_", "markersize": 26, "linestyle": ""} if along.categorical else {}
    axes.plot(marks, mean, color=INK, markeredgewidth=2, linewidth=2, **look)


def _pair(
    axes: Axes, x: Scale, y: Scale, value: np.ndarray, special: Any, shades: Mapping[str, Any], areas: bool
) -> None:
    """The plane of two parameters: the local mean, and each trial in its own colour."""
    if areas:
        _surface(axes, x, y, value, shades)
    across, up = x.scattered(0), y.scattered(1)
    small = len(value) > 200
    edge: dict[str, Any] = {"s": 8 if small else 26, "linewidths": 0.3 if small else 0.6, "edgecolors": INK}
    axes.scatter(across, up, c=value, **edge, **shades)
    for row, mark in special:
        axes.plot(across[row], up[row], **mark)
    write_ticks(axes.xaxis, x, points=180)
    write_ticks(axes.yaxis, y, points=190)
    axes.set(xlim=style.limits(x.low, x.high, 0.04), ylim=style.limits(y.low, y.high, 0.04))
    axes.grid(False)


def _surface(axes: Axes, x: Scale, y: Scale, value: np.ndarray, shades: Mapping[str, Any]) -> None:
    """The mean of the trials near each place, weighted by nearness; white if fewer than two are near."""
    (columns, near_x), (rows, near_y) = x.kernel(len(value)), y.kernel(len(value))
    amount = near_y @ near_x.T  # [rows, columns]
    mean = (near_y * value) @ near_x.T / np.maximum(amount, 1e-9)
    axes.pcolormesh(
        columns, rows, np.ma.masked_array(mean, amount < 1.5), alpha=0.75, linewidth=0, shading="nearest", **shades
    )


def _importance_title(table: pd.DataFrame) -> str:
    """The most important parameter with its shares, if the methods agree; otherwise that of each."""
    objectives = _objectives(table)
    first = {str(name): str(shares.idxmax()) for name, shares in (objectives or table).items()}
    parameters = list(dict.fromkeys(first.values()))
    if len(parameters) == 1:
        shares = ", ".join(f"{name} {shares.max():.2f}" for name, shares in (objectives or table).items())
        return f"{style.short(parameters[0])} matters most ({shares})"
    if objectives:
        each = (f"{style.short(parameter)} for {name}" for name, parameter in first.items())
        return f"What matters most: {', '.join(each)}"
    choices = (f"{style.short(parameter)} ({name})" for name, parameter in first.items())
    return f"The methods disagree on what matters most: {', '.join(choices)}"


def _objectives(table: pd.DataFrame) -> dict[str, pd.Series]:
    """The shares by objective, if all are by one method: "fANOVA, accuracy". Otherwise empty."""
    parts = [str(name).partition(", ") for name in table]
    if len(parts) < 2 or len({method for method, *_ in parts}) > 1:
        return {}
    return {objective: table[name] for (*_, objective), name in zip(parts, table, strict=True)}


def _colours(count: int) -> list[str]:
    return [BLUE, GREY, ORANGE, INK, LIGHT][:count] if count <= 5 else [BLUE] * count
