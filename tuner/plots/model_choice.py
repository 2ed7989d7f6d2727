"""The candidates of model=auto."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tuner.plots import style
from tuner.plots.style import BLUE, GREY, ORANGE, SMALL

ROWS = 24


def model_choice(rows: Sequence[Mapping[str, Any]], images: int) -> Figure:
    """The accuracies of the candidates with their standard errors, the best on top, and the time that each would take.

    rows: a candidate's name, accuracy, error, bank_seconds, as_good, chosen; the best first.
    images: that they were scored on.
    """
    candidates = pd.DataFrame(rows)
    kept = candidates.chosen | (np.arange(len(candidates)) < ROWS)
    shown = candidates[kept]
    chosen = shown[shown.chosen].iloc[0]
    title = f"Chosen: {chosen['name']}, accuracy {chosen.accuracy:.3f} on {images:,} training images"
    note = "Whiskers: one standard error. Blue: as good as the best, within one standard error. Orange: chosen."
    note += f" The first {ROWS} of {len(candidates):,} candidates." if len(candidates) > ROWS else ""
    figure = style.figure(title, width=11, height=max(3.2, 0.34 * len(shown) + 2), note=note)
    axes, places = style.axes(figure), range(len(shown))
    axes.grid(False, axis="y")
    colours = np.where(shown.chosen, ORANGE, np.where(shown.as_good, BLUE, GREY))
    for place, value, error, colour in zip(places, shown.accuracy, shown.error, colours, strict=True):
        axes.errorbar(value, place, xerr=error, fmt="o", color=colour, markersize=7, elinewidth=2)
    ends = [*(shown.accuracy - shown.error), *(shown.accuracy + shown.error)]
    low, high = style.limits(min(ends), max(ends))
    axes.set(xlim=(max(low, -0.01), min(high, 1.01)), ylim=(len(shown) - 0.4, -0.6), yticks=places)
    axes.set_yticklabels([style.short(name, 60) for name in shown.name])
    style.name(axes, "leave-one-out accuracy of ridge regression")
    for place, seconds in zip(places, shown.bank_seconds, strict=True):
        side = axes.get_yaxis_transform()
        axes.text(1.01, place, f"{seconds:,.0f} s", transform=side, va="center", fontsize=SMALL)
    axes.text(1.01, -0.8, "all features", transform=axes.get_yaxis_transform(), va="bottom", fontsize=SMALL)
    return figure
