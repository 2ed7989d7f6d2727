"""Disks and folders that cannot be written: one line, exit code 1, and what was written before can be gone on from."""

import errno
import os
from pathlib import Path

import pytest
from helpers import TINY, result

from tuner.runs.run import Run

SEARCH = ("-m", "hparams_search=optuna", "hydra.sweeper.n_trials=3", "final.seeds=0", "study=mine")
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS), "metrics.csv")


@pytest.mark.parametrize("place", ["a file/x", "/proc/x"])
@pytest.mark.parametrize(
    "arguments",
    [("hydra.run.dir=PLACE",), ("-m", "seed=1,2", "hydra.sweep.dir=PLACE"), (*SEARCH, "hydra.sweep.dir=PLACE")],
    ids=["run", "sweep", "search"],
)
def test_a_folder_that_cannot_be_made(command, arguments, place):
    Path("a file").write_text("")
    code, output = command(*TINY, *(argument.replace("PLACE", f"'{place}'") for argument in arguments))
    assert code == 1
    assert f"{place} cannot be used: " in output.splitlines()[-1]
    assert "Traceback" not in output


@pytest.fixture
def failing(monkeypatch):
    """The disk of runs fails when an epoch is written: that of the third call. Then it is mended."""
    calls, real = [], Run.log_epoch

    def log_epoch(run, epoch, metrics):
        calls.append(epoch)
        if len(calls) == 3:
            raise READ_ONLY
        real(run, epoch, metrics)

    monkeypatch.setattr(Run, "log_epoch", log_epoch)
    return calls


def test_a_run_on_a_disk_that_becomes_read_only_is_resumed(command, tmp_path, failing):
    code, output = command(*TINY, "epochs=4", "hydra.run.dir=here")
    assert code == 1
    assert output.splitlines()[-1].endswith(
        f"a disk is full or cannot be written ({READ_ONLY}): change that, then resume with: "
        f"python -m tuner.resume {tmp_path / 'here'}"
    )
    assert "Traceback" not in output
    code, output = command(*TINY, "epochs=4", "hydra.run.dir=here")
    assert code == 0, output
    assert "resuming after epoch 2" in output
    assert result(Path("here"))["epochs"] == 4


def test_a_search_on_a_disk_that_becomes_read_only_goes_on_with_the_same_trials(command, failing):
    arguments = (*TINY, *SEARCH, "hydra/launcher=basic", "epochs=2")
    code, output = command(*arguments)
    assert code == 1
    assert f"a disk is full or cannot be written ({READ_ONLY}): change that, then continue with: " in output
    assert "Traceback" not in output
    code, output = command(*arguments)
    assert code == 0, output
    assert "continuing after 1 of 3 trials" in output
    assert "3/3 trials" in output


@pytest.mark.parametrize("place", ["a file/x", "/proc/x"])
@pytest.mark.parametrize(
    "words",
    [
        ("compare", "RUN", "--plots", "--out"),
        ("evaluate", "RUN", "--out"),
        ("export", "RUN", "--format", "pt2", "--out"),
        ("predict", "RUN", "image.png", "--maps"),
    ],
    ids=lambda words: words[0],
)
def test_results_that_cannot_be_written(trained, call, tmp_path, monkeypatch, words, place):
    monkeypatch.chdir(tmp_path)
    Path("a file").write_text("")
    Path("image.png").write_bytes((Path(__file__).parents[1] / "docs/pictures/accuracy.png").read_bytes())
    code, _, err = call(*(str(trained()) if word == "RUN" else word for word in words), place)
    assert code == 1
    assert place in err.splitlines()[-1]
    assert "Traceback" not in err
