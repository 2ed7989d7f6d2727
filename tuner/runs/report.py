"""The tables and figures of a run, from its predictions."""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from tuner import plots
from tuner.runs import calibration, metrics
from tuner.runs.predictions import Predictions, concatenated
from tuner.runs.run import Run


def tables(
    predictions: Sequence[Predictions], reported: Sequence[Predictions], classes: Sequence[str]
) -> dict[str, list[list[Any]]]:
    """CSV files by name, as rows with the header first.

    predictions.csv has all predictions. confusion_matrix.csv and per_class.csv are of the reported ones, pooled.
    """
    labels, predicted, _ = concatenated(reported)
    counts = metrics.confusion_matrix(labels, predicted, len(classes))
    per_class = metrics.per_class(labels, predicted, classes)
    rows = [row for part in predictions for row in _rows(part, classes)]
    return {
        "predictions.csv": [["split", "image", "label", "predicted", "confidence"], *rows],
        "confusion_matrix.csv": [["true \\ predicted", *classes], *map(list, zip(classes, *counts.T, strict=True))],
        "per_class.csv": [list(per_class[0]), *(list(row.values()) for row in per_class)],
    }


def _rows(part: Predictions, classes: Sequence[str]) -> list[list[Any]]:
    """A row of predictions.csv for each image. An image without a name is called by its row in the data set."""
    names = part.samples.names
    columns = (values.tolist() for values in (part.rows, part.labels, part.predicted, part.confidence))
    return [
        [part.split, names[row] if names else row, classes[label], classes[predicted], f"{confidence:.4f}"]
        for row, label, predicted, confidence in zip(*columns, strict=True)
    ]


def figures(parts: Sequence[Predictions], classes: Sequence[str], split: str) -> dict[str, Figure]:
    """Figures by name, of all parts together. split: what the titles call them."""
    labels, predicted, confidence = concatenated(parts)
    counts = metrics.confusion_matrix(labels, predicted, len(classes))
    mistakes = metrics.most_confident_mistakes(labels, predicted, confidence, 25)
    images = [_image(parts, number) for number in mistakes.tolist()]
    examples = plots.examples(
        torch.stack(images) if images else torch.empty(0),
        [classes[i] for i in labels[mistakes]],
        [classes[i] for i in predicted[mistakes]],
        confidence[mistakes].tolist(),
        split,
    )
    before = calibration.bins(torch.cat([part.log_p for part in parts]), labels)
    after = calibration.bins(torch.cat([part.calibrated for part in parts]), labels)
    errors = calibration.error(before), calibration.error(after)
    return {
        "confusion_matrix": plots.confusion_matrix(counts, classes, split),
        "per_class": plots.per_class(metrics.per_class(labels, predicted, classes), split),
        "examples": examples,
        "reliability": plots.reliability(before, after, errors, parts[0].temperature, split),
    }


def _image(parts: Sequence[Predictions], number: int) -> torch.Tensor:
    """An image, uint8 [C, H, W], by its number among those of all parts."""
    for part in parts:
        if number < len(part.rows):
            return part.samples.images[part.rows[number]]
        number -= len(part.rows)
    raise IndexError(number)


def write_report(
    run: Run,
    predictions: Sequence[Predictions],
    classes: Sequence[str],
    accuracies: dict[str, float],
    saved_epoch: int,
    draw: bool,
) -> None:
    """Write a run's tables and, with `draw`, its plots. They report the last of the predictions.

    accuracies: by the name of the split, for the plot that compares them.
    """
    reported = predictions[-1:]
    for name, rows in tables(predictions, reported, classes).items():
        run.save_table(name, rows)
    if not draw:
        return
    curve = run.metrics()
    run.save_plot("accuracy", plots.accuracy(curve, saved_epoch))
    run.save_plot("loss", plots.loss(curve, saved_epoch))
    run.save_plot("train_vs_test", plots.train_vs_test(accuracies))
    for name, figure in figures(reported, classes, reported[0].split).items():
        run.save_plot(name, figure)
