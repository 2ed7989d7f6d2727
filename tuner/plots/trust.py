"""Figures on trust: confidence against accuracy, and evidence maps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from tuner.plots import style
from tuner.plots.style import BLUE, GRID, INK, LIGHT, MUTED, NAME, ORANGE, TEXT


def reliability(
    before: Sequence[Any], after: Sequence[Any], errors: tuple[float, float], temperature: float, split: str
) -> Figure:
    """Accuracy by confidence, in bins, without and with the temperature. Perfect calibration is the diagonal.

    before, after: `calibration.bins`, (images, confidence, accuracy), the lowest confidence first.
    errors: their expected calibration errors, `calibration.error`.
    """
    title = f"{split.capitalize()} calibration error {errors[0]:.3f}"
    title += f", at temperature {temperature:.2f} it is {errors[1]:.3f}" if temperature != 1 else ""
    note = "Below the diagonal a model is overconfident. Bars: the share of images in each bin."
    figure = style.figure(title, 10, 5.6, note)
    grid = figure.add_gridspec(2, 2, height_ratios=[4, 1])
    for column, (bins, name) in enumerate(((before, "before"), (after, f"after, temperature {temperature:.2f}"))):
        top = _draw_column(figure, grid, column, bins)
        top.set_title(f"{name}: {errors[column]:.3f}", fontsize=TEXT, color=INK)
    return figure


def calibration(bins: Sequence[Any], error: float, split: str) -> Figure:
    """Accuracy by calibrated confidence alone.   bins, error: as in `reliability`, after calibration."""
    note = "Below the diagonal the model is overconfident. Light bars: the share of images in each bin."
    figure = style.figure(f"{split.capitalize()} calibration error {error:.3f}", 6.5, 5.6, note)
    _draw_column(figure, figure.add_gridspec(2, 1, height_ratios=[4, 1]), 0, bins)
    return figure


def _draw_column(figure: Figure, grid: GridSpec, column: int, bins: Sequence[Any]) -> Axes:
    """Draw accuracy by confidence, and the share of images in each bin below it. Returns the upper axes."""
    top = style.axes(figure, grid[0, column])
    _draw_bins(top, bins)
    below = style.axes(figure, grid[1, column], sharex=top)
    counts = np.array([count for count, *_ in bins], float)
    width = 1 / len(bins)
    below.bar((np.arange(len(bins)) + 0.5) * width, counts / max(1, counts.sum()), 0.9 * width, color=LIGHT)
    below.set_xlabel("confidence, the probability of the predicted class")
    below.set_ylim(0, 1)
    below.set_yticks([0.5, 1])
    top.tick_params(labelbottom=False)
    if column == 0:
        top.set_ylabel("accuracy")
        below.set_ylabel("images")
    return top


def _draw_bins(axes: Axes, bins: Sequence[Any]) -> None:
    width = 1 / len(bins)
    for place, (count, confidence, accuracy) in enumerate(bins):
        if count:
            axes.bar((place + 0.5) * width, accuracy, 0.9 * width, color=BLUE)
            axes.plot([confidence] * 2, [accuracy, confidence], color=ORANGE, linewidth=2, solid_capstyle="butt")
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=":")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))


def attention(
    image: np.ndarray, heat: np.ndarray, name: str, predicted: str, probability: float, method: str
) -> Figure:
    """An image as the model gets it, without and with a map of the evidence for the predicted class.

    image: uint8 [H, W, C], C = 1 gray or 3 RGB.   heat: float [H, W], 0..1.   method: how the heat was computed.
    """
    figure = style.figure(f"{style.short(predicted)} {probability:.3f}", 7.5, 4.4, f"{style.short(name, 60)}. {method}")
    for place, overlaid in ((121, False), (122, True)):
        axes = figure.add_subplot(place, xticks=[], yticks=[])
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.spines[:].set_color(GRID)
        axes.set_title("as the model gets it" if not overlaid else "evidence for the class", fontsize=TEXT, **NAME)
        if overlaid:
            axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.25 + 0.45 * heat)
    return figure
