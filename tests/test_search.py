"""A search, from its trials to the retrained best: tuner's own runs under the sweeper."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import optuna
import pandas as pd
import pytest
import yaml
from helpers import result
from optuna.trial import TrialState
from safetensors import safe_open

from tuner.training import setup

TINY = ("data=synthetic", "model=tiny", "epochs=4", "batch_size=32", "plots=false")
SEARCH = ("-m", "hparams_search=optuna", "study=mine", "hydra.sweeper.n_trials=4", *TINY)
MINE = Path("multirun/mine")


def study(name: str = "mine") -> optuna.Study:
    return optuna.load_study(study_name=name, storage="sqlite:///multirun/optuna.db")


def test_a_search_ends_with_its_best_configuration_retrained_and_tested(command):
    code, output = command(*SEARCH, "plots=true")
    assert code == 0, output
    best = study().best_trial
    r = result(MINE / "best")
    assert r["status"] == "complete"
    assert (r["study"], r["trial"]) == ("mine", best.number)
    assert (r["n_train"], r["n_val"], r["val_accuracy"]) == (320, 0, None)
    assert r["seeds"] == [0, 1, 2]
    assert r["epochs"] == result(MINE / str(best.number))["saved_epoch"]
    assert len(r["test_accuracies"]) == 3
    assert r["test_accuracy"] == pytest.approx(sum(r["test_accuracies"]) / 3)
    assert f"test accuracy {r['test_accuracy']:.4f}, standard deviation {r['test_accuracy_std']:.4f}" in output
    assert f"best value {best.value:.6g} (trial {best.number})" in output

    files = {path.name for path in (MINE / "best").iterdir()}
    models = {"model.safetensors", "model-1.safetensors", "model-2.safetensors"}
    assert files == models | {
        *("conf", "metrics.csv", "result.json", "per_class.csv", "confusion_matrix.csv", "predictions.csv"),
        *("train.log", ".hydra", "plots"),
    }
    assert {path.stem for path in (MINE / "best/plots").iterdir()} >= {"accuracy", "loss", "confusion_matrix"}
    curve = pd.read_csv(MINE / "best/metrics.csv")
    assert list(curve.epoch) == [1, 2, 3, 4]
    assert curve.val_accuracy.isna().all()
    weights = [safe_open(MINE / "best" / name, framework="pt").get_tensor("head.0.weight") for name in sorted(models)]
    assert not any((a == b).all() for a, b in pairwise(weights))

    # its config is a run of its own, with the very value of the trial
    code, output = command("--config-dir", str(MINE / "best/conf"), "--config-name", "config", "plots=false")
    assert code == 0, output
    [folder] = [path.parent for path in Path("outputs").rglob("result.json")]
    assert result(folder)["val_accuracy"] == best.value


def test_trials_and_runs_know_each_other_and_not_the_test_split(command):
    command(*SEARCH, "final.seeds=0")
    trials = study().trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    for trial in trials:
        folder = (MINE / str(trial.number)).absolute()
        r = result(folder)
        assert (r["study"], r["trial"], r["val_accuracy"]) == ("mine", trial.number, trial.value)
        assert r["storage"] == f"sqlite:///{Path('multirun/optuna.db').absolute()}"
        assert r["test_accuracy"] is None
        attributes = trial.user_attrs
        assert attributes["output_dir"] == str(folder)
        assert (attributes["device"], attributes["epochs"]) == (r["device"], 4)
        assert not any("test" in key for key in attributes)
        assert trial.intermediate_values == {
            row.epoch: pytest.approx(row.val_accuracy, abs=1e-6)
            for row in pd.read_csv(folder / "metrics.csv").itertuples()
        }
    assert not (MINE / "best").exists()


def test_a_complete_search_prints_its_result_and_does_nothing(command):
    command(*SEARCH)
    before = {path: path.stat().st_mtime_ns for path in MINE.rglob("*") if path.is_file() and path.suffix != ".lock"}
    code, output = command(*SEARCH)
    assert code == 0
    assert "all of its 4 trials" in output
    assert "test accuracy" in output
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in before if before[path] != after[path]} <= {"optimization_results.yaml", "trials.csv"}


def test_a_best_that_is_missing_or_unfinished_is_made_again(command):
    command(*SEARCH)
    first = result(MINE / "best")["test_accuracies"]
    shutil.rmtree(MINE / "best")
    command(*SEARCH)
    assert result(MINE / "best")["test_accuracies"] == first


def test_a_new_best_takes_the_place_of_the_old_one_which_is_kept(command):
    one = ("hydra.sweeper.n_trials=1", "final.seeds=1")
    _, output = command(*SEARCH, *one)
    assert result(MINE / "best")["trial"] == 0
    accuracy = f"test accuracy {result(MINE / 'best')['test_accuracy']:.4f}"
    assert f"{accuracy}, of 1 seed: " in (MINE / "best/train.log").read_text()
    assert f"on train + validation, 1 seed: {accuracy} (80 images, 95%: " in output
    folder = MINE / "best" / "result.json"
    folder.write_text(json.dumps(result(MINE / "best") | {"trial": 99}))  # as if it had been another
    command(*SEARCH, *one)
    assert result(MINE / "best")["trial"] == 0
    [old] = MINE.glob("best-until-*")
    assert (old / "model.safetensors").exists()


# trial 0 has the default lr, which learns little in two epochs
WITH_DEFAULT = (*SEARCH, "model.head.width=32", "optimizer.lr=choice(1e-3,3e-2)", "model.head.dropout=0.2", "epochs=2")
WITH_DEFAULT += ("hydra.sweeper.enqueue=[{optimizer.lr:3e-2}]", "hydra.sweeper.n_trials=2", "final.seeds=2")


def test_the_default_config_is_retrained_and_tested_beside_the_best(command, call):
    code, output = command(*WITH_DEFAULT)
    assert code == 0, output
    best, default = result(MINE / "best"), result(MINE / "default")
    assert (best["trial"], default["trial"]) == (1, 0)
    assert best["seeds"] == default["seeds"] == [0, 1]
    assert best["split_hashes"] == default["split_hashes"]
    found = yaml.safe_load((MINE / "optimization_results.yaml").read_text())["final"]["default"]
    assert found["difference"] == pytest.approx(best["test_accuracy"] - default["test_accuracy"])
    assert found["test_accuracy"] == default["test_accuracy"]
    right = [(t := pd.read_csv(MINE / name / "predictions.csv")).predicted == t.label for name in ("best", "default")]
    error = (right[0].astype(float) - right[1]).std() / 80**0.5
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=1e-3)
    line = f"the default config likewise, 2 seeds: {default['test_accuracy']:.4f}, standard deviation "
    verdict = f"the best has {found['difference']:+.4f} (95% interval {found['low']:+.4f} to {found['high']:+.4f}): "
    for text in (output, call("study", MINE)[1]):
        assert line in text
        assert f"{verdict}more than chance explains" in text


def test_what_is_missing_of_the_best_and_the_default_is_retrained_alone(command):
    command(*WITH_DEFAULT, "final.default=false")
    assert not (MINE / "default").exists()
    code, output = command(*WITH_DEFAULT)
    assert (code, "retraining trial 1" in output, "retraining trial 0, the default" in output) == (0, False, True)
    (MINE / "default/result.json").unlink()  # as a run that is killed
    code, output = command(*WITH_DEFAULT)
    assert (code, output.count("retraining trial")) == (0, 1)
    assert result(MINE / "default")["trial"] == 0
    assert len([*MINE.glob("default-until-*")]) == 1
    assert "retraining" not in command(*WITH_DEFAULT)[1]


def test_the_best_is_trained_for_the_epochs_that_validation_chose(command):
    command(*SEARCH, "keep=best", "epochs=8", "hydra.sweeper.n_trials=2", "optimizer.lr=0.003")
    best = study().best_trial
    chosen = result(MINE / str(best.number))["saved_epoch"]
    r = result(MINE / "best")
    assert r["epochs"] == chosen
    lr = pd.read_csv(MINE / "best/metrics.csv").lr
    assert lr.iloc[0] < lr.max()
    assert len(lr) == chosen


@pytest.mark.parametrize("frozen", ["block1", "null"])
def test_seeds_are_trained_one_after_another_where_the_backbone_is(command, frozen):
    code, output = command(
        *SEARCH, f"model.frozen={frozen}", "epochs=1", "hydra.sweeper.n_trials=1", "final.seeds=2", "optimizer.lr=1e-4"
    )
    assert code == 0, output
    assert len(result(MINE / "best")["test_accuracies"]) == 2


def test_without_a_name_the_study_its_folder_and_the_printed_command_have_one(command):
    code, output = command("-m", "hparams_search=optuna", "hydra.sweeper.n_trials=2", "final.seeds=0", *TINY)
    assert code == 0, output
    [name] = optuna.get_all_study_names("sqlite:///multirun/optuna.db")
    assert [path.name for path in Path("multirun").iterdir() if path.is_dir()] == [name]
    assert f" study={name}\n" in output
    assert result(Path("multirun", name, "0"))["study"] == name
    code, output = command(
        "-m", "hparams_search=optuna", "hydra.sweeper.n_trials=3", "final.seeds=0", *TINY, f"study={name}"
    )
    assert code == 0, output
    assert "continuing after 2 of 3 trials" in output


def test_the_best_is_retrained_with_its_own_config(command):
    """What does not affect the objective is as in the last command, all else as the trial recorded it."""
    code, output = command(*SEARCH, "final.seeds=0")
    assert code == 0, output
    number = study().best_trial.number
    path = MINE / str(number) / "conf/config.yaml"
    recorded = yaml.safe_load(path.read_text())
    recorded["optimizer"] |= {"_target_": "torch.optim.SGD", "momentum": 0.5}
    recorded["epochs"] = 3  # and so on: a trial of another command, before settings were compared
    del recorded["augment"]["erase"]
    path.write_text(yaml.safe_dump(recorded))
    saved = json.loads((MINE / str(number) / "result.json").read_text()) | {"saved_epoch": 2}
    (MINE / str(number) / "result.json").write_text(json.dumps(saved))
    code, output = command(*SEARCH, "final.seeds=1")
    assert code == 0, output
    best = yaml.safe_load((MINE / "best/conf/config.yaml").read_text())
    assert best["optimizer"] == recorded["optimizer"]
    assert best["epochs"] == 3
    assert "erase" not in best["augment"]
    assert result(MINE / "best")["epochs"] == 2


def csv_of(path, swapped=()):
    """Write a CSV file, for a command that has read nothing yet: a process keeps the images of its sweep."""
    setup._in_use.clear()
    lines = [
        "label,a,b,c,d",
        *(f"{'xy'[(i + (i in swapped)) % 2]},{i},{2 * i},{3 * i},{i % 2 * 200}" for i in range(60)),
    ]
    Path(path).write_text("\n".join(lines))


@pytest.mark.parametrize("launcher", ["fused", "basic"])
def test_a_study_does_not_go_on_with_other_images(command, launcher):
    arguments = (*SEARCH[:3], *TINY[1:], "data=csv", "data.path=t.csv", f"hydra/launcher={launcher}", "final.seeds=0")
    csv_of("t.csv")
    code, output = command(*arguments, "hydra.sweeper.n_trials=2")
    assert code == 0, output
    csv_of("t.csv", swapped=(3, 4))
    code, output = command(*arguments, "hydra.sweeper.n_trials=3")
    assert code == 1
    said = [line for line in output.splitlines() if "study mine had other images (" in line]
    assert len(said) == 1
    assert "restore them, or give another study=NAME, or study_mixed=true" in said[0]
    assert "Traceback" not in output
    assert sum(trial.state == TrialState.COMPLETE for trial in study().trials) == 2
    Path("moved").mkdir()
    csv_of("moved/same.csv")
    code, output = command(*arguments, "data.path=moved/same.csv", "hydra.sweeper.n_trials=3")
    assert code == 0, output  # the same images in another file
    code, output = command(*arguments, "study_mixed=true", "hydra.sweeper.n_trials=4")
    assert code == 0, output
    last = [trial for trial in study().trials if trial.state == TrialState.COMPLETE][-1]
    assert last.user_attrs["mixed"].startswith("other images (")


def test_the_best_is_not_retrained_on_other_images(command):
    arguments = (*SEARCH[:3], *TINY[1:], "data=csv", "data.path=t.csv", "hydra.sweeper.n_trials=2")
    csv_of("t.csv")
    assert command(*arguments, "final.seeds=0")[0] == 0
    csv_of("t.csv", swapped=(3, 4))
    code, output = command(*arguments, "final.seeds=1")
    assert code == 1
    lines = output.strip().splitlines()
    assert "study mine had other images" in lines[-1]
    assert any("best value" in line for line in lines)  # the summary comes first
    assert not (MINE / "best/model.safetensors").exists()


def test_a_best_whose_folder_is_on_another_machine_is_retrained_from_what_the_study_has(command):
    assert command(*SEARCH)[0] == 0
    before = result(MINE / "best")
    shutil.rmtree(MINE / "best")
    shutil.rmtree(MINE / str(before["trial"]))
    code, output = command(*SEARCH)
    assert code == 0, output
    assert f"{before['trial']} is not on this machine: its config is taken from this sweep" in output
    after = result(MINE / "best")
    assert after["test_accuracies"] == before["test_accuracies"]
    assert after["temperature"] == before["temperature"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("final.ensemble=many", "final.ensemble=many must be a whole number of at least 0 and at most 100"),
        ("final.default=maybe", "final.default=maybe must be true or false"),
        ("final.seeds=x", "final.seeds=x must be a whole number of at least 0"),
        ("data.folds=1", "data.folds=1 must be a whole number of at least 2 and at most 100, or null"),
        ("optimizer.lr=1e-4..1e-2", "optimizer.lr=1e-4..1e-2 must be a number of more than 0"),
        ("optimizer.lr=interval(-1,-0.5)", "optimizer.lr=-1.0 must be a number of more than 0"),
    ],
)
def test_a_value_that_no_trial_can_have_is_refused_before_the_search(command, word, message):
    code, output = command(*SEARCH, word)
    assert code == 1
    assert message in output
    assert len(output.strip().splitlines()) == 1
    assert not Path("multirun/optuna.db").exists()


def test_a_value_that_only_some_trials_can_have_fails_those(command):
    searched = "keep=choice(best,last)"  # best is for no folds
    code, output = command(*SEARCH, searched, "data.folds=2", "final.seeds=0", "hydra.sweeper.sampler.seed=1")
    assert code == 0, output
    states = {trial.params["keep"]: trial.state.name for trial in study().trials}
    assert states == {"best": "FAIL", "last": "COMPLETE"}
    assert "some trials will fail: data.folds=2 needs keep=last" in output


def test_a_best_that_cannot_be_retrained_stays_as_it_was(command):
    assert command(*SEARCH)[0] == 0
    before = result(MINE / "best")
    config = MINE / str(before["trial"]) / "conf/config.yaml"
    config.write_text("[")
    code, output = command(*SEARCH, "final.ensemble=1")
    assert code == 1
    assert str(config) in output.strip().splitlines()[-1]
    assert result(MINE / "best") == before
    assert not list(MINE.glob("best-until-*"))


def test_a_best_that_cannot_be_retrained_ends_with_the_summary(command):
    assert command(*SEARCH, "final.seeds=0")[0] == 0
    best = study().best_trial
    config = MINE / str(best.number) / "conf/config.yaml"
    text = config.read_text()
    config.write_text("[")
    code, output = command(*SEARCH)
    assert code == 1
    lines = output.strip().splitlines()
    assert str(config) in lines[-1]
    assert any(f"best value {best.value:.6g} (trial {best.number})" in line for line in lines)
    config.write_text(text)
    code, output = command(*SEARCH)
    assert code == 0, output
    assert "standard deviation" in output


def test_a_direction_against_the_objective_is_warned_of(command):
    code, output = command(*SEARCH, "hydra.sweeper.direction=minimize", "final.seeds=0", "hydra.sweeper.n_trials=1")
    assert code == 0, output
    said = (
        "objective=accuracy is better the larger it is: direction=minimize makes the worst trial the best; give "
        "hydra.sweeper.direction=[maximize]"
    )
    assert output.count(said) == 1
    code, output = command(*SEARCH, "study=other", "final.seeds=0", "hydra.sweeper.n_trials=1")
    assert "makes the worst" not in output


def test_one_folder_for_all_trials_is_refused(command):
    code, output = command(*SEARCH, "hydra.sweep.subdir=same")
    assert code == 1
    assert "hydra.sweep.subdir=same is one folder for all trials; include ${hydra.job.num}" in output
    assert not Path("multirun/optuna.db").exists()


def test_a_pruned_run_keeps_its_curve_and_says_so(command):
    code, output = command(
        *SEARCH,
        "epochs=6",
        "hydra.sweeper.n_trials=12",
        "optimizer.lr=choice(1e-7,1e-3)",
        "hydra.sweeper.pruner.n_startup_trials=1",
        "hydra.sweeper.pruner.n_warmup_steps=1",
        "final.seeds=0",
    )
    assert code == 0, output
    pruned = [trial for trial in study().trials if trial.state == TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        folder = MINE / str(trial.number)
        r, curve = result(folder), pd.read_csv(folder / "metrics.csv")
        assert r["status"] == "pruned"
        assert r["epochs"] == len(curve) == trial.user_attrs["epochs"] < 6
        assert r["val_accuracy"] == pytest.approx(curve.val_accuracy.iloc[-1])
        log = (folder / "train.log").read_text()
        assert "pruned at step" in log
        assert "Traceback" not in log
        assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("search", ["optuna", "optuna_model"])  # found by a job; found while a trial is drawn
def test_a_mistake_that_no_trial_survives_is_told_without_a_traceback(command, search):
    words = ("model.last_block=block9", "hydra.sweeper.n_trials=2", "study=mine", "data=synthetic", "data.n=40")
    code, output = command("-m", f"hparams_search={search}", *words)
    assert code == 1, output
    assert "stopped: 2 trials failed" in output
    assert "trial 0 failed: InputError: model.last_block=block9 is not a block of vgg16; known: block1" in output
    assert "Traceback" not in output
    assert [trial.user_attrs["error"][:10] for trial in study().trials] == ["InputError"] * 2


@pytest.mark.parametrize("launcher", ["fused", "basic"])
def test_a_search_ends_in_time_between_epochs_and_is_continued(command, launcher):
    words = (*SEARCH, "final.seeds=0", f"hydra/launcher={launcher}")
    code, output = command(*words, "hydra.sweeper.timeout=1e-6")
    assert code == 1
    assert "were ended by hydra.sweeper.timeout: give more time" in output
    first = [trial for trial in study().trials if trial.state != TrialState.WAITING]
    for trial in first:
        assert (trial.state, trial.user_attrs["ended_by"]) == (TrialState.PRUNED, "timeout")
        assert len(pd.read_csv(MINE / str(trial.number) / "metrics.csv")) == 1
    code, output = command(*words, "hydra.sweeper.timeout=1h", "hydra.sweeper.n_trials=6")
    assert code == 0, output
    assert "of 1 h 0 min" in output
    again = [trial for trial in study().trials[len(first) :] if trial.params in [trial.params for trial in first]]
    assert len(again) == len(first)


def test_a_diverged_run_is_a_failure_and_not_pruned(command):
    code, output = command(
        *SEARCH, "optimizer=sgd", "scheduler=constant", "optimizer.lr=choice(1e-2,1e38)", "final.seeds=0"
    )
    assert code == 0, output
    states = {trial.params["optimizer.lr"]: trial for trial in study().trials}
    assert states[1e-2].state == TrialState.COMPLETE
    assert states[1e38].state == TrialState.FAIL
    assert "lower optimizer.lr, or set grad_clip" in states[1e38].user_attrs["error"]
    assert result(MINE / str(states[1e38].number))["status"] == "failed"


def test_accuracy_against_cost(command):
    code, output = command(
        *("-m", "hparams_search=optuna_pareto", "study=mine", *TINY, "hydra.sweeper.n_trials=4"),
        *("model.image_size=choice(16,32)", "model.last_block=choice(block1,block2)", "model.pool=choice(1,2)"),
    )
    assert code == 0, output
    for trial in study().trials:
        r = result(MINE / str(trial.number))
        assert trial.values == [r["val_accuracy"], r["gmacs"]]
    costs = {(t.params["model.image_size"], t.params["model.last_block"]): t.values[1] for t in study().trials}
    assert len(set(costs.values())) >= len(costs)
    assert "trials are on the Pareto front" in output
    solutions = yaml.safe_load((MINE / "optimization_results.yaml").read_text())["solutions"]
    assert {tuple(s["values"]) for s in solutions} == {tuple(t.values) for t in study().best_trials}


def test_the_wide_search_draws_what_fits(command):
    code, output = command(
        *("-m", "hparams_search=optuna_wide", "study=mine", "data=synthetic", "epochs=1", "hydra.sweeper.n_trials=8"),
        *("model.image_size=choice(32,48)", "model.last_block=choice(block3,block4)"),
        "final.seeds=0",
    )
    assert code == 0, output
    trials = study().trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 8
    for trial in trials:
        p = trial.params
        assert 1 <= p["model.pool"] <= min(4, p["model.image_size"] // 2 ** int(p["model.last_block"][-1]))
        assert ("model.head.width" in p) == (p["model.head.depth"] > 0)


def test_the_wide_search_leaves_to_the_command_line_what_it_gives(command):
    code, output = command(
        *("-m", "hparams_search=optuna_wide", "study=mine", *TINY, "epochs=1", "hydra.sweeper.n_trials=4"),
        *("optimizer=sgd", "optimizer.lr=0.01", "model.image_size=32", "model.last_block=block2", "model.pool=1"),
        "final.seeds=0",
    )
    assert code == 0, output
    for trial in study().trials:
        assert trial.state == TrialState.COMPLETE
        assert {"optimizer", "optimizer.lr", "model.pool"}.isdisjoint(trial.params)
        assert 1e-6 <= trial.params["optimizer.weight_decay"] <= 1e-3  # that of SGD


@pytest.mark.parametrize("search", ["random", "grid", "gp", "cmaes"])
def test_every_search_runs(command, search):
    code, output = command(
        "-m", f"hparams_search={search}", "study=mine", *TINY, "epochs=1", "hydra.sweeper.n_trials=3"
    )
    assert code == 0, output
    assert [trial.state for trial in study().trials] == [TrialState.COMPLETE] * 3
    assert (MINE / "best/model.safetensors").exists()
