"""A search on a Ray cluster that runs already, with a node that does not share this machine's folders."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

RAY = Path(sys.executable).with_name("ray")
NAMESPACE = ["unshare", "--mount"]  # a mount in it is seen by its processes alone


@pytest.fixture
def cluster(toy, monkeypatch):
    """The address of a cluster of one node, and a function that starts another one, which does not see a folder."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # its token would be in the home folder
    toy.environment["RAY_AUTH_MODE"] = "disabled"
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []

    def start(*words, before=()):
        command = [*before, str(RAY), "start", "--num-cpus=2", "--disable-usage-stats", "--block"]
        command += ["--node-ip-address=127.0.0.1", *words]
        with (Path(temporary) / f"node-{len(started)}.log").open("wb") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    def start_without(folder):
        script = f'mount -t tmpfs none "{folder}" && exec "$0" "$@"'
        start(f"--address={address}", before=[*NAMESPACE, "sh", "-c", script])

    start("--head", f"--port={address.partition(':')[2]}", "--include-dashboard=false", f"--temp-dir={temporary}")
    yield address, start_without
    for process in started:
        os.killpg(process.pid, signal.SIGTERM)
    for process in started:
        process.wait(60)
    shutil.rmtree(temporary, ignore_errors=True)


def nodes(address):
    script = f"import ray; ray.init('{address}', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else 0


def wait_for_nodes(address, count):
    for _ in range(30):
        if nodes(address) == count:
            return
    pytest.fail(f"the cluster does not have {count} nodes")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="this system does not let this user make a mount namespace",
)
def test_a_cluster_whose_nodes_do_not_see_the_study_is_refused_before_the_first_trial(toy, cluster):
    address, start_without = cluster
    options = ["hydra/launcher=ray", f"+hydra.launcher.ray.init.address={address}", "hydra.sweeper.n_jobs=2"]
    wait_for_nodes(address, 1)
    done = toy.command(*options, "hydra.sweeper.n_trials=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert toy.states() == ["COMPLETE"] * 2
    assert all(trial.system_attrs["outlives"] for trial in toy.study().trials)
    start_without(toy.folder)
    wait_for_nodes(address, 2)
    done = toy.command(*options, "hydra.sweeper.n_trials=4")
    assert done.returncode == 1
    assert "of Ray's cluster does not see " in done.stdout
    assert "use a database server, hydra.sweeper.storage=postgresql+psycopg://" in done.stdout
    assert toy.states() == ["COMPLETE"] * 2
    assert len(toy.starts()) == 2
