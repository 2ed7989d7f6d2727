"""tuner.runs.predictions: the scores of a split, for result.json and tuner.evaluate."""

import pytest
import torch

from tuner.data import Samples
from tuner.runs import calibration, metrics
from tuner.runs.predictions import Predictions, result_scores, summary


def scored(split, n, classes=7, temperature=2.0):
    """Random log-probabilities of n images, which are rows 5 and up of the samples."""
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(classes, (n + 5,), generator=generator)
    log_p = torch.randn(n, classes, generator=generator) + 2 * torch.nn.functional.one_hot(labels[5:], classes)
    samples = Samples(torch.zeros(n + 5, 1, 4, 4, dtype=torch.uint8), labels)
    return Predictions(split, samples, torch.arange(5, n + 5), log_p.log_softmax(1), temperature)


def test_the_scores_of_several_parts_are_those_of_all_their_images():
    parts = [scored("training", 30), scored("test", 50)]
    labels, log_p = torch.cat([p.labels for p in parts]), torch.cat([p.log_p for p in parts])
    calibrated = calibration.calibrated(log_p, 2.0)
    before, after = ({name: v for name, [v] in metrics.scores(p[None], labels).items()} for p in (log_p, calibrated))
    assert before["auroc"] != after["auroc"]
    errors = {"ece": calibration.ece(log_p, labels), "ece_calibrated": calibration.ece(calibrated, labels)}
    assert summary(parts) == pytest.approx(before | {"log_loss": after["log_loss"]} | errors)


def test_the_scores_of_validation_and_test_in_a_result():
    validation, test = scored("validation", 40), scored("test", 60)
    both = result_scores([validation, test])
    names = (*metrics.METRICS, "ece", "ece_calibrated")
    assert list(both) == [f"{split}_{name}" for split in ("val", "test") for name in names if name != "accuracy"]
    assert both == {
        f"{prefix}_{name}": value
        for prefix, part in (("val", validation), ("test", test))
        for name, value in summary([part]).items()
        if name != "accuracy"
    }
    alone = result_scores([test])
    assert alone == both | {name: None for name in both if name.startswith("val_")}


def test_scores_that_there_are_not_are_none():
    few = summary([scored("test", 20, classes=5)])
    assert [name for name, value in few.items() if value is None] == ["top5_accuracy"]
    part = scored("test", 20, temperature=1.0)
    part.log_p[0] = -torch.inf
    part.log_p[0, (part.labels[0] + 1) % 7] = 0.0
    assert [name for name, value in summary([part]).items() if value is None] == ["log_loss"]  # it is infinite
