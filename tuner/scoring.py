"""What a run's saved weights make of a split: its predictions, its tables, its plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tuner import metrics, plots
from tuner.data import Samples
from tuner.plan import Fitted
from tuner.runs import Run


@dataclass
class Scored:
    """A split's images, the rows of them that are in it, and the log-probabilities [len(rows), classes] they got."""

    split: str
    samples: Samples
    rows: torch.Tensor
    log_p: torch.Tensor

    def answers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each row the label, the predicted class and its probability."""
        return self.samples.labels[self.rows], self.log_p.argmax(1), self.log_p.amax(1).exp()

    def table(self, classes: Sequence[str]) -> list[list[Any]]:
        columns = zip(self.rows.tolist(), *(answer.tolist() for answer in self.answers()), strict=True)
        return [[self.split, row, classes[true], classes[said], f"{p:.4f}"] for row, true, said, p in columns]


def report(
    run: Run,
    scored: Sequence[Scored],
    classes: Sequence[str],
    accuracies: dict[str, float],
    fitted: Fitted,
    draw: bool,
) -> None:
    """A run's predictions, and the tables and plots of the last split that was scored."""
    table = [row for one in scored for row in one.table(classes)]
    run.save_table("predictions.csv", [["split", "image", "label", "predicted", "confidence"], *table])
    split, samples, rows = scored[-1].split, scored[-1].samples, scored[-1].rows
    labels, predicted, confidence = scored[-1].answers()
    counts = metrics.confusion_matrix(labels, predicted, len(classes))
    per_class = metrics.per_class(labels, predicted, classes)
    run.save_table("confusion_matrix.csv", [["true \\ predicted", *classes], *zip(classes, *counts.T, strict=True)])
    run.save_table("per_class.csv", [list(per_class[0]), *(list(row.values()) for row in per_class)])
    if not draw:
        return
    curve = run.metrics()
    worst = metrics.most_confident_mistakes(labels, predicted, confidence, 25)
    run.save_plot("accuracy", plots.accuracy(curve, fitted.epoch))
    run.save_plot("loss", plots.loss(curve, fitted.epoch))
    run.save_plot("train_vs_test", plots.train_vs_test(accuracies))
    run.save_plot("confusion_matrix", plots.confusion_matrix(counts, classes, split))
    run.save_plot("per_class", plots.per_class(per_class, split))
    examples = plots.examples(
        samples.images[rows[worst]],
        [classes[i] for i in labels[worst]],
        [classes[i] for i in predicted[worst]],
        confidence[worst].tolist(),
        split,
    )
    run.save_plot("examples", examples)
