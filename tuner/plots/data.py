"""A figure of the images that a run trains on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tuner.plots import style
from tuner.plots.style import GRID, INK, NAME, TEXT


def images(images: Any, labels: Sequence[str], marks: Sequence[str], title: str, note: str) -> Figure:
    """Images in rows, one for each class in the order of `labels`.

    images: uint8 [N, H, W, C], C = 1 gray or 3 RGB; those of a class are adjacent.
    labels: the class of each.   marks: what is written below each, such as "augmented", or "".
    """
    classes = list(dict.fromkeys(labels))
    columns = max(map(list(labels).count, classes))
    figure = style.figure(title, max(6, 1.15 * columns + 1.6), 1.25 * len(classes) + 1.1, note)
    grid = figure.add_gridspec(len(classes), columns)
    place = dict.fromkeys(classes, 0)
    for image, label, mark in zip(np.asarray(images), labels, marks, strict=True):
        axes = figure.add_subplot(grid[classes.index(label), place[label]], xticks=[], yticks=[])
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.spines[:].set_color(GRID)
        if not place[label]:
            name = style.short(label, 20)
            axes.set_ylabel(name, fontsize=TEXT, color=INK, rotation=0, ha="right", va="center", labelpad=8, **NAME)
        if mark:
            axes.set_xlabel(mark, fontsize=8, color=INK, labelpad=2)
        place[label] += 1
    return figure
