"""Optuna's storage proxy over a database, and searches that use it."""

import socket
import subprocess
import sys
from contextlib import contextmanager

import optuna
import pytest

from tuner import InputError
from tuner.sweep import storage


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@contextmanager
def serve(*words):
    command = [sys.executable, "-m", "tuner.server", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_search_runs_over_a_proxy_and_waits_while_it_is_away(toy):
    port, url = free_port(), f"sqlite:///{toy.folder}/studies.db"
    with serve("--storage", url, "--port", port, "--every", 1) as server:
        lines = [server.stderr.readline() for _ in range(2)]
        assert lines == [
            f"serving {url} at grpc://localhost:{port}\n",
            f"grpc://localhost:{port}: the database answers; 0 studies\n",
        ]
        search = (f"hydra.sweeper.storage=grpc://localhost:{port}", "hydra.sweeper.n_trials=4", "steps=5", "seconds=1")
        with toy.start(*search) as sweep:
            toy.wait_for(2)
            server.kill()
            server.communicate(timeout=60)
            with serve("--storage", url, "--port", port) as again:
                assert again.poll() is None
                out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, out + err
    study = optuna.load_study(study_name="toy", storage=url)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    assert sorted(toy.starts()) == list(range(4))


def test_what_cannot_be_served_is_one_line(tmp_path):
    url = f"sqlite:///{tmp_path}/studies.db"
    for words, message in {
        ("--storage", url, "--port", 0): "--port 0 must be from 1 to 65535",
        ("--storage", "sqlite://"): "--storage sqlite:// is no database, which Optuna's proxy needs",
        ("--storage", url, "--every", 0): "--every=0.0 must be a number of more than 0",
    }.items():
        with serve(*words) as server:
            _, err = server.communicate(timeout=60)
        assert (server.returncode, err) == (1, f"{message}\n")
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with serve("--storage", url, "--port", port) as server:
            _, err = server.communicate(timeout=60)
    assert server.returncode == 1
    assert f"cannot listen at grpc://localhost:{port}: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize("url", ["grpc://", "grpc://host", "grpc://host:port", "grpc://a b:1", "grpc://u:p@host:1"])
def test_the_address_of_a_proxy_is_checked(url):
    with pytest.raises(InputError, match=r"must be grpc://HOST:PORT, where Optuna's storage proxy listens"):
        storage.resolve(url)


def test_a_proxy_that_is_not_there_is_one_line(toy):
    port = free_port()
    done = toy.command(f"hydra.sweeper.storage=grpc://localhost:{port}")
    assert done.returncode == 1
    assert f"cannot be used: no proxy answers at grpc://localhost:{port}" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
