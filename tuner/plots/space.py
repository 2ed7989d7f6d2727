"""A search space along the axes of a figure: places of values, ticks, and nearness."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axis import XAxis, YAxis
from matplotlib.ticker import MaxNLocator

from tuner.plots import style
from tuner.plots.style import HUGE, NAME


@dataclass(frozen=True)
class Parameter:
    """A dimension of the search space: a range, or the choices of a categorical one (numbers, strings, bools, None)."""

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Scale:
    """Trials along an axis. Places are values, their log10 on a log axis, or 0, 1, 2 ... for choices."""

    places: np.ndarray  # of each trial; NaN if it does not have the parameter
    low: float
    high: float
    ticks: dict[float, str]
    categorical: bool = False

    def share(self) -> np.ndarray:
        """The places as shares of the way from low to high."""
        return (self.places - self.low) / (self.high - self.low)

    def scattered(self, seed: int) -> np.ndarray:
        """The places. Those of choices are moved a little at random, so trials do not hide each other."""
        shift = np.random.default_rng(seed).uniform(-0.25, 0.25, len(self.places))
        return self.places + shift if self.categorical else self.places

    def kernel(self, trials: int) -> tuple[np.ndarray, np.ndarray]:
        """Places along the axis, [g], and how near the trials are to them, 0..1, [g, n]. No choice is near another."""
        if self.categorical:
            marks = np.arange(len(self.ticks), dtype=float)
            return marks, (self.places == marks[:, None]).astype(float)
        marks = np.linspace(self.low, self.high, 101)
        reach = 0.3 * trials ** (-1 / 6) * (self.high - self.low)  # narrower with more trials, as for a density
        near = np.exp(-0.5 * ((marks[:, None] - self.places) / reach) ** 2)
        return marks, np.nan_to_num(near)


def scale(parameter: Parameter, trials: pd.DataFrame) -> Scale:
    """The scale of a parameter: its range, stretched to the values there are."""
    values = trials[parameter.name] if parameter.name in trials else pd.Series(np.nan, index=trials.index)
    if parameter.choices is not None:
        places = np.array([_choice(value, parameter.choices) for value in values])
        names = {float(place): str(choice) for place, choice in enumerate(parameter.choices)}
        return Scale(places, -0.5, len(names) - 0.5, names, categorical=True)
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    ends = np.array([np.nan if end is None else end for end in (parameter.low, parameter.high)], dtype=float)
    numbers, ends = _drawable(numbers, parameter.log), _drawable(ends, parameter.log)
    known = np.concatenate([numbers, ends])
    known = known[np.isfinite(known)] if np.isfinite(known).any() else np.zeros(1)
    low, high = float(known.min()), float(known.max())
    if low == high:
        low, high = style.limits(low, high)
    return Scale(numbers, low, high, _ticks(low, high, parameter.log))


def value_scale(values: np.ndarray, low: float, high: float, falling: bool) -> Scale:
    """The scale of an objective, from the worst value to the best."""
    if low == high:
        low, high = style.limits(low, high)
    ticks = _ticks(low, high, log=False)
    return Scale(values, high, low, ticks) if falling else Scale(values, low, high, ticks)


def write_ticks(axis: XAxis | YAxis, scale: Scale, points: float) -> None:
    """Write ticks and their names along an axis that is `points` long, rotated or thinned out if they would overlap."""
    step = -(-len(scale.ticks) * 16 // int(points))
    ticks = dict(list(scale.ticks.items())[::step])
    room = int(points / max(1, len(ticks)) / 8.5)  # letters
    tight = axis.axis_name == "x" and any(len(name) > room for name in ticks.values())
    names = [style.short(name, 16 if axis.axis_name == "y" or tight else 26) for name in ticks.values()]
    if axis.axis_name == "x":
        axis.set_tick_params(pad=8)  # clear of the other axis's lowest
    axis.set_ticks(list(ticks), names, rotation=90 if tight else 0, **NAME)


def value_text(value: Any) -> str:
    """A parameter's value with three digits, or as a whole number. NaN stands for the choice None."""
    if value != value:
        return "None"
    if isinstance(value, float | np.floating) and not isinstance(value, bool):
        return f"{value:g}" if float(value).is_integer() else f"{value:.3g}"
    return style.short(str(value))


def wrapped(name: str, limit: int) -> str:
    """A long name on a few lines, broken after dots and spaces."""
    lines = [""]
    for part in re.split(r"(?<=[. ])", style.short(name, 3 * limit - 6)):
        if lines[-1] and len((lines[-1] + part).rstrip()) > limit:
            lines.append("")
        lines[-1] += part
    return "\n".join(style.short(line, limit) for line in lines)


def _choice(value: Any, choices: tuple[Any, ...]) -> float:
    """The index of a value among the choices, NaN if it is none of them. A missing value is the choice None."""
    missing = value is None or value != value
    places = (k for k, choice in enumerate(choices) if (choice is None if missing else choice == value))
    return float(next(places, np.nan))


def _drawable(numbers: np.ndarray, log: bool) -> np.ndarray:
    numbers = np.where(np.isfinite(numbers) & (np.abs(np.nan_to_num(numbers)) < HUGE), numbers, np.nan)
    if not log:
        return numbers
    return np.log10(numbers, out=np.full(numbers.shape, np.nan), where=numbers > 0)


def _named(values: list[float]) -> dict[float, str]:
    """The values with their names, which all have the same number of decimals."""
    names = [f"{value:g}" for value in values]
    decimals = max((len(name.partition(".")[2]) for name in names), default=0)
    plain = not any("e" in name for name in names)
    return {value: f"{value:.{decimals}f}" if plain else name for value, name in zip(values, names, strict=True)}


def _ticks(low: float, high: float, log: bool, count: int = 4) -> dict[float, str]:
    """About four round values from low to high and their names, by place."""
    if not log:
        even = MaxNLocator(count, steps=[1, 2, 5, 10]).tick_values(low, high)
        return _named([float(value) for value in even if low <= value <= high])
    if high - low < 0.5:  # so near each other that a log axis looks linear
        near = _ticks(10**low, 10**high, log=False)
        return {float(np.log10(value)): name for value, name in near.items()}
    for digits in ((1, 2, 5), (1, 3), (1,)):
        powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
        values = np.array([digit * 10.0**power for power in powers for digit in digits])
        places = np.log10(values)
        inside = (places >= low - 1e-9) & (places <= high + 1e-9)
        if inside.sum() <= count:
            break
    step = -(-int(inside.sum()) // count)
    return {
        float(place): f"{value:g}" for place, value in zip(places[inside][::step], values[inside][::step], strict=True)
    }
