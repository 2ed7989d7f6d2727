"""Trials of machines that are gone are run again elsewhere, and results that come late are used."""

import threading
import time
from types import SimpleNamespace

import optuna
import pytest
from helpers import wait_until
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from tuner import InputError
from tuner.sweep import late, leases, storage
from tuner.sweep.budget import OWNER, Budget
from tuner.sweep.job import Job
from tuner.sweep.leases import LEASE, Renewals, Watch
from tuner.sweep.optuna_private import set_system_attr
from tuner.sweep.outcome import OUTCOME, Outcome

DONE = Outcome("COMPLETE", [0.5])


@pytest.fixture
def clock(monkeypatch):
    """What time.monotonic returns: a list of one number."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def study(tmp_path):
    return optuna.create_study(study_name="s", storage=storage.connect(f"sqlite:///{tmp_path}/studies"))


def new_budget(study, tmp_path, machine, **options):
    locks = tmp_path / machine
    locks.mkdir(exist_ok=True)
    return Budget(study, locks, f"{machine}:1:2:x", **{"n_trials": 3, "retries": 2} | options)


# When a lease has expired


def test_a_lease_expires_when_it_stays_the_same(clock):
    watch = Watch()
    looks = []
    for _ in range(9):
        looks.append(watch.has_expired(0, 1.5))
        clock[0] += 20
    assert looks == [False] * 6 + [True] * 3  # after 120 s


def test_a_lease_that_is_renewed_does_not_expire(clock):
    watch = Watch()
    for second in range(0, 1000, 10):
        clock[0] = 1000 + second
        assert not watch.has_expired(0, second // 100)
        assert watch.has_expired(1, "same") == (second >= 120)  # another trial's


def test_a_time_without_a_look_is_no_proof(clock):
    """The storage was away for an hour: nobody could renew a lease."""
    watch = Watch()
    watch.has_expired(0, 1.5)
    clock[0] += 3600
    assert not watch.has_expired(0, 1.5)
    clock[0] += 5
    assert not watch.has_expired(0, 2.5)  # renewed at once


# Renewing them


def lease(study, number):
    return study.get_trials()[number].system_attrs[LEASE]


def test_a_sweep_renews_the_leases_of_its_running_trials_alone(study, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEWAL", 0.01)
    budget = new_budget(study, tmp_path, "here")
    with budget.alive():
        first, second = budget.ask(), budget.ask()
        before = lease(study, 0), lease(study, 1)
        wait_until(lambda: lease(study, 0) > before[0] and lease(study, 1) > before[1])
        budget.tell(first.number, DONE)
        ended = lease(study, 0)
        running = lease(study, 1)
        wait_until(lambda: lease(study, 1) > running)
        assert lease(study, 0) == ended
        thread = budget.renewals.thread
    thread.join(60)
    assert not thread.is_alive()
    assert second.number == 1


def test_a_renewal_that_fails_is_told_once_and_tried_again(study, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(leases, "RENEWAL", 0.01)
    renewals, calls, fails = Renewals(study), [], threading.Event()
    inner = study._storage.set_trial_system_attr
    fails.set()

    def write(*arguments):
        calls.append(arguments)
        if fails.is_set():
            raise StorageInternalError("away")
        inner(*arguments)

    budget = new_budget(study, tmp_path, "here")
    trial = budget.ask()
    budget.renewals.end()
    budget.renewals.thread.join(60)
    before = lease(study, 0)
    monkeypatch.setattr(study._storage, "set_trial_system_attr", write)
    renewals.hold(trial)
    wait_until(lambda: len(calls) > 3)
    fails.clear()
    wait_until(lambda: lease(study, 0) > before)
    renewals.end()
    renewals.thread.join(60)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "the lease of trial 0 cannot be renewed: away"
    ]


def test_a_sweep_keeps_a_trial_that_another_one_came_too_late_to_start(study, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEWAL", 0.01)
    budget = new_budget(study, tmp_path, "here")
    trial = budget.ask()
    set_system_attr(study, trial, OWNER, "another")  # set before it saw that the trial runs
    wait_until(lambda: budget.trial(0).system_attrs[OWNER] == budget.owner)
    budget.renewals.end()


def test_a_trial_that_has_ended_is_renewed_no_more(study, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEWAL", 0.01)
    budget = new_budget(study, tmp_path, "here")
    trial = budget.ask()
    study.tell(trial.number, 0.5)  # by another program
    wait_until(lambda: not budget.renewals.held)
    budget.renewals.end()


# Results that come late


def lost(study, tmp_path, **options):
    """A trial that a machine runs and another takes for lost: the trial, and the other's budget."""
    here, there = new_budget(study, tmp_path, "here", **options), new_budget(study, tmp_path, "there", **options)
    trial = there.ask()
    trial.suggest_float("x", 0, 1)
    trial.report(0.75, 1)
    there.renewals.end()
    here.watch.has_expired = lambda number, lease: True
    here.recover()
    return trial, here


def test_a_late_result_goes_to_the_copy_that_waits(study, tmp_path, caplog):
    trial, here = lost(study, tmp_path)
    late.hand_over(trial, DONE, {"seconds": 1.5})
    first, copy = study.trials
    assert (first.state, copy.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert (copy.value, copy.params, copy.intermediate_values) == (0.5, trial.params, {1: 0.75})
    assert copy.user_attrs == {"seconds": 1.5}
    assert copy.system_attrs[OUTCOME] == DONE.__dict__
    assert [each.number for each in here.counted()] == [1]
    assert "trial 0 was taken for lost, but has ended: trial 1 gets its result" in caplog.text


@pytest.mark.parametrize("retries", [0, 2])
def test_a_late_result_is_dropped_if_the_trial_runs_again_or_is_given_up(study, tmp_path, caplog, retries):
    trial, here = lost(study, tmp_path, retries=retries)
    if retries:
        assert here.ask().number == 1
    late.hand_over(trial, DONE, {})
    assert [each.state.name for each in study.trials] == (["FAIL", "RUNNING"] if retries else ["FAIL"])
    assert "trial 0 was taken for lost, and its result comes too late: it is not used" in caplog.text


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_job_whose_trial_is_taken_for_lost_goes_on_and_its_result_is_used(toy, launcher):
    options = [f"hydra/launcher={launcher}", "hydra.sweeper.n_trials=2", "steps=40", "seconds=8"]
    with toy.start(*options) as sweep:
        toy.wait_for(1)
        study = toy.study()
        here = new_budget(study, toy.folder, "elsewhere")
        here.watch.has_expired = lambda number, lease: True
        wait_until(lambda: len(study.trials[0].intermediate_values) > 3)
        here.recover()
        assert [trial.state.name for trial in study.trials] == ["FAIL", "WAITING"]
        out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, out + err
    assert toy.states() == ["FAIL", *["COMPLETE"] * 2]
    assert sorted(toy.starts()) == [0, 2]
    first, copy, *_ = toy.study().trials
    assert copy.user_attrs["output_dir"] == first.user_attrs["output_dir"]
    assert copy.value == pytest.approx(copy.params["x"] ** 2)
    if launcher == "basic":
        assert (out + err).count("trial 0 was taken for lost; it goes on") == 1


def test_a_job_that_starts_after_its_trial_was_taken_for_lost_does_not_run(study, tmp_path, monkeypatch):
    """As one that a cluster's queue held back, while its sweep was killed."""
    lost(study, tmp_path)
    ran = []
    hydra = SimpleNamespace(job=SimpleNamespace(num=0), runtime=SimpleNamespace(output_dir=str(tmp_path)), verbose=True)
    monkeypatch.setattr("tuner.sweep.job.HydraConfig.get", lambda: hydra)
    job = Job(ran.append, "sqlite:///studies", "s", 1, optuna.pruners.NopPruner(), study=study)
    with pytest.raises(InputError, match="trial 0 has ended before this job started: it was taken for lost"):
        job({})
    assert not ran


# Sweeps on several machines


def test_another_machine_runs_what_a_killed_one_left(toy):
    options = ["hydra.sweeper.n_trials=4", "steps=4"]
    toy.environment["TOY_HOST"] = "first"
    with toy.start(*options, "seconds=60") as first:
        toy.wait_for(1)
        first.kill()
    toy.environment |= {"TOY_HOST": "second", "TOY_LEASE": "2"}
    second = toy.command(*options, "seconds=0.1")
    assert second.returncode == 0, second.stdout + second.stderr
    assert toy.states() == ["FAIL", *["COMPLETE"] * 4]
    assert "waiting for trial 0 of other sweeps, on first: what is lost there is run again here" in second.stdout
    trials = toy.study().trials
    assert trials[0].user_attrs["error"] == "it gave no sign of life for 2 s; its sweep ran on first; it is retried"
    assert trials[4].params == trials[0].params
    assert trials[4].system_attrs[OWNER].startswith("second:")
    assert (toy.folder / "multirun/toy/optimization_results.yaml").exists()


@pytest.mark.slow
def test_a_machine_without_the_folders_of_a_killed_one_ends_its_study(toy, server, tmp_path):
    """They share a database alone."""
    options = ["hydra.sweeper.n_trials=4", "steps=4", f"hydra.sweeper.storage={server.url}"]
    toy.environment["TOY_HOST"] = "first"
    with toy.start(*options, "seconds=60") as first:
        toy.wait_for(1)
        first.kill()
    (toy.folder / "multirun").rename(toy.folder / "of the first")
    toy.environment |= {"TOY_HOST": "second", "TOY_LEASE": "2"}
    second = toy.command(*options, "seconds=0.1")
    assert second.returncode == 0, second.stdout + second.stderr
    assert [trial.state.name for trial in toy.study(storage=server.url).trials] == ["FAIL", *["COMPLETE"] * 4]
    assert "best value" in second.stdout
