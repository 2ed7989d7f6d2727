import math
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count
from unittest.mock import ANY

import numpy as np
import optuna
import psutil
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import GridSampler, RandomSampler
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState, create_trial

from tuner.sweep import optuna_private, storage
from tuner.sweep.budget import (
    LOCKS,
    OUTLIVES,
    OWNER,
    RETRY_HISTORY,
    SURPLUS,
    Budget,
    allowed_failures,
    new_owner,
    sweep_is_running,
)
from tuner.sweep.leases import LEASE
from tuner.sweep.outcome import OUTCOME, Outcome, Pruned

HOST = socket.gethostname()
OTHER = f"{HOST}:1:other"  # a sweep on this machine; it is alive only within its budget's alive()
DONE = Outcome("COMPLETE", [0.5])


@pytest.fixture(params=["sqlite", "journal"])
def spec(request, tmp_path):
    return f"{request.param}:///{tmp_path}/studies"


@pytest.fixture
def new_budget(spec, tmp_path):
    """A sweep's budget of the one study in the storage."""
    names = count(2)

    def new_budget(n_trials=9, retries=2, name=None, locks=tmp_path, on_trial_end=lambda number, outcome: None):
        study = optuna.create_study(
            study_name="s", storage=storage.connect(spec), sampler=RandomSampler(0), load_if_exists=True
        )
        name = name or f"{HOST}:{next(names)}:mine"
        return Budget(study, locks, name, n_trials=n_trials, retries=retries, on_trial_end=on_trial_end)

    return new_budget


def ask(budget):
    trial = budget.ask()
    trial.suggest_float("x", 0, 1)
    return trial


def states(budget):
    return [trial.state.name for trial in budget.trials()]


# The budget


def trial_of(state, **attributes):
    values = [0.5] if state == "COMPLETE" else None
    return create_trial(state=TrialState[state], values=values, system_attrs=attributes)


@pytest.mark.parametrize(
    ("trials", "counting", "failures"),
    [
        ([], [], 0),
        (["COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"], [0, 1, 2, 3], 1),
        (["FAIL", ("FAIL", {SURPLUS: True}), "FAIL"], [0, 2], 2),
        (["FAIL", "COMPLETE", ("WAITING", {RETRY_HISTORY: [0]})], [1], 0),  # the copy will count instead
        (["FAIL", ("FAIL", {RETRY_HISTORY: [0]}), ("COMPLETE", {RETRY_HISTORY: [0, 1]})], [2], 0),
        (["FAIL", ("FAIL", {RETRY_HISTORY: [0]})], [1], 1),
    ],
)
def test_which_trials_use_up_the_budget(new_budget, trials, counting, failures):
    budget = new_budget(n_trials=len(counting) + 1)
    for trial in trials:
        budget.study.add_trial(trial_of(trial) if isinstance(trial, str) else trial_of(trial[0], **trial[1]))
    assert [trial.number for trial in budget.counted()] == counting
    assert budget.failures() == failures
    assert budget.has_room()
    budget.n_trials = len(counting)
    assert not budget.has_room()


def test_there_are_trials_until_the_budget_is_used_up(new_budget):
    budget = new_budget(n_trials=3)
    budget.study.enqueue_trial({"x": 0.25})
    trials = [ask(budget) for _ in range(3)]
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert trials[0].params == {"x": 0.25}
    assert budget.ask() is None
    for trial, outcome in zip(trials, [DONE, Outcome("PRUNED"), Outcome("FAIL", error="e")], strict=True):
        budget.tell(trial.number, outcome)
    assert budget.ask() is None
    assert states(budget) == ["COMPLETE", "PRUNED", "FAIL"]
    budget.n_trials = 4
    assert budget.ask().number == 3


def test_there_are_no_trials_once_the_sampler_has_no_more_points(new_budget):
    budget = new_budget(n_trials=9)
    budget.study.sampler = GridSampler({"x": [0.0, 0.5, 1.0]})
    while trial := budget.ask():
        budget.tell(trial.number, Outcome("COMPLETE", [trial.suggest_float("x", 0, 1)]))
    assert sorted(trial.value for trial in budget.trials()) == [0.0, 0.5, 1.0]
    assert budget.sampler_exhausted.is_set()


def test_threads_share_the_budget(new_budget):
    budget, numbers = new_budget(n_trials=12), []

    def work():
        while trial := budget.ask():
            numbers.append(trial.number)
            budget.tell(trial.number, DONE)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work) for _ in range(4)]:
            future.result()
    assert sorted(numbers) == list(range(12))
    assert states(budget) == ["COMPLETE"] * 12


PROGRAM = """
import os, socket, sys, time
from pathlib import Path
import optuna
from tuner.sweep import storage
from tuner.sweep.budget import Budget
from tuner.sweep.outcome import OUTCOME, Outcome
study = optuna.load_study(study_name="s", storage=storage.connect(sys.argv[1]))
name = f"{socket.gethostname()}:{os.getpid()}:process"
budget = Budget(study, Path(sys.argv[2]), name, n_trials=21, retries=2, on_trial_end=lambda number, outcome: None)
"""


def start(script, budget, spec):
    command = [sys.executable, "-c", PROGRAM + script, spec, str(budget.locks)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


SHARE = """
print("ready", flush=True)
sys.stdin.readline()
with budget.alive():
    while trial := budget.ask():
        x = trial.suggest_float("x", 0, 1)
        ends = (Outcome("COMPLETE", [x]), Outcome("PRUNED"), Outcome("FAIL", error="of its own"))
        budget.tell(trial.number, ends[trial.number % 3])
        budget.recover()
        print(trial.number, flush=True)
"""


def test_processes_share_the_budget(new_budget, spec):
    budget = new_budget(n_trials=21)
    for x in (0.0, 0.5, 1.0):
        budget.study.enqueue_trial({"x": x})
    processes = [start(SHARE, budget, spec) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    numbers = [[int(line) for line in process.communicate(timeout=60)[0].split()] for process in processes]
    assert sorted(chain(*numbers)) == list(range(21))
    assert states(budget) == ["COMPLETE", "PRUNED", "FAIL"] * 7
    assert [trial.params["x"] for trial in budget.trials()[:3]] == [0.0, 0.5, 1.0]
    assert sum(map(bool, numbers)) > 1  # of the processes, not one alone
    assert not list(budget.locks.glob("*.alive"))


def test_of_two_machines_without_a_common_lock_the_later_one_gives_way(new_budget, tmp_path, monkeypatch):
    early, late = new_budget(n_trials=2, locks=tmp_path / "1"), new_budget(n_trials=2, locks=tmp_path / "2")
    for budget in (early, late):
        budget.locks.mkdir()
    ask(early)
    monkeypatch.setattr(late, "has_room", lambda: early.ask() is not None)  # between its look and its asking
    assert late.ask() is None
    assert states(early) == ["RUNNING", "RUNNING", "FAIL"]
    assert [trial.number for trial in early.counted()] == [0, 1]
    assert early.failures() == 0


# How trials end


def test_a_trial_ends_once(new_budget):
    ends = []
    budget = new_budget(on_trial_end=lambda number, outcome: ends.append((number, outcome.state)))
    trial = ask(budget)
    budget.tell(trial.number, DONE)
    budget.tell(trial.number, Outcome("FAIL", error="too late"))
    budget.finish_lost(trial.number, "too late")
    budget.finish_lost(trial.number, "too late", interrupted=True)
    assert ends == [(0, "COMPLETE")]
    [trial] = budget.trials()
    assert (trial.value, trial.user_attrs) == (0.5, {})
    assert trial.system_attrs == {OWNER: budget.owner, LEASE: ANY}


def test_a_failure_is_written_down_unless_its_job_did(new_budget):
    budget = new_budget()
    for number in (0, 1):
        ask(budget)
        if number == 0:
            budget.study._storage.set_trial_user_attr(budget.trial(0)._trial_id, "error", "from the job")
        budget.tell(number, Outcome.failed(ZeroDivisionError("told")))
    first, second = (trial.user_attrs for trial in budget.trials())
    assert first == {"error": "from the job"}
    assert second["error"] == "ZeroDivisionError: told"
    assert "ZeroDivisionError" in second["traceback"]


WRITTEN = [("COMPLETE", [0.25]), ("PRUNED", None), ("FAIL", None), (None, None)]
DIE = f"""
with budget.alive():
    for state, values in {WRITTEN}:
        trial = budget.ask()
        trial.suggest_float("x", 0, 1)
        outcome = Outcome(state, values, error="of its own" if state == "FAIL" else None)
        if state:
            trial.storage.set_trial_system_attr(trial._trial_id, OUTCOME, outcome.__dict__)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_sweep_leaves_is_recovered_and_what_a_living_one_runs_is_left_alone(new_budget, spec):
    ends = []
    budget = new_budget(on_trial_end=lambda number, outcome: ends.append(number))
    with start(DIE, budget, spec) as process:
        assert process.stdout.readline() == "ready\n"
        budget.recover()
        assert states(budget) == ["RUNNING"] * 4
        process.kill()
    budget.recover()
    assert states(budget) == ["COMPLETE", "PRUNED", "FAIL", "FAIL", "WAITING"]
    assert ends == [0, 1, 2, 3]
    trials = budget.trials()
    assert trials[0].value == 0.25
    assert trials[2].user_attrs["error"] == "of its own"
    assert trials[3].user_attrs["error"] == "the sweep that ran it was killed; it is retried"
    assert [trial.number for trial in budget.counted()] == [0, 1, 2]
    again = ask(budget)
    assert (again.number, again.params) == (4, trials[3].params)
    assert not list(budget.locks.glob("*.alive"))


def test_trials_of_those_who_cannot_be_told_to_be_dead_are_left_alone(new_budget, monkeypatch):
    budget, elsewhere, living = new_budget(), new_budget(name="another-machine:1:x"), new_budget(name=OTHER)
    monkeypatch.setattr(budget.watch, "has_expired", lambda number, lease: number != 1)
    with living.alive():
        for asking in (budget, elsewhere, living):
            ask(asking)
        budget.recover()
        assert states(budget) == ["RUNNING"] * 3
    budget.recover()
    assert states(budget) == ["RUNNING", "RUNNING", "FAIL", "WAITING"]


def test_a_trial_of_another_machine_is_lost_when_its_lease_expires(new_budget, monkeypatch):
    budget, elsewhere = new_budget(), new_budget(name="another-machine:1:x")
    ask(elsewhere)
    monkeypatch.setattr(budget.watch, "has_expired", lambda number, lease: True)
    budget.recover()
    assert states(budget) == ["FAIL", "WAITING"]
    said = "it gave no sign of life for 120 s; its sweep ran on another-machine; it is retried"
    assert budget.trial(0).user_attrs["error"] == said
    again = ask(budget)
    assert again.params == budget.trial(0).params
    assert budget.trial(1).system_attrs[OWNER] == budget.owner


def test_a_job_that_outlives_its_sweep_is_lost_when_its_lease_expires(new_budget, monkeypatch):
    """As one on a cluster, which may be queued, run, or have ended."""
    budget, dead = new_budget(), new_budget(name=OTHER)
    dead.jobs_outlive = True
    for _ in range(3):
        ask(dead)
    assert all(trial.system_attrs[OUTLIVES] for trial in budget.trials())
    optuna_private.set_system_attr(budget.study, budget.trial(1), OUTCOME, DONE.__dict__)
    monkeypatch.setattr(budget.watch, "has_expired", lambda number, lease: False)
    budget.recover()
    assert states(budget) == ["RUNNING", "COMPLETE", "RUNNING"]
    monkeypatch.setattr(budget.watch, "has_expired", lambda number, lease: number == 2)
    budget.recover()
    assert states(budget) == ["RUNNING", "COMPLETE", "FAIL", "WAITING"]
    assert OUTLIVES not in budget.trial(3).system_attrs  # who asks for it says so anew


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # of Optuna's reading of retries
@pytest.mark.parametrize("retries", [0, 1, 2])
def test_a_lost_trial_is_tried_again_as_often_as_allowed(new_budget, retries):
    budget, dead = new_budget(n_trials=1, retries=retries), new_budget(n_trials=1, name=OTHER)
    for number in range(retries + 1):
        assert ask(dead).number == number
        budget.recover()
    assert budget.ask() is None
    trials = budget.trials()
    assert states(budget) == ["FAIL"] * (retries + 1)
    assert len({trial.params["x"] for trial in trials}) == 1
    reasons = ["the sweep that ran it was killed; it is retried"] * retries + ["the sweep that ran it was killed"]
    assert [trial.user_attrs["error"] for trial in trials] == reasons
    for trial in trials:  # as Optuna's own retries are
        assert RetryHeartbeatStaleTrialCallback.retry_history(trial) == list(range(trial.number))
        assert RetryHeartbeatStaleTrialCallback.retried_trial_number(trial) == (0 if trial.number else None)
    assert budget.failures() == 1


@pytest.mark.parametrize("retries", [0, 1])
def test_an_interrupted_trial_has_used_up_no_attempt(new_budget, retries):
    budget, dead = new_budget(n_trials=1, retries=retries), new_budget(n_trials=1, name=OTHER)
    for number in range(3):
        ask(budget)
        budget.finish_lost(number, "interrupted", interrupted=True)
        assert budget.trial(number).user_attrs["error"] == "interrupted; it is retried"
    for number in range(3, 3 + retries + 1):
        assert ask(dead).number == number
        budget.recover()
    assert states(budget) == ["FAIL"] * (4 + retries)
    assert budget.failures() == 1
    assert budget.ask() is None


def test_a_trial_has_its_owner_from_its_first_moment_on(new_budget, monkeypatch):
    """Killed right after the study was asked, before anything else is written: the trial is known to be lost."""
    budget, dead = new_budget(n_trials=3), new_budget(n_trials=3, name=OTHER)
    budget.study.enqueue_trial({"x": 0.25})

    def power_cut(*arguments):
        raise KeyboardInterrupt

    for _ in range(2):  # a waiting trial, and a new one
        with monkeypatch.context() as patch:
            patch.setattr(optuna_private, "Trial", power_cut)
            with pytest.raises(KeyboardInterrupt):
                dead.ask()
    assert [trial.system_attrs.get(OWNER) for trial in budget.trials()] == [OTHER, OTHER]
    budget.recover()
    assert states(budget) == ["FAIL", "FAIL", "WAITING", "WAITING"]
    assert budget.ask().suggest_float("x", 0, 1) == 0.25


def test_a_trial_that_was_killed_before_it_was_taken_is_still_waiting(new_budget, monkeypatch):
    budget, dead = new_budget(), new_budget(name=OTHER)
    budget.study.enqueue_trial({"x": 0.25})

    def power_cut(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dead.study._storage, "set_trial_state_values", power_cut)
        with pytest.raises(KeyboardInterrupt):
            dead.ask()
    budget.recover()
    assert states(budget) == ["WAITING"]
    budget.ask()
    assert budget.trial(0).system_attrs[OWNER] == budget.owner


def test_a_plain_worker_of_optuna_is_left_alone(new_budget, spec):
    """It has no owner, and may run: its trial counts, and it can tell its result."""
    budget = new_budget(n_trials=3)
    plain = optuna.load_study(study_name="s", storage=budget.study._storage)
    trial = plain.ask({"x": FloatDistribution(0, 1)})
    ask(budget)
    budget.recover()
    assert budget.without_owner() == [0]
    assert states(budget) == ["RUNNING", "RUNNING"]
    plain.tell(trial, 0.5)
    budget.recover()
    assert states(budget) == ["COMPLETE", "RUNNING"]
    assert budget.without_owner() == []


def test_a_plain_worker_runs_beside_a_sweep(toy):
    with toy.start("hydra.sweeper.n_trials=5", "seconds=0.2") as sweep:
        toy.wait_for(1)
        plain = toy.study()
        trial = plain.ask({"x": FloatDistribution(-2, 2)})
        toy.wait_for(3)
        plain.tell(trial, 0.5)
        out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, out + err
    assert toy.states() == ["COMPLETE"] * 5


def test_a_stranger_that_still_runs_is_named(toy):
    toy.run("hydra.sweeper.n_trials=2")
    toy.study().ask({"x": FloatDistribution(-2, 2)})
    done = toy.run("hydra.sweeper.n_trials=4")
    assert "trials [2] are run by a program that is not a sweep; if it was killed: optuna tell" in done.stdout
    assert toy.states() == ["COMPLETE", "COMPLETE", "RUNNING", "COMPLETE"]


@pytest.mark.parametrize(
    ("owner", "runs"),
    [
        (f"{HOST}:{{pid}}:{{start}}:id", True),
        (f"{HOST}:{{pid}}:{{earlier}}:id", False),  # the process that had this number before
        (f"{HOST}:{{pid}}:id", True),  # of an earlier version
        (f"{HOST}:{{gone}}:{{start}}:id", False),
        ("another-machine:1:5:id", True),
    ],
)
def test_a_process_that_got_the_number_of_a_killed_sweep_is_not_the_sweep(tmp_path, owner, runs):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    start = round(psutil.Process().create_time())
    name = owner.format(pid=os.getpid(), start=start, earlier=start - 3600, gone=ended.pid)
    (tmp_path / LOCKS).mkdir()
    (tmp_path / LOCKS / f"{name}.alive").touch()
    assert sweep_is_running(tmp_path) is runs


def test_the_name_of_a_sweep_is_that_of_a_running_one(tmp_path):
    (tmp_path / LOCKS).mkdir()
    (tmp_path / LOCKS / f"{new_owner()}.alive").touch()
    assert sweep_is_running(tmp_path)
    assert new_owner() != new_owner()


def test_a_second_recovery_adds_no_second_copy(new_budget):
    budget, dead = new_budget(), new_budget(name=OTHER)
    ask(dead)
    for _ in range(2):
        budget.recover()
    with ThreadPoolExecutor(4) as pool:
        ask(dead)  # the copy, and lost again
        for future in [pool.submit(new_budget().recover) for _ in range(4)]:
            future.result()
    assert states(budget) == ["FAIL", "FAIL", "WAITING"]


def test_a_recovery_that_is_cut_off_is_finished_by_the_next(new_budget, monkeypatch):
    budget, dead = new_budget(), new_budget(name=OTHER)
    ask(dead)

    def power_cut(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(budget, "tell", power_cut)
        with pytest.raises(KeyboardInterrupt):
            budget.recover()
    assert states(budget) == ["RUNNING", "WAITING"]
    new_budget().recover()
    assert states(budget) == ["FAIL", "WAITING"]


def test_the_copy_of_a_lost_trial_is_no_duplicate_of_it_while_a_recovery_is_cut_off(new_budget, monkeypatch):
    budget, dead = new_budget(), new_budget(name=OTHER)
    ask(dead)
    with monkeypatch.context() as patch:
        patch.setattr(budget, "tell", lambda *_: None)
        budget.recover()
    assert states(budget) == ["RUNNING", "WAITING"]
    copy = ask(budget)
    assert copy.params == budget.trial(0).params
    assert budget.original(copy) is None


def test_an_enqueued_trial_that_was_lost_before_it_drew_anything_stays_what_it_was(new_budget):
    budget, dead = new_budget(), new_budget(name=OTHER)
    budget.study.enqueue_trial({"x": 0.25, "y": "a"}, user_attrs={"enqueued": True})
    budget.study.enqueue_trial({}, user_attrs={"baseline": True})
    for _ in range(2):
        dead.ask()
    budget.recover()
    first, second = budget.ask(), budget.ask()
    assert (first.suggest_float("x", 0, 1), first.suggest_categorical("y", ["a", "b"])) == (0.25, "a")
    assert first.user_attrs == {"enqueued": True}
    assert second.user_attrs == {"baseline": True}


@pytest.mark.parametrize(
    ("rate", "n_trials", "allowed"),
    [(0.0, 9, 0), (1.0, 9, 9), (0.5, 1, 0), (0.5, 5, 2), (0.3, 10, 3), (0.29, 100, 29), (0.1, 0, 0)],
)
def test_allowed_failures(rate, n_trials, allowed):
    assert allowed_failures(rate, n_trials) == allowed


# What a job returns


@pytest.mark.parametrize(
    ("returned", "values"),
    [(0.5, [0.5]), (3, [3.0]), (np.float32(0.5), [0.5]), ((0.5, 3), [0.5, 3.0]), (np.array([1, 2]), [1.0, 2.0])],
)
def test_finite_numbers_complete_a_trial_unless_it_was_pruned(returned, values):
    assert Outcome.of(returned, len(values)) == Outcome("COMPLETE", values)
    assert Outcome.of(Pruned(), len(values)) == Outcome("PRUNED")


NO_NUMBER = [math.nan, math.inf, -math.inf, None, "text", [0.5], {"val_accuracy": 0.5}, 10**400]
NO_TWO_NUMBERS = [0.5, [0.5], [1, 2, 3], [1, math.nan], [1, None], [1, "text"], None, "12", {1: 0.5, 2: 0.5}]


@pytest.mark.parametrize(
    ("objectives", "wanted", "returned"),
    [(1, "a finite number", it) for it in NO_NUMBER] + [(2, "2 finite numbers", it) for it in NO_TWO_NUMBERS],
    ids=lambda it: str(it)[:20],
)
def test_anything_else_has_failed(objectives, wanted, returned):
    error = f"the objective must return {wanted}, not {returned!r}"
    assert Outcome.of(returned, objectives) == Outcome("FAIL", error=error)
