"""No configuration is trained twice, and a search ends when its space has no other."""

import subprocess
import sys
from collections import Counter

import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from tuner.sweep import duplicates, ranking
from tuner.sweep.history import History
from tuner.sweep.stopping import StopRules

FOUR = ("x=choice(0,1)", "n=choice(1,2)", "hydra.sweeper.n_trials=20")
ALL_FOUR = "all 4 configurations of the space have been evaluated"
COMPLETE, PRUNED, FAIL, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING


def results(toy):
    return yaml.safe_load((toy.folder / "multirun/toy/optimization_results.yaml").read_text())


def trained(toy):
    """The configurations whose jobs were started, each as often as it was."""
    trials = toy.study().trials
    return Counter(tuple(sorted(trials[number].params.items())) for number in toy.starts())


def same(toy):
    """The duplicates: number -> number of the original."""
    return {t.number: t.user_attrs["same_as"] for t in toy.study().trials if "same_as" in t.user_attrs}


# Which trials are the same


def trial_of(number, state=COMPLETE, x=1, **attributes):
    distributions = {"x": CategoricalDistribution([1, 1.0, True, "1", 2])}
    value = 0.5 if state == COMPLETE else None
    trial = create_trial(state=state, value=value, params={"x": x}, distributions=distributions, user_attrs=attributes)
    trial.number = number
    return trial


@pytest.mark.parametrize(
    ("trials", "original"),
    [
        ([], None),
        ([trial_of(0)], 0),
        ([trial_of(0), trial_of(1)], 0),
        ([trial_of(9)], None),  # itself
        ([trial_of(0, RUNNING), trial_of(1, PRUNED), trial_of(2)], 2),
        ([trial_of(0, RUNNING), trial_of(1, PRUNED)], 1),
        ([trial_of(0, RUNNING)], 0),
        ([trial_of(0, FAIL)], None),
        ([trial_of(0, same_as=5)], None),
        ([trial_of(0, mixed="other images")], None),
        ([trial_of(0, PRUNED, ended_by="trial_timeout")], None),
        ([trial_of(0, x=2), trial_of(1, x=1.0), trial_of(2, x=True), trial_of(3, x="1")], None),  # equal in Python
    ],
)
def test_what_a_trial_repeats(trials, original):
    found = duplicates.find(trials, 9, {"x": 1})
    assert (found and found.number) == original


@pytest.mark.parametrize(
    ("space", "size"),
    [
        ({}, 1),
        ({"a": CategoricalDistribution(["x", "y"]), "b": IntDistribution(1, 3)}, 6),
        ({"a": IntDistribution(0, 10, step=5), "b": IntDistribution(1, 64, log=True)}, 192),
        ({"a": FloatDistribution(0, 0.3, step=0.1)}, 4),
        ({"a": FloatDistribution(0, 1)}, None),
        ({"a": FloatDistribution(1, 1), "b": IntDistribution(2, 2)}, 1),
    ],
)
def test_the_size_of_a_space(space, size):
    assert duplicates.size(space) == size


def test_values_that_differ_by_rounding_are_one_configuration_of_the_space():
    space = {"a": FloatDistribution(0, 0.5, step=0.1)}
    trials = [create_trial(value=0, params={"a": a}, distributions=space) for a in (0.3, 0.1 + 0.2, 0.1)]
    trials += [create_trial(value=0, params={"a": 5.0}, distributions={"a": FloatDistribution(0, 9)})]  # an older space
    trials += [create_trial(value=0)]
    assert len({duplicates.point(trial.params, space) for trial in trials} - {None}) == 2


def test_duplicates_are_no_trials_without_gain():
    study = optuna.create_study(direction="maximize")
    for value, attributes in ((0.5, {}), (0.5, {"same_as": 0}), (0.4, {})):
        study.add_trial(create_trial(value=value, user_attrs=attributes))
    assert StopRules(stop_when_flat=2).reason(History(study).look()) is None
    assert [trial.number for trial in ranking.complete(study.trials)] == [0, 2]


# Searches


@pytest.mark.parametrize(
    "options",
    [
        ("hydra/sweeper/sampler=random",),
        ("hydra/sweeper/sampler=tpe",),
        ("hydra/sweeper/sampler=tpe", "hydra/launcher=fused", "hydra.launcher.stack=3"),
        pytest.param(("hydra/launcher=joblib", "hydra.sweeper.n_jobs=2"), id="joblib"),
        ("objectives=2", "hydra.sweeper.direction=[minimize,minimize]", "hydra/sweeper/sampler=nsgaii"),
    ],
)
def test_a_space_of_four_configurations_is_trained_four_times(toy, options):
    done = toy.command(*FOUR, *options) if "joblib" in str(options) else toy.run(*FOUR, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(trained(toy).values()) == [1] * 4
    written = results(toy)
    assert written["stopped"] == ALL_FOUR
    assert f"the search ended after 4 trials, as {ALL_FOUR}" in done.stdout
    assert written["trials"].pop("duplicate", 0) == len(same(toy))
    assert written["trials"] == {"complete": 4}
    trials = toy.study().trials
    for number, original in same(toy).items():
        assert trials[number].params == trials[original].params
        if trials[number].state == COMPLETE:
            assert trials[number].values == trials[original].values
            assert f"trial {number}: same as trial {original}, " in done.stdout


def test_it_is_the_study_that_knows_its_configurations(toy):
    """A search that goes on repeats none, and one whose space is exhausted starts none."""
    assert toy.run(*FOUR[:2], "hydra.sweeper.n_trials=2").returncode == 0
    assert len(toy.starts()) == 2
    toy.run(*FOUR)
    before = len(toy.study().trials)
    done = toy.run(*FOUR)
    assert done.returncode == 0
    assert f"no more trials, as {ALL_FOUR}" in done.stdout
    assert sorted(trained(toy).values()) == [1] * 4
    assert len(toy.study().trials) == before
    done = toy.run("x=choice(0,1)", "n=choice(1,2)", "z=choice(0.0,5.0)", "hydra.sweeper.n_trials=20")  # a larger space
    assert "all 8 configurations of the space have been evaluated" in done.stdout
    assert len(toy.starts()) == 12


def test_n_trials_are_trained_whatever_is_drawn_again(toy):
    done = toy.run("x=range(0,5)", "n=range(0,4)", "hydra/sweeper/sampler=tpe", "hydra.sweeper.n_trials=14")
    assert done.returncode == 0, done.stdout
    assert sorted(trained(toy).values()) == [1] * 14
    assert same(toy)  # or this shows nothing
    assert results(toy)["trials"] == {"complete": 14, "duplicate": len(same(toy))}
    assert f"14/14 trials, {len(same(toy))} duplicate" in done.stdout
    assert "stopped" not in results(toy)


def test_a_space_without_end_ends_when_nothing_new_is_drawn(toy, monkeypatch):
    """A custom space has no known size."""
    monkeypatch.setattr("tuner.sweep.trial_loop.IN_A_ROW", 7)
    monkeypatch.setattr("tuner.sweep.duplicates.IN_A_ROW", 7)
    options = ("x=1", "hydra.sweeper.custom_search_space=toy.one_more", "hydra.sweeper.n_trials=50")
    for _ in range(2):
        done = toy.run(*options)
        assert done.returncode == 0, done.stdout
        assert "as the last 7 draws gave no new configuration" in done.stdout
        assert sorted(trained(toy).values()) == [1, 1]
    assert results(toy)["stopped"] == "the last 7 draws gave no new configuration"


def test_without_anything_to_search_there_is_one_trial(toy):
    done = toy.run("x=1")
    assert done.returncode == 0
    assert "as the only configuration of the space has been evaluated" in done.stdout
    assert toy.starts() == [0]


def test_a_pruned_configuration_is_pruned_again_by_what_is_known(toy):
    options = ("hydra/sweeper/pruner=threshold", "hydra.sweeper.pruner.upper=2", "steps=3")
    done = toy.run("x=choice(1,2)", "n=range(0,8)", "hydra.sweeper.n_trials=12", "hydra/sweeper/sampler=tpe", *options)
    assert done.returncode == 0, done.stdout
    assert sorted(trained(toy).values()) == [1] * 12
    toy.run(
        *("x=choice(1,2)", "n=range(0,8)", "hydra.sweeper.n_trials=12", "hydra/sweeper/sampler=tpe", *options),
        "hydra.sweeper.enqueue=[{x: 2, n: 0}]",
    )
    trials = toy.study().trials
    [pruned] = [t for t in trials if t.state == PRUNED and t.number in same(toy)][:1]
    original = trials[same(toy)[pruned.number]]
    assert original.state == PRUNED
    assert pruned.value == original.value
    assert f"trial {pruned.number}: same as trial {original.number}, pruned: not trained again" in done.stdout
    assert results(toy)["trials"]["pruned"] + results(toy)["trials"]["complete"] == 12


def test_a_failed_configuration_may_be_tried_again_until_all_others_were(toy):
    done = toy.run("group=choice(a,nowhere)", "x=choice(0,1)", "hydra.sweeper.n_trials=40")
    assert done.returncode == 0, done.stdout
    assert f"as {ALL_FOUR}" in done.stdout
    assert sorted(trained(toy).values()) == [1, 1]
    assert results(toy)["trials"]["fail"] >= 2


def test_an_enqueued_configuration_that_is_known_is_not_trained(toy):
    toy.run("hydra.sweeper.enqueue=[{x: 1.0},{x: 0.5},{x: 0.5}]", "hydra.sweeper.n_trials=3")
    assert same(toy)[1] == 0  # trial 0 is the default config
    assert max(trained(toy).values()) == 1
    assert len(toy.starts()) == 3


def test_with_study_mixed_each_trial_is_trained(toy):
    """The images may be others, which is known only once a trial runs."""
    toy.run(*FOUR)
    started = len(toy.starts())
    toy.run(*FOUR[:2], f"hydra.sweeper.n_trials={started + 3}", "hydra.sweeper.study_mixed=true")
    assert len(toy.starts()) == started + 3


def test_sweeps_at_once_train_no_configuration_twice(toy):
    space = ("x=choice(0,1,2)", "n=choice(1,2,3)", "seconds=0.2")
    sweeps = [toy.start(*space, "hydra.sweeper.n_trials=50") for _ in range(3)]
    for sweep in sweeps:
        out, err = sweep.communicate(timeout=200)
        assert sweep.returncode == 0, out + err
    assert sorted(trained(toy).values()) == [1] * 9
    assert results(toy)["stopped"] == "all 9 configurations of the space have been evaluated"
    assert results(toy)["trials"]["complete"] == 9


def test_a_sweep_that_draws_only_what_another_runs_waits_for_its_result(toy, monkeypatch):
    """The space has no known size: it could be that the sampler draws something else then."""
    monkeypatch.setattr("tuner.sweep.trial_loop.WHILE_RUNNING", 2)
    monkeypatch.setattr("tuner.sweep.trial_loop.IN_A_ROW", 3)
    options = ("x=1", "hydra.sweeper.custom_search_space=toy.no_more", "seconds=4")
    with toy.start(*options, "hydra.sweeper.n_trials=1") as first:
        toy.wait_for(1)
        second = toy.run(*options, "hydra.sweeper.n_trials=3")
        first.communicate(timeout=100)
    assert (first.returncode, second.returncode) == (0, 0), second.stdout
    assert toy.starts() == [0]
    assert toy.states() == ["COMPLETE"] + ["FAIL"] * 2 + ["COMPLETE"] * 3
    assert set(same(toy).values()) == {0}
    assert "trial 1: same as trial 0, which still runs: not trained twice" in second.stdout
    assert "trial 3: same as trial 0, 1: not trained again | 1/3 trials, 3 duplicates" in second.stdout


# python -c: the sweep is killed before it tells the outcome of its first duplicate
KILLED_TELLING = """
import os, signal, sys
from tuner.sweep.budget import Budget
import toy

def tell(budget, trial, original):
    os.kill(os.getpid(), signal.SIGKILL)

Budget.tell_duplicate = tell
sys.argv[0] = "toy"
toy.main()
"""


@pytest.mark.parametrize("retries", [0, 2])
def test_a_sweep_that_is_killed_before_it_tells_a_duplicate_loses_nothing(toy, retries):
    options = ("x=choice(0,1)", "n=choice(1,2,3)", "hydra.sweeper.n_trials=6", f"hydra.sweeper.retries={retries}")
    command = [sys.executable, "-c", KILLED_TELLING, "-m", *options]
    killed = subprocess.run(command, cwd=toy.folder, env=toy.environment, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    lost = toy.study().trials[-1]
    assert lost.state == RUNNING
    done = toy.run(*options)
    assert done.returncode == 0, done.stdout
    assert max(trained(toy).values()) == 1
    assert len(toy.starts()) == (6 if retries else 5)  # without retries, a lost trial counts as failed
    assert not any(trial.state == RUNNING for trial in toy.study().trials)


# What reads a study


def test_a_duplicate_is_shown_as_one_and_has_no_part_in_the_results(toy):
    from tuner import study
    from tuner.analysis import load

    toy.run("x=range(0,5)", "n=range(0,4)", "hydra/sweeper/sampler=tpe", "hydra.sweeper.n_trials=14")
    read, copies = load("toy"), len(same(toy))
    assert copies
    assert dict(read.states) == {"COMPLETE": 14, "DUPLICATE": copies}
    assert len(read.complete) == 14
    assert read.best.number not in same(toy)
    assert f"{copies} duplicate" in study.headline(read)
    listed = read.trials.set_index("number")
    assert listed.folder.isna().sum() == copies
    assert read.importances
    for _, figure in study.figures(read):
        assert figure
    study.write_page(read, toy.folder / "study.html")
    assert study.advice(read)
    table = (toy.folder / "multirun/toy/trials.csv").read_text().splitlines()
    assert "user_attrs_same_as" in table[0]
    assert len(table) == 1 + 14 + copies
