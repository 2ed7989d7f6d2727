"""Training and searching from Python, as in a notebook."""

import json
import signal
import subprocess
import sys
import time

import pytest
from helpers import TINY

import tuner
from tuner import InputError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_from_python(tmp_path, capfd):
    run = tuner.train(*TINY, "epochs=2", "name=mine")
    assert run.folder == tmp_path / "outputs" / "mine"
    assert len(run.metrics) == run.result["epochs"] == 2
    assert f"{run.result['val_accuracy']:.4f} (" in repr(run)
    assert list(run.model().classes) == run.result["class_names"]
    assert "epoch 2/2: val accuracy" in capfd.readouterr().out  # as it comes
    assert tuner.train.__name__ == "tuner.train"  # the command's module, which can be imported


def test_a_search_from_python(tmp_path):
    study = tuner.sweep(*TINY, "epochs=1", "study=mine", "hydra.sweeper.n_trials=2", "final.seeds=0")
    assert study.folder == tmp_path / "multirun" / "mine"
    assert len(study.trials) == 2
    assert {parameter.name for parameter in study.parameters} == {
        "optimizer.lr",
        "model.head.dropout",
        "model.head.width",
    }


@pytest.mark.parametrize(
    ("call", "word", "message"),
    [
        ("train", "epochs=0", "epochs=0 must be"),
        ("train", "epoch=3", "Could not override 'epoch'"),
        ("train", "hydra.run.dir=x", "hydra.run.dir can't be given from Python"),
        ("sweep", "optimizer.lrr=interval(0,1)", "did you mean optimizer.lr"),
    ],
)
def test_a_mistake_is_an_error(call, word, message, tmp_path):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        getattr(tuner, call)(*TINY, word)


def called(tmp_path):
    """A process that trains for long, in its second epoch; its Ctrl-C is that of a terminal."""
    code = f"import tuner; tuner.train(*{TINY!r}, 'epochs=100000', 'name=long')"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while "epoch 2/" not in process.stdout.readline():
        pass
    return process


def test_an_interrupted_call_interrupts_the_command(tmp_path):
    with called(tmp_path) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert "interrupted after epoch" in out
    assert err.strip().endswith("KeyboardInterrupt")


def test_a_command_ends_with_the_process_that_has_called_it(tmp_path):
    with called(tmp_path) as process:
        process.kill()
        process.wait()
        result = tmp_path / "outputs" / "long" / "result.json"
        while not result.exists():
            time.sleep(0.1)
    assert json.loads(result.read_text())["status"] == "interrupted"
