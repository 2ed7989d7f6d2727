"""How far a model's probabilities can be trusted, and a temperature that makes them truer.

Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599: one number, fitted on validation images, by
which all logits are divided. No prediction changes, only how sure it is.
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
    """Images whose confidence lies in one of BINS equal parts of 0..1: how many, its mean, and their accuracy."""

    images: int
    confidence: float
    accuracy: float


def temperature(log_p: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature in LOWEST..HIGHEST with the lowest cross-entropy; 1, with a line in the log, where there is none.

    log_p: log-probabilities (or logits), float [N, classes].   labels: int64 [N].
    The cross-entropy is convex in 1 / T, so that its slope by that has one zero at most.
    """
    z = log_p.float().t().contiguous()  # [classes, N]: with few classes a softmax is 20 times as fast this way round
    right = z.gather(0, labels[None]).mean(dtype=torch.float64)

    @functools.cache
    def slope(log_t: float) -> float:
        expected = (F.softmax(z * math.exp(-log_t), dim=0) * z).sum(0)
        return float(expected.mean(dtype=torch.float64) - right)

    lowest, highest = math.log(LOWEST), math.log(HIGHEST)
    reason = None
    if not z.numel() or not bool(torch.isfinite(z).all()):
        reason = "there is no finite log-probability for each class of each image"
    elif slope(lowest) <= 0:
        reason = "however sure, the model gets sure answers right"
    elif slope(highest) >= 0:
        reason = "the model knows less than nothing"
    if reason:
        log.info("temperature: 1 (no best one in %g to %g: %s)", LOWEST, HIGHEST, reason)
        return 1.0
    return math.exp(brentq(slope, lowest, highest, xtol=1e-4))


def calibrated(log_p: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities [N, classes] at a temperature."""
    return log_p if temperature == 1 else F.log_softmax(log_p / temperature, dim=1)


def bins(log_p: torch.Tensor, labels: torch.Tensor) -> list[Bin]:
    """The images by the probability of their predicted class, in BINS bins, the lowest first."""
    confidence, predicted = log_p.double().exp().max(1)
    place = (confidence * BINS).ceil().clamp(1, BINS).long() - 1  # the bins are (0, 1/15], (1/15, 2/15], ...
    count = torch.bincount(place, minlength=BINS)
    sums = [torch.bincount(place, x, minlength=BINS) for x in (confidence, (predicted == labels).double())]
    means = [(total / count.clamp(min=1)).tolist() for total in sums]
    return [Bin(*values) for values in zip(count.tolist(), *means, strict=True)]


def error(bins: Sequence[Bin]) -> float:
    """Expected calibration error of bins(): |accuracy - confidence| of a bin, averaged over images; 0 without any."""
    images = sum(b.images for b in bins)
    return math.fsum(b.images * abs(b.accuracy - b.confidence) for b in bins) / max(1, images)


def ece(log_p: torch.Tensor, labels: torch.Tensor) -> float:
    """Expected calibration error.   log_p: log-probabilities, float [N, classes].   labels: int64 [N]."""
    return error(bins(log_p, labels))
