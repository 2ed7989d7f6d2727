"""What all figures share: colours, sizes, the empty figure and its axes, labels, and `save`."""

import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from tuner.files import replacing

# Grey, blue and orange differ in lightness as well as in hue: they stay apart for colour-blind readers and in print.
COLOURS = {"train": "#8C8C8C", "validation": "#0068A8", "test": "#D55E00"}
BLUE, ORANGE, INK, MUTED, GRID = "#0068A8", "#D55E00", "#222222", "#666666", "#E6E6E6"
GREY, LIGHT = "#A0A0A0", "#9CC9E8"
BLUES = LinearSegmentedColormap.from_list("blues", ["#FFFFFF", "#9CC9E8", BLUE, "#00395E"]).with_extremes(bad=GRID)
TITLE, TEXT, SMALL = 16, 12, 10  # points
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # keeps the grid out of a text
SIGN = {"maximize": 1, "minimize": -1}
HUGE = 1e100  # from here on a value counts as infinite: sums of its squares overflow
CJK = ["Noto Sans CJK JP", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "Arial Unicode MS"]
FONTS = ["DejaVu Sans", *(font for font in CJK if font in font_manager.get_font_names())]
NAME: dict[str, Any] = {"parse_math": False, "fontfamily": FONTS}  # a class may be called "$5 to $10", or "猫"
STATES = {  # of a trial: word, colour
    "COMPLETE": ("complete", BLUE),
    "PRUNED": ("pruned", GREY),
    "FAIL": ("failed", INK),
    "RUNNING": ("running", LIGHT),
    "WAITING": ("waiting", GRID),
}
DEFAULT: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": INK, "markeredgewidth": 1.5, "markersize": 7}


class Picture(Figure):
    """A figure that a notebook shows.

    Jupyter shows matplotlib's own figures only once pyplot has been imported, which nothing here needs.
    """

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        _write(self, file, dpi=100)
        return file.getvalue()


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG of 150 dots per inch. A reader of `path` sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        _write(figure, file, dpi=150)


def png(figure: Figure) -> bytes:
    """The same PNG in memory, for a web page."""
    file = io.BytesIO()
    _write(figure, file, dpi=150)
    return file.getvalue()


def _write(figure: Figure, file: BinaryIO, dpi: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the box in its place says so
        figure.savefig(file, format="png", dpi=dpi)


def figure(title: str, width: float = 9, height: float = 5.5, note: str = "") -> Figure:
    """An empty figure, in inches, with a title wrapped to its width and small print at the bottom."""
    figure = Picture(figsize=(width, height), facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    scale = max(1, width / 11)  # a larger figure is shown smaller
    for write, text, points, letter, style in (
        (figure.suptitle, title, TITLE * scale, 0.65, {"fontweight": "bold", "color": INK}),
        (figure.supxlabel, note, SMALL * scale, 0.57, {"color": MUTED}),
    ):  # a letter is `letter` times its height wide
        text = textwrap.fill(text, int(72 * width / (letter * points)))
        write(text, x=0.1 / width, ha="left", fontsize=points, **style, **NAME)
    return figure


def axes(figure: Figure, place: Any = 111, **options: Any) -> Axes:
    """Add axes without a frame, over a light grid.   place, options: of Figure.add_subplot."""
    axes = figure.add_subplot(place, **options)
    axes.spines[:].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=TEXT, labelcolor=INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=TEXT, color=INK)
    return axes


def short(name: str, limit: int = 26) -> str:
    """`name` on one line, without its middle if it is long: long names often share their beginnings."""
    name, half = " ".join(str(name).split()), (limit - 1) // 2
    return name if len(name) <= limit else f"{name[:half]}…{name[-half:]}"


def panels(title: str, count: int, note: str = "") -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes, up to three per row."""
    across = min(count, 3)
    down = -(-count // across)
    width, height = [(9, 5.5), (10, 4.9), (12, 4.5)][across - 1]
    sheet = figure(title, width, height + 3.4 * (down - 1), note)
    grid = sheet.add_gridspec(down, across)
    return sheet, [axes(sheet, grid[divmod(place, across)]) for place in range(count)]


def name(axes: Axes, x: str = "", y: str = "") -> None:
    """Label the axes. Names are not parsed as math."""
    axes.set_xlabel(x, **NAME)
    axes.set_ylabel(y, **NAME)


def size(axes: Axes) -> np.ndarray:
    """The approximate width and height of the axes in points: the layout is known only when the figure is drawn."""
    box = axes.get_window_extent()
    return 72 / axes.figure.dpi * np.array([box.width, box.height])


def annotate(axes: Axes, text: str, place: Any, offset: Any, coordinates: Any = "data", **style: Any) -> None:
    """Write `text` at `place`, with an `offset` in points."""
    axes.annotate(text, place, offset, coordinates, "offset points", fontsize=TEXT, annotation_clip=False, **style)


def number(value: float) -> str:
    """A number with three decimals; from 1000 on with six digits, below 0.1 with three."""
    if value == 0 or 0.1 <= abs(value) < 1000:
        return f"{value:.3f}"
    return f"{value:.6g}" if abs(value) >= 1000 else f"{value:.3g}"


def focus(values: Any, goal: str) -> tuple[float, float]:
    """The range to draw: all of the values, unless a few bad ones would flatten the others."""
    sign = SIGN[goal]
    top, quarter, worst = sign * np.quantile(sign * np.asarray(values, float), [1, 0.25, 0])
    if abs(top - worst) > 6 * abs(top - quarter) > 0:
        worst = top + 3 * (quarter - top)
    return min(top, worst), max(top, worst)


def limits(low: float, high: float, room: float = 0.08) -> tuple[float, float]:
    """Limits of an axis for values from `low` to `high`, which may be equal, with some room around them."""
    span = high - low if high - low > 1e-9 * abs(high) else 0.1 * abs(high) or 1.0
    return low - room * span, high + room * span


def spread(heights: Sequence[float], gap: float) -> np.ndarray:
    """The heights, moved as little as possible so that each two are `gap` apart. Their order stays."""
    from scipy.optimize import isotonic_regression  # slow to import, and few figures need it

    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(order))
    moved = np.empty(len(order))
    moved[order] = isotonic_regression(np.asarray(heights, float)[order] - steps).x + steps
    return moved
