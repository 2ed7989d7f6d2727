"""The commands `train` and `sweep` as functions, for scripts and notebooks: `tuner.train(...)`, `tuner.sweep(...)`.

Each runs its command in a process of its own, and prints what that prints, as it comes. So it does the same, and gives
the memory of the GPU back. Interrupting it is Ctrl-C for the command.
"""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner import InputError
from tuner.runs.result import on_images, read_result
from tuner.terminal import CALLER, INTERRUPTED

if TYPE_CHECKING:
    import pandas as pd

    from tuner.analysis.loaded_study import LoadedStudy
    from tuner.inference.model import Model


@dataclass(frozen=True)
class TrainedRun:
    """A run that `train` has ended, by its folder."""

    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        """Its result.json: accuracies, epochs, seconds, device, versions and more."""
        return read_result(self.folder)

    @property
    def metrics(self) -> "pd.DataFrame":
        """Its metrics.csv: a row per epoch."""
        from tuner.runs import read_metrics

        return read_metrics(self.folder)

    @property
    def pictures(self) -> list[Path]:
        """Its plots, PNG files."""
        return sorted((self.folder / "plots").glob("*.png"))

    def model(self) -> "Model":
        """The trained model: see `tuner.load`."""
        from tuner import load

        return load(self.folder)

    def __repr__(self) -> str:
        """Its folder and accuracies, on a line."""
        result = self.result
        names = {"val": "validation", "test": "test"}
        scores = [
            f"{name} accuracy {accuracy:.4f} ({on_images(accuracy, result[f'n_{split}'])})"
            for split, name in names.items()
            if (accuracy := result.get(f"{split}_accuracy")) is not None and result.get(f"n_{split}")
        ]
        return f"run {self.folder}: {', '.join(scores)}"


def train(*overrides: str) -> TrainedRun:
    """Fine-tune a network, as `python -m tuner.train OVERRIDES` does.

    overrides: GROUP=OPTION or KEY=VALUE, as on the command line.
    Raises InputError if the command ends with a mistake, and KeyboardInterrupt if it is interrupted.
    """
    words = list(overrides)
    _refuse(words, "hydra.run.dir", "name")
    name = _given(words, "name")
    folder = f"outputs/{name or format(datetime.now(), '%Y-%m-%d/%H-%M-%S-%f')}"
    _run(words if name else [*words, f"hydra.run.dir={folder}"])
    return TrainedRun(Path(folder).absolute())


def sweep(*overrides: str) -> "LoadedStudy":
    """Search hyperparameters, as `tuner sweep OVERRIDES` does, and read the study back: see `tuner.analysis.load`.

    overrides: as for `train`. Without hparams_search=NAME, the search is hparams_search=optuna.
    Raises InputError if the command ends with a mistake, and KeyboardInterrupt if it is interrupted.
    """
    from tuner import analysis

    words = list(overrides)
    _refuse(words, "hydra.sweep.dir", "study")
    name = _given(words, "study") or f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    _run(["-m", *default_search(words), *words, f"study={name}"])
    return analysis.load(Path("multirun", name).absolute())


def default_search(words: Iterable[str]) -> list[str]:
    """hparams_search=optuna, unless the words name a search."""
    named = any(word.startswith(("hparams_search=", "hydra/sweeper=")) for word in words)
    return [] if named else ["hparams_search=optuna"]


def _given(words: Iterable[str], key: str) -> str | None:
    """The value that overrides give a key."""
    values = [word.partition("=")[2].strip("'\"") for word in words if word.startswith(f"{key}=")]
    return values[-1] if values else None


def _refuse(words: Iterable[str], key: str, instead: str) -> None:
    if any(word.startswith(f"{key}=") for word in words):
        raise InputError(f"{key} can't be given from Python, where the folder must be known: give {instead}=NAME")


def _run(words: list[str]) -> None:
    """Run `python -m tuner.train` and print its output. Raises InputError or KeyboardInterrupt if it fails."""
    command = [sys.executable, "-m", "tuner.train", *words]
    environment = os.environ | {CALLER: str(os.getpid())}
    last: deque[str] = deque(maxlen=10)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=environment,
    ) as process:
        assert process.stdout
        while True:
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    last.append(line.strip())
                break
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)  # it says how to go on
    if process.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if process.returncode:
        errors = [line.partition(" ERROR ")[2] for line in last if " ERROR " in line]
        raise InputError(errors[-1] if errors else " ".join(filter(None, last)))
