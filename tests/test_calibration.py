"""Temperatures and calibration errors, against definitions, made-up models, and runs."""

import json
import math
import time

import pytest
import torch
import torch.nn.functional as F

from tuner.runs import calibration
from tuner.runs.calibration import bins, calibrated, ece, temperature


def honest(n=20_000, classes=5, scale=2.0):
    """Log-probabilities that are true, and labels drawn from them."""
    generator = torch.Generator().manual_seed(0)
    log_p = F.log_softmax(scale * torch.randn(n, classes, generator=generator), dim=1)
    return log_p, torch.multinomial(log_p.exp(), 1, generator=generator).flatten()


@pytest.mark.parametrize("factor", [0.2, 0.5, 1, 2, 5])
def test_the_temperature_undoes_what_made_a_model_too_sure_or_not_sure_enough(factor):
    log_p, labels = honest()
    wrong = F.log_softmax(factor * log_p, dim=1)
    t = temperature(wrong, labels)
    assert t == pytest.approx(factor, rel=0.05)
    assert ece(calibrated(wrong, t), labels) < 0.02
    assert factor == 1 or ece(wrong, labels) > 3 * ece(calibrated(wrong, t), labels)
    assert torch.equal(calibrated(wrong, t).argmax(1), wrong.argmax(1))


def test_it_is_the_lowest_cross_entropy_of_all_temperatures():
    log_p, labels = honest(300)
    losses = {t: F.nll_loss(calibrated(log_p, t), labels).item() for t in torch.arange(0.5, 2, 0.001).tolist()}
    assert temperature(log_p, labels) == pytest.approx(min(losses, key=losses.get), abs=0.002)


HALF = torch.tensor([[0.5, 0.5]]).log()
NOT_FITTED = [  # log-probabilities, labels, what is said
    (torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log(), [0, 1], "the optimum is below 0.05"),
    (torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log(), [1, 0], "the optimum is above 20"),
    (torch.tensor([[0.0, -math.inf], [-0.1, -2.0]]), [0, 1], "missing or not finite"),
    (torch.tensor([[math.nan, 0.0]]), [0], "missing or not finite"),
    (HALF, [0], "the optimum is below 0.05"),
    (torch.empty(0, 2), [], "missing or not finite"),
]


@pytest.mark.parametrize(("log_p", "labels", "said"), NOT_FITTED)
def test_where_none_is_best_it_is_one_and_says_so(log_p, labels, said, caplog):
    caplog.set_level("INFO")
    assert temperature(log_p, torch.tensor(labels, dtype=torch.int64)) == 1
    assert "temperature: 1 (calibration skipped: " in caplog.text
    assert said in caplog.text


def test_the_calibration_error_is_that_of_the_definition():
    log_p, labels = honest(1000)
    confidence, predicted = log_p.double().exp().max(1)
    right = (predicted == labels).double()
    expected = 0.0
    for i in range(15):  # equation 3 of the paper
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            expected += inside.double().mean() * (right[inside].mean() - confidence[inside].mean()).abs()
    assert ece(log_p, labels) == pytest.approx(float(expected), abs=1e-12)
    found = bins(log_p, labels)
    assert len(found) == 15
    assert sum(b.images for b in found) == 1000
    assert all(b.images == 0 or i / 15 < b.confidence <= (i + 1) / 15 for i, b in enumerate(found))


TABLE = [  # probabilities of class 0 of two, labels, the error
    ([1.0, 1.0], [0, 0], 0.0),
    ([1.0, 1.0], [0, 1], 0.5),
    ([1.0, 1.0], [1, 1], 1.0),
    ([0.75, 0.75, 0.75, 0.75], [0, 0, 0, 1], 0.0),
    ([0.9, 0.6], [0, 1], 0.5 * 0.1 + 0.5 * 0.6),
]


@pytest.mark.parametrize(("p", "labels", "error"), TABLE)
def test_small_cases_of_the_calibration_error(p, labels, error):
    log_p = torch.tensor([[q, 1 - q] for q in p]).log()
    assert ece(log_p, torch.tensor(labels)) == pytest.approx(error, abs=1e-6)


def test_it_costs_a_trial_nothing():
    log_p, labels = honest(5000, 10)
    temperature(log_p, labels)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        ece(calibrated(log_p, temperature(log_p, labels)), labels)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02  # it takes 2 ms; what else the machine does takes its share


def test_a_run_fits_it_on_validation_and_writes_both_errors(trained):
    folder = trained("label_smoothing=0.6", "plots=true")
    result = json.loads((folder / "result.json").read_text())
    assert 0.05 < result["temperature"] < 1  # smoothed labels make it too unsure
    for split in ("val", "test"):
        assert result[f"{split}_ece_calibrated"] < result[f"{split}_ece"]
    assert (folder / "plots" / "reliability.png").stat().st_size > 10_000


def test_what_is_said_without_validation_images(command):
    code, output = command("data=synthetic", "model=tiny", "epochs=3", "final.epochs=2", "final.seeds=1")
    assert code == 0, output
    assert "temperature: 1 (there are no validation images to fit it on" in output
    assert calibration.calibrated(HALF, 1) is HALF
