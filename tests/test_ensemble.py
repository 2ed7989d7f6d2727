"""Ensembles of a study's trials: how they are chosen, their one head, and the search that ends with one."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import TINY, result
from safetensors.torch import save_file

import tuner
from tuner import InputError
from tuner.inference.model import Layers
from tuner.runs import ensemble
from tuner.runs.ensemble import Means, Member, choose
from tuner.runs.selection import Gain
from tuner.sweep.report import final_result
from tuner.training.heads import Classifier, Head, Stack
from tuner.training.merging import merged, merged_head

CPU = torch.device("cpu")
MINE = Path("multirun/mine")


# One head


@pytest.mark.parametrize("widths", [[(), ()], [(8,), (5,), (16,)], [(8, 4), (3, 7)], [(4, 3, 2), (2, 3, 4), (5, 5, 5)]])
def test_the_merged_head_gives_the_weighted_sum_of_the_logits(widths):
    heads = [Head(w, 0.3, seed) for seed, w in enumerate(widths)]
    classifier = Classifier(None, Stack(12, 5, heads, CPU)).eval()
    x, weights = torch.randn(20, 12), [0.5, 0.3, 0.7][: len(heads)]
    expected = torch.einsum("k,kbc->bc", torch.tensor(weights), classifier(x))

    state = merged([classifier.state(k) for k in range(len(heads))], weights)
    head = merged_head(heads)
    assert head.widths == tuple(map(sum, zip(*widths, strict=True)))
    one = Classifier(None, Stack(12, 5, [head], CPU)).eval()
    assert {name: tensor.shape for name, tensor in one.state(0).items()} == {n: t.shape for n, t in state.items()}
    one.load_state(0, state)
    torch.testing.assert_close(one(x)[0], expected)
    torch.testing.assert_close(Layers(state, torch.float32)(x), expected)


def test_a_merged_head_that_is_too_wide_is_refused():
    with pytest.raises(InputError, match=r"hidden layers of \[80000\] units as one; at most 65,536 are allowed: lower"):
        merged_head([Head((40_000,), 0.0, 0), Head((40_000,), 0.0, 1)])


# The choice


def library(trials, images, seed=0, noise=2.0, classes=4):
    """Trials of equal quality with errors of their own: (log-probabilities [M, N, classes], labels [N])."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    hard = torch.randn(images, classes, generator=generator)
    own = torch.randn(trials, images, classes, generator=generator)
    logits = 2 * torch.nn.functional.one_hot(labels, classes) + hard + noise * own
    return (logits / 2).log_softmax(2), labels


def loss(log_p, labels):
    return float(torch.nn.functional.cross_entropy(log_p.double(), labels))


@pytest.mark.parametrize("most", [1, 2, 5, 20])
def test_an_ensemble_is_no_worse_than_what_it_starts_with(most):
    log_p, labels = library(8, 300)
    means = Means(log_p, labels)
    for start in range(8):
        picks = means.greedy(start, most)
        assert start in picks
        assert len(picks) <= most
        assert picks == means.greedy(start, most)  # the same again
        assert loss(means.of(picks), labels) == pytest.approx(means.log_loss(picks))
        assert loss(means.of(picks), labels) <= loss(log_p[start], labels)
        assert (means.of(picks).argmax(1) == labels).equal(means.right(picks))
    assert len(means.greedy(0, 5)) == 5


def test_every_pick_is_the_one_that_helps_most():
    log_p, labels = library(6, 200)
    first, second = Means(log_p, labels).greedy(3, 2)
    added = first + second - 3
    assert added == min(range(6), key=lambda k: loss((log_p[3] + log_p[k]) / 2, labels))


def test_a_copy_of_the_best_and_a_trial_that_knows_nothing_are_not_added():
    log_p, labels = library(1, 200)
    nothing = log_p[:, torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert Means(torch.cat([log_p, log_p, nothing]), labels).greedy(0, 5) == (0,)


def members(temperatures):
    return [Member(10 + k, Path(str(k)), 5, temperature) for k, temperature in enumerate(temperatures)]


def test_the_weights_are_shares_of_logits_at_the_temperature_of_each_trial():
    log_p, labels = library(6, 300)
    temperatures = [0.5, 1.0, 2.0, 0.5, 1.0, 2.0]
    hot = log_p * torch.tensor(temperatures)[:, None, None]  # as confident as these temperatures correct
    found = choose(members(temperatures), hot, labels, 5, with_gain=False)
    by_trial = {member.trial - 10: weight for member, weight in zip(found.members, found.weights, strict=True)}
    assert found.record["trials"][0] == found.members[0].trial == 10
    assert sum(weight * temperatures[k] for k, weight in by_trial.items()) == pytest.approx(1)
    logits = sum(weight * hot[k] for k, weight in by_trial.items())
    assert loss(logits, labels) == pytest.approx(found.record["val_log_loss"], rel=1e-5)
    assert loss(logits / found.temperature, labels) <= found.record["val_log_loss"] < found.record["best_val_log_loss"]
    assert found.record["trials"] == choose(members([1.0] * 6), log_p, labels, 5, with_gain=False).record["trials"]


# Its gain


def simulated(noise, monkeypatch, studies=40):
    """For studies of 8 trials: (the gain of the ensemble over the best, its value on 20,000 other images)."""
    monkeypatch.setattr(ensemble, "DRAWS", 100)
    found = []
    for seed in range(studies):
        log_p, labels = library(8, 20_400, seed, noise)
        here = Means(log_p[:, :400], labels[:400])
        start = int(here.with_each(())[1].sum(1).argmax())
        right = Means(log_p[:, 400:], labels[400:]).right(here.greedy(start, 4))
        true = right.double().mean() - (log_p[start, 400:].argmax(1) == labels[400:]).double().mean()
        found.append((Gain(**here.gain(start, 4)), float(true)))
    return found


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_the_gain_is_that_on_other_images_and_the_interval_has_it(monkeypatch, noise):
    found = simulated(noise, monkeypatch)
    error = np.mean([one.corrected - true for one, true in found])
    assert abs(error) < 0.005
    assert np.mean([one.low <= true <= one.high for one, true in found]) >= 0.9


# Stored predictions


def test_predictions_are_stored_to_three_digits(tmp_path):
    log_p, labels = library(1, 50)
    ensemble.write(tmp_path, log_p[0], labels)
    stored, same = ensemble.read(tmp_path)
    torch.testing.assert_close(stored, log_p[0], rtol=1e-3, atol=1e-6)
    assert same.equal(labels)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "there is no validation.safetensors"),
        ({}, "validation.safetensors is damaged"),
        ({"log_p": torch.zeros(3, 2), "labels": torch.zeros(2, dtype=torch.int64)}, r"log_p \[N, classes\] and labels"),
        ({"log_p": torch.full((1, 2), torch.nan), "labels": torch.zeros(1, dtype=torch.int64)}, "finite"),
        ({"log_p": torch.zeros(1, 2), "labels": torch.tensor([2])}, "a label is not one of its 2 classes"),
    ],
)
def test_stored_predictions_that_cannot_be_used(tmp_path, tensors, message):
    if tensors is not None:
        save_file(tensors, tmp_path / ensemble.LOG_P)
    with pytest.raises(InputError, match=message):
        ensemble.read(tmp_path)


# A search that ends with one

SEARCH = ("-m", "hparams_search=random", "study=mine", "hydra.sweeper.n_trials=4", *TINY)


def probabilities(path):
    return tuner.load(path).predict(IMAGES)


IMAGES = torch.randint(256, (30, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_search_ends_with_one_model_that_all_commands_take(command, call):
    code, output = command(*SEARCH, "final.ensemble=3", "final.seeds=2", "plots=true")
    assert code == 0, output
    r = result(MINE / "best")
    record = r["ensemble"]
    trials = record["trials"]
    assert trials[0] == r["trial"]
    assert len(trials) > 1
    assert sum(record["weights"]) == pytest.approx(1, abs=1e-3)
    assert (r["seeds"], r["n_val"], len(r["test_accuracies"])) == ([0, 1], 0, 1)
    assert [path.name for path in (MINE / "best").glob("*.safetensors")] == ["model.safetensors"]
    config = yaml.safe_load((MINE / "best/conf/config.yaml").read_text())
    recorded = [yaml.safe_load((MINE / str(t) / "conf/config.yaml").read_text()) for t in trials]
    assert config["model"]["head"]["width"] == [2 * sum(own["model"]["head"]["width"] for own in recorded)]

    line = f"gain of the ensemble over the best trial {Gain(**record['gain'])}"
    accuracy = f"the ensemble of trials {', '.join(map(str, trials))}, 2 seeds each: "
    for text in (line, f"on train + validation, {accuracy}test accuracy {r['test_accuracy']:.4f}"):
        assert text in output
    assert yaml.safe_load((MINE / "optimization_results.yaml").read_text())["final"]["ensemble"] == record
    _, out, _ = call("study", MINE)
    assert line in out
    assert f"retrained on train + validation and tested, {accuracy}{r['test_accuracy']:.4f}" in out

    code, out, err = call("evaluate", MINE / "best")
    assert code == 0, err
    assert f"{r['test_accuracy']:.4f}" in out
    for form in ("torchscript", *(["onnx"] if find_spec("onnxruntime") and find_spec("onnxscript") else [])):
        code, out, err = call("export", MINE / "best", "--format", form)
        assert code == 0, err
        assert "the top class of 0 images" in out
    code, out, err = call("predict", MINE / "best", MINE / "best/plots/accuracy.png", "--maps", "maps")
    assert code == 0, err


def test_the_seeds_of_the_best_trial_alone_are_averaged_at_the_logits(command):
    command(*SEARCH, "final.seeds=2")
    shutil.copytree(MINE / "best", "apart")
    code, output = command(*SEARCH, "final.seeds=2", "final.ensemble=1")
    assert code == 0, output
    assert "final.ensemble leaves out" not in output
    assert result(MINE / "best")["temperature"] == pytest.approx(1, abs=0.01)  # it is in the weights
    both = [probabilities(Path("apart") / name) for name in ("model.safetensors", "model-1.safetensors")]
    mean = sum(p.log() for p in both) / 2
    torch.testing.assert_close(probabilities(MINE / "best"), mean.softmax(1), rtol=1e-2, atol=1e-3)


def test_it_is_retrained_if_what_it_depends_on_has_changed_and_only_then(command):
    command(*SEARCH, "final.seeds=1")
    alone = result(MINE / "best")
    assert "ensemble" not in alone
    assert command(*SEARCH, "final.seeds=1", "final.ensemble=2")[0] == 0
    two = (MINE / "best/result.json").read_text()
    assert result(MINE / "best")["ensemble"]["asked"] == {"picks": 2, "complete_trials": 4}
    command(*SEARCH, "final.seeds=1", "final.ensemble=2")
    assert (MINE / "best/result.json").read_text() == two
    command(*SEARCH, "final.seeds=1", "final.ensemble=2", "hydra.sweeper.n_trials=5")
    assert result(MINE / "best")["ensemble"]["asked"] == {"picks": 2, "complete_trials": 5}
    command(*SEARCH, "final.seeds=1", "hydra.sweeper.n_trials=5")
    assert "ensemble" not in result(MINE / "best")


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_killed_retraining_begins_again_with_the_same_result(command, launcher):
    words = (*SEARCH, "final.ensemble=3", "final.seeds=1", f"hydra/launcher={launcher}", "hydra.sweeper.n_trials=3")
    code, output = command(*words)
    assert code == 0, output
    before, first = result(MINE / "best"), probabilities(MINE / "best")
    (MINE / "best/result.json").unlink()  # it is written last
    code, output = command(*words)
    assert code == 0, output
    assert result(MINE / "best")["ensemble"] == before["ensemble"]
    assert probabilities(MINE / "best").equal(first)
    assert len([*MINE.glob("best-until-*")]) == 1


def test_trials_that_do_not_fit_the_best_are_left_out_and_named(command):
    words = (
        "-m",
        "hparams_search=grid",
        "study=mine",
        *TINY,
        "optimizer.lr=choice(1e-2,3e-3)",
        "model.head.dropout=0.1",
    )
    words += ("model.head.width=8", "model.pool=choice(1,2)", "model.head.depth=choice(1,2)", "model.head.dropout=0.1")
    code, output = command(*words, "hydra.sweeper.n_trials=8", "final.ensemble=4")
    assert code == 0, output
    record = result(MINE / "best")["ensemble"]
    assert record["candidates"] == 2
    config = yaml.safe_load((MINE / "best/conf/config.yaml").read_text())["model"]
    for trial in record["trials"]:
        own = yaml.safe_load((MINE / str(trial) / "conf/config.yaml").read_text())["model"]
        assert (own["pool"], own["head"]["depth"]) == (config["pool"], len(config["head"]["width"]))
    assert ": another model.pool" in output
    assert ": another depth of the head than " in output


def test_trials_of_an_earlier_version_have_no_stored_predictions(command):
    command(*SEARCH, "final.seeds=0")
    for trial in range(4):
        (MINE / str(trial) / ensemble.LOG_P).unlink()
    code, output = command(*SEARCH, "final.ensemble=2")
    assert code == 1
    assert "the best: there is no validation.safetensors; final.ensemble=0 retrains it alone" in output
    assert not (MINE / "best").exists()


def test_heads_over_trained_blocks_are_refused(command):
    code, output = command(*TINY, "model.frozen=block1", "final.ensemble=2")
    assert code == 1
    assert "final.ensemble=2 averages heads over the same features, so no block may be trained" in output


@pytest.mark.parametrize("record", [3, {}, {"trials": ["a"]}, {"trials": [0], "gain": {"low": 1}}])
def test_a_damaged_record_of_an_ensemble_counts_as_none(tmp_path, caplog, record):
    (tmp_path / "best").mkdir()
    tested = {"status": "complete", "trial": 0, "test_accuracy": 0.5, "test_accuracy_std": 0.0, "seeds": [0]}
    (tmp_path / "best/result.json").write_text(json.dumps(tested))
    assert final_result(tmp_path, 0) == tested
    (tmp_path / "best/result.json").write_text(json.dumps(tested | {"ensemble": record}))
    assert final_result(tmp_path, 0) is None
    assert "has an ensemble without its trials or gain: it is damaged" in caplog.text
