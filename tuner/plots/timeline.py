"""When the trials of a study ran."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tuner.plots import style
from tuner.plots.style import INK, MUTED, STATES, TEXT

UNITS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}


def timeline(trials: pd.DataFrame) -> Figure:
    """One bar per trial from its start to its end, in the first free lane. Running trials extend to the latest time.

    trials: one row per trial, with the columns number, state, start and end, which may be NaT.
    """
    started = trials[trials["start"].notna() & trials["state"].isin(STATES)]  # duplicates took no time
    if started.empty:
        return style.figure("No trial has started yet", height=1)
    begin, end, cuts, idle = _without_idle(*_seconds(started))
    lanes, span = _lanes(begin, end), float(end.max())
    several = f", up to {lanes.max() + 1:,} at once" if lanes.max() else ""
    title = f"{len(started):,} trial{'s' * (len(started) > 1)} in {_duration(span)}{several}"
    note = f"Cut out at the dotted lines: {_duration(idle)} in which nothing ran." if idle else ""
    height = float(np.clip(0.34 * lanes.max() + 2.4, 2.6, 8))
    figure = style.figure(title, height=height, note=note)
    axes = style.axes(figure)
    unit = _unit(span)
    begin, end, cuts = begin / UNITS[unit], end / UNITS[unit], cuts / UNITS[unit]
    _bars(axes, started, begin, end, lanes)
    for cut in cuts:
        axes.axvline(cut, color=MUTED, linewidth=1.2, linestyle=":")
    axes.set(xlabel=f"{unit} since the first start", xlim=style.limits(0, end.max(), 0.015))
    axes.set(ylim=(lanes.max() + 0.6, -0.6), yticks=[])
    present = [state for state in STATES if (started["state"] == state).any()]
    names = [f"{(started['state'] == state).sum():,} {STATES[state][0]}" for state in present]
    handles = [Patch(color=STATES[state][1]) for state in present]
    where: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "handlelength": 1}
    axes.legend(handles, names, ncols=4, frameon=False, fontsize=TEXT, labelcolor=INK, **where)
    return figure


def _seconds(started: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of each trial in seconds since the first start; a trial lost without an end has length 0."""
    start, end = pd.to_datetime(started["start"]), pd.to_datetime(started["end"])
    origin, latest = start.min(), max(start.max(), end.max() if end.notna().any() else start.max())
    end = end.fillna(start).mask(started["state"] == "RUNNING", latest)
    begin, finish = ((time - origin).dt.total_seconds().to_numpy() for time in (start, end))
    return begin, np.maximum(begin, finish)


def _without_idle(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Cut out most of the long periods in which nothing ran, such as the night before a resume.

    Returns the moved begin and end, the places of the cuts, and the idle seconds there.
    """
    order = np.argsort(begin, kind="stable")
    reach = np.maximum.accumulate(end[order])
    gaps = np.maximum(begin[order][1:] - reach[:-1], 0)
    busy = reach[-1] - gaps.sum() or 1.0
    long = gaps > 0.1 * busy
    moved = np.zeros(len(begin))
    moved[order] = np.concatenate([[0], np.cumsum(np.where(long, gaps - 0.02 * busy, 0))])
    cuts = (begin - moved)[order][1:][long] - 0.01 * busy
    return begin - moved, end - moved, cuts, float(gaps[long].sum())


def _lanes(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The lane of each trial: the first in which nothing runs at its start."""
    free: list[float] = []
    lanes = np.zeros(len(begin), dtype=int)
    for trial in np.argsort(begin, kind="stable"):
        lane = next((lane for lane, time in enumerate(free) if time <= begin[trial]), len(free))
        free[lane : lane + 1] = [end[trial]]
        lanes[trial] = lane
    return lanes


def _bars(axes: Axes, started: pd.DataFrame, begin: np.ndarray, end: np.ndarray, lanes: np.ndarray) -> None:
    """Draw bars as long as their trials, with the trial's number if there is room."""
    width, height = style.size(axes) / [end.max() or 1, lanes.max() + 1]  # points a unit, and a lane
    colours = np.array([STATES[state][1] for state in started["state"]], dtype=object)
    wide = (end - begin) * width > 4
    edges = np.where(wide & (height > 4), "white", colours)  # a sliver needs an edge of its own colour to be seen
    axes.barh(lanes, end - begin, 0.86, begin, color=colours, edgecolor=edges, linewidth=0.6)
    for row, (number, state) in enumerate(zip(started["number"], started["state"], strict=True)):
        light = state in ("RUNNING", "PRUNED", "WAITING")
        if state == "RUNNING":
            axes.plot(end[row], lanes[row], ">", color=colours[row], markersize=min(12, height), clip_on=False)
        if (end[row] - begin[row]) * width > 7 * len(str(number)) + 4 and height > 12:
            place = ((begin[row] + end[row]) / 2, lanes[row])
            axes.text(*place, str(number), ha="center", va="center", fontsize=9, color=INK if light else "white")


def _unit(seconds: float) -> str:
    return max((unit for unit in UNITS if seconds >= 2 * UNITS[unit]), key=UNITS.__getitem__, default="seconds")


def _duration(seconds: float) -> str:
    unit = _unit(seconds)
    return f"{seconds / UNITS[unit]:,.3g} {unit}"
