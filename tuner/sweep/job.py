"""The task functions of a search's jobs, around the user's: they find their trial, and record how it ended."""

import functools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from hydra.core.hydra_config import HydraConfig
from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import Trial

from tuner import InputError, artifacts
from tuner.files import replacing
from tuner.sweep import gpus, late, passwords, slurm, storage
from tuner.sweep.leases import Renewals
from tuner.sweep.optuna_private import of_jobs, running_trial
from tuner.sweep.outcome import OUTCOME, OUTCOME_FILE, Outcome, Pruned, ends_sweep
from tuner.sweep.patient_storage import set_attributes
from tuner.sweep.pruning import Pruning
from tuner.sweep.report import read_result
from tuner.sweep.storage_files import Place
from tuner.sweep.trial import RunningTrial, Shared, Stages, TrialPruned, running_in_job, stages_of

log = logging.getLogger("tuner.sweep")
RECORDED = ("device", "epochs", "saved_epoch", "temperature")  # what the study has of result.json, beside the value


@dataclass
class Job:
    """The task function of a search's jobs, around the user's. It finds its trial by hydra.job.num.

    It travels to worker processes and opens the storage there. A study in memory is out of their reach, so their trials
    are not pruned.

    patience: how long a call of the storage may wait for its server, in seconds.
    places: the storage's file and the study's folder.   artifacts: where run folders are copied to.
    has_password: whether the password of the storage travels with it. Otherwise it is in the workers' environment.
    """

    task: TaskFunction
    spec: str | None
    study_name: str
    objectives: int
    pruner: optuna.pruners.BasePruner
    shared: Shared = field(default_factory=Shared)
    patience: float = 0.0
    places: Sequence[Place] = ()
    artifacts: str | None = None
    study: Study | None = None  # in the process of the sweep
    view: Study | None = None  # as the jobs of a process use it
    pruning: Pruning | None = None  # of all jobs in a process
    renewals: Renewals | None = None  # likewise; in the process of the sweep, its budget renews the leases
    parent: int = field(default_factory=os.getpid)
    has_password: bool = False

    def __getstate__(self) -> dict[str, Any]:
        of_process = dict.fromkeys(("study", "view", "pruning", "renewals"))
        spec = self.spec if self.has_password else storage.redacted(self.spec)
        return self.__dict__ | of_process | {"spec": spec}

    def __call__(self, cfg: DictConfig) -> Any:
        """Run the job. Returns the objective, or Pruned; raises the task's error once the outcome is recorded."""
        started = self._start(cfg)
        stages = stages_of(self.task)
        if stages:
            return self._attempt(started, lambda: stages.run(cfg, started.trial))
        token = running_in_job.set(started.trial)
        try:
            return self._attempt(started, lambda: self.task(cfg))
        finally:
            running_in_job.reset(token)

    @property
    def stages(self) -> Stages | None:
        """The task's stages, which also record the outcome of the trial."""
        inner = stages_of(self.task)
        if inner is None:
            return None

        def prepare(cfg: DictConfig, _trial: RunningTrial | None) -> tuple[_Started, Any]:
            started = self._start(cfg)
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

    def _start(self, cfg: DictConfig) -> "_Started":
        hydra = HydraConfig.get()
        slurm.go_on_when_warned()
        if os.getpid() != self.parent and OmegaConf.select(cfg, "device") == "auto" and (gpu := gpus.take_one()):
            log.info("this process takes GPU %s of several: %s=%s", gpu, gpus.VISIBLE, gpu)
        for place in self.places:
            place.check()
        trial = self._trial(hydra.job.num)
        _quiet_console()
        if os.getpid() != self.parent == os.getppid():
            _watch(self.parent)
        if os.getpid() != self.parent and "ray" in sys.modules:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray's handler looks like the job's own sys.exit()
        folder = hydra.runtime.output_dir
        try:
            if trial:
                set_attributes(trial.study, trial, {"output_dir": folder, "host": socket.gethostname()})
        except UpdateFinishedTrialError:
            message = f"trial {hydra.job.num} has ended before this job started: it was taken for lost"
            raise InputError(message) from None
        if trial and self.pruning is None:
            self.pruning = Pruning(trial.study, self.pruner)
        if trial and self.study is None:
            self.renewals = self.renewals or Renewals(trial.study)
            self.renewals.hold(trial)
        spec = storage.redacted(self.spec)
        running = RunningTrial(self.study_name, hydra.job.num, spec, self.shared, trial, self.pruning)
        copies = f"{self.artifacts}/{self.study_name}" if self.artifacts else None
        return _Started(running, Path(folder), self.places, copies, time.perf_counter(), self.renewals)

    def _attempt(self, started: "_Started", part: Callable[[], Any], last: bool = True) -> Any:
        """Run a part of the job. The trial's outcome is written if that fails, and after the last part."""
        outcome, goes_on = None, False
        try:
            returned = part()
            goes_on = not last
            if last:
                outcome = Outcome.of(returned, self.objectives)
        except TrialPruned as pruned:
            returned = Pruned(str(pruned) or None)
            outcome = Outcome("PRUNED", reason=returned.reason)
        except SystemExit as stop:
            error = RuntimeError(f"the job ended with sys.exit({stop.code!r})")
            error.__cause__ = stop
            outcome = Outcome.failed(error)
            raise error from stop  # or a worker process would end with it
        except Exception as error:
            outcome = None if ends_sweep(error) else Outcome.failed(error)
            raise  # Hydra logs it, in the job's folder
        finally:
            try:
                if outcome:  # otherwise it was interrupted, or its error ends the sweep: the trial is run again
                    started.end(outcome)
            finally:
                if started.renewals and not goes_on:
                    started.renewals.drop(started.trial.number)
        return returned

    def _trial(self, number: int) -> Trial | None:
        if self.view is None:
            study = self.study
            if study is None:
                if self.spec is None:
                    return None
                store = storage.connect(passwords.from_environment(self.spec), patience=self.patience, joining=True)
                study = optuna.load_study(study_name=self.study_name, storage=store)
            self.view = of_jobs(study, self.pruner)
        return running_trial(self.view, number)


@dataclass
class _Started:
    """A job that has started: its trial, its folder, what must stay in its place meanwhile, and since when.

    copies: where its folder is copied to.   renewals: of its lease.
    """

    trial: RunningTrial
    folder: Path
    places: Sequence[Place]
    copies: str | None
    time: float
    renewals: Renewals | None

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
        attributes: dict[str, Any] = {"seconds": round(time.perf_counter() - self.time, 3)}
        attributes |= {key: result[key] for key in RECORDED if key in result}
        if self.copies and (url := artifacts.try_to_put(self.folder, self.copies, str(trial.number))):
            attributes[artifacts.ARTIFACT] = url
        if outcome.error:
            attributes |= {"error": outcome.error, "traceback": outcome.traceback}
        try:
            set_attributes(trial.study, trial, attributes, {OUTCOME: asdict(outcome)})
        except UpdateFinishedTrialError:
            late.hand_over(trial, outcome, attributes)
        (self.folder / OUTCOME_FILE).unlink()


@dataclass
class LastRun:
    """The task function of the job that retrains a study's best trial."""

    task: TaskFunction
    best: RunningTrial
    artifacts: str | None = None

    def __call__(self, cfg: DictConfig) -> str | None:
        """Run the job. It reports no intermediate values: its trial is complete. Returns the URL of the folder's copy.

        None if there is no copy.
        """
        _quiet_console()
        slurm.go_on_when_warned()
        if stages := stages_of(self.task):
            stages.run(cfg, self.best)
        else:
            self.task(cfg)
        folder = Path(HydraConfig.get().runtime.output_dir)
        place = self.artifacts and f"{self.artifacts}/{self.best.study}"
        return artifacts.try_to_put(folder, place, folder.name) if place else None


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
