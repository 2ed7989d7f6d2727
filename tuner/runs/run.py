"""Writing a run folder: a killed run leaves only whole files."""

import csv
import io
import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from filelock import FileLock, Timeout
from matplotlib.figure import Figure

from tuner import InputError, __version__, plots
from tuner.files import appending, replacing, subfolder
from tuner.runs.ending import TakenError, check_free
from tuner.runs.layout import CHECKPOINT
from tuner.runs.result import read_result
from tuner.runs.table import read_metrics
from tuner.runs.trackers import Tracker
from tuner.safe_text import cell

if TYPE_CHECKING:
    import torch  # takes seconds to import, and most who read runs don't need it

METRICS = (
    *("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_balanced_accuracy", "lr", "seconds"),
)
VERSIONS = ("torch", "torchvision", "hydra-core", "hydra-optuna-sweeper", "omegaconf", "optuna")
log = logging.getLogger("tuner.runs")


class Run:
    """A run folder that is being written.

    metrics.csv grows by a row an epoch; every other file is written once, whole. result.json comes last: without it,
    the run is still going or was killed.

    log: writes to the log of the run's job, also when the program is busy with other jobs.
    result: what finish() writes to result.json beside its arguments.
    tracker: gets what metrics.csv and result.json get.
    resumes: whether the folder has a killed run's checkpoint. Its config files are not written again.
    """

    def __init__(self, folder: Path):
        """Raises TakenError if `folder` holds a run that is finished or still going, or is the folder of a study."""
        check_free(folder)
        self.lock = FileLock(folder / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise TakenError(f"another process is writing the run in {folder}: wait for it, or end it") from error
        except (OSError, NotImplementedError) as error:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s): make sure that only one process writes there", folder, error)
        try:
            check_free(folder)  # another process may have ended it meanwhile
        except (InputError, OSError):
            self._unlock()
            raise
        self.folder = folder
        self.log = _job_log()
        self.result: dict[str, Any] = {}
        self.tracker: Tracker | None = None
        self.start = time.perf_counter()
        self.has_ended = False
        self.resumes = (folder / CHECKPOINT).exists()
        self.ended_before = self._take("result.json")
        self._remove_leftovers()

    def _take(self, name: str) -> bytes | None:
        """Remove a file. Returns what it held, or None if there was none."""
        path = self.folder / name
        content = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        return content

    def leave(self) -> None:
        """End a run that was not resumed after all: its folder stays as it was."""
        self.has_ended = True
        if self.ended_before is not None:
            with replacing(self.folder / "result.json") as file:
                file.write(self.ended_before)

    def _unlock(self) -> None:
        Path(self.lock.lock_file).unlink(missing_ok=True)
        self.lock.release()

    def _remove_leftovers(self) -> None:
        """Remove a failed run's files, except a resumable checkpoint."""
        (self.folder / "model.safetensors").unlink(missing_ok=True)
        if not self.resumes:
            with replacing(self.folder / "metrics.csv") as file:
                file.write((",".join(METRICS) + "\n").encode())

    def cut_metrics(self, epochs: int) -> None:
        """Remove the rows of later epochs from metrics.csv. Raises InputError if it lacks rows, or is damaged."""
        path = self.folder / "metrics.csv"
        try:
            kept = b"".join(path.read_bytes().splitlines(keepends=True)[: 1 + epochs])
            rows = pd.read_csv(io.BytesIO(kept), dtype=float)
            if list(rows.get("epoch", ())) != list(range(1, epochs + 1)) or not kept.endswith(b"\n"):
                raise ValueError(f"it must have the epochs 1 to {epochs}")
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path} is damaged ({reason}): delete it and {CHECKPOINT} to start again") from error
        with replacing(path) as file:
            file.write(kept)

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Append an epoch's row to metrics.csv; a missing metric's cell is empty."""
        with appending(self.folder / "metrics.csv") as file:
            values = (f"{metrics[name]:.6g}" if name in metrics else "" for name in METRICS[1:])
            csv.writer(file, lineterminator="\n").writerow([epoch, *values])
        if self.tracker:
            self.tracker.log_epoch(epoch, metrics)

    def metrics(self) -> pd.DataFrame:
        """The rows of metrics.csv so far, one per epoch."""
        return read_metrics(self.folder)

    def seconds(self) -> float:
        """Seconds since the run began, including those before it was killed and resumed."""
        return time.perf_counter() - self.start

    def save_model(
        self, state: "Mapping[str, torch.Tensor]", about: Mapping[str, Any], name: str = "model.safetensors"
    ) -> None:
        """Save tensors, with `about` in the file's metadata: see tuner.runs.model_file."""
        from tuner.runs import model_file  # imports torch, which takes seconds

        model_file.write(self.folder / name, state, about)

    def save_table(self, name: str, rows: Sequence[Sequence[Any]]) -> None:
        """Write a CSV file. rows: the header, then the rows."""
        write_table(self.folder / name, rows)

    def save_config(self, files: Mapping[str, str]) -> None:
        """Write config files, unless the run resumes.   files: FOLDER/NAME in the run folder -> content.

        conf/config.yaml is the applied config, which all readers take. It has its own folder because Hydra takes
        folders beside a config for its groups.
        """
        for path, text in ({} if self.resumes else files).items():
            folder, name = path.split("/")
            with replacing(subfolder(self.folder, folder) / name) as file:
                file.write(text.encode())

    def save_plot(self, name: str, figure: Figure) -> None:
        """plots/NAME.png"""
        plots.save(figure, subfolder(self.folder, "plots") / f"{name}.png")

    def finish(self, status: str, **more: Any) -> None:
        """Write result.json. status: complete, pruned, interrupted or failed."""
        seconds = round(self.seconds(), 2)
        result = {"status": status, **self.result, **more, "seconds": seconds, "versions": versions()}
        with replacing(self.folder / "result.json") as file:
            file.write(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self.has_ended = True
        if status == "complete":
            (self.folder / CHECKPOINT).unlink(missing_ok=True)

    def close(self) -> None:
        """Unlock the folder, and send the tracker how the run ended; that may take time, but result.json is final."""
        self._unlock()
        for handler in set(self.log.handlers) - set(_handlers(logging.getLogger("tuner.train"))):
            handler.close()
        if self.tracker and (self.folder / "result.json").exists():  # else the disk is full, or the like
            self.tracker.finish(read_result(self.folder))


def _job_log() -> logging.Logger:
    """A copy of the logger "tuner.train", as Hydra has set it up for this job. The next job does not change it."""
    source = logging.getLogger("tuner.train")
    job = logging.Logger(source.name, source.getEffectiveLevel())
    job.handlers = _handlers(source)
    for handler in job.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.mode = "a"  # closed by the next job's set-up, it opens again only in this mode
            handler.encoding = "utf-8"
            if isinstance(handler.stream, io.TextIOWrapper):  # open, in the encoding of the console
                handler.stream.reconfigure(encoding="utf-8")
    return job


def _handlers(logger: logging.Logger | None) -> list[logging.Handler]:
    """The handlers that get the records of a logger: its own, and those of the loggers above it."""
    handlers: list[logging.Handler] = []
    while logger:
        handlers += logger.handlers
        logger = logger.parent if logger.propagate else None
    return handlers


def write_table(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file. rows: the header, then the rows; for their texts see `tuner.safe_text.cell`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([cell(value) for value in row] for row in rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def versions() -> dict[str, str]:
    """The versions of tuner, Python and the packages in VERSIONS."""
    return {"tuner": __version__, "python": platform.python_version()} | {name: version(name) for name in VERSIONS}
