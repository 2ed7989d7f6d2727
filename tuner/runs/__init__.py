"""Run folders: writing one, reading many, scores, trackers. For use from Python: load, read_metrics, read_result."""

from tuner.runs.table import load, read_metrics, read_result

__all__ = ["load", "read_metrics", "read_result"]
