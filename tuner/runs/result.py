"""The result of a run, read from its folder. Imports no pandas: a sweep reads results, and must start fast."""

import json
import math
from pathlib import Path
from typing import Any

from tuner import InputError

Z = 1.959964  # of the normal distribution, for 95%


def read_result(folder: Path, *, any_program: bool = False) -> dict[str, Any]:
    """A folder's result.json.

    any_program: accept the result of a program other than tuner, which has no `status`.
    Raises FileNotFoundError if there is none, and InputError if it is damaged or not of a run.
    """
    path = folder / "result.json"
    text = path.read_bytes()
    try:
        result = json.loads(text.decode())
        if not isinstance(result, dict) or not (any_program or isinstance(result.get("status"), str)):
            raise ValueError("not the result of a run: it has no status")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from error
    return result


def accuracy_interval(accuracy: float, images: int) -> tuple[float, float]:
    """The 95% interval of an accuracy on so many images, at least 1: Wilson's score interval (JASA 22, 1927, 209-212).

    It is about other images of the same kind; how much training varies is not in it.
    """
    share = Z**2 / images
    middle = (accuracy + share / 2) / (1 + share)
    half = Z / (1 + share) * math.sqrt(accuracy * (1 - accuracy) / images + share / (4 * images))
    return max(0.0, middle - half), min(1.0, middle + half)


def on_images(accuracy: float, images: int) -> str:
    """The number of images of an accuracy, and its interval: such as "1,200 images, 95%: 0.9041 to 0.9348"."""
    low, high = accuracy_interval(accuracy, images)
    return f"{images:,} image{'s' * (images != 1)}, 95%: {low:.4f} to {high:.4f}"
