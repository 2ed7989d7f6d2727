"""What a sweep knows of all trials of its study, read bit by bit, is what follows from them."""

import random
from collections import Counter
from datetime import datetime, timedelta

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from tuner.sweep import duplicates, history, ranking, storage
from tuner.sweep.budget import OWNER, RETRY_HISTORY, SURPLUS, Budget
from tuner.sweep.history import History
from tuner.sweep.outcome import Outcome
from tuner.sweep.patient_storage import PatientStorage
from tuner.sweep.progress import Progress
from tuner.sweep.settings import MIXED, SAME_AS
from tuner.sweep.stopping import StopRules, lacks_gain

SPACE = {"x": CategoricalDistribution([0, 1, 2]), "y": CategoricalDistribution(["a", "b"])}
STATES = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]


@pytest.fixture(params=["memory", "sqlite", "journal"])
def study(request, tmp_path):
    spec = None if request.param == "memory" else f"{request.param}:///{tmp_path}/studies"
    return optuna.create_study(storage=storage.connect(spec), sampler=RandomSampler(0), direction="maximize")


def facts(of):
    """All that follows from the trials, in a form that can be compared."""
    params = [{"x": x, "y": y} for x in (0, 1, 2) for y in ("a", "b")]
    return {
        "counted": dict(of.counted()),
        "finished": of.finished(),
        "before": [of.counted_before(number) for number in range(len(of.trials))],
        "duplicates": of.duplicates(),
        "best": of.best and of.best.number,
        "without_gain": of.without_gain,
        "longest": of.longest,
        "tried": of.tried(),
        "same": [getattr(duplicates.find(of.same(p), 1000, p), "number", None) for p in params],
        "retries": of.retries,
        "ended": of.run_time.total,
        "unfinished": [trial.number for trial in of.unfinished],
    }


def test_an_interrupt_in_the_middle_of_a_look_counts_nothing_twice(study, monkeypatch):
    looked = History(study, SPACE)
    study.tell(study.ask(SPACE), 0.5)
    study.ask(SPACE)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(History, "_compare_with_best", interrupted)
        with pytest.raises(KeyboardInterrupt):
            looked.look()
    assert facts(looked.look()) == facts(History(study, SPACE).look())
    assert looked.counted() == {TrialState.COMPLETE: 1, TrialState.RUNNING: 1}


def recounted(trials, study):
    """The same from the whole list."""
    counting = history.counted(trials)
    numbers = [trial.number for trial in counting]
    best = ranking.best(study, trials)
    params = [{"x": x, "y": y} for x in (0, 1, 2) for y in ("a", "b")]
    points = {duplicates.point(t.params, SPACE) for t in counting if MIXED not in t.user_attrs} - {None}
    times = [t.user_attrs.get("seconds", 0.0) for t in trials if t.state == TrialState.COMPLETE]
    seconds = {s for t in trials if t.state.is_finished() and "seconds" in t.user_attrs for s in span(t)}
    return {
        "counted": dict(Counter(trial.state for trial in counting)),
        "finished": sum(trial.state.is_finished() for trial in counting),
        "before": [sum(n < number for n in numbers) for number in range(len(trials))],
        "duplicates": sum(SAME_AS in trial.user_attrs for trial in trials),
        "best": best and best.number,
        "without_gain": sum(lacks_gain(trial) for trial in trials[best.number + 1 :]) if best else 0,
        "longest": max(times, default=0.0),
        "tried": len(points),
        "same": [getattr(duplicates.find(trials, 1000, p), "number", None) for p in params],
        "retries": {tuple(t.system_attrs[RETRY_HISTORY]) for t in trials if RETRY_HISTORY in t.system_attrs},
        "ended": timedelta(seconds=len(seconds)),
        "unfinished": [trial.number for trial in trials if not trial.state.is_finished()],
    }


def span(trial):
    start = trial.datetime_start.replace(microsecond=0)
    return [start + timedelta(seconds=n) for n in range(round((trial.datetime_complete - start).total_seconds()))]


def change(study, draw):
    """One of the things that happen to a study."""
    trials = study.get_trials(deepcopy=False)
    running = [t for t in trials if t.state == TrialState.RUNNING]
    marks = {SAME_AS: 0} if draw.random() < 0.2 else {MIXED: "images"} if draw.random() < 0.1 else {}
    match draw.choice(["ask", "ask", "add", "tell", "tell", "retry", "surplus"]):
        case "ask":
            trial = study.ask()
            for name, distribution in SPACE.items():
                trial.suggest_categorical(name, distribution.choices)
            for key, value in marks.items():
                trial.set_user_attr(key, value)
        case "add":
            state = draw.choice(STATES)
            value = draw.randrange(9) if state == TrialState.COMPLETE else None
            params = {name: draw.choice(distribution.choices) for name, distribution in SPACE.items()}
            attributes = marks | {"seconds": draw.randrange(9)}
            one = create_trial(state=state, value=value, params=params, distributions=SPACE, user_attrs=attributes)
            one.datetime_start = datetime(2026, 1, 1) + timedelta(seconds=draw.randrange(300))
            one.datetime_complete = one.datetime_start + timedelta(seconds=draw.randrange(9))
            study.add_trial(one)
        case "tell" if running:
            state = draw.choice(STATES)
            study.tell(draw.choice(running).number, draw.randrange(9) if state == TrialState.COMPLETE else None, state)
        case "retry" if trials:
            lost = draw.choice(trials)
            past = [*lost.system_attrs.get(RETRY_HISTORY, []), lost.number]
            study.add_trial(create_trial(state=TrialState.WAITING, system_attrs={RETRY_HISTORY: past}))
        case "surplus" if running:
            study._storage.set_trial_system_attr(running[0]._trial_id, SURPLUS, True)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_read_bit_by_bit_is_what_follows_from_all_trials(study, seed):
    draw, often, seldom = random.Random(seed), History(study, SPACE), History(study, SPACE)
    for step in range(60):
        change(study, draw)
        looked = facts(often.look())
        expected = recounted(study.get_trials(deepcopy=False), study)
        assert looked == expected
        if step % 20 == 19:
            assert facts(seldom.look()) == expected
            assert facts(History(study, SPACE).look()) == expected  # as another process sees it


# What a trial costs


@pytest.fixture
def readings(monkeypatch):
    """How many trials each look has read, and how often a list of all trials was made."""
    looks, lists = [], []
    read = history.changed_trials

    def counted_read(*arguments):
        changed = read(*arguments)
        looks.append(len(changed))
        return changed

    monkeypatch.setattr(history, "changed_trials", counted_read)
    for kind in (InMemoryStorage, PatientStorage):
        read_all = kind.get_all_trials
        monkeypatch.setattr(
            kind, "get_all_trials", lambda *a, read_all=read_all, **o: lists.append(a) or read_all(*a, **o)
        )
    return looks, lists


def run_trial(budget):
    trial = budget.ask()
    trial.suggest_float("z", 0, 1)
    assert budget.original(trial) is None
    budget.tell(trial.number, Outcome("COMPLETE", [trial.params["z"]]))


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_trial_reads_only_what_has_changed_however_many_there_are(kind, tmp_path, readings):
    looks, lists = readings
    store = InMemoryStorage() if kind == "memory" else storage.connect(f"sqlite:///{tmp_path}/studies")
    study = optuna.create_study(storage=store, sampler=RandomSampler(0))
    for trial in range(50):
        study.add_trial(create_trial(value=trial, system_attrs={OWNER: "other"}))
    rules = StopRules(timeout=1e6, stop_when_flat=1000)
    budget = Budget(study, tmp_path, "here:1:2:x", n_trials=1000, retries=2, rules=rules)
    progress = Progress(budget.history, 1000, rules)
    budget.on_trial_end = progress.trial_ended
    run_trial(budget)
    assert looks[0] == 50
    looks.clear()
    lists.clear()
    for _ in range(5):
        run_trial(budget)
        budget.recover()
    budget.renewals.end()
    assert max(looks) <= 1
    assert len(looks) <= 5 * 4
    assert not lists
    assert budget.failures() == 0
