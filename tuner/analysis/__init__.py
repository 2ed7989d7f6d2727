"""A study, read back: its trials, what mattered, what to try next. For use from Python: load."""

from tuner.analysis.loaded_study import load

__all__ = ["load"]
