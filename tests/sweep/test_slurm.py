"""Searches on a real Slurm of one node, without accounting: nothing runs twice, nothing is waited for in vain."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from helpers import TINY, wait_until
from optuna.trial import TrialState
from slurm import CPUS, slurm_cluster  # noqa: F401 - a fixture

from tuner.sweep import slurm as slurm_queue
from tuner.sweep.budget import Budget
from tuner.sweep.slurm import JobEndedError, Queue
from tuner.sweep.storage import connect, resolve

OPTIONS = ["hydra/launcher=submitit_slurm", "hydra.sweeper.n_jobs=2"]


@pytest.fixture
def slurm(toy, slurm_cluster):  # noqa: F811
    """The cluster, on which the toy runs."""
    toy.environment |= slurm_cluster.environment | {"TOY_POLL": "1"}
    yield slurm_cluster
    slurm_cluster.ask("scancel", "--user=root")
    wait_until(lambda: not slurm_cluster.jobs())


@contextmanager
def running(toy, *words, **options):
    """A search, which is killed at the latest when the block is left."""
    with toy.start(*words, **options) as sweep:
        try:
            yield sweep
        finally:
            sweep.kill()


def job_of(toy, number):
    return toy.study().trials[number].system_attrs["slurm_job"]


@pytest.mark.slow
def test_a_killed_sweep_is_resumed_beside_its_jobs_that_run_and_wait(toy, slurm):
    options = [*OPTIONS, f"hydra.launcher.cpus_per_task={CPUS}", "hydra.sweeper.n_trials=3", "does=all-go"]
    with running(toy, *options) as sweep:
        toy.wait_for(1)
        wait_until(lambda: sorted(slurm.jobs().values()) == ["PENDING", "RUNNING"])
        sweep.kill()
    with running(toy, *options) as sweep:
        wait_until(lambda: len(slurm.jobs()) == 3)
        (toy.folder / "go").touch()
        out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, out + err
    assert toy.states() == ["COMPLETE"] * 3
    assert sorted(toy.starts()) == [0, 1, 2]


@pytest.mark.slow
def test_a_job_that_is_cancelled_is_run_again_and_ctrl_c_cancels_all(toy, slurm):
    with running(toy, *OPTIONS, "hydra.sweeper.n_trials=2", "does=all-go", start_new_session=True) as sweep:
        toy.wait_for(2)
        slurm.ask("scancel", job_of(toy, 0))
        toy.wait_for(3)
        os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does
        out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, out + err
    trials = toy.study().trials
    assert f"trial 0 failed: Slurm job {job_of(toy, 0)} ended as CANCELLED; it is retried" in out
    assert f"cancelling Slurm jobs {job_of(toy, 1)}, {job_of(toy, 2)}" in out
    assert "continue with: python -m toy -m" in out
    assert "sacct" not in out + err
    wait_until(lambda: not slurm.jobs())
    assert Counter(trial.state.name for trial in trials) == {"FAIL": 3, "WAITING": 2}
    assert ["excused" in trial.system_attrs for trial in trials[:3]] == [False, True, True]


@pytest.mark.slow
def test_a_job_goes_on_when_it_is_warned_and_when_slurm_requeues_it(toy, slurm):
    with running(toy, *OPTIONS, "hydra.sweeper.n_trials=2", "does=all-go") as sweep:
        toy.wait_for(2)
        warned, requeued = job_of(toy, 0), job_of(toy, 1)
        for name in ("USR1", "USR2", "TERM"):
            slurm.ask("scancel", f"--signal={name}", warned)
        log = toy.folder / "multirun/toy/0/toy.log"
        wait_until(lambda: log.read_text().count("Slurm will end this job soon") == 2)
        slurm.ask("scontrol", "requeue", requeued)
        wait_until(lambda: slurm.jobs()[requeued] == "PENDING")
        slurm.ask("scontrol", "update", f"JobId={requeued}", "StartTime=now")  # Slurm would wait for two minutes
        toy.wait_for(3)
        (toy.folder / "go").touch()
        out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, out + err
    assert toy.states() == ["COMPLETE"] * 2
    assert sorted(toy.starts()) == [0, 1, 1]
    assert "cancelling" not in out


@pytest.mark.slow
def test_a_preempted_trial_is_put_back_and_this_is_no_attempt(toy, slurm):
    options = [*OPTIONS, "hydra.launcher.partition=cheap", "hydra.sweeper.retries=0", "hydra.sweeper.n_trials=1"]
    with running(toy, *options, "does=0-go") as sweep:
        toy.wait_for(1)
        slurm.ask("sbatch", "--partition=urgent", f"--ntasks={CPUS}", "--output=/dev/null", "--wrap=true")
        out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, out + err
    assert toy.states() == ["FAIL", "COMPLETE"]
    assert f"trial 0 failed: Slurm job {job_of(toy, 0)} ended as PREEMPTED; it is retried" in out


@pytest.mark.slow
def test_what_slurm_refuses_is_told(toy, slurm):
    done = toy.command(*OPTIONS, "hydra.launcher.partition=none")
    assert done.returncode == 1
    assert "the launcher cannot start jobs: " in done.stdout + done.stderr
    assert "invalid partition specified: none" in done.stdout + done.stderr


@pytest.mark.slow
def test_the_password_of_a_storage_is_in_no_file_of_a_search(toy, slurm, server):
    done = toy.command(*OPTIONS, "hydra.sweeper.n_trials=2", f"hydra.sweeper.storage={server.url}")
    assert done.returncode == 0, done.stdout + done.stderr
    files = [path for path in toy.folder.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".pkl" for path in files) == 4
    assert not [path for path in files if b"secret" in path.read_bytes()]
    assert "secret" not in done.stdout + done.stderr


# Arrays of equal searches and of workers: no launcher


def submit_array(folder, environment, size, *words):
    """Submit `python -m WORDS` as an array. Returns its id. The output of job N goes to N.log."""
    options = ["--parsable", f"--array=1-{size}", "--signal=B:USR1@60", "--output=%a.log"]
    command = ["sbatch", *options, "--wrap", "exec " + shlex.join([sys.executable, "-m", *words])]
    return subprocess.check_output(command, env=environment, cwd=folder, text=True).strip()


@pytest.mark.slow
def test_an_array_of_searches_of_which_one_is_cancelled_one_warned_and_one_requeued(toy, slurm):
    words = ["toy", "-m", "hydra.sweeper.n_trials=6", "does=all-go"]
    array = submit_array(toy.folder, toy.environment, 4, *words)
    toy.wait_for(4)
    slurm.ask("scancel", f"{array}_1")
    slurm.ask("scancel", "--batch", "--signal=USR1", f"{array}_4")  # as before its time limit
    slurm.ask("scontrol", "requeue", f"{array}_2")
    wait_until(lambda: slurm.jobs() == {f"{array}_2": "PENDING", f"{array}_3": "RUNNING"})
    slurm.ask("scontrol", "update", f"JobId={array}_2", "StartTime=now")
    toy.wait_for(5)
    (toy.folder / "go").touch()
    wait_until(lambda: not slurm.jobs())
    trials = toy.study().trials
    assert Counter(trial.state.name for trial in trials) == {"FAIL": 3, "COMPLETE": 6}
    assert all("excused" in trial.system_attrs for trial in trials if trial.state == TrialState.FAIL)
    assert sorted(toy.starts()) == list(range(9))
    assert ["interrupted with 0/6" in (toy.folder / f"{n}.log").read_text() for n in (1, 3, 4)] == [True, False, True]
    assert "best value" in (toy.folder / "3.log").read_text()


@pytest.mark.slow
def test_an_array_of_workers_on_a_database_ends_a_study(command, slurm_cluster, server, tmp_path):  # noqa: F811
    search = [
        "-m",
        "hparams_search=optuna",
        "study=mine",
        *TINY,
        "final.seeds=0",
        f"hydra.sweeper.storage={server.url}",
    ]
    code, output = command(*search, "hydra/launcher=basic", "hydra.sweeper.n_trials=1")
    assert code == 0, output
    environment = os.environ | slurm_cluster.environment
    words = ["tuner.worker", "--storage", server.url, "study=mine", "hydra.sweeper.n_trials=8"]
    submit_array(tmp_path, environment, 2, *words)
    wait_until(lambda: not slurm_cluster.jobs())
    study = optuna.load_study(study_name="mine", storage=connect(resolve(server.url)))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 8
    assert {Path(trial.user_attrs["output_dir"]).name for trial in study.trials} == {*map(str, range(8))}
    for name in ("1.log", "2.log"):
        assert "best value" in (tmp_path / name).read_text()


# The queue


@pytest.fixture
def listed(monkeypatch):
    """A queue, what squeue answers to it, and the clock: a list of one number."""
    answer, now = {"states": {}}, [1000.0]
    monkeypatch.setattr(slurm_queue, "_states", lambda: answer["states"])
    monkeypatch.setattr(slurm_queue, "POLL", 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return Queue(), answer, now


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "a state of tomorrow"])
def test_a_job_that_waits_or_runs_is_waited_for(listed, state):
    queue, answer, now = listed
    queue.register_job("7")
    answer["states"] = {"7": state}
    for _ in range(3):
        now[0] += 1000
        assert not queue.is_done("7")
    assert queue.is_alive("7") is True


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"7": "CANCELLED"}, "Slurm job 7 ended as CANCELLED"),
        ({"7": "TIMEOUT"}, "Slurm job 7 ended as TIMEOUT: raise hydra.launcher.timeout_min"),
        ({"7": "OUT_OF_MEMORY"}, "Slurm job 7 ended as OUT_OF_MEMORY: raise hydra.launcher.mem_gb"),
        ({"7": "FAILED"}, "Slurm job 7 ended as FAILED: see .submitit/7_0_log.err in the study's folder"),
        ({"8": "RUNNING"}, "Slurm job 7 is not in the queue any more"),
    ],
)
def test_a_job_that_has_ended_may_still_have_a_result_in_a_slow_folder(listed, states, message):
    queue, answer, now = listed
    queue.register_job("7")
    answer["states"] = states
    assert not queue.is_done("7")
    now[0] += 14
    assert not queue.is_done("7")
    now[0] += 2
    with pytest.raises(JobEndedError) as error:
        queue.is_done("7")
    assert str(error.value) == message
    assert queue.is_alive("7") is False


def test_while_squeue_does_not_answer_nothing_has_ended(listed):
    queue, answer, now = listed
    queue.register_job("7")
    answer["states"] = None
    for _ in range(3):
        now[0] += 1000
        assert not queue.is_done("7")
    assert queue.is_alive("7") is None


def test_a_list_that_is_older_than_a_job_says_nothing_about_it(listed, monkeypatch):
    queue, answer, now = listed
    monkeypatch.setattr(slurm_queue, "POLL", 10.0)
    assert queue.is_alive("7") is False
    now[0] += 1
    queue.register_job("7")
    assert not queue.is_done("7")
    assert not queue.ended
    answer["states"] = {"7": "PENDING"}
    assert queue.is_alive("7") is True  # asks again


# The trials of a sweep that was killed


@pytest.mark.parametrize(
    ("machine", "alive", "states"),
    [
        (socket.gethostname(), True, ["RUNNING"]),
        (socket.gethostname(), False, ["FAIL", "WAITING"]),  # at once
        (socket.gethostname(), None, ["RUNNING"]),
        ("elsewhere", True, ["RUNNING"]),
        ("elsewhere", False, ["RUNNING"]),  # its queue may be another one: the lease tells it
    ],
)
def test_the_queue_tells_whether_a_job_without_its_sweep_is_lost(tmp_path, monkeypatch, machine, alive, states):
    study = optuna.create_study(study_name="s", storage=connect(f"sqlite:///{tmp_path}/studies"))
    locks = tmp_path / "locks"
    locks.mkdir()
    killed = Budget(study, locks, f"{machine}:1:2:x", n_trials=3, retries=2)
    killed.jobs_outlive = True
    killed.record_job(killed.ask().number, "7")
    killed.renewals.end()
    monkeypatch.setattr(slurm_queue.QUEUE, "is_alive", {"7": alive}.get)
    resumed = Budget(study, locks, "here:1:2:y", n_trials=3, retries=2)
    resumed.recover()
    assert [trial.state.name for trial in study.trials] == states
    assert "slurm_job" not in study.trials[-1].system_attrs or states == ["RUNNING"]


def test_a_job_in_the_queue_is_not_lost_when_its_lease_expires(tmp_path, monkeypatch):
    study = optuna.create_study(study_name="s", storage=connect(f"sqlite:///{tmp_path}/studies"))
    killed = Budget(study, tmp_path, "elsewhere:1:2:x", n_trials=3, retries=2)
    killed.record_job(killed.ask().number, "7")
    killed.renewals.end()
    resumed = Budget(study, tmp_path, "here:1:2:y", n_trials=3, retries=2)
    resumed.watch.has_expired = lambda number, lease: True
    monkeypatch.setattr(slurm_queue.QUEUE, "is_alive", lambda job: True)
    resumed.recover()
    assert study.trials[0].state == TrialState.RUNNING
    monkeypatch.setattr(slurm_queue.QUEUE, "is_alive", lambda job: None)
    resumed.recover()
    assert study.trials[0].state == TrialState.FAIL
