"""Cross-validation: data.folds, in a run and in a search."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pandas as pd
import pytest
import torch
from helpers import TINY, result
from hydra import compose, initialize_config_dir

import tuner
from tuner import InputError
from tuner.config import CONF, parse
from tuner.data import Samples, split
from tuner.training import merging, together
from tuner.training.folds import folds_of, means, standard_error
from tuner.training.setup import setup_of
from tuner.training.spec import Fitted, spec_of
from tuner.training.together import fit_all, trained_head

FOLDS = (*TINY, "data.n=100", "data.folds=5")
SEARCH = ("-m", "hparams_search=optuna", "study=mine", "hydra.sweeper.n_trials=6", *FOLDS, "final.seeds=1")
MINE = Path("multirun/mine")


def data(*counts, copies=0):
    """A data set with so many different images of each class; the first ones are there once more."""
    labels = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).to(torch.uint8)
    images, labels = torch.cat([images, images[:copies]]), torch.cat([labels, labels[:copies]])
    pool, test = Samples(images, labels), Samples(images[:2], labels[:2])
    return split(pool, test, [f"c{i}" for i in range(len(counts))], val_share=0.2, seed=0)


def test_each_image_is_in_one_fold_and_trains_the_heads_of_the_others():
    folds = folds_of(data(50, 33), 4, seed=0)
    assert torch.equal(torch.cat([fold.images for fold in folds]).sort().values, torch.arange(83))
    for fold in folds:
        assert not torch.isin(fold.train, fold.images).any()
        assert torch.isin(fold.val, fold.images).all()
    assert {len(fold.train) for fold in folds} == {62}
    assert {len(fold.val) for fold in folds} == {20}
    labels = data(50, 33).pool.labels
    counts = torch.stack([torch.bincount(labels[fold.images]) for fold in folds])
    assert (counts.max(0).values - counts.min(0).values).max() <= 1  # stratified


def test_exact_copies_are_in_one_fold():
    folds = folds_of(data(30, 30, copies=10), 3, seed=0)
    for fold in folds:
        assert {row + 60 for row in fold.images.tolist() if row < 10} == {
            row for row in fold.images.tolist() if row >= 60
        }


def test_the_seed_draws_the_folds():
    drawn = [folds_of(data(50, 50), 5, seed)[0].images for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_class_with_fewer_images_than_folds_is_refused():
    with pytest.raises(InputError, match=r"data.folds=5 needs 5 images of each class .*; 'c1' has 4: lower data.folds"):
        folds_of(data(50, 4), 5, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.folds=1"], "data.folds=1 must be "),
        (["model.frozen=block1"], "data.folds=5 is for heads on cached features: set model.frozen to model.last_block"),
        (["model.frozen=null"], "data.folds=5 is for heads on cached features"),
        (["keep=best"], "data.folds=5 needs keep=last: the best epoch of each fold"),
        (["warm_start=other"], "data.folds=5 can't start from warm_start=other"),
    ],
)
def test_what_contradicts_folds_is_refused(command, options, message):
    code, output = command(*FOLDS, *options)
    assert code == 1
    assert message in output
    assert "Traceback" not in output


def test_a_run_is_the_mean_of_heads_that_are_trained_alone(command):
    code, output = command(*FOLDS, "hydra.run.dir=run")
    assert code == 0, output
    assert "splits: 80 in 5 folds to train and for validation, 20 to test" in output
    found = result("run")
    assert (found["n_train"], found["n_val"]) == (64, 80)
    assert found["baselines"]["n_train"] == 64  # they are scored by the same folds
    values = found["fold_values"]
    assert found["val_accuracy"] == pytest.approx(sum(values) / 5)
    assert found["standard_error"] == pytest.approx(standard_error(values))
    assert f"(mean of 5 folds, standard error {found['standard_error']:.4f}; 80 images, 95%: " in output

    with initialize_config_dir(str(CONF)):
        config = parse(compose("train", list(FOLDS)))
    setup = setup_of(config, shared=False)
    labels, folds = setup.data.pool.labels, folds_of(setup.data, 5, config.seed)
    curves, log_p = [], torch.empty(len(labels), len(setup.data.classes))
    for fold in folds:
        spec, curve = spec_of(config, setup, config.seed, fold.train, fold.val), []
        [(_, fitted)] = fit_all([(setup, spec)], lambda _epoch, m, spec=spec, curve=curve: curve.append(m[spec]) or ())
        log_p[fold.images], _ = trained_head(setup, spec, fitted).score(setup.x, labels, fold.images)
        curves.append(curve)
    epochs = pd.read_csv("run/metrics.csv")
    for epoch, row in zip(zip(*curves, strict=True), epochs.itertuples(), strict=True):
        expected = means(epoch)
        for name in ("train_loss", "val_loss", "val_accuracy"):
            assert getattr(row, name) == pytest.approx(expected[name], rel=1e-3)
    accuracies = [float((log_p[f.images].argmax(1) == labels[f.images]).double().mean()) for f in folds]
    assert values == pytest.approx(accuracies)
    table = pd.read_csv("run/predictions.csv")
    own = table[table.split == "validation"]
    assert list(own.image) == list(range(80))  # each image once, by the head that has not seen it
    assert [setup.data.classes.index(name) for name in own.predicted] == log_p.argmax(1).tolist()


def test_the_model_of_a_run_is_the_mean_of_its_heads(command):
    code, output = command(*FOLDS, "hydra.run.dir=run")
    assert code == 0, output
    with initialize_config_dir(str(CONF)):
        data = setup_of(parse(compose("train", list(FOLDS))), shared=False).data
    predicted = tuner.load("run").predict(data.test.images).argmax(1)
    assert float((predicted == data.test.labels).double().mean()) == pytest.approx(result("run")["test_accuracy"])


def study():
    return optuna.load_study(study_name="mine", storage="sqlite:///multirun/optuna.db")


def test_a_search_by_folds(command):
    code, output = command(*SEARCH, "hydra.launcher.stack=3")
    assert code == 0, output
    trials = study().trials
    assert len(trials) == 6
    for trial in trials:
        found = result(MINE / str(trial.number))
        if trial.state == optuna.trial.TrialState.COMPLETE:
            assert found["val_accuracy"] == trial.value == pytest.approx(sum(found["fold_values"]) / 5)
            assert not (MINE / str(trial.number) / "model.safetensors").exists()
        curve = pd.read_csv(MINE / str(trial.number) / "metrics.csv").val_accuracy  # the means are what is reported
        assert list(trial.intermediate_values.values()) == pytest.approx(list(curve), rel=1e-4)
    best = result(MINE / "best")
    assert (best["n_train"], best["n_val"]) == (80, 0)
    assert "fold_values" not in best
    # each trial's value does not depend on the others in its stack
    number = study().best_trial.number
    code, output = command(
        "--config-dir", str(MINE / f"{number}/conf"), "--config-name", "config", "hydra.run.dir=alone"
    )
    assert code == 0, output
    assert result("alone")["fold_values"] == pytest.approx(result(MINE / str(number))["fold_values"])
    # a study is by folds, or it is not
    for other in ("data.folds=null", "data.folds=4"):
        code, output = command(*(word for word in SEARCH if word != "data.folds=5"), other, "hydra.sweeper.n_trials=8")
        assert code == 1
        assert "study mine has other settings: data.folds=" in output
        assert len(study().trials) == 6


def test_heads_that_are_too_wide_as_one_are_refused_only_where_they_become_one(command, monkeypatch):
    monkeypatch.setattr(merging, "WIDEST", 5 * 32 - 1)
    trials = ("-m", *FOLDS, "model.head.width=16,32", "study=mine")
    code, output = command(*trials)
    assert code == 0, output
    assert not (MINE / "1/model.safetensors").exists()
    code, output = command(*FOLDS, "model.head.width=32")
    assert code == 1
    assert "5 heads make hidden layers of [160] units as one; at most 159 are allowed: lower model.head.width" in output


def test_trials_that_are_tested_have_a_model(command):
    code, output = command("-m", *FOLDS, "seed=0,1", "test=true", "study=mine")
    assert code == 0, output
    assert all((MINE / f"{number}/model.safetensors").exists() for number in range(2))
    assert all(0 < result(MINE / str(number))["test_accuracy"] <= 1 for number in range(2))


def test_a_diverged_fold_ends_its_trial_alone(command):
    code, output = command(
        "-m", *FOLDS, "optimizer=sgd", "optimizer.lr=0.1,1e30", "hydra.launcher.stack=2", "study=mine"
    )
    assert code == 1, output
    statuses = [result(MINE / str(number)) for number in (0, 1)]
    assert [found["status"] for found in statuses] == ["complete", "failed"]
    assert "the loss is not finite" in statuses[1]["error"]


def test_a_search_killed_amid_the_folds_resumes(tmp_path):
    words = [sys.executable, "-m", "tuner.train", *SEARCH, "epochs=40", "hydra.launcher.stack=3", "device=cpu"]
    env = os.environ | {"TUNER_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    curve = tmp_path / MINE / "1/metrics.csv"
    while not (curve.exists() and len(curve.read_text().splitlines()) > 3):  # all folds of three trials are training
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resumed = optuna.load_study(study_name="mine", storage=f"sqlite:///{tmp_path}/multirun/optuna.db")
    ended = [trial for trial in resumed.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    assert len(ended) == 6
    for trial in ended:
        if trial.state.name == "COMPLETE":
            found = result(Path(trial.user_attrs["output_dir"]))
            assert len(found["fold_values"]) == 5
            assert found["val_accuracy"] == trial.value
    assert (tmp_path / MINE / "best/model.safetensors").exists()


def test_a_stack_that_is_too_large_is_halved_between_trials(command, monkeypatch):
    trained = []

    def fit(specs, *arguments, **options):
        if len(specs) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        trained.append(len(specs))
        return real(specs, *arguments, **options)

    real = together.fit
    monkeypatch.setattr(together, "fit", fit)
    code, output = command("-m", *FOLDS, "optimizer.lr=1e-3,2e-3,3e-3", "hydra.launcher.stack=3", "study=mine")
    assert code == 0, output
    assert trained == [5, 10]
    assert "training 5, then 10: set hydra.launcher.stack=" in output
    assert all(len(result(MINE / str(number))["fold_values"]) == 5 for number in range(3))


def test_out_of_memory_of_a_single_trial_is_the_error_of_all_its_folds(monkeypatch):
    def fit(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(together, "fit", fit)
    with initialize_config_dir(str(CONF)):
        config = parse(compose("train", list(FOLDS)))
    setup = setup_of(config, shared=False)
    specs = [spec_of(config, setup, 0, f.train, f.val, folds=5) for f in folds_of(setup.data, 5, 0)]
    fitted = together.fit_stack(setup, specs, lambda _epoch, _metrics: ())
    assert [type(f.error) for f in fitted] == [torch.OutOfMemoryError] * 5
    assert not any(replace(f, error=None) != Fitted() for f in fitted)
