"""The reliability plot and the maps say what they show, in titles that are whole."""

import numpy as np
import pytest
import torch
from matplotlib.image import AxesImage
from seen import legible, note, texts

from tuner import plots
from tuner.runs.calibration import bins, calibrated, error


def log_p(n, classes=4):
    generator = torch.Generator().manual_seed(0)
    return torch.log_softmax(3 * torch.randn(n, classes, generator=generator), 1)


@pytest.mark.parametrize(("split", "n", "temperature"), [("validation", 400, 2.0), ("test", 1, 0.5), ("all", 0, 1.0)])
def test_reliability(tmp_path, monkeypatch, split, n, temperature):
    labels = torch.arange(n) % 4
    before, after = (bins(p, labels) for p in (log_p(n), calibrated(log_p(n), temperature)))
    errors = error(before), error(after)
    figure = plots.reliability(before, after, errors, temperature, split)
    said = legible(figure, tmp_path, monkeypatch)
    expected = f"{split.capitalize()} calibration error {errors[0]:.3f}"
    expected += f", at temperature {temperature:.2f} it is {errors[1]:.3f}" if temperature != 1 else ""
    assert said == expected
    assert f"before: {errors[0]:.3f}" in texts(figure)


@pytest.mark.parametrize("shape", [(28, 28, 1), (64, 32, 3), (16, 200, 3)])
def test_a_map_lies_over_its_image(tmp_path, monkeypatch, shape):
    image, heat = np.full(shape, 99, np.uint8), np.linspace(0, 1, shape[0] * shape[1]).reshape(shape[:2])
    figure = plots.attention(image, heat, "cats/$5_a.jpg", "猫 or a very long name of a class", 0.5, "Grad-CAM on it")
    said = legible(figure, tmp_path, monkeypatch)
    assert said.endswith(" 0.500")
    assert note(figure) == "cats/$5_a.jpg. Grad-CAM on it"
    assert [len(axes.findobj(AxesImage)) for axes in figure.axes] == [1, 2]
