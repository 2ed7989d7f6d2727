import importlib
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import optuna
import pytest

from tuner.sweep.storage import absolute, connect

TOY = """
defaults:
  - _self_
  - group: a
  - override hydra/sweeper: optuna
  - override hydra/sweeper/sampler: random
x: 1.0
y: b
z: 0.0
n: 1
steps: 1
seconds: 0.0
objectives: 1
does: ""
ran: ${hydra:runtime.cwd}/ran.txt
hydra:
  output_subdir: null
  sweep:
    dir: multirun/toy
  sweeper:
    direction: minimize
    storage: sqlite:///multirun/optuna.db
    study_name: toy
    n_trials: 6
    n_jobs: 1
    sampler:
      seed: 0
    params:
      x: interval(-2, 2)
"""


class Toy:
    """The toy program in an empty folder.

    `run` is its command in this process, which saves the time of imports; `start` and `command` have a process for it.
    `study` is what it left.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture):
        self.folder, self.patch, self.capture = folder, patch, capture
        conf = folder / "conf"
        (conf / "group").mkdir(parents=True)
        (conf / "toy.yaml").write_text(TOY)
        for name in "ab":
            (conf / "group" / f"{name}.yaml").write_text(f"name: {name}\n")
        here = str(Path(__file__).parent)
        self.environment = os.environ | {"TOY_CONFIG": str(conf), "PYTHONPATH": here, "PYTHONWARNINGS": "ignore"}
        patch.chdir(folder)
        patch.setenv("TOY_CONFIG", str(conf))
        patch.syspath_prepend(here)

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        command = [sys.executable, "-m", "toy", "-m", *arguments]
        pipe = subprocess.PIPE
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the tests run in the background
        options |= {"cwd": self.folder, "env": self.environment, "preexec_fn": heard}
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        toy = importlib.import_module("toy")
        self.patch.setattr(sys, "argv", ["toy", "-m", *arguments])
        code = 0
        try:
            toy.main()
        except SystemExit as stop:
            code = stop.code
        return subprocess.CompletedProcess(arguments, code, *self.capture.readouterr())

    def command(self, *arguments: str) -> subprocess.CompletedProcess:
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def study(self, name: str = "toy", storage: str = "sqlite:///multirun/optuna.db") -> optuna.Study:
        return optuna.load_study(study_name=name, storage=connect(absolute(storage)))

    def states(self) -> list[str]:
        return [trial.state.name for trial in self.study().trials]

    def starts(self) -> list[int]:
        """The number of each job that was started."""
        return [int(line.split()[0]) for line in (self.folder / "ran.txt").read_text().splitlines()]


@pytest.fixture
def toy(tmp_path, monkeypatch, capfd):
    return Toy(tmp_path, monkeypatch, capfd)
