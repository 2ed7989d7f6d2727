"""Learning rate schedules: the share of the training that is done, 0..1 -> a factor of the lr."""

import math


def onecycle(progress: float, *, warmup: float = 0.3, start: float = 0.04) -> float:
    """From `start` of the lr up to all of it, over the first `warmup` of the training, then down to 0.

    Both ways are half cosines. Smith and Topin, arXiv:1708.07120; the momentum stays as it is.
    """
    if progress < warmup:
        return start + (1 - start) * (1 - math.cos(math.pi * progress / warmup)) / 2
    return cosine((progress - warmup) / (1 - warmup))


def cosine(progress: float) -> float:
    """Half a cosine from all of the lr to 0. Loshchilov and Hutter, arXiv:1608.03983, without restarts."""
    return (1 + math.cos(math.pi * progress)) / 2


def constant(progress: float) -> float:
    """The lr as it is."""
    return 1.0
