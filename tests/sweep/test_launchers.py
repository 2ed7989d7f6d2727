"""Each launcher for real: jobs at once, pruned, killed; and nothing is left running, whichever way a sweep ends."""

import os
import signal
import time
from collections import Counter

import psutil
import pytest
from optuna.trial import TrialState

LAUNCHERS = [
    "joblib",
    pytest.param("submitit_local", marks=pytest.mark.slow),
    pytest.param("ray", marks=pytest.mark.slow),
]
EVERY = ["basic", *LAUNCHERS]


def options(launcher: str) -> list[str]:
    extra = ["+hydra.launcher.ray.init.include_dashboard=false"] if launcher == "ray" else []
    return [f"hydra/launcher={launcher}", "hydra.sweeper.n_jobs=2", *extra]


def left_behind(toy) -> list[str]:
    """Processes, besides this one's other children, that have this toy's config in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TOY_CONFIG") == str(toy.folder / "conf") and process.pid != os.getpid():
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def assert_nothing_is_left(toy, seconds: float = 8) -> None:
    deadline = time.monotonic() + seconds
    while (left := left_behind(toy)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


@pytest.mark.parametrize("launcher", EVERY)
@pytest.mark.parametrize("storage", ["sqlite:///multirun/optuna.db", "journal:///multirun/optuna.journal"])
def test_trials_are_run_pruned_and_failed(toy, launcher, storage):
    done = toy.command(
        *options(launcher),
        f"hydra.sweeper.storage={storage}",
        "hydra/sweeper/pruner=median",
        "hydra.sweeper.pruner.n_startup_trials=2",
        "hydra.sweeper.n_trials=12",
        "steps=5",
        "does=3-raise 4-nan",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    study = toy.study(storage=storage)
    states = Counter(trial.state.name for trial in study.trials)
    assert sum(states.values()) == 12
    assert states["PRUNED"] >= 1
    assert 1 <= states["FAIL"] <= 2  # one of the two may have been pruned
    assert sorted(toy.starts()) == list(range(12))
    for trial in study.trials:
        folder = toy.folder / "multirun/toy" / str(trial.number)
        assert trial.user_attrs["output_dir"] == str(folder)
        assert folder.is_dir()
        if trial.state == TrialState.FAIL:
            assert trial.user_attrs["error"]
        log = folder / "toy.log"
        if trial.state == TrialState.PRUNED and log.exists():
            assert "Traceback" not in log.read_text()
    assert "12/12 trials" in done.stdout
    assert_nothing_is_left(toy)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_trial_starts_when_another_ends(toy, launcher):
    """Trial 1 ends when the sixth trial has started: with batches that would be never."""
    done = toy.command(*options(launcher), "hydra.sweeper.n_trials=8", "does=1-wait")
    assert done.returncode == 0, done.stdout + done.stderr
    ends = {trial.number: trial.datetime_complete for trial in toy.study().trials}
    assert sum(end < ends[1] for end in ends.values()) >= 4


def test_what_cannot_run_at_once_is_told(toy):
    done = toy.run("hydra.sweeper.n_jobs=2")
    assert "n_jobs=2: the basic launcher runs one job at a time" in done.stdout


def test_joblibs_multiprocessing_runs_in_batches(toy):
    done = toy.command(*options("joblib"), "hydra.launcher.backend=multiprocessing", "hydra.sweeper.n_trials=4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert toy.states() == ["COMPLETE"] * 4
    assert_nothing_is_left(toy)


def test_a_study_in_memory_works_with_worker_processes_but_does_not_prune(toy):
    done = toy.command(*options("joblib"), "hydra.sweeper.storage=null", "does=2-raise", "hydra/sweeper/pruner=median")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no trial is pruned" in done.stdout
    assert "trial 2 failed: RuntimeError: trial 2 raises" in done.stdout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_worker_that_is_killed_fails_its_trial_and_the_sweep_goes_on(toy, launcher):
    """Trial 2 kills its process each time. It is retried twice, under other numbers, and completes."""
    done = toy.command(*options(launcher), "does=2-kill", "hydra.sweeper.n_trials=6")
    assert done.returncode == 0, done.stdout + done.stderr
    trials = toy.study().trials
    assert trials[2].state == TrialState.FAIL
    assert "its process ended" in trials[2].user_attrs["error"]
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 6
    assert any(t.params == trials[2].params and t.state == TrialState.COMPLETE for t in trials)
    assert_nothing_is_left(toy)


def test_a_job_that_always_kills_its_process_is_given_up(toy):
    done = toy.command(*options("joblib"), "hydra.sweeper.n_jobs=1", "does=all-kill", "hydra.sweeper.n_trials=1")
    assert done.returncode == 1
    assert toy.states() == ["FAIL"] * 3
    assert "no trial was completed" in done.stdout


@pytest.mark.parametrize("launcher", EVERY)
def test_kill_9_leaves_no_process_and_the_study_goes_on(toy, launcher):
    with toy.start(*options(launcher), "hydra.sweeper.n_trials=6", "seconds=1") as sweep:
        toy.wait_for(3)
        sweep.kill()
    assert_nothing_is_left(toy)
    done = toy.command("hydra/launcher=basic", "hydra.sweeper.n_trials=6")
    assert done.returncode == 0, done.stdout + done.stderr
    trials = toy.study().trials
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 6
    assert not any(trial.state == TrialState.RUNNING for trial in trials)


def test_ctrl_c_ends_a_sweep_whose_worker_has_written_half_a_message(toy):
    with toy.start(*options("joblib"), "does=1-half", "hydra.sweeper.n_trials=4") as sweep:
        deadline = time.monotonic() + 120
        while not (toy.folder / "half").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        sweep.send_signal(signal.SIGINT)
        try:
            out, err = sweep.communicate(timeout=60)
        finally:
            sweep.kill()  # or the end of `with` would wait for it
    assert sweep.returncode == 130, out + err
    assert "continue with: python -m toy -m" in out
    assert_nothing_is_left(toy)
    assert not any(trial.state == TrialState.RUNNING for trial in toy.study().trials)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_workers_and_says_how_to_go_on(toy, launcher, signal_):
    with toy.start(*options(launcher), "hydra.sweeper.n_trials=20", "seconds=2", start_new_session=True) as sweep:
        toy.wait_for(3)
        if signal_ == signal.SIGINT:
            os.killpg(sweep.pid, signal_)  # as a terminal does
        else:
            sweep.send_signal(signal_)
        out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, out + err
    assert "continue with: python -m toy -m" in out
    assert_nothing_is_left(toy)
    trials = toy.study().trials
    assert not any(trial.state == TrialState.RUNNING for trial in trials)
    interrupted = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert interrupted
    assert all(trial.system_attrs.get("excused") for trial in interrupted)
