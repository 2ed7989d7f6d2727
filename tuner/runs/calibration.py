"""Calibration: how far a model's probabilities can be trusted, and a temperature that corrects them.

Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599: all logits are divided by one number, which is
fitted on validation images. Predictions stay the same; confidences change.
"""

import functools
import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import brentq

log = logging.getLogger("tuner.runs.calibration")

LOWEST, HIGHEST = 0.05, 20.0
BINS = 15


class Bin(NamedTuple):
    """Images with a confidence in one of BINS equal intervals of 0..1: number, mean confidence, accuracy."""

    images: int
    confidence: float
    accuracy: float


def temperature(log_p: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature with the lowest cross-entropy. If that is not in LOWEST..HIGHEST: 1, and a line in the log.

    log_p: log-probabilities (or logits), float [N, classes].   labels: int64 [N].
    The cross-entropy is convex in 1 / T, so its slope has at most one zero.
    """
    z = log_p.float().t().contiguous()  # [classes, N]: 20 times as fast for a softmax over few classes
    right = z.gather(0, labels[None]).mean(dtype=torch.float64)

    @functools.cache
    def slope(log_t: float) -> float:
        expected = (F.softmax(z * math.exp(-log_t), dim=0) * z).sum(0)
        return float(expected.mean(dtype=torch.float64) - right)

    lowest, highest = math.log(LOWEST), math.log(HIGHEST)
    reason = None
    if not z.numel() or not bool(torch.isfinite(z).all()):
        reason = "log-probabilities are missing or not finite"
    elif slope(lowest) <= 0:
        reason = f"the optimum is below {LOWEST:g}"
    elif slope(highest) >= 0:
        reason = f"the optimum is above {HIGHEST:g}"
    if reason:
        log.info("temperature: 1 (calibration skipped: %s)", reason)
        return 1.0
    return math.exp(brentq(slope, lowest, highest, xtol=1e-4))


def calibrated(log_p: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities, float [N, classes], at a temperature."""
    return log_p if temperature == 1 else F.log_softmax(log_p / temperature, dim=1)


def bins(log_p: torch.Tensor, labels: torch.Tensor) -> list[Bin]:
    """The images by their confidence, the probability of the predicted class: BINS bins, the lowest first.

    log_p: log-probabilities, float [N, classes].   labels: int64 [N].
    """
    confidence, predicted = log_p.double().exp().max(1)
    return bins_of(confidence, predicted == labels)


def bins_of(confidence: torch.Tensor, right: torch.Tensor) -> list[Bin]:
    """The same, from confidences, float64 [N], and whether the predictions are right, bool [N]."""
    place = (confidence * BINS).ceil().clamp(1, BINS).long() - 1  # the bins are (0, 1/15], (1/15, 2/15], ...
    count = torch.bincount(place, minlength=BINS)
    sums = [torch.bincount(place, x, minlength=BINS) for x in (confidence, right.double())]
    means = [(total / count.clamp(min=1)).tolist() for total in sums]
    return [Bin(*values) for values in zip(count.tolist(), *means, strict=True)]


def error(bins: Sequence[Bin]) -> float:
    """Expected calibration error of bins(): |accuracy - confidence| of a bin, averaged over images; 0 without any."""
    images = sum(b.images for b in bins)
    return math.fsum(b.images * abs(b.accuracy - b.confidence) for b in bins) / max(1, images)


def ece(log_p: torch.Tensor, labels: torch.Tensor) -> float:
    """Expected calibration error.   log_p: log-probabilities, float [N, classes].   labels: int64 [N]."""
    return error(bins(log_p, labels))
