"""A trial, seen from its job: what it reports, whether it is pruned, and its outcome, written down before it ends."""

import functools
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from hydra.core.hydra_config import HydraConfig
from hydra.types import TaskFunction
from omegaconf import DictConfig
from optuna.study import Study
from optuna.trial import Trial, TrialState

from tuner.files import no_space
from tuner.sweep import storage
from tuner.sweep.report import read_result

TrialPruned = optuna.TrialPruned
OUTCOME = "outcome"  # system attribute of a trial: its Outcome as a dict, from the job to whoever tells the study


@dataclass(frozen=True)
class Link:
    """Where the running trial belongs: `storage` is without a password, null in memory."""

    study: str
    trial: int
    storage: str | None


_running: ContextVar[tuple[Link, Trial | None] | None] = ContextVar("running", default=None)


def link() -> Link | None:
    """The running trial's study and number, or None outside of a search."""
    running = _running.get()
    return running[0] if running else None


def report(value: float, step: int) -> None:
    """Tell the study a value of the objective on the way, once a step. Outside of a search: nothing.

    Raises TrialPruned where the study's pruner ends the trial. A study with several objectives is not pruned.
    """
    trial = (_running.get() or (None, None))[1]
    if trial is None or len(trial.study.directions) > 1:
        return
    trial.report(value, step)
    if trial.should_prune():
        raise TrialPruned(f"pruned at step {step} with {value:.6g}")


@dataclass(frozen=True)
class Pruned:
    """What a pruned job returns: it was no failure, and Hydra logs no traceback."""


@dataclass
class Outcome:
    """How a trial ended. `state` is COMPLETE, with values, PRUNED, or FAIL, with an error and its traceback."""

    state: str
    values: list[float] | None = None
    error: str | None = None
    traceback: str | None = None

    @classmethod
    def of(cls, returned: Any, objectives: int) -> "Outcome":
        """From what a job returned: finite numbers, as many as there are objectives, or it failed."""
        if isinstance(returned, Pruned):
            return cls("PRUNED")
        wanted = "a finite number" if objectives == 1 else f"{objectives} finite numbers"
        values = [] if isinstance(returned, str | Mapping) else [returned] if objectives == 1 else returned
        try:
            values = [float(value) for value in values]
        except (TypeError, ValueError, OverflowError):
            values = []
        if len(values) == objectives and all(map(math.isfinite, values)):
            return cls("COMPLETE", values)
        return cls("FAIL", error=f"the objective must return {wanted}, not {returned!r}"[:2000])

    @classmethod
    def failed(cls, error: BaseException) -> "Outcome":
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return cls("FAIL", error=text[:2000], traceback="".join(traceback.format_exception(error))[-20_000:])

    @property
    def trial_state(self) -> TrialState:
        return TrialState[self.state]


@dataclass
class Job:
    """The task function of a search's jobs, around the user's. It finds its trial by hydra.job.num.

    It travels to worker processes, and opens the storage there for itself. A study in memory is out of their reach, so
    that its trials are not pruned.
    """

    task: TaskFunction
    spec: str | None
    study_name: str
    objectives: int
    pruner: optuna.pruners.BasePruner
    parent: int = field(default_factory=os.getpid)
    study: Study | None = None  # in the process of the sweep

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"study": None}

    def __call__(self, cfg: DictConfig) -> Any:
        hydra = HydraConfig.get()
        trial = self._trial(hydra.job.num)
        if hydra.verbose is False:
            _keep_the_console_for_the_sweep()
        if os.getpid() != self.parent == os.getppid():
            _watch(self.parent)
        if os.getpid() != self.parent and "ray" in sys.modules:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray's handler looks like the job's own sys.exit()
        attributes: dict[str, Any] = {"output_dir": hydra.runtime.output_dir, "host": socket.gethostname()}
        _set(trial, attributes)
        token = _running.set((Link(self.study_name, hydra.job.num, storage.redacted(self.spec)), trial))
        start = time.perf_counter()
        outcome = None
        try:
            returned = self.task(cfg)
            outcome = Outcome.of(returned, self.objectives)
        except TrialPruned:
            returned = Pruned()
            outcome = Outcome("PRUNED")
        except SystemExit as stop:
            error = RuntimeError(f"the job ended with sys.exit({stop.code!r})")
            error.__cause__ = stop
            outcome = Outcome.failed(error)
            raise error from stop  # or a worker process would end with it
        except Exception as error:
            outcome = None if no_space(error) else Outcome.failed(error)
            raise  # Hydra logs it, in the job's folder
        finally:
            _running.reset(token)
            if outcome:  # otherwise it was interrupted, or the disk is full: it is to run again
                _finish(trial, outcome, Path(hydra.runtime.output_dir), time.perf_counter() - start)
        return returned

    def _trial(self, number: int) -> Trial | None:
        study = self.study
        if study is None:
            if self.spec is None:
                return None
            study = optuna.load_study(study_name=self.study_name, storage=storage.connect(self.spec))
        view = optuna.Study(study.study_name, study._storage, optuna.samplers.RandomSampler(), self.pruner)
        return Trial(view, study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number))


@dataclass
class LastRun:
    """The task function of the job that retrains a study's best configuration: of the study, but none of its trials."""

    task: TaskFunction
    link: Link

    def __call__(self, cfg: DictConfig) -> Any:
        if HydraConfig.get().verbose is False:
            _keep_the_console_for_the_sweep()
        token = _running.set((self.link, None))
        try:
            return self.task(cfg)
        finally:
            _running.reset(token)


def _set(trial: Trial | None, attributes: dict[str, Any]) -> None:
    for key, value in attributes.items():
        if trial is not None:
            trial.set_user_attr(key, value)


def _finish(trial: Trial | None, outcome: Outcome, folder: Path, seconds: float) -> None:
    """Write down how the trial went; the outcome last, for from then on nothing of it can be lost."""
    if trial is None:
        return
    result = read_result(folder)
    _set(trial, {"seconds": round(seconds, 3)} | {key: result[key] for key in ("device", "epochs") if key in result})
    if outcome.error:
        _set(trial, {"error": outcome.error, "traceback": outcome.traceback})
    trial.storage.set_trial_system_attr(trial._trial_id, OUTCOME, outcome.__dict__)


def _keep_the_console_for_the_sweep() -> None:
    """Jobs log to their own files; on the console, where the sweep tells how it goes, only warnings."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.WARNING)


@functools.cache
def _watch(parent: int) -> None:
    """In a worker process, once: end it when its parent is gone. A forked one has no mark for the reaper to find."""

    def end_with_it() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
