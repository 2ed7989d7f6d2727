"""A study, read back: its trials, what mattered, what to try next. For use from Python: load."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.analysis.loaded_study import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import Optuna when load is used, and not when runs are compared."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tuner.analysis import loaded_study

    return getattr(loaded_study, name)
