"""A trial in its job: intermediate values, pruning, and its outcome, which is recorded before the job ends."""

import functools
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from hydra.core.hydra_config import HydraConfig
from hydra.types import TaskFunction
from omegaconf import DictConfig
from optuna.study import Study
from optuna.trial import Trial, TrialState

from tuner.files import disk_error, replacing
from tuner.sweep import passwords, settings, storage
from tuner.sweep.optuna_private import set_system_attr, trial_view
from tuner.sweep.report import read_result
from tuner.sweep.storage_files import Place, StorageLostError

log = logging.getLogger("tuner.sweep")
TrialPruned = optuna.TrialPruned
OUTCOME = "outcome"  # system attribute of a trial: its Outcome as a dict, from the job to whoever tells the study
OUTCOME_FILE = ".outcome.json"  # the same in the run folder, until the study has it


@dataclass(frozen=True)
class Shared:
    """What the trials of a study have in common.

    irrelevant: keys that do not affect the objective.   images: attribute -> hashes of the splits, those known so far.
    may_be_mixed: whether a trial with other images is marked instead of refused.
    """

    irrelevant: Sequence[str] = ()
    images: dict[str, dict[str, str]] = field(default_factory=dict)
    may_be_mixed: bool = False


class RunningTrial:
    """The trial that a job runs, or the best trial, in the job that retrains it.

    study: its name.   number: of the trial.   storage: a URL without a password, or None for a study in memory.
    shared: what the trials of the study have in common.
    """

    def __init__(self, study: str, number: int, storage: str | None, trial: Trial | None, shared: Shared):
        self.study, self.number, self.storage, self.trial, self.shared = study, number, storage, trial, shared
        self.lost = False  # whether the study could not be written once

    def check_images(self, data: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
        """Compare the images with those that the study's trials had; the first trial records them.

        data: the config of the data.   hashes: of its splits.
        Raises MixedStudyError if they are others, unless the study may be mixed: then the trial is marked.
        """
        key = settings.images_key(data, self.shared.irrelevant)
        known = self.shared.images
        if key not in known and self.trial:  # another process may have recorded them
            known |= {name: value for name, value in self.trial.study.user_attrs.items() if name == key}
        if key not in known and self.trial:
            self.trial.study.set_user_attr(key, dict(hashes))
        before = known.setdefault(key, dict(hashes))
        if before != hashes:
            splits = ", ".join(name for name in hashes if before.get(name) != hashes[name])
            if not (self.shared.may_be_mixed and self.trial):
                raise settings.MixedStudyError(
                    f"study {self.study} had other images ({splits}): restore them, or give another study=NAME, or "
                    "study_mixed=true, which leaves the new trials out of every result"
                )
            self.trial.set_user_attr(settings.MIXED, f"other images ({splits})")

    def report(self, value: float, step: int) -> None:
        """Report an intermediate value of the objective, once a step.

        Raises TrialPruned if the study's pruner ends the trial. A study with several objectives is not pruned.
        """
        if self.trial is None or len(self.trial.study.directions) > 1:
            return
        try:
            self.trial.report(value, step)
            prune = self.trial.should_prune()
        except StorageLostError as error:
            if not self.lost:
                log.warning("trial %d goes on without being pruned: %s", self.number, error)
            self.lost = True
            return
        if prune:
            set_outcome(self.trial, Outcome("PRUNED"))  # a kill from here on does not run it again
            raise TrialPruned(f"pruned at step {step} with {value:.6g}")


# For report() alone: programs in which Hydra calls the task function with a config and nothing else.
_running: ContextVar[RunningTrial | None] = ContextVar("running", default=None)


def report(value: float, step: int) -> None:
    """Report an intermediate value of the running trial from anywhere in its job. Outside a search: nothing.

    Raises TrialPruned if the study's pruner ends the trial.
    """
    if running := _running.get():
        running.report(value, step)


@dataclass(frozen=True)
class Stages:
    """A task function in three stages, for launchers that train many jobs together.

    prepare: config, trial or None -> prepared; called in the job's Hydra context.
    fit_together: prepared jobs -> the index of each and its result, as soon as that is known; called once for many
        jobs, in no job's context. A job is finished before the next result is asked for.
    finish: prepared, and its result or the exception that ended it -> the objective; in the job's context.
    """

    prepare: Callable[[DictConfig, RunningTrial | None], Any]
    fit_together: Callable[[Sequence[Any]], Iterator[tuple[int, Any]]]
    finish: Callable[[Any, Any], Any]

    def run(self, cfg: DictConfig, trial: RunningTrial | None) -> Any:
        """One job, from start to end."""
        prepared = self.prepare(cfg, trial)
        try:
            [(_, fitted)] = self.fit_together([prepared])
        except BaseException as error:  # noqa: BLE001 - the last stage records it and raises it
            fitted = error
        return self.finish(prepared, fitted)


def stages_of(task: Any) -> Stages | None:
    """The stages of a task function, its attribute `stages`; None for one that runs in one piece."""
    return getattr(task, "stages", None)


@dataclass(frozen=True)
class Pruned:
    """What a pruned job returns. It did not fail, and Hydra logs no traceback."""


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
        """FAIL, with the error in one line of at most 2,000 characters, and the end of its traceback."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return cls("FAIL", error=text[:2000], traceback="".join(traceback.format_exception(error))[-20_000:])

    @property
    def trial_state(self) -> TrialState:
        """`state` as Optuna's enum."""
        return TrialState[self.state]


@dataclass
class Job:
    """The task function of a search's jobs, around the user's. It finds its trial by hydra.job.num.

    It travels to worker processes and opens the storage there; its password travels in their environment. A study in
    memory is out of their reach, so their trials are not pruned.

    patience: how long a call of the storage may wait for its server, in seconds.
    places: the storage's file and the study's folder.
    """

    task: TaskFunction
    spec: str | None
    study_name: str
    objectives: int
    pruner: optuna.pruners.BasePruner
    shared: Shared = Shared()
    patience: float = 0.0
    places: Sequence[Place] = ()
    study: Study | None = None  # in the process of the sweep
    parent: int = field(default_factory=os.getpid)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"study": None, "spec": storage.redacted(self.spec)}

    def __call__(self, cfg: DictConfig) -> Any:
        """Run the job. Returns the objective, or Pruned; raises the task's error once the outcome is recorded."""
        started = self._start()
        stages = stages_of(self.task)
        if stages:
            return self._attempt(started, lambda: stages.run(cfg, started.trial))
        token = _running.set(started.trial)
        try:
            return self._attempt(started, lambda: self.task(cfg))
        finally:
            _running.reset(token)

    @property
    def stages(self) -> Stages | None:
        """The task's stages, which also record the outcome of the trial."""
        inner = stages_of(self.task)
        if inner is None:
            return None

        def prepare(cfg: DictConfig, _trial: RunningTrial | None) -> tuple[_Started, Any]:
            started = self._start()
            return started, self._attempt(started, lambda: inner.prepare(cfg, started.trial), last=False)

        def fit_together(jobs: Sequence[tuple[_Started, Any]]) -> Iterator[tuple[int, Any]]:
            places = [place for place, (_, prepared) in enumerate(jobs) if not isinstance(prepared, Pruned)]
            yield from ((place, None) for place in range(len(jobs)) if place not in places)
            for index, fitted in inner.fit_together([jobs[place][1] for place in places]) if places else ():
                yield places[index], fitted

        def finish(job: tuple[_Started, Any], fitted: Any) -> Any:
            started, prepared = job
            if isinstance(prepared, Pruned):  # before it was trained
                return prepared
            _quiet_console()
            return self._attempt(started, lambda: inner.finish(prepared, fitted))

        return Stages(prepare, fit_together, finish)

    def _start(self) -> "_Started":
        hydra = HydraConfig.get()
        for place in self.places:
            place.check()
        trial = self._trial(hydra.job.num)
        _quiet_console()
        if os.getpid() != self.parent == os.getppid():
            _watch(self.parent)
        if os.getpid() != self.parent and "ray" in sys.modules:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray's handler looks like the job's own sys.exit()
        folder = hydra.runtime.output_dir
        _set(trial, {"output_dir": folder, "host": socket.gethostname()})
        running = RunningTrial(self.study_name, hydra.job.num, storage.redacted(self.spec), trial, self.shared)
        return _Started(running, Path(folder), self.places, time.perf_counter())

    def _attempt(self, started: "_Started", part: Callable[[], Any], last: bool = True) -> Any:
        """Run a part of the job. The trial's outcome is written if that fails, and after the last part."""
        outcome = None
        try:
            returned = part()
            if last:
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
            outcome = None if ends_sweep(error) else Outcome.failed(error)
            raise  # Hydra logs it, in the job's folder
        finally:
            if outcome:  # otherwise it was interrupted, or its error ends the sweep: the trial is run again
                started.end(outcome)
        return returned

    def _trial(self, number: int) -> Trial | None:
        study = self.study
        if study is None:
            if self.spec is None:
                return None
            store = storage.connect(passwords.from_environment(self.spec), patience=self.patience, joining=True)
            study = optuna.load_study(study_name=self.study_name, storage=store)
        return trial_view(study, number, self.pruner)


@dataclass
class _Started:
    """A job that has started: its trial, its folder, what must stay in its place meanwhile, and when."""

    trial: RunningTrial
    folder: Path
    places: Sequence[Place]
    time: float

    def end(self, outcome: Outcome) -> None:
        """Record how the trial ended: in the run folder, and then in the study, where the outcome itself comes last.

        Once it is written, the trial cannot be lost. Raises StorageLostError if that is not possible.
        """
        trial = self.trial.trial
        if trial is None:
            return
        for place in self.places:
            place.check()
        self.folder.mkdir(exist_ok=True)
        with replacing(self.folder / OUTCOME_FILE) as file:
            file.write(json.dumps(asdict(outcome)).encode())
        result = read_result(self.folder)
        seconds = round(time.perf_counter() - self.time, 3)
        _set(trial, {"seconds": seconds} | {key: result[key] for key in ("device", "epochs") if key in result})
        if outcome.error:
            _set(trial, {"error": outcome.error, "traceback": outcome.traceback})
        set_outcome(trial, outcome)
        (self.folder / OUTCOME_FILE).unlink()


@dataclass
class LastRun:
    """The task function of the job that retrains a study's best trial."""

    task: TaskFunction
    best: RunningTrial

    def __call__(self, cfg: DictConfig) -> Any:
        """Run the job. It reports no intermediate values: its trial is complete."""
        _quiet_console()
        stages = stages_of(self.task)
        return stages.run(cfg, self.best) if stages else self.task(cfg)


def ends_sweep(error: Any) -> bool:
    """Whether a job's error ends the sweep and is no failure of its trial: a full disk, a lost study, other images."""
    return isinstance(error, settings.MixedStudyError | StorageLostError) or disk_error(error) is not None


def set_outcome(trial: Trial, outcome: Outcome) -> None:
    """Record the outcome in the study. The sweep, or one that resumes it, tells it to Optuna."""
    set_system_attr(trial.study, trial, OUTCOME, outcome.__dict__)


def _set(trial: Trial | None, attributes: dict[str, Any]) -> None:
    for key, value in attributes.items():
        if trial is not None:
            trial.set_user_attr(key, value)


def _quiet_console() -> None:
    """Jobs log to their own files; the console, which shows the sweep's progress, gets only their warnings."""
    if HydraConfig.get().verbose is not False:
        return
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.WARNING)


@functools.cache
def _watch(parent: int) -> None:
    """End this worker process when its parent is gone. A forked worker has no mark for the reaper to find."""

    def end_with_it() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
