"""The trials of a study with several objectives."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tuner.plots import style
from tuner.plots.style import BLUE, DEFAULT, ORANGE, SIGN, SMALL
from tuner.plots.trials import baseline, complete, nothing


def pareto_front(trials: pd.DataFrame, goals: Sequence[str], objectives: Sequence[str]) -> Figure:
    """The complete trials by two objectives. Those on the Pareto front are orange, with their numbers.

    trials: with the columns number, state, baseline and value_0, value_1 ... in the order of goals and objectives.
    Three or more objectives: a panel for each pair; the front is that of all objectives.
    """
    columns = [f"value_{place}" for place in range(len(goals))]
    done = complete(trials, columns)
    if done.empty:
        return nothing(trials)
    on_front = _undominated(done[columns].to_numpy() * [SIGN[goal] for goal in goals])
    which = f"{on_front.sum():,} of {len(done):,} trials are" if len(done) > 1 else "The only complete trial is"
    title = f"{which} on the Pareto front of {', '.join(objectives[:-1])} and {objectives[-1]}"
    pairs, default = list(combinations(range(len(goals)), 2)), baseline(done)
    note = "Orange: no trial is as good in all and better in one; numbers are the trials'."
    figure, grid = style.panels(
        title, len(pairs), note + (" Diamond: the default config." if default is not None else "")
    )
    for (x, y), axes in zip(pairs, grid, strict=True):
        labels = [f"{objectives[k]} ({'higher' if SIGN[goals[k]] > 0 else 'lower'} is better)" for k in (x, y)]
        style.name(axes, *labels)
        points = done[[columns[x], columns[y]]].to_numpy()
        _points(axes, points, on_front, [goals[x], goals[y]], line=len(goals) == 2)
        _number_front(axes, points[on_front], done["number"][on_front], [SIGN[goals[x]], SIGN[goals[y]]])
        if default is not None:
            axes.plot(default[columns[x]], default[columns[y]], "D", **DEFAULT)
    return figure


def _points(axes: Axes, points: np.ndarray, on_front: np.ndarray, goals: Sequence[str], line: bool) -> None:
    size = float(np.clip(2000 / len(points), 12, 40))
    axes.scatter(points[~on_front, 0], points[~on_front, 1], s=size, color=BLUE, alpha=0.5, linewidths=0)
    front = points[on_front]
    if line:
        axes.plot(*front[np.argsort(front[:, 0])].T, color=ORANGE, linewidth=1.2, zorder=2.1)
    axes.scatter(front[:, 0], front[:, 1], s=44, color=ORANGE, linewidths=0, zorder=2.2)
    for values, goal, name in zip(points.T, goals, ("xlim", "ylim"), strict=True):
        ends = [
            *style.focus(values, goal),
            *values[on_front],
        ]  # bad values that would flatten the others are off the scale
        axes.set(**{name: style.limits(min(ends), max(ends), 0.1)})


def _number_front(axes: Axes, front: np.ndarray, numbers: pd.Series, signs: Sequence[int]) -> None:
    """Write the numbers on the better side of their points, where there are no trials, as far as there is room."""
    box = np.array([axes.get_xlim(), axes.get_ylim()])
    placed: list[np.ndarray] = []  # in points
    for point, number in zip(front, numbers, strict=True):
        place = (point - box[:, 0]) / (box[:, 1] - box[:, 0]) * style.size(axes)
        if all((abs(place - other) > (8 + 6 * len(str(number)), 14)).any() for other in placed):
            placed.append(place)
            side: dict[str, Any] = {
                "ha": "left" if signs[0] > 0 else "right",
                "va": "bottom" if signs[1] > 0 else "top",
            }
            offset = (4 * signs[0], 4 * signs[1])
            axes.annotate(str(number), point, offset, textcoords="offset points", fontsize=SMALL, color=ORANGE, **side)


def _undominated(values: np.ndarray) -> np.ndarray:
    """Which rows of [n, m] are not dominated: none is as good in all columns and better in one. Larger is better."""
    as_good = np.all(values >= values[:, None], axis=2)
    return ~np.any(as_good & np.any(values > values[:, None], axis=2), axis=1)
