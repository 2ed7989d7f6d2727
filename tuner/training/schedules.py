"""Learning rate schedules: progress of the training, 0..1 -> factor for the lr."""

import math

from tuner.rules import SHARE


def onecycle(progress: float, *, warmup: float = 0.3, start: float = 0.04) -> float:
    """Rise from `start` to 1 in the first `warmup` of the training, then fall to 0; both along half a cosine.

    Smith and Topin, arXiv:1708.07120, without the cycle of the momentum.
    """
    SHARE.check("scheduler.warmup", warmup)
    SHARE.check("scheduler.start", start)
    if progress < warmup:
        return start + (1 - start) * (1 - math.cos(math.pi * progress / warmup)) / 2
    return cosine((progress - warmup) / (1 - warmup))


def cosine(progress: float) -> float:
    """Fall from 1 to 0 along half a cosine. Loshchilov and Hutter, arXiv:1608.03983, without restarts."""
    return (1 + math.cos(math.pi * progress)) / 2


def constant(progress: float) -> float:  # noqa: ARG001 - schedules share this signature
    """Always 1."""
    return 1.0
