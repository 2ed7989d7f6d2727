"""The end of a multirun that is no search, such as `-m seed=0,1,2`: the mean and the spread of its runs.

Hydra calls it, because conf/train.yaml lists it among hydra.callbacks. A search has a report of its own.
"""

import logging
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from tuner import yaml_file
from tuner.runs.result import read_result

log = logging.getLogger("tuner.train")
MOST = 10  # lines
BASIC = "BasicSweeper"  # Hydra's own


class Summary(Callback):
    """Logs the mean validation accuracy over the seeds of each configuration, the best first."""

    def on_multirun_end(self, config: DictConfig, **_more: Any) -> None:
        """Called by Hydra when all jobs have ended."""
        if not str(config.hydra.sweeper._target_).endswith(BASIC):
            return
        folder = Path(config.hydra.sweep.dir)
        found = lines(folder)
        for line in found:
            log.info("%s", line)
        if found:
            log.info("all runs: python -m tuner.compare %s", folder)


def lines(folder: Path) -> list[str]:
    """A line for each configuration, and one that says how many more there are.   folder: of the multirun."""
    accuracies, tested = defaultdict(list), defaultdict(list)
    for overrides, result in complete_runs(folder):
        accuracies[overrides].append(result["val_accuracy"])
        if isinstance(result.get("test_accuracy"), float):
            tested[overrides].append(result["test_accuracy"])
    best_first = sorted(accuracies, key=lambda overrides: -statistics.fmean(accuracies[overrides]))
    common = set.intersection(*map(set, best_first)) if best_first else set()
    names = [" ".join(word for word in overrides if word not in common) for overrides in best_first]
    shown = []
    for name, overrides in zip(names, best_first, strict=True):
        text = spread("validation", accuracies[overrides])
        if len(tested[overrides]) == len(accuracies[overrides]):
            text += f"; {spread('test', tested[overrides])}"
        shown.append(f"{name}: {text}" if name else text)
    return shown[:MOST] + ([f"and {len(shown) - MOST} more configurations"] if len(shown) > MOST else [])


def complete_runs(folder: Path) -> Iterable[tuple[tuple[str, ...], dict[str, Any]]]:
    """The overrides of each complete run, apart from its seed, and its result."""
    for result_path in folder.glob("*/result.json"):
        result = read_result(result_path.parent)
        if result["status"] == "complete" and isinstance(result.get("val_accuracy"), float):
            overrides = yaml_file.read(result_path.parent / ".hydra" / "overrides.yaml")
            others = tuple(str(line) for line in overrides if not str(line).startswith("seed="))
            yield others, result


def spread(split: str, values: Sequence[float]) -> str:
    """Such as "validation accuracy 0.9042 (mean of 4 runs, standard deviation 0.0031, 0.9000 to 0.9083)"."""
    mean = f"{split} accuracy {statistics.fmean(values):.4f}"
    if len(values) == 1:
        return f"{mean} (1 run)"
    deviation, low, high = statistics.stdev(values), min(values), max(values)
    return f"{mean} (mean of {len(values)} runs, standard deviation {deviation:.4f}, {low:.4f} to {high:.4f})"
