"""Searches on a Ray cluster that runs already, with a node that does not share this machine's folders."""

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


private = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="this system does not let this user make a mount namespace",
)


@pytest.mark.slow
@private
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


@pytest.mark.slow
@private
def test_run_folders_come_back_from_nodes_that_share_no_folder(toy, cluster, server, tmp_path_factory):
    address, start_without = cluster
    place = tmp_path_factory.mktemp("artifacts")
    wait_for_nodes(address, 1)
    start_without(toy.folder)
    wait_for_nodes(address, 2)
    words = ["tuner.train", "-m", "hparams_search=random", "model=tiny", "data=synthetic", "epochs=2", "plots=false"]
    words += ["hydra/launcher=ray", f"+hydra.launcher.ray.init.address={address}", f"artifacts={place}", "study=s"]
    words += [f"hydra.sweeper.storage={server.url}", "hydra.sweeper.n_jobs=4", "hydra.sweeper.n_trials=8"]
    command = [sys.executable, "-m", *words, "final.seeds=1"]
    environment = toy.environment | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=toy.folder, env=environment, capture_output=True, text=True, timeout=500)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "run folders from " in output  # some ran on the other node
    assert "it is retrained on this machine: the nodes of the cluster do not see " in output
    folder = toy.folder / "multirun" / "s"
    names = {path.name for path in folder.iterdir() if path.is_dir() and (path / "result.json").exists()}
    assert names == {*map(str, range(8)), "best"}
    assert "test accuracy" in output
    assert "secret" not in output


@pytest.mark.slow
@private
def test_ctrl_c_ends_the_jobs_on_all_nodes(toy, cluster, server):
    address, start_without = cluster
    wait_for_nodes(address, 1)
    start_without(toy.folder / "conf")
    wait_for_nodes(address, 2)
    options = ["hydra/launcher=ray", f"+hydra.launcher.ray.init.address={address}", "hydra.sweeper.n_jobs=4"]
    options += [f"hydra.sweeper.storage={server.url}", "hydra.sweeper.n_trials=4"]
    with toy.start(*options, "seconds=1000") as sweep:
        toy.wait_for(4)
        sweep.send_signal(signal.SIGINT)
        out, err = sweep.communicate(timeout=100)
    assert sweep.returncode == 130, out + err
    assert "Traceback" not in out + err
    states = [trial.state.name for trial in toy.study(storage=server.url).trials]
    assert sorted(states) == ["FAIL"] * 4 + ["WAITING"] * 4
    done = toy.command(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(toy.starts()) == list(range(8))


@pytest.mark.slow
@private
def test_a_node_without_the_code_of_the_config_is_named_before_the_first_trial(toy, cluster, server):
    address, _ = cluster
    wait_for_nodes(address, 1)
    (toy.folder / "own" / "mydata").mkdir(parents=True)
    (toy.folder / "own" / "mydata" / "__init__.py").write_text("def load():\n    pass\n")
    toy.environment["PYTHONPATH"] += f"{os.pathsep}{toy.folder / 'own'}"
    options = ["hydra/launcher=ray", f"+hydra.launcher.ray.init.address={address}", "+data._target_=mydata.load"]
    options += ["hydra.sweeper.n_trials=2"]
    done = toy.command(*options)
    assert done.returncode == 1
    line = "has no Python package mydata, of data._target_=mydata.load: install it there, or send it with "
    assert line in done.stdout, done.stdout + done.stderr
    assert toy.starts() == []
    sent = f"+hydra.launcher.ray.init.runtime_env.py_modules=[{toy.folder / 'own' / 'mydata'}]"
    done = toy.command(*options, sent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert toy.states() == ["COMPLETE"] * 2
