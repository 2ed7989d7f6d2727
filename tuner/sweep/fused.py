"""Jobs that train together, in this process: `hydra/launcher=fused`.

Each job is an ordinary one of Hydra's, with its own config, folder, log and callbacks, in a coroutine of its own. It
runs until it asks, by together(), for what may be done with other jobs at once; when all have come so far, or ended, it
is done for those whose keys are equal, and each goes on with its part. A job that never asks runs as under the basic
launcher. After HFTA (Wang et al., arXiv:2102.02344), which fuses models; here a sweep's heads over the same features.
"""

import contextvars
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from greenlet import getcurrent, greenlet
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tuner import InputError

log = logging.getLogger("tuner.sweep")
job_log = logging.getLogger(__name__)
ROUNDS = 5  # of trials at least, for a sampler to learn from
DO_NOT_LEARN = ("Random", "Grid", "QMC", "BruteForce")
_hub: contextvars.ContextVar[greenlet | None] = contextvars.ContextVar("hub", default=None)


@dataclass(frozen=True, eq=False)
class Request:
    """What a job wants done. plan: a dataclass with a field `on_epoch`, work: plans -> a result for each."""

    plan: Any
    key: Any
    work: Callable[[Sequence[Any]], Sequence[Any]]


def together(plan: Any, *, key: Any, work: Callable[[Sequence[Any]], Sequence[Any]]) -> Any:
    """The result of `work` for this plan; under the fused launcher it is called once for all plans of an equal key.

    plan.on_epoch is called in the job that the plan is of. What it raises ends that job alone: `work` gets False.
    key: hashable, or None for what can't be done together.
    """
    hub = _hub.get()
    if hub is None:
        [result] = work([plan])
        return result
    message = hub.switch(Request(plan, key, work))
    while isinstance(message, tuple):
        message = hub.switch(plan.on_epoch(*message))
    return message.value


@dataclass(frozen=True)
class Result:
    value: Any


class _Scene:
    """What there is once a process, as one job has it: Hydra's config, the logs, environment and working folder."""

    def __init__(self) -> None:
        self.config = cast(Any, HydraConfig.instance().cfg)
        self.folder = Path.cwd()
        named = OmegaConf.select(self.config, "hydra.job_logging.loggers") or ()
        loggers = [logging.getLogger(name) for name in (None, *named)]
        self.logs = [(logger, logger.handlers[:], logger.level) for logger in loggers]
        for handler in self.handlers():
            if isinstance(handler, logging.FileHandler):
                handler.mode = "a"  # the next job's set-up closes it, and one of mode w does not open again
        self.environment = {
            key: os.environ.get(key) for key in OmegaConf.select(self.config, "hydra.job.env_set") or ()
        }

    def handlers(self) -> set[logging.Handler]:
        return {handler for _, handlers, _ in self.logs for handler in handlers}

    def restore(self) -> None:
        HydraConfig.instance().cfg = self.config
        for logger, handlers, level in self.logs:
            logger.handlers[:] = handlers
            logger.setLevel(level)
        os.chdir(self.folder)
        for key, value in self.environment.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


class _Job:
    """A job between its start and its end. `request` is what it waits for; `returned`, when it has ended."""

    def __init__(self, run: Callable[[], JobReturn]):
        self.coroutine = greenlet(run)
        self.coroutine.gr_context = contextvars.copy_context()
        self.coroutine.gr_context.run(_hub.set, getcurrent())
        self.scene = _Scene()
        self.request: Request | None = None
        self.returned: JobReturn | None = None

    def go_on(self, *message: Any) -> Any:
        """Let the job run until it waits again, or ends; returns what it answers."""
        return self._switch(lambda: self.coroutine.switch(*message))

    def raise_in_it(self, error: BaseException) -> None:
        self._switch(lambda: self.coroutine.throw(error))

    def _switch(self, switch: Callable[[], Any]) -> Any:
        ours = _Scene()
        self.scene.restore()
        try:
            answer = switch()
        finally:
            self.scene = _Scene()
            if self.coroutine.dead:
                self.request = None
                for handler in self.scene.handlers() - ours.handlers():
                    handler.close()
            ours.restore()
        if isinstance(answer, Request):
            self.request = answer
        elif self.coroutine.dead:
            self.returned = answer
        return answer

    def on_epoch(self, request: Request, *epoch: Any) -> bool:
        """Called by the work; whether the job wants it to go on."""
        answer = self.go_on(epoch)
        return self.request is request and answer is not False


class Fused:
    """Runs a launch's jobs, `stack` of them at a time."""

    def __init__(self, stack: int | str):
        self.stack = stack

    def setup(self, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        if self.stack != "auto" and not (type(self.stack) is int and self.stack >= 1):
            raise InputError(f"hydra.launcher.stack={self.stack} must be a whole number of at least 1, or auto")

    def size(self) -> int:
        """How many jobs train together, at most. What it chooses it says, once."""
        if self.stack == "auto":
            self.stack, why = self._auto()
            log.info("hydra.launcher.stack: %d (auto: %s)", self.stack, why)
        assert isinstance(self.stack, int)
        return self.stack

    def _auto(self) -> tuple[int, str]:
        from tuner.device import choose_device, stack_size  # torch: not every program that has the launcher has it

        device = choose_device(str(OmegaConf.select(self.config, "device", default="auto")))
        most = stack_size(device)
        search = OmegaConf.select(self.config, "hydra.sweeper")
        sampler = str(OmegaConf.select(search, "sampler._target_", default="Random"))
        n_trials = OmegaConf.select(search, "n_trials", default=None)
        if n_trials and not any(name in sampler for name in DO_NOT_LEARN) and n_trials < ROUNDS * most:
            return max(1, n_trials // ROUNDS), f"{ROUNDS} rounds of {n_trials} trials, for the sampler to learn from"
        return most, f"larger stacks are no faster on {device}"

    def launch(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        setup_globals()
        self._log()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        size = self.size()
        returns: list[JobReturn] = []
        for start in range(0, len(job_overrides), size):
            returns += self._run(job_overrides[start : start + size], first + start)
        return returns

    def _log(self) -> None:
        """Hydra's log of the sweep, which a job's replaces."""
        hydra = self.config.hydra
        configure_log(hydra.hydra_logging, hydra.verbose, execution_whitelist=self.hydra_context.execution_whitelist)

    def _run(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        jobs = []
        try:
            for number, overrides in enumerate(job_overrides, first):
                jobs.append(_Job(partial(self._run_job, number, overrides)))
                jobs[-1].go_on()
            while waiting := [job for job in jobs if job.request]:
                alike: dict[Any, list[_Job]] = {}
                for job in waiting:
                    assert job.request
                    alike.setdefault(job if job.request.key is None else job.request.key, []).append(job)
                for group in alike.values():
                    _work(group)
        except BaseException as error:  # an interrupt: each job ends as if it had got it
            for job in jobs:
                if job.request:
                    with suppress(BaseException):
                        job.raise_in_it(error)
            raise
        finally:
            self._log()
        return [job.returned for job in jobs if job.returned]

    def _run_job(self, number: int, overrides: Sequence[str]) -> JobReturn:
        job_log.info("#%d: %s", number, " ".join(filter_overrides(overrides)))
        try:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        except (HydraException, OmegaConfBaseException) as error:  # of this job alone
            failed = JobReturn(overrides=overrides, status=JobStatus.FAILED)
            failed.return_value = error
            return failed
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def _work(jobs: Sequence[_Job]) -> None:
    """Do what these jobs wait for, at once, and let each go on with what came of it."""
    requests = [job.request for job in jobs if job.request]
    plans = [
        replace(request.plan, on_epoch=partial(job.on_epoch, request))
        for job, request in zip(jobs, requests, strict=True)
    ]
    results: Sequence[Any] | Exception
    try:
        results = requests[0].work(plans)
    except Exception as error:  # noqa: BLE001 - each job fails with it
        results, where = error, error.__traceback__
    for i, (job, request) in enumerate(zip(jobs, requests, strict=True)):
        if job.request is not request:  # it has ended meanwhile
            continue
        job.request = None
        if isinstance(results, Exception):
            job.raise_in_it(results.with_traceback(where))  # without what the job before has added
        else:
            job.go_on(Result(results[i]))
