"""model=auto: what is scored, what is chosen, and where the choice is kept."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import result
from PIL import Image
from sklearn.linear_model import Ridge

import tuner
from tuner.bank import cuts
from tuner.bank.cuts import Candidate, sample
from tuner.bank.ridge import LAMBDAS, leave_one_out
from tuner.cache_files import Cache
from tuner.config import ModelConfig, of_run
from tuner.data import synthetic
from tuner.data.files import image_array
from tuner.networks import weights
from tuner.networks.backbone import Backbone, block_shapes
from tuner.rules import DURATION, seconds
from tuner.training import model_choice, setup
from tuner.training.model_choice import Choice, choose, from_json

CPU = torch.device("cpu")
VGG11 = ("model=auto", "model.name=vgg11", "model.weights=null", "model.image_size=32")
RUN = (*VGG11, "data=synthetic", "data.n=120", "epochs=1", "batch_size=32", "plots=false")


def auto(**values):
    everything = dict.fromkeys(model_choice.KEYS, "auto") | {"frozen": "auto"}
    return ModelConfig(**everything | {"name": "vgg11", "weights": None, "image_size": 32} | values)


@pytest.fixture(scope="module")
def data():
    return synthetic.load(n=150, size=16, classes=3)


def chosen(data, tmp_path, model=None, **options):
    defaults = {"seed": 0, "cache": Cache(tmp_path), "device": CPU, "dtype": torch.float32}
    return choose(model or auto(), data, **defaults | options)


# The score


def test_leave_one_out_is_what_regressions_without_each_image_predict():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    x = torch.randn(30, 50, generator=generator) + F.one_hot(labels, 50) * 1.5
    gram, targets = x @ x.T, F.one_hot(labels, 3).double().numpy()
    centred = (x - x.mean(0)).double()
    unit = float(torch.linalg.eigvalsh(centred @ centred.T).clamp(min=0).mean())
    by_penalty = []
    for penalty in LAMBDAS * unit:
        fits = []
        for i in range(30):
            kept = torch.arange(30) != i
            model = Ridge(float(penalty), solver="svd").fit(x[kept].double().numpy(), targets[kept.numpy()])
            fits.append(torch.from_numpy(model.predict(x[i : i + 1].double().numpy())[0]))
        fitted = torch.stack(fits)
        by_penalty.append((float(((fitted - torch.from_numpy(targets)) ** 2).sum()), fitted.argmax(1)))
    expected = min(by_penalty, key=lambda pair: pair[0])[1]
    predicted, loss = leave_one_out(gram, labels, 3)
    assert predicted.equal(expected)
    assert loss == pytest.approx(min(error for error, _ in by_penalty) / 30, rel=1e-4)


def test_features_of_one_value_score_as_chance_does():
    assert leave_one_out(torch.ones(6, 6), torch.arange(6) % 2, 2)[0].shape == (6,)


# The candidates


def test_blocks_that_are_tried_are_the_last_of_each_size_of_map():
    assert list(block_shapes("efficientnet_lite0", 64)) == [f"features.{i}" for i in range(9)]
    one = model_choice._pass(auto(), "efficientnet_lite0", None, 64, 0)
    assert one.groups == [
        *(["features.3"], ["features.5"], ["features.8"]),
        *(["features.3", "features.5"], ["features.5", "features.8"]),
    ]
    assert model_choice._pass(auto(last_block="features.2"), "efficientnet_lite0", None, 64, 0).groups == [
        ["features.2"]
    ]


def test_each_candidate_has_the_features_that_a_run_would_have(data, tmp_path):
    choice = chosen(data, tmp_path)
    assert len(choice.candidates) > 8
    rows = sample(data, 10**6, 0)
    labels = data.pool.labels[rows]
    for candidate in choice.candidates[::3]:
        values = candidate.values
        backbone = Backbone(**values, frozen=values["last_block"])
        assert backbone.feature_size == candidate.features
        assert backbone.macs() / 1e9 == pytest.approx(candidate.gmacs, abs=1e-4)
        features = backbone.frozen_part(torch.float32)(data.pool.images[rows])
        features = F.layer_norm(features, features.shape[1:])
        right = leave_one_out(features @ features.T, labels, 3)[0] == labels
        assert float(right.double().mean()) == pytest.approx(candidate.accuracy, abs=1.5 / len(rows))


def test_fixed_values_limit_the_choice(data, tmp_path):
    for fixed in ({"pool": 2}, {"last_block": "block3"}, {"last_block": ["block2", "block3"]}, {"pool": None}):
        choice = chosen(data, tmp_path, auto(**fixed))
        for candidate in choice.candidates:
            assert candidate.values.items() >= fixed.items()


def test_with_trained_blocks_only_single_blocks_above_them_are_tried(data, tmp_path):
    for frozen, first in (("block3", "block4"), (None, "block3")):
        choice = chosen(data, tmp_path, auto(frozen=frozen))
        assert {c.values["last_block"] for c in choice.candidates} <= {"block3", "block4", "block5"}
        assert min(c.values["last_block"] for c in choice.candidates) == first


def test_validation_and_test_images_are_not_looked_at(data, tmp_path):
    pool, test = data.pool, data.test
    images, labels = pool.images.clone(), pool.labels.clone()
    images[data.val] = 255 - images[data.val]
    labels[data.val] = labels[data.val].flip(0)
    other = replace(
        data, pool=replace(pool, images=images, labels=labels), test=replace(test, images=255 - test.images)
    )
    ours, theirs = chosen(data, tmp_path / "a"), chosen(other, tmp_path / "b")
    assert [(c.values, c.accuracy) for c in ours.candidates] == [(c.values, c.accuracy) for c in theirs.candidates]


def test_the_sample_is_stratified_has_no_copies_and_only_training_images(data):
    assert not torch.isin(sample(data, 10**6, 0), data.val).any()
    images = data.pool.images.clone()
    images[data.train[1]] = images[data.train[0]]
    doubled = replace(data, pool=replace(data.pool, images=images))
    assert len(sample(doubled, 10**6, 0)) == len(data.train) - 1
    large = synthetic.load(n=2000, size=8, classes=4)
    rows = sample(large, 1, 0)
    assert torch.bincount(large.pool.labels[rows]).tolist() == [50, 50, 50, 50]
    assert len(sample(large, 10**6, 0)) == cuts.MOST
    assert not rows.equal(sample(large, 1, 1))


def test_weights_that_were_downloaded_are_candidates(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert weights.at_hand() == [("vgg16", "bundled"), ("efficientnet_lite0", "bundled")]
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/resnet18-f37072fd.pth").touch()
    assert weights.at_hand()[2:] == [("resnet18", "IMAGENET1K_V1")]


# The choice


def candidate(name, bank_seconds):
    values = dict.fromkeys(model_choice.KEYS, name)
    return Candidate(values, 10, 1.0, bank_seconds, 0.0, 0.0, 0.5)


def ranked(budget, *options):
    pairs = []
    for name, bank_seconds, right, *loss in options:  # each is wrong about other images
        correct = (torch.arange(100) - 10 * len(pairs)) % 100 < right
        scored = {"accuracy": right / 100} | ({"loss": loss[0]} if loss else {})
        pairs.append((replace(candidate(name, bank_seconds), **scored), correct))
    return Choice(model_choice._ranked(pairs, budget), 100, 1.0, ())


def test_the_cheapest_that_is_as_good_as_the_best_is_chosen():
    choice = ranked(1.0, ("best", 90, 80), ("cheap", 20, 79), ("worse", 5, 70))
    assert [c.values["name"] for c in choice.candidates] == ["best", "cheap", "worse"]
    assert [c.as_good for c in choice.candidates] == [True, True, False]
    assert choice.chosen.values["name"] == "cheap"


def test_the_squared_error_decides_between_equal_accuracies():
    correct = torch.arange(100) < 90
    pairs = [(replace(candidate(name, 5), accuracy=0.9, loss=loss), correct) for name, loss in (("a", 0.3), ("b", 0.2))]
    assert [c.values["name"] for c in model_choice._ranked(pairs, 60.0)] == ["b", "a"]


def test_among_features_that_take_less_time_than_the_choice_the_squared_error_counts():
    options = ("slow", 90, 82, 0.1), ("lucky", 20, 81, 0.3), ("good", 20, 80, 0.2), ("cheap", 5, 80, 0.3)
    assert ranked(30.0, *options).chosen.values["name"] == "good"
    assert ranked(10.0, *options).chosen.values["name"] == "cheap"
    said = model_choice.lines(ranked(30.0, *options[1:]))[-1]
    assert said.endswith(", with a smaller squared error, and within one standard error of the best")


def test_what_does_not_fit_into_the_budget_is_left_out_and_named(data, tmp_path, monkeypatch):
    model = auto(image_size="auto")
    monkeypatch.setattr(cuts.Pass, "seconds_per_image", lambda *_: 1e6)
    choice = chosen(data, tmp_path, model)
    assert {c.values["image_size"] for c in choice.candidates} == {64}
    assert [line.partition(" (")[0] for line in choice.left_out] == ["vgg11 at 128 px", "vgg11 at 224 px"]
    assert "not tried: vgg11 at 128 px (about " in "\n".join(model_choice.lines(choice))


def test_a_choice_is_remembered(data, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    first = chosen(data, tmp_path)
    assert chosen(data, tmp_path) == from_json(json.loads(json.dumps(first.as_json())))
    assert "chosen before" in caplog.text
    [path] = tmp_path.glob("choices/*.json")
    for damage in ("{}", "[", '{"candidates": [], "images": 1, "seconds": 1, "left_out": []}'):
        path.write_text(damage)
        caplog.clear()
        assert chosen(data, tmp_path).chosen.values == first.chosen.values
        assert "cannot be read" in caplog.text
    for other in ({"seed": 1}, {"model": auto(pool=1)}):
        chosen(data, tmp_path, **other)
    assert len(list(tmp_path.glob("choices/*.json"))) == 3


# Runs and searches


def test_a_run_records_what_was_chosen_and_its_model_can_be_used(command):
    code, output = command(*RUN, "plots=true", "hydra.run.dir=run")
    assert code == 0, output
    assert "<- chosen" in output
    model, choice = of_run(Path("run")).model, from_json(result(Path("run"))["model_choice"])
    assert {key: getattr(model, key) for key in model_choice.KEYS} == dict(choice.chosen.values)
    assert model.frozen == model.last_block
    assert Path("run/plots/model.png").stat().st_size > 10_000
    assert tuner.load("run").predict(torch.zeros(2, *tuner.load("run").input_shape, dtype=torch.uint8)).shape == (2, 4)


def test_the_trials_of_a_search_have_one_choice(command, monkeypatch):
    words = ("-m", "hparams_search=optuna", "hydra.sweeper.n_trials=3", "final.seeds=1", "study=s", *RUN)
    code, output = command(*words)
    assert code == 0, output
    assert "chosen for all trials: model.last_block=" in output
    assert Path("multirun/s/0/train.log").read_text().count("<- chosen") == 1
    models = {repr(replace(of_run(path.parent).model, head=None)) for path in Path("multirun/s").glob("*/result.json")}
    assert len(models) == 1
    monkeypatch.setattr(setup, "choose", lambda *_, **__: pytest.fail("chosen again"))
    monkeypatch.setenv("TUNER_CACHE", str(Path("another").absolute()))  # keys that do not matter may change
    code, output = command(*words, "hydra.sweeper.n_trials=4", "cache_limit=20GB")
    assert code == 0, output
    assert "4/4 trials" in output


def test_image_files_are_decoded_at_the_size_of_each_candidate(command, monkeypatch):
    """And the run's images at the chosen size, as in a run from its config."""
    for module in (model_choice, setup):
        monkeypatch.setattr(module, "SIZES", (32, 40))
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        Path("images", name).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(0, 255, (50, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"images/{name}/{i}.png")
    seen = set()
    read = image_array._read_at
    monkeypatch.setattr(
        image_array, "_read_at", lambda files, how, names, side: seen.add(side) or read(files, how, names, side)
    )
    words = ("model=auto", "model.name=vgg11", "model.weights=null", "epochs=1", "batch_size=8", "model.budget=10m")
    code, output = command(*words, "data=image_folder", "data.root=images", "hydra.run.dir=run")
    assert code == 0, output
    assert seen == {32, 40}
    size = of_run(Path("run")).model.image_size
    assert tuner.load("run").input_shape == (3, size, size)
    code, output = command("--config-dir=run/conf", "--config-name=config", "hydra.run.dir=again")
    assert code == 0, output
    assert result(Path("again"))["split_hashes"] == result(Path("run"))["split_hashes"]
    assert result(Path("again"))["val_loss"] == result(Path("run"))["val_loss"]


def test_a_list_of_images_to_leave_out_applies_after_the_choice(command, call):
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        Path("images", name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(f"images/{name}/{i}.png")
    words = ("model=auto", "model.name=vgg11", "model.weights=null", "data=image_folder", "data.root=images")
    words = (*words, "model.budget=5s", "epochs=1", "batch_size=8")
    code, _, err = call("audit", *words, "--out", "audit")
    assert code == 0, err
    table = pd.read_csv("audit/audit.csv", dtype=str)
    assert len(table)
    table.assign(exclude="yes").to_csv("audit/audit.csv", index=False)
    code, output = command(*words, "data.exclude=audit/audit.csv", "hydra.run.dir=run")
    assert code == 0, output
    assert result(Path("run"))["n_excluded"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.budget=soon",), "model.budget=soon must be a time above 0, in seconds or as 60s, 10m or 2h"),
        (("model.budget=0",), "model.budget=0 must be a time above 0"),
        (("model.name=resnext",), "model=auto has nothing to choose from: model.name=resnext is not a classification"),
        (("model.image_size=abc",), "model.image_size=abc must be a whole number of at least 1"),
        (("model.last_block=5",), "model.last_block=5 must be a block, or a list of blocks"),
        (("model.pool=1.5",), "model.pool=1.5 must be a whole number of at least 1"),
        (("model.name=[vgg11]",), "model.name=['vgg11'] must be text"),
        (
            ("model.frozen=block7",),
            "nothing to choose from: model.frozen=block7 is not a block of vgg11",
        ),
        (
            ("model.frozen=block5",),
            "nothing to choose from: vgg11 has no block above model.frozen=block5 to use at model.image_size=32",
        ),
        (("model.last_block=block9",), "model=auto has nothing to choose from: model.last_block=block9 is not a block"),
        (("model.pool=99",), "model=auto has nothing to choose from: no map is as large as model.pool=99"),
        (("model.name=auto", "model.weights=auto", "model.last_block=block9"), "known: features.0, features.1"),
        (("model.name=auto", "model.weights=auto", "model.last_block=block9"), "known: block1, block2"),
    ],
)
def test_a_choice_without_candidates_is_one_line(command, words, message):
    code, output = command(*RUN, *words)
    assert code == 1
    assert message in output
    assert "Traceback" not in output


def test_a_wrong_size_is_told_before_image_files_are_read(command):
    code, output = command("model=auto", "model.image_size=-3", "data=image_folder", "data.root=.")
    assert code == 1
    assert "model.image_size=-3 must be a whole number of at least 1" in output


def test_durations():
    assert [seconds(value) for value in (5, 0.5, "60s", "10m", "1.5h")] == [5, 0.5, 60, 600, 5400]
    for wrong in ("", "s", "5", "-1s", "1d", "nans", "infs", None, True, [], 0, "1e400h"):
        assert not DURATION.holds(wrong)


# A search that judges cuts before their features are computed


SCREENED = ("-m", "hparams_search=optuna", "study=s", "final.seeds=0", "model.screen=10m")
TINY_DATA = ("data=synthetic", "data.n=120", "epochs=1", "batch_size=32", "model=tiny")


def ends():
    return [result(path.parent) for path in sorted(Path("multirun/s").glob("*/result.json"))]


def test_a_cut_that_scores_below_the_median_of_the_others_costs_no_bank(command, monkeypatch):
    scores = iter([0.5, 0.6, 0.7, 0.8, 0.9, 0.69, 0.7])
    monkeypatch.setattr(cuts, "score", lambda *_, **__: next(scores))
    monkeypatch.setenv("TUNER_CACHE", str(Path("cache").absolute()))
    code, output = command(*SCREENED, *TINY_DATA, "hydra.sweeper.n_trials=7", "hydra/launcher=basic")
    assert code == 0, output
    assert [end["status"] for end in ends()] == [*["complete"] * 5, "pruned", "complete"]
    assert (ends()[5]["epochs"], ends()[5]["val_accuracy"]) == (0, None)
    assert "seconds_features" not in ends()[5]
    log = Path("multirun/s/5/train.log").read_text()
    assert "pruned before training: its cut scores 0.690, below the median 0.700 of the trials" in log


def test_a_cut_whose_features_would_take_too_long_is_pruned(command):
    words = ("model.screen=1e-6s", "model.image_size=40", "hydra.sweeper.n_trials=2")
    _, output = command(*SCREENED, *TINY_DATA, *words)
    assert "all were pruned" in output
    assert [end["status"] for end in ends()] == ["pruned", "pruned"]
    log = Path("multirun/s/0/train.log").read_text()
    assert "its features would take" in log
    assert "more than model.screen=1e-6s" in log


@pytest.mark.parametrize("frozen", ["block1", "null"])
def test_trained_blocks_can_be_screened(command, frozen):
    code, output = command(*SCREENED, *TINY_DATA, f"model.frozen={frozen}", "hydra.sweeper.n_trials=2")
    assert code == 0, output
    assert [end["status"] for end in ends()] == ["complete", "complete"]


def test_the_score_is_that_of_the_features_of_a_run(data, tmp_path):
    choice = chosen(data, tmp_path, auto(last_block="block3", pool=1))
    backbone = Backbone(**choice.chosen.values, frozen="block3")
    score = cuts.score(backbone, data, seed=0, cache=Cache(tmp_path), device=CPU, dtype=torch.float32)
    assert score == pytest.approx(choice.chosen.accuracy, abs=1.5 / len(data.train))
