"""What several test files share."""

import json
import time
from collections.abc import Callable
from pathlib import Path

TINY = ("data=synthetic", "model=tiny", "epochs=3", "batch_size=32", "plots=false")  # a run of a second


def result(folder: Path) -> dict:
    """A run folder's result.json."""
    return json.loads((Path(folder) / "result.json").read_text())


def record(*curves: list) -> Callable:
    """An on_epoch for fit() that appends the metrics of head k to the k-th list, in the order of the specs."""
    places: dict = {}

    def on_epoch(epoch, metrics):
        for spec, m in metrics.items():
            curves[places.setdefault(spec, len(places))].append(m)
        return ()

    return on_epoch


def wait_until(condition):
    """Until it holds; a busy machine takes its time."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
