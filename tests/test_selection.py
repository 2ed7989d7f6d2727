"""The gain of the best of several trials, corrected for having chosen it by the same images."""

import math

import numpy as np
import pytest
from scipy.stats import norm
from test_paired import of, scored

from tuner.runs import selection
from tuner.runs.selection import Gain, gain, gain_of


def answers(accuracies, images, generator):
    """Whether classifiers of these accuracies are right about each image, some of which are hard for all: [T, N]."""
    hard = generator.standard_normal(images)
    own = generator.standard_normal((len(accuracies), images))
    position = math.sqrt(0.85) * hard + math.sqrt(0.15) * own
    return position > norm.ppf(1 - np.array(accuracies))[:, None]


def simulated(spread, monkeypatch, studies=100):
    """For studies of 16 trials around an accuracy of 0.9 whose best is not the default: (gain, its true value)."""
    monkeypatch.setattr(selection, "DRAWS", 200)
    generator, found = np.random.default_rng(0), []
    for _ in range(studies):
        accuracies = 0.9 + spread * generator.standard_normal(16)
        right = answers(accuracies.clip(0.5, 0.99), 400, generator)
        if best := int(right.mean(1).argmax()):
            found.append((gain(right, 0), accuracies[best] - accuracies[0]))
    return found


def test_among_equal_trials_what_is_announced_is_luck_and_the_corrected_gain_is_none(monkeypatch):
    found = simulated(0.0, monkeypatch)
    assert np.mean([one.announced for one, _ in found]) > 0.012
    assert abs(np.mean([one.corrected for one, _ in found])) < 0.003
    assert np.mean([one.is_chance for one, _ in found]) > 0.9


def test_where_trials_differ_the_corrected_gain_is_the_true_one(monkeypatch):
    found = simulated(0.03, monkeypatch)
    true = np.mean([value for _, value in found])
    assert np.mean([one.announced for one, _ in found]) > true + 0.003
    assert np.mean([one.corrected for one, _ in found]) == pytest.approx(true, abs=0.003)
    assert np.mean([one.is_chance for one, _ in found]) < 0.4


@pytest.mark.parametrize("spread", [0.0, 0.005, 0.03])
def test_about_95_percent_of_the_intervals_have_the_true_gain(monkeypatch, spread):
    found = simulated(spread, monkeypatch)
    assert np.mean([one.low <= true <= one.high for one, true in found]) >= 0.9


def test_the_same_predictions_give_the_same_gain():
    right = answers([0.8, 0.9, 0.85], 100, np.random.default_rng(0))
    assert gain(right, 0) == gain(right, 0)
    assert gain(right, 1).announced == 0


def test_a_gain_says_how_sure_it_is():
    how = "95% interval -0.0102 to 0.0164; the best of 12 complete trials on 1,600 images"
    assert str(Gain(0.01, 0.0031, -0.0102, 0.0164, 1600, 12)) == f"on other images: 0.0031 ({how}): within chance"
    assert str(Gain(0.01, 0.03, 0.01, 0.05, 600, 12)).endswith(": more than chance explains")


RIGHT, WRONG = ("a", "a"), ("a", "b")


def test_the_folders_of_a_study_give_the_same(tmp_path):
    rows = [[RIGHT] * k + [WRONG] * (20 - k) for k in (10, 12, 15)]
    default, *others = (scored(tmp_path / str(k), of("validation", answers)) for k, answers in enumerate(rows))
    right = np.array([[answer is RIGHT for answer in answers] for answers in rows])
    assert gain_of(default, others) == gain(right, 0)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(of("validation", [RIGHT] * 4), id="fewer images"),
        pytest.param(of("validation", [RIGHT] * 5, start=1), id="other images"),
        pytest.param(of("validation", [("b", "b")] * 5), id="other labels"),
        pytest.param(of("test", [RIGHT] * 5), id="no validation images"),
        pytest.param(None, id="no predictions"),
    ],
)
def test_without_predictions_for_the_same_images_there_is_no_gain(tmp_path, rows):
    default, other = scored(tmp_path / "a", of("validation", [RIGHT] * 5)), tmp_path / "b"
    other.mkdir()
    if rows is not None:
        scored(other, rows)
    assert gain_of(default, [other]) is None
    assert gain_of(other, [default]) is None


def test_out_of_fold_answers_have_a_wider_interval():
    """The heads of five folds share training images: by 1.5 times, as Nadeau and Bengio have it."""
    right = np.random.default_rng(0).random((4, 500)) < 0.8
    one, five, two = (gain(right, 0, folds=folds) for folds in (None, 5, 2))
    assert (five.announced, five.corrected) == (one.announced, one.corrected)
    assert five.high - five.low == pytest.approx(1.5 * (one.high - one.low))
    assert two.high - two.low == pytest.approx(3**0.5 * (one.high - one.low))
