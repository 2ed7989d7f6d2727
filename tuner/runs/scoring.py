"""What a run's saved weights make of a split: its predictions, its tables, its plots."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

from tuner import plots
from tuner.data import Samples
from tuner.runs import calibration, metrics
from tuner.runs.run import Run


@dataclass
class Scored:
    """A split's images, the rows of them that are in it, and the log-probabilities [len(rows), classes] they got.

    temperature: at which these become the probabilities that are told.
    """

    split: str
    samples: Samples
    rows: torch.Tensor
    log_p: torch.Tensor
    temperature: float = 1.0

    @property
    def labels(self) -> torch.Tensor:
        return self.samples.labels[self.rows]

    @property
    def calibrated(self) -> torch.Tensor:
        """The log-probabilities at the temperature."""
        return calibration.calibrated(self.log_p, self.temperature)

    def answers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each row the label, the predicted class and its probability, calibrated."""
        return self.labels, self.log_p.argmax(1), self.calibrated.amax(1).exp()

    def table(self, classes: Sequence[str]) -> list[list[Any]]:
        names = self.samples.names
        columns = zip(self.rows.tolist(), *(answer.tolist() for answer in self.answers()), strict=True)
        return [
            [self.split, names[row] if names else row, classes[true], classes[said], f"{p:.4f}"]
            for row, true, said, p in columns
        ]


def summary(parts: Sequence[Scored]) -> dict[str, float | None]:
    """The scores of all parts together: the metrics of METRICS, and the calibration error `ece`, `ece_calibrated`.

    A metric that needs more classes is None, and so is one that is infinite or NaN, which JSON can't have.
    Log loss is that of the calibrated probabilities. AUROC is that of the uncalibrated ones, as in an epoch's
    validation: a temperature changes how images are ranked if there are more than two classes. The others are the
    same with either.
    """
    labels = torch.cat([part.labels for part in parts])
    log_p = torch.cat([part.log_p for part in parts])
    calibrated = torch.cat([part.calibrated for part in parts])
    names = metrics.applicable(log_p.shape[1])
    scores = metrics.scores(log_p[None], labels, names) | metrics.scores(calibrated[None], labels, ["log_loss"])
    values = {name: scores[name][0] if name in scores else None for name in metrics.METRICS}
    values |= {"ece": calibration.ece(log_p, labels), "ece_calibrated": calibration.ece(calibrated, labels)}
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def measures(scored: Sequence[Scored]) -> dict[str, float | None]:
    """For result.json: val_NAME and test_NAME of each score in summary() except accuracy; None without the split."""
    names = [name for name in (*metrics.METRICS, "ece", "ece_calibrated") if name != "accuracy"]
    results: dict[str, float | None] = {}
    for prefix, split in (("val", "validation"), ("test", "test")):
        parts = [part for part in scored if part.split == split]
        values = summary(parts) if parts else {}
        results |= {f"{prefix}_{name}": values.get(name) for name in names}
    return results


def answers(parts: Sequence[Scored]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row of all parts the label, the predicted class and its probability, calibrated."""
    labels, predicted, confidence = zip(*(part.answers() for part in parts), strict=True)
    return torch.cat(labels), torch.cat(predicted), torch.cat(confidence)


def tables(scored: Sequence[Scored], reported: Sequence[Scored], classes: Sequence[str]) -> dict[str, list[list[Any]]]:
    """CSV files by name, the header first: the predictions of all, and how classes did in what is reported."""
    rows = [row for one in scored for row in one.table(classes)]
    labels, predicted, _ = answers(reported)
    counts = metrics.confusion_matrix(labels, predicted, len(classes))
    per_class = metrics.per_class(labels, predicted, classes)
    return {
        "predictions.csv": [["split", "image", "label", "predicted", "confidence"], *rows],
        "confusion_matrix.csv": [["true \\ predicted", *classes], *map(list, zip(classes, *counts.T, strict=True))],
        "per_class.csv": [list(per_class[0]), *(list(row.values()) for row in per_class)],
    }


def pictures(parts: Sequence[Scored], classes: Sequence[str], split: str) -> dict[str, Figure]:
    """Figures by name, of the parts of what is called `split`."""
    labels, predicted, confidence = answers(parts)
    worst = metrics.most_confident_mistakes(labels, predicted, confidence, 25)
    examples = plots.examples(
        torch.stack([_image(parts, place) for place in worst.tolist()]) if len(worst) else torch.empty(0),
        [classes[i] for i in labels[worst]],
        [classes[i] for i in predicted[worst]],
        confidence[worst].tolist(),
        split,
    )
    before = calibration.bins(torch.cat([part.log_p for part in parts]), labels)
    after = calibration.bins(torch.cat([part.calibrated for part in parts]), labels)
    errors = calibration.error(before), calibration.error(after)
    return {
        "confusion_matrix": plots.confusion_matrix(
            metrics.confusion_matrix(labels, predicted, len(classes)), classes, split
        ),
        "per_class": plots.per_class(metrics.per_class(labels, predicted, classes), split),
        "examples": examples,
        "reliability": plots.reliability(before, after, errors, parts[0].temperature, split),
    }


def _image(parts: Sequence[Scored], place: int) -> torch.Tensor:
    """The image of a row, by its place in all parts."""
    for part in parts:
        if place < len(part.rows):
            return part.samples.images[part.rows[place]]
        place -= len(part.rows)
    raise IndexError(place)


def report(
    run: Run,
    scored: Sequence[Scored],
    classes: Sequence[str],
    accuracies: dict[str, float],
    saved_epoch: int,
    draw: bool,
) -> None:
    """A run's predictions, and the tables and plots of the last split that was scored."""
    for name, rows in tables(scored, scored[-1:], classes).items():
        run.save_table(name, rows)
    if not draw:
        return
    curve = run.metrics()
    run.save_plot("accuracy", plots.accuracy(curve, saved_epoch))
    run.save_plot("loss", plots.loss(curve, saved_epoch))
    run.save_plot("train_vs_test", plots.train_vs_test(accuracies))
    for name, figure in pictures(scored[-1:], classes, scored[-1].split).items():
        run.save_plot(name, figure)
