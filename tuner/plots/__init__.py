"""Figures: numbers in, `matplotlib.figure.Figure` out, and `save`.

Nothing here touches pyplot, a backend or rcParams, so figures can be drawn in threads and without a display.
"""

from tuner.plots.compare import bars, curves
from tuner.plots.data import images
from tuner.plots.model_choice import model_choice
from tuner.plots.pareto import pareto_front
from tuner.plots.run import accuracy, confusion_matrix, examples, loss, per_class, train_vs_test
from tuner.plots.space import Parameter
from tuner.plots.study import contours, importances, parallel_coordinates, slices
from tuner.plots.style import HUGE, png, save
from tuner.plots.thumbnail import thumbnail
from tuner.plots.timeline import timeline
from tuner.plots.trials import edf, history, intermediate_values
from tuner.plots.trust import attention, calibration, reliability

__all__ = [
    "HUGE",
    "Parameter",
    "accuracy",
    "attention",
    "bars",
    "calibration",
    "confusion_matrix",
    "contours",
    "curves",
    "edf",
    "examples",
    "history",
    "images",
    "importances",
    "intermediate_values",
    "loss",
    "model_choice",
    "parallel_coordinates",
    "pareto_front",
    "per_class",
    "png",
    "reliability",
    "save",
    "slices",
    "thumbnail",
    "timeline",
    "train_vs_test",
]
