"""Jobs that train together, in this process: `hydra/launcher=fused`.

Each job is an ordinary Hydra job with its own config, folder, log and callbacks. A task function with `stages` (see
tuner.sweep.trial.Stages) is run in three of them: every job is prepared, all are trained at once, every job is
finished. Other task functions run one after another, as under the basic launcher. HFTA (Wang et al., arXiv:2102.02344)
fuses models in this way; here a sweep's heads over the same features form a stack.
"""

import copy
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from tuner import InputError
from tuner.sweep import hydra_private
from tuner.sweep.trial import Stages, stages_of

log = logging.getLogger("tuner.sweep")
job_log = logging.getLogger(__name__)
ROUNDS = 5  # of trials at least, for a sampler to learn from
DO_NOT_LEARN = ("Random", "Grid", "QMC", "BruteForce")


@dataclass
class _Job:
    """A job of a stack.

    config: None if it could not be composed.   returned: of the last stage that was run.
    prepared: between the first and the last stage, while the job `waits`, what the first one returned.
    """

    config: DictConfig | None
    returned: JobReturn
    prepared: Any = None
    waits: bool = False


@dataclass
class _Callbacks:
    """The callbacks of a job that Hydra runs in two parts: its start is announced once, and so is its end.

    job: None in the first part.
    """

    callbacks: Any
    job: _Job | None

    def on_job_start(self, **options: Any) -> None:
        if self.job is None:
            self.callbacks.on_job_start(**options)

    def on_job_end(self, *, config: DictConfig, job_return: JobReturn, **options: Any) -> None:
        if self.job:
            job_return.hydra_cfg = self.job.returned.hydra_cfg
            self.callbacks.on_job_end(config=self.job.config, job_return=job_return, **options)
        elif job_return.status is not JobStatus.COMPLETED:
            self.callbacks.on_job_end(config=config, job_return=job_return, **options)


class Fused:
    """Runs a launch's jobs, `stack` of them at a time."""

    def __init__(self, stack: int | str):
        self.stack = stack
        self.workers = 1  # processes that train stacks of this search

    def setup(self, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what launches need. Raises InputError if `stack` is neither auto nor a whole number of at least 1."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        if self.stack != "auto" and not (type(self.stack) is int and self.stack >= 1):
            raise InputError(f"hydra.launcher.stack={self.stack} must be a whole number of at least 1, or auto")

    def size(self) -> int:
        """The largest number of jobs that train together. An automatic choice is logged once."""
        if self.stack == "auto":
            self.stack, why = self._auto()
            log.info("hydra.launcher.stack: %d (auto: %s)", self.stack, why)
        assert isinstance(self.stack, int)
        return self.stack

    def _auto(self) -> tuple[int, str]:
        from tuner.device import choose_device, stack_size  # imports torch, which other programs may not have

        device = choose_device(str(OmegaConf.select(self.config, "device", default="auto")))
        most = stack_size(device)
        search = OmegaConf.select(self.config, "hydra.sweeper")
        sampler = str(OmegaConf.select(search, "sampler._target_", default="Random"))
        n_trials = OmegaConf.select(search, "n_trials", default=None)
        stacks = ROUNDS * self.workers
        if n_trials and not any(name in sampler for name in DO_NOT_LEARN) and n_trials < stacks * most:
            size, each = max(1, n_trials // stacks), f", {self.workers} stacks each" if self.workers > 1 else ""
            return size, f"{ROUNDS} rounds of {n_trials} trials{each}, for the sampler to learn from"
        return most, f"larger stacks are no faster on {device}"

    def launch(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """Run jobs with the numbers `first`, `first` + 1, ... Returns what each returned, or its error."""
        return self.launch_jobs(list(enumerate(job_overrides, first)))

    def launch_jobs(self, jobs: Sequence[tuple[int, Sequence[str]]]) -> list[JobReturn]:
        """Run jobs, given by their numbers and overrides. Returns what each returned, or its error."""
        hydra_private.setup_globals()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        stages, size = stages_of(self.task_function), self.size()
        try:
            if stages is None:
                return [self._run_whole(number, overrides) for number, overrides in jobs]
            stacks = [jobs[start : start + size] for start in range(0, len(jobs), size)]
            return [returned for stack in stacks for returned in self._run_together(stages, stack)]
        finally:
            self._log_to_sweep()

    def _run_whole(self, number: int, overrides: Sequence[str]) -> JobReturn:
        config, failed = self._compose(number, overrides)
        return failed if config is None else self._run(config, self.task_function)

    def _run_together(self, stages: Stages, stack: Sequence[tuple[int, Sequence[str]]]) -> list[JobReturn]:
        jobs: list[_Job] = []
        try:
            for number, overrides in stack:
                jobs.append(self._prepare(stages, number, overrides))
            waiting = [job for job in jobs if job.waits]
            self._log_to_sweep()
            try:
                for index, fitted in stages.fit_together([job.prepared for job in waiting]) if waiting else ():
                    self._finish(stages, waiting[index], fitted)
                if any(job.waits for job in waiting):
                    raise RuntimeError("fit_together must yield a result for each job")
            except Exception as error:  # noqa: BLE001 - each job that is left reports it as its own
                for job in waiting:
                    self._finish(stages, job, error)
        except BaseException as error:  # an interrupt, which ends each job that is left
            for job in jobs:
                with suppress(BaseException):
                    self._finish(stages, job, error)
            raise
        return [job.returned for job in jobs]

    def _prepare(self, stages: Stages, number: int, overrides: Sequence[str]) -> _Job:
        config, returned = self._compose(number, overrides)
        if config is None:
            return _Job(None, returned)
        callbacks = _Callbacks(self.hydra_context.callbacks, None)
        job = _Job(config, self._run(config, lambda cfg: stages.prepare(cfg, None), callbacks))
        if job.returned.status is JobStatus.COMPLETED:
            job.prepared, job.waits = job.returned.return_value, True
            job.returned.return_value = None
        return job

    def _finish(self, stages: Stages, job: _Job, fitted: Any) -> None:
        """Run the last stage of a job, unless it has been run, or the first one failed."""
        if not job.waits:
            return
        prepared, job.prepared, job.waits = job.prepared, None, False  # nothing of it is kept
        config = copy.deepcopy(job.config)
        assert config is not None
        with read_write(config.hydra), open_dict(config):
            config.hydra.output_subdir = None  # the first part has written these files
            for handler in (OmegaConf.select(config, "hydra.job_logging.handlers") or {}).values():
                if "mode" in handler:
                    handler.mode = "a"  # the first part has begun the log
        callbacks = _Callbacks(self.hydra_context.callbacks, job)
        job.returned = self._run(config, lambda _: stages.finish(prepared, fitted), callbacks)
        self._log_to_sweep()

    def _compose(self, number: int, overrides: Sequence[str]) -> tuple[DictConfig | None, JobReturn]:
        """The config of a job; None where it can't be composed, which is a failure of this job alone."""
        self._log_to_sweep()
        job_log.info("#%d: %s", number, " ".join(hydra_private.filter_overrides(overrides)))
        returned = JobReturn(overrides=overrides)
        try:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            returned.status = JobStatus.FAILED
            returned.return_value = error
            return None, returned
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        return config, returned

    def _run(self, config: DictConfig, task: TaskFunction, callbacks: Any = None) -> JobReturn:
        """Run a task function in a job's Hydra context. callbacks: other ones than the user's."""
        context = replace(self.hydra_context, callbacks=callbacks or self.hydra_context.callbacks)
        return hydra_private.run_job(context, task, config)

    def _log_to_sweep(self) -> None:
        """Set up Hydra's log of the sweep again, which a job's log replaced."""
        hydra_private.configure_log(self.hydra_context, self.config)
