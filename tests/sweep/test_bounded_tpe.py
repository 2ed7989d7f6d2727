"""TPE proposes the same in a small study, and sees a bounded part of a large one."""

import logging

import optuna
import pytest
from optuna.pruners import HyperbandPruner
from optuna.samplers import TPESampler
from optuna.samplers._tpe import sampler as tpe
from optuna.trial import TrialState, create_trial

from tuner.sweep import bounded_tpe
from tuner.sweep.bounded_tpe import BoundedTPE
from tuner.sweep.history import History


def search(trials, bounded=True, direction="minimize", pruner=None, **options):
    """The parameters of a search with a seed, two trials at a time; every third is pruned."""
    study = optuna.create_study(directions=direction.split(), sampler=TPESampler(seed=0, **options), pruner=pruner)
    history = History(study)
    if bounded:
        study.sampler = BoundedTPE(study.sampler, history)
    for _ in range(0, trials, 2):
        pair = []
        for _ in range(2):
            history.look()
            trial = study.ask()
            trial.suggest_float("x", -5, 5)
            trial.suggest_categorical("y", ["a", "b", "c"])
            pair.append(trial)
        for trial in pair:
            values = [(trial.params["x"] - 1) ** 2 + (trial.params["y"] == "a")] * len(study.directions)
            if trial.number % 3 or len(values) > 1:
                study.tell(trial, values)
            else:
                trial.report(values[0], 1)
                study.tell(trial, state=TrialState.PRUNED)
    return study


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"multivariate": True, "group": True, "constant_liar": True},
        {"multivariate": False, "constant_liar": False},
        {"direction": "maximize"},
        {"direction": "minimize maximize"},
        {"pruner": HyperbandPruner()},
    ],
    ids=["default", "group", "independent", "maximize", "two objectives", "hyperband"],
)
def test_a_study_up_to_the_limit_gets_tpes_own_proposals(options):
    params = [[trial.params for trial in search(40, bounded, **options).trials] for bounded in (True, False)]
    assert params[0] == params[1]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bounded_tpe, "LIMIT", 60)


@pytest.fixture
def splits(monkeypatch):
    """The trials that TPE was given, and those of them that it took for good ones."""
    seen, split = [], tpe._split_trials

    def split_trials(study, trials, n_below, *more):
        below, above = split(study, trials, n_below, *more)
        seen.append(([trial.number for trial in trials], {trial.number for trial in below}))
        return below, above

    monkeypatch.setattr(tpe, "_split_trials", split_trials)
    return seen


def test_a_larger_study_is_seen_in_part_and_proposals_depend_on_the_seed_alone(small, splits, caplog):
    with caplog.at_level(logging.INFO, "tuner.sweep"):
        first, second = search(100), search(100)
    assert [trial.params for trial in first.trials] == [trial.params for trial in second.trials]
    assert max(len(trials) for trials, _ in splits) <= 60
    assert all(trials == sorted(trials) for trials, _ in splits)
    said = "TPE sees 60 trials from now on, the 25 best and the latest: each costs time"
    assert caplog.messages.count(said) == 2  # searches


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_good_trials_are_those_of_the_whole_study_and_the_others_the_latest(splits, direction, monkeypatch):
    """The best ones come first, so only their values keep them in sight."""
    good, sign = [], 1 if direction == "minimize" else -1
    for limit in (1000, 300):
        monkeypatch.setattr(bounded_tpe, "LIMIT", limit)
        study = optuna.create_study(direction=direction)
        distributions = {"x": optuna.distributions.FloatDistribution(0, 1000)}
        for number in range(500):
            study.add_trial(create_trial(value=sign * number, params={"x": number}, distributions=distributions))
        study.sampler = BoundedTPE(TPESampler(seed=0), History(study).look())
        study.ask().suggest_float("x", 0, 1000)
        good.append(splits[-1][1])
    assert good[0] == good[1] == set(range(25))
    assert splits[-1][0] == [*range(25), *range(225, 500)]
