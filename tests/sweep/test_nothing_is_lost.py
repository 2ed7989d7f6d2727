"""Sweeps killed at random moments, and many at once: each trial of the budget is there, once."""

import random
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from test_launchers import assert_nothing_is_left

from tuner import InputError
from tuner.analysis import loaded_study


def assert_exact(toy, storage: str, n_trials: int) -> None:
    """As many counted trials as were asked for, no number twice, no result that a job had written lost."""
    trials = toy.study(storage=storage).trials
    states = Counter(trial.state for trial in trials)
    assert states[TrialState.COMPLETE] == n_trials
    assert states[TrialState.RUNNING] == states[TrialState.WAITING] == 0
    assert [trial.number for trial in trials] == list(range(len(trials)))
    starts = Counter(toy.starts())
    assert set(starts.values()) == {1}  # no job twice
    for trial in trials:
        wrote = trial.system_attrs.get("outcome")
        if wrote:
            assert (trial.state.name, trial.values) == (wrote["state"], wrote["values"])
        else:
            assert trial.state == TrialState.FAIL
            retried = any(other.system_attrs.get("retry_history", [None])[-1] == trial.number for other in trials)
            assert retried or "surplus" in trial.system_attrs, trial
    points = [trial.params["x"] for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(set(points)) == n_trials


def wait_for_more(toy, sweep, starts: int) -> None:
    """Until so many more jobs have started, or the sweep has ended."""
    until = len(toy.starts()) + starts
    while sweep.poll() is None and len(toy.starts()) < until:
        time.sleep(0.01)


KILLS = 5  # for each of nine combinations: 45


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "stacked"])
@pytest.mark.parametrize("storage", ["sqlite:///multirun/optuna.db", "journal:///multirun/it.journal", "postgresql"])
def test_kills_at_random_moments(toy, launcher, storage, request):
    """Kill -9 while the sweep starts, or so many trials later, and a moment. PostgreSQL is restarted once."""
    rng = random.Random(launcher + storage)
    server = request.getfixturevalue("server") if storage == "postgresql" else None
    storage = server.url if server else storage
    options = (
        ["hydra/launcher=fused", "hydra.launcher.stack=3"] if launcher == "stacked" else [f"hydra/launcher={launcher}"]
    )
    toy.environment |= {"TOY_STAGES": "1"} if launcher == "stacked" else {}
    options += ["hydra.sweeper.n_jobs=2", f"hydra.sweeper.storage={storage}"]
    options += ["hydra.sweeper.n_trials=24", "hydra.sweeper.retries=20", "seconds=0.2", "steps=3"]
    kills = 0
    while kills < KILLS:
        with toy.start(*options) as sweep:
            if rng.random() < 0.3:
                time.sleep(rng.random())  # while it starts, and settles what the one before left
            else:
                wait_for_more(toy, sweep, rng.randint(1, 2))
                time.sleep(0.2 * rng.random())
            if sweep.poll() is not None:
                break
            if server and kills == KILLS // 2:
                server.stop()
                server.start()
                wait_for_more(toy, sweep, 1)
            sweep.kill()
            kills += 1
        assert_nothing_is_left(toy)
    done = toy.command(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert kills == KILLS
    assert_exact(toy, storage, 24)
    print(f"{kills} kills, {len(toy.study(storage=storage).trials)} trials, {len(toy.starts())} jobs")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_a_server_that_is_restarted_fails_no_trial(toy, server, launcher):
    options = [f"hydra/launcher={launcher}", "hydra.sweeper.n_jobs=2", f"hydra.sweeper.storage={server.url}"]
    with toy.start(*options, "hydra.sweeper.n_trials=8", "steps=10", "seconds=1") as sweep:
        toy.wait_for(3)
        server.stop()
        time.sleep(2)  # calls fail meanwhile
        server.start()
        out, err = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, out + err
    trials = toy.study(storage=server.url).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 8
    assert all(len(trial.intermediate_values) == 10 for trial in trials)
    assert sorted(toy.starts()) == list(range(8))
    assert "Traceback" not in out + err
    assert "secret" not in out + err
    if launcher == "basic":
        lines = (out + err).splitlines()
        assert [sum(text in line for line in lines) for text in ("does not answer", "answers again")] == [1, 1]


@pytest.mark.slow
def test_a_server_that_stays_away_loses_no_outcome(toy, server):
    options = [
        "hydra.sweeper.n_trials=6",
        "hydra.sweeper.retries=0",
        f"hydra.sweeper.storage={server.url}",
        "seconds=1",
    ]
    with toy.start(*options, "steps=5", "hydra.sweeper.storage_patience=1") as sweep:
        toy.wait_for(3)
        server.stop()
        out, err = sweep.communicate(timeout=100)
    assert sweep.returncode == 1, out + err
    assert "did not answer for 1 s" in out
    assert "then continue with: python -m toy -m" in out
    assert "Traceback" not in out + err
    server.start()
    done = toy.command(*options, "steps=5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(toy.starts()) == list(range(6))  # the trial that ran without the server is not run again
    assert [trial.state.name for trial in toy.study(storage=server.url).trials] == ["COMPLETE"] * 6


@pytest.mark.parametrize(
    "storage",
    [
        "sqlite:///multirun/optuna.db",
        pytest.param("journal:///multirun/optuna.journal", marks=pytest.mark.slow),
        pytest.param("postgresql", marks=pytest.mark.slow),
    ],
)
def test_six_sweeps_at_once_run_60_trials(toy, storage, request):
    if storage == "postgresql":
        storage = request.getfixturevalue("postgresql")
    options = ["hydra.sweeper.n_trials=60", f"hydra.sweeper.storage={storage}", "hydra.output_subdir=.hydra"]
    sweeps = [toy.start(*options) for _ in range(6)]
    for sweep in sweeps:
        out, err = sweep.communicate(timeout=200)
        assert sweep.returncode == 0, out + err
        assert "secret" not in out + err
    written = [path for path in (toy.folder / "multirun/toy").rglob("*") if path.is_file()]
    assert not any(b"secret" in path.read_bytes() for path in written)
    assert_exact(toy, storage, 60)
    assert sorted(path.name for path in (toy.folder / "multirun").iterdir() if path.is_dir()) == ["toy"]
    assert len([path for path in (toy.folder / "multirun/toy").iterdir() if path.name.isdigit()]) == 60


def pids(toy) -> set[str]:
    """The processes that have run trials."""
    return {line.split()[1] for line in (toy.folder / "ran.txt").read_text().splitlines()}


@pytest.mark.slow
def test_six_machines_of_which_one_is_killed_20_times(toy, server):
    """Each kill hits any of them, which comes back; the last one does not. The server is restarted once."""
    rng, kills = random.Random(0), 20
    options = [f"hydra.sweeper.storage={server.url}", "hydra.sweeper.n_trials=100", "hydra.sweeper.retries=20"]

    def start(machine: int):
        toy.environment |= {"TOY_HOST": f"machine-{machine}", "TOY_LEASE": "10"}
        return toy.start(*options, "seconds=0.5", "steps=3")

    with ExitStack() as stack:
        sweeps = [stack.enter_context(start(machine)) for machine in range(6)]
        toy.wait_for(1)
        for kill in range(kills):
            machine = rng.randrange(6)
            wait_for_more(toy, sweeps[machine], rng.randint(0, 3))
            time.sleep(0.5 * rng.random())
            assert sweeps[machine].poll() is None, sweeps[machine].communicate()
            sweeps[machine].kill()
            if kill < kills - 1:
                sweeps[machine].communicate()
                sweeps[machine] = stack.enter_context(start(machine))
            if kill == kills // 2:
                while not {str(sweep.pid) for sweep in sweeps} <= pids(toy):  # one that starts would not wait
                    assert all(sweep.poll() is None for sweep in sweeps)
                    time.sleep(0.05)
                server.stop()
                server.start()
        ended = [sweep.communicate(timeout=300) for sweep in sweeps]
    codes = sorted(sweep.returncode for sweep in sweeps)
    assert codes == [-9, 0, 0, 0, 0, 0], ended
    assert_exact(toy, server.url, 100)
    assert_nothing_is_left(toy)
    assert sum("best value" in out for out, _ in ended) == 5


@pytest.mark.slow
def test_a_reader_of_postgresql_cannot_write(toy, postgresql):
    toy.command(f"hydra.sweeper.storage={postgresql}", "hydra.sweeper.n_trials=2")
    with pytest.raises(InputError, match="give it with the password, --storage URL"):
        loaded_study.load("multirun/toy")
    s = loaded_study.load("multirun/toy", postgresql)
    assert list(s.trials.state) == ["COMPLETE", "COMPLETE"]
    with pytest.raises(StorageInternalError):
        s.study.set_user_attr("folder", "elsewhere")
    assert loaded_study.load("toy", postgresql).study.user_attrs["folder"] == str(Path("multirun/toy").absolute())
