"""Run folders: writing one, reading many, scores, trackers. For use from Python: load, read_metrics, read_result."""

from typing import TYPE_CHECKING, Any

from tuner.runs.result import read_result

if TYPE_CHECKING:
    from tuner.runs.table import load, read_metrics

__all__ = ["load", "read_metrics", "read_result"]


def __getattr__(name: str) -> Any:
    """Import pandas when load or read_metrics is used, and not when a sweep starts."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tuner.runs import table

    return getattr(table, name)
