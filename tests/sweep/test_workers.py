"""Several processes that run a study's trials side by side, each with a GPU of its own."""

import os
import signal
from collections import Counter, defaultdict

import psutil
import pytest
from helpers import wait_until
from test_launchers import assert_nothing_is_left, options

SHORT = ["hydra.sweeper.n_trials=8", "seconds=0.3"]


def starts(toy):
    """For each process, the numbers of its trials and its GPUs."""
    found = defaultdict(list)
    for line in (toy.folder / "ran.txt").read_text().splitlines():
        number, pid, *gpus = line.split()
        found[int(pid)].append((int(number), *gpus))
    return dict(found)


def worker_of(toy, sweep):
    """The worker's process, once both processes run a trial."""
    wait_until(lambda: (toy.folder / "ran.txt").exists() and len(starts(toy)) == 2)
    [pid] = starts(toy).keys() - {sweep.pid}
    return psutil.Process(pid)


def test_workers_share_a_study_and_one_of_them_ends_it(toy):
    done = toy.command("hydra.sweeper.workers=2", *SHORT, "does=all-pair")
    assert done.returncode == 0, done.stdout + done.stderr
    assert toy.states() == ["COMPLETE"] * 8
    assert sorted(toy.starts()) == list(range(8))
    assert len(starts(toy)) == 2
    log = toy.folder / "multirun/toy/workers/1.log"
    assert f"worker 1: {log}" in done.stdout
    assert "continuing after" in log.read_text() or "running 8 trials" in log.read_text()
    assert done.stdout.count("best value") == 1
    assert_nothing_is_left(toy)


def test_a_worker_that_is_killed_loses_no_trial(toy):
    with toy.start(
        "hydra.sweeper.workers=2", *SHORT, "hydra.sweeper.n_trials=3", "seconds=4", "does=all-pair"
    ) as sweep:
        worker_of(toy, sweep).kill()
        out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, out + err
    assert Counter(toy.states()) == {"COMPLETE": 3, "FAIL": 1}
    log = toy.folder / "multirun/toy/workers/1.log"
    assert f"worker 1 ended with exit code -9: see {log}; the trials that it had are run again" in out


def test_a_worker_that_is_killed_is_started_again(toy):
    with toy.start("hydra.sweeper.workers=2", *SHORT, "steps=600", "seconds=600") as sweep:
        first = worker_of(toy, sweep)
        first.kill()
        wait_until(lambda: len(starts(toy)) == 3)
        sweep.send_signal(signal.SIGINT)
        out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, out + err
    log = toy.folder / "multirun/toy/workers/1.log"
    text = f"worker 1 ended with exit code -9: see {log}; the trials that it had are run again, and it is started again"
    assert out.count(text) == 1
    assert out.count("worker 1 ended") == 1
    assert_nothing_is_left(toy)


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGUSR1])
def test_an_interrupt_ends_the_workers_which_put_their_trials_back(toy, signal_):
    with toy.start("hydra.sweeper.workers=2", *SHORT, "steps=600", "seconds=60") as sweep:
        worker = worker_of(toy, sweep)
        sweep.send_signal(signal_)
        out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, out + err
    assert not worker.is_running()
    assert_nothing_is_left(toy)
    assert Counter(toy.states()) == {"FAIL": 2, "WAITING": 2}
    assert all("excused" in trial.system_attrs for trial in toy.study().trials[:2])
    assert "Traceback" not in out + err + (toy.folder / "multirun/toy/workers/1.log").read_text()


def test_workers_end_with_a_sweep_that_is_killed(toy):
    with toy.start("hydra.sweeper.workers=2", *SHORT, "steps=600", "seconds=60") as sweep:
        worker_of(toy, sweep)
        sweep.kill()
    assert_nothing_is_left(toy, seconds=60)
    done = toy.run(*SHORT, "hydra.sweeper.n_trials=3", "seconds=0")
    assert done.returncode == 0
    assert Counter(toy.states()) == {"FAIL": 2, "COMPLETE": 3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra.sweeper.workers=0"], "hydra.sweeper.workers=0 must be a whole number of at least 1, or auto"),
        (["hydra.sweeper.workers=many"], "hydra.sweeper.workers=many must be a whole number of at least 1, or auto"),
        (["hydra.sweeper.workers=2", "hydra/launcher=joblib"], "JoblibLauncher has workers of its own: set hydra.swe"),
        (["hydra.sweeper.workers=2", "hydra.sweeper.storage=null"], "the study is in memory, where no other process"),
        (["hydra.sweeper.workers=2"], "the command of this program is not known: start it as a command"),
    ],
)
def test_workers_that_cannot_be_are_refused(toy, words, message):
    done = toy.run(*words)
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
    assert not (toy.folder / "ran.txt").exists()


# GPUs


def test_each_worker_has_its_own_gpu(toy):
    toy.environment["CUDA_VISIBLE_DEVICES"] = "4,GPU-5"
    done = toy.command("hydra.sweeper.workers=2", *SHORT, "does=all-pair")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worker 1 on GPU GPU-5: " in done.stdout
    seen = {frozenset(gpus for _, gpus in trials) for trials in starts(toy).values()}
    assert seen == {frozenset({"4,GPU-5"}), frozenset({"GPU-5"})}  # this process uses the first of its two


def test_each_process_of_joblib_takes_its_own_gpu(toy):
    toy.environment |= {"CUDA_VISIBLE_DEVICES": "0,1", "TMPDIR": str(toy.folder)}
    done = toy.command(*options("joblib"), "+device=auto", *SHORT, "does=all-pair")
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [{gpus for _, gpus in trials} for trials in starts(toy).values()]
    assert sorted(map(sorted, seen)) == [["0"], ["1"]]


def test_without_a_choice_of_device_a_process_takes_no_gpu(toy):
    toy.environment |= {"CUDA_VISIBLE_DEVICES": "0,1", "TMPDIR": str(toy.folder)}
    done = toy.command(*options("joblib"), "+device=cuda:1", *SHORT, "hydra.sweeper.n_trials=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {gpus for trials in starts(toy).values() for _, gpus in trials} == {"0,1"}


@pytest.mark.slow
def test_ray_gives_each_trial_a_gpu_and_keeps_its_processes(toy):
    done = toy.command(*options("ray"), "+hydra.launcher.ray.init.num_gpus=2", *SHORT, "does=all-pair")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hydra.launcher.ray.remote.num_gpus: 1 (auto: Ray has GPUs, and each trial gets one)" in done.stdout
    assert len(starts(toy)) == 2
    assert {gpus for trials in starts(toy).values() for _, gpus in trials} == {"0", "1"}
    assert os.getpid() not in starts(toy)
