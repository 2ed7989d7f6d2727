"""The gain of the best of several trials over the default, corrected for having chosen it by the same images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tuner.runs.result import Z
from tuner.runs.table import read_predictions

DRAWS, TOGETHER = 2000, 100  # bootstrap samples, and how many at a time


@dataclass(frozen=True)
class Gain:
    """How much more accurate the best of some trials is than the default.

    announced: by the images that it was chosen by.   corrected: the estimate for other images.
    low, high: its 95% interval.   images, trials: their number.
    """

    announced: float
    corrected: float
    low: float
    high: float
    images: int
    trials: int

    @property
    def is_chance(self) -> bool:
        """Whether the interval includes no gain."""
        return self.low <= 0

    def __str__(self) -> str:
        """Such as "on other images: 0.003 (95% interval -0.01 to 0.02, ...): within chance"."""
        interval = f"95% interval {self.low:.4f} to {self.high:.4f}"
        how = f"{interval}; the best of {self.trials} complete trials on {self.images:,} images"
        verdict = "within chance" if self.is_chance else "more than chance explains"
        return f"on other images: {self.corrected:.4f} ({how}): {verdict}"


def gain(right: np.ndarray, default: int, seed: int = 0, folds: int | None = None) -> Gain:
    """The gain of the best trial over the default.

    right: whether each trial classifies each validation image correctly, bool [trials, N].   default: its row.
    folds: if the answers are out of fold, the number of folds. Their heads share training images, so the interval is
        wider (Nadeau and Bengio, Machine Learning 52 (2003), 239-281: 1.5 times with five folds).

    The best on a bootstrap sample of the images is compared with the default on the images outside that sample, which
    had no part in the choice: the bootstrap bias correction of Tsamardinos, Greasidou and Borboudakis, Machine Learning
    107 (2018), 1895-1922. Each image counts by its mean over the samples without it (the leave-one-out bootstrap of
    Efron and Tibshirani, JASA 92 (1997), 548-560). The interval is that of the difference of two trials on N images.
    """
    trials, n = right.shape
    scores = right.astype(np.float32)
    difference = scores - scores[default]

    def of_best(drawn: np.ndarray) -> np.ndarray:
        return difference[(drawn.astype(np.float32) @ scores.T).argmax(1)]  # the earliest of equals, as in a study

    corrected = left_out_mean(n, of_best, seed=seed)
    return of_difference(difference[int(scores.sum(1).argmax())], corrected, trials, folds)


def left_out_mean(
    n: int, difference_of: Callable[[np.ndarray], np.ndarray], *, draws: int = DRAWS, seed: int = 0
) -> float:
    """The mean difference of two classifiers on images outside the bootstrap samples by which they were chosen.

    n: number of images.   difference_of: how often samples have each image, int [S, n] -> difference, float [S, n].
    """
    generator = np.random.default_rng(seed)
    total, times = np.zeros(n), np.zeros(n)
    for _ in range(0, draws, TOGETHER):
        drawn = generator.multinomial(n, np.full(n, 1 / n), size=TOGETHER)
        left_out = drawn == 0
        total += (difference_of(drawn) * left_out).sum(0)
        times += left_out.sum(0)
    return float((total / np.maximum(times, 1)).mean())


def of_difference(difference: np.ndarray, corrected: float, trials: int, folds: int | None = None) -> Gain:
    """The gain, from the difference of two classifiers on each image, float [N], and its mean on other images."""
    n = len(difference)
    error = float(difference.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    error *= math.sqrt(1 + folds / (folds - 1)) if folds else 1.0
    return Gain(float(difference.mean()), corrected, corrected - Z * error, corrected + Z * error, n, trials)


def gain_of(default: Path, others: Sequence[Path], folds: int | None = None) -> Gain | None:
    """The gain of the best of `others` and the default, by their predictions of validation images.

    default, others: run folders.   folds: as for gain(). None if one of the runs has no predictions, or they are not of
    the same images.
    """
    right = _right([default, *others], "validation")
    return None if right is None else gain(right, 0, folds=folds)


def tested_interval(default: Path, best: Path, difference: float) -> tuple[float, float] | None:
    """The 95% interval of a difference in accuracy, by the predictions of two run folders for the test images.

    difference: in the middle of the interval. None as for gain_of.
    """
    right = _right([default, best], "test")
    if right is None:
        return None
    scores = right.astype(np.float32)
    found = of_difference(scores[1] - scores[0], difference, 2)
    return found.low, found.high


def _right(folders: Sequence[Path], split: str) -> np.ndarray | None:
    """Whether each run classifies each image of a split correctly, bool [runs, N]."""
    columns: list[pd.Series] = []
    for folder in folders:
        table = read_predictions(folder)
        if table is None:
            return None
        table = table[table.split == split].set_index(["image", "label"])
        columns.append((table.predicted == table.index.get_level_values("label")).rename(len(columns)))
    if not len(columns[0]) or any(not column.index.equals(columns[0].index) for column in columns):
        return None
    right: np.ndarray = pd.concat(columns, axis=1).to_numpy().T
    return right
