"""A model's predictions for the images of a split, and their scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tuner.data import Samples
from tuner.runs import calibration, metrics


@dataclass
class Predictions:
    """Log-probabilities for the images of a split.

    split: training, validation or test.
    samples: images and labels.   rows: int64 [N], the rows of `samples` in the split.
    log_p: uncalibrated log-probabilities, float [N, classes].
    temperature: the temperature that calibrates them.
    """

    split: str
    samples: Samples
    rows: torch.Tensor
    log_p: torch.Tensor
    temperature: float = 1.0

    @property
    def labels(self) -> torch.Tensor:
        """int64 [N]"""
        return self.samples.labels[self.rows]

    @property
    def calibrated(self) -> torch.Tensor:
        """Calibrated log-probabilities, float [N, classes]."""
        return calibration.calibrated(self.log_p, self.temperature)

    @property
    def predicted(self) -> torch.Tensor:
        """The most probable class of each image, int64 [N]."""
        return self.log_p.argmax(1)

    @property
    def confidence(self) -> torch.Tensor:
        """The calibrated probability of the predicted class, float [N]."""
        return self.calibrated.amax(1).exp()


def concatenated(parts: Sequence[Predictions]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels int64 [N], predicted classes int64 [N] and confidences float [N] of all parts, N images in all."""
    labels, predicted = torch.cat([p.labels for p in parts]), torch.cat([p.predicted for p in parts])
    return labels, predicted, torch.cat([p.confidence for p in parts])


def summary(parts: Sequence[Predictions]) -> dict[str, float | None]:
    """The scores of all parts together: each of metrics.METRICS, and the calibration errors `ece` and `ece_calibrated`.

    A score is None if its metric needs more classes, or if it is infinite or NaN, which JSON does not have.
    Log loss is that of the calibrated probabilities. AUROC is that of the uncalibrated ones, as in the validation of
    an epoch: with more than two classes a temperature changes how images rank. The other scores are the same for both.
    """
    labels = torch.cat([part.labels for part in parts])
    log_p = torch.cat([part.log_p for part in parts])
    calibrated = torch.cat([part.calibrated for part in parts])
    names = metrics.applicable(log_p.shape[1])
    scores = metrics.scores(log_p[None], labels, names) | metrics.scores(calibrated[None], labels, ["log_loss"])
    values = {name: scores[name][0] if name in scores else None for name in metrics.METRICS}
    values |= {"ece": calibration.ece(log_p, labels), "ece_calibrated": calibration.ece(calibrated, labels)}
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def result_scores(predictions: Sequence[Predictions]) -> dict[str, float | None]:
    """The scores for result.json: val_NAME and test_NAME of each score of summary(), None without the split.

    Accuracy is left out: the caller has it already.
    """
    names = [name for name in (*metrics.METRICS, "ece", "ece_calibrated") if name != "accuracy"]
    results: dict[str, float | None] = {}
    for prefix, split in (("val", "validation"), ("test", "test")):
        parts = [part for part in predictions if part.split == split]
        values = summary(parts) if parts else {}
        results |= {f"{prefix}_{name}": values.get(name) for name in names}
    return results
