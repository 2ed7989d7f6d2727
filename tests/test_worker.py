"""A worker joins a study that was started elsewhere, with the config that it was started with."""

import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from tuner import InputError, worker
from tuner.sweep.settings import COMMAND

URL = "sqlite:///multirun/optuna.db"
SEARCH = ("-m", "hparams_search=optuna", "study=mine", "data=synthetic", "model=tiny", "epochs=2", "batch_size=32")
SEARCH += ("plots=false", "final.seeds=1", "hydra.sweeper.n_trials=2", "hydra/launcher=basic")


def work(*words):
    command = [sys.executable, "-m", "tuner.worker", "--storage", URL, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def study():
    return optuna.load_study(study_name="mine", storage=URL)


def test_a_worker_runs_trials_and_leaves_the_rest_to_the_sweep(command):
    code, output = command(*SEARCH)
    assert code == 0, output
    before = study().user_attrs[COMMAND]
    done = work("study=mine", "hydra.sweeper.n_trials=4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [trial.state.name for trial in study().trials] == ["COMPLETE"] * 4
    assert "running: python -m tuner.train -m hparams_search=optuna data=synthetic" in done.stderr
    assert "continuing after 2 of 4 trials" in done.stdout
    assert "retraining" not in done.stdout
    assert study().user_attrs[COMMAND] == before  # not the worker's
    code, output = command(*SEARCH, "hydra.sweeper.n_trials=4")
    assert code == 0
    assert "all of its 4 trials" in output
    assert Path("multirun/mine/best/result.json").exists()


def test_a_worker_takes_from_a_study_what_describes_the_search_alone(tmp_path, monkeypatch):
    """A study may be somebody else's: it does not choose how this machine runs jobs, or where it writes."""
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/optuna.db"
    words = ["-m", "--config-dir", "/elsewhere", "hparams_search=optuna", "study=mine", "model.head.width=512"]
    words += ["+a.b=1", "~c", "hydra/launcher=ray", "+hydra.launcher.ray.init.address=auto", "final.seeds=3"]
    words += ["hydra.sweep.dir=/elsewhere", "hydra.sweeper.n_trials=5", "hydra/sweeper/sampler=random"]
    words += ["hydra.sweeper.storage=sqlite:///x", "hydra.callbacks.x._target_=a.B", "hydra.searchpath=[/elsewhere]"]
    words += ["optimizer.lr=interval(0,1)"]
    optuna.create_study(study_name="mine", storage=url).set_user_attr(COMMAND, words)
    assert worker.recorded(url, "mine") == [
        *("hparams_search=optuna", "model.head.width=512", "+a.b=1", "~c", "hydra.sweeper.n_trials=5"),
        *("hydra/sweeper/sampler=random", "optimizer.lr=interval(0,1)"),
    ]


def test_what_a_worker_cannot_join_is_one_line(tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    optuna.create_study(study_name="other", storage=url)
    with pytest.raises(InputError, match=r"no study mine in sqlite:///.*optuna.db; known: other"):
        worker.recorded(url, "mine")
    with pytest.raises(InputError, match="study other does not say how it was started: join it with that command"):
        worker.recorded(url, "other")
    with pytest.raises(InputError, match=f"no file {tmp_path}/none.db"):
        worker.recorded(f"sqlite:///{tmp_path}/none.db", "mine")
    done = work("study=a", "study=b")
    assert (done.returncode, done.stderr) == (1, "give the study once, as study=NAME\n")


@pytest.mark.slow
def test_a_worker_waits_for_a_server_that_is_restarted(command, server):
    words = [word for word in SEARCH if not word.startswith("final.seeds")]
    code, output = command(*words, "final.seeds=0", f"hydra.sweeper.storage={server.url}")
    assert code == 0, output
    server.stop()
    line = [sys.executable, "-m", "tuner.worker", "--storage", server.url, "study=mine", "hydra.sweeper.n_trials=4"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = process.stderr.readline()
        server.start()
        out, err = process.communicate(timeout=300)
    assert said.endswith("trying again for up to 600 s\n"), said + err
    assert process.returncode == 0, out + err
    assert "continuing after 2 of 4 trials" in out
    assert "secret" not in said + out + err
