"""The sweep: ask the study for trials, launch them, tell it how they went, and at the end retrain the best."""

import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
from filelock import FileLock, Timeout
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from optuna.samplers import GridSampler
from optuna.trial import Trial, TrialState

from tuner import InputError
from tuner.files import no_space
from tuner.sweep import hydra_private, launchers, ranking, report, sampling, space, storage
from tuner.sweep.account import LOCKS, Account, allowed_failures
from tuner.sweep.compose import Composer
from tuner.sweep.join import join, name_objectives
from tuner.sweep.progress import Progress
from tuner.sweep.trial import Job, LastRun, Link, Outcome

log = logging.getLogger("tuner.sweep")


class AsyncSweeper:
    """A sweeper with hydra-optuna-sweeper's options and more, see tuner.sweep.plugin.

    The study is the only account of what was done: any number of sweeps, at once or one after another, on any machine
    that reaches its storage, work it off together.
    """

    config: DictConfig
    hydra_context: HydraContext
    launcher: Launcher

    def __init__(
        self,
        *,
        sampler: DictConfig,
        direction: Any,
        storage: Any,
        study_name: str | None,
        n_trials: int,
        n_jobs: int,
        max_failure_rate: float,
        custom_search_space: str | None,
        params: Mapping[str, str] | None,
        pruner: DictConfig,
        fail_fast: bool,
        retries: int,
        baseline: bool,
        enqueue: Sequence[Any],
    ):
        self.sampler, self.pruner_config, self.params = sampler, pruner, params or {}
        self.direction, self.storage, self.study_name = direction, storage, study_name
        self.n_trials, self.n_jobs, self.retries = n_trials, n_jobs, retries
        self.max_failure_rate = 0.0 if fail_fast else max_failure_rate
        self.custom_search_space, self.baseline, self.enqueue = custom_search_space, baseline, enqueue
        self.custom_search_space_extender: Callable[[DictConfig, Trial], None] | None = None
        self.launched = False  # whether any job came back
        self.stopping = threading.Event()  # no more trials are started
        self.interrupted = threading.Event()
        self.last_failure: Outcome | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        """Work off the study's budget, then retrain its best configuration.

        Exits with 130 where it was interrupted, with 1 where too many trials failed, none was completed, or a disk is
        full, which is no trial's failure.
        """
        try:
            self._sweep(arguments)
        except InputError as error:
            log.error("%s", error)
            sys.exit(1)
        except KeyboardInterrupt:  # before or after the trials
            sys.exit(130)
        except Exception as error:
            reason = no_space(error)
            if reason is None:
                raise
            again = report.resume_command(self.config, self.study_name) if self.study_name else "the same command"
            log.error("a disk is full (%s): make room, then go on with: %s", reason, again)
            sys.exit(1)

    def _check(self) -> None:
        for key, least, most in (
            ("n_trials", 0, None),
            ("n_jobs", 1, None),
            ("max_failure_rate", 0, 1),
            ("retries", 0, None),
        ):
            value = getattr(self, key)
            if value < least or (most is not None and value > most):
                limits = f"at least {least}" if most is None else f"from {least} to {most}"
                raise InputError(f"hydra.sweeper.{key}={value} must be {limits}")

    def _sweep(self, arguments: list[str]) -> None:
        self._check()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # the sweep says what matters
        self.spec = storage.absolute(self.storage)
        if self.custom_search_space:
            target = {"_target_": self.custom_search_space, "_partial_": True}
            trusted = self.hydra_context.execution_whitelist
            self.custom_search_space_extender = sampling.made(OmegaConf.create(target), trusted)
        lines = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        self.space = space.parse(lines, self.hydra_context.config_loader)
        with nullcontext() if self.config.hydra.verbose else launchers.quiet():
            account = self._join()
            with account.alive():
                with account.lock:
                    self._agree(account)
                    report.write(self.study, account.trials(), self.folder, self.spec)  # says where the study is kept
                self._announce()
                try:
                    if self.account.room() or self._best_to_retrain() is not None:
                        with launchers.running(self.launcher), interruptible(self.slots):  # Ray took the signals before
                            self._work_off()
                            self._retrain_best()
                except KeyboardInterrupt:
                    self.interrupted.set()
                    hydra_private.configure_log(self.hydra_context, self.config)  # the job that was interrupted had it
                    account.release()  # so that the tables have these trials as the study does
                except BaseException:
                    report.write(self.study, self.account.trials(), self.folder, self.spec)
                    raise
                self._end()

    # 1. Find or make the study, and agree with it

    def _join(self) -> Account:
        self.pruner = sampling.made(self.pruner_config, sampling.PRUNERS)
        wanted = Path(self.config.hydra.sweep.dir).absolute()
        self.study, self.folder = join(self.study_name, self.spec, directions(self.direction), wanted)
        self.study_name = self.study.study_name
        self.study.pruner = self.pruner
        locks = self.folder / LOCKS
        locks.mkdir(exist_ok=True)
        owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        budget = {"n_trials": self.n_trials, "retries": self.retries}
        self.account = Account(self.study, locks, owner, **budget, told=self._told)
        return self.account

    def _agree(self, account: Account) -> None:
        """What several sweeps on a study must not do at once: under its lock."""
        name_objectives(self.study, OmegaConf.select(self.config, "objective"))
        attributes = self.study.user_attrs
        self._check_search(attributes)
        self._prepare_launcher()
        joined = attributes.get("sweeps", 0)
        objectives = len(self.study.directions)
        self.study.sampler = sampling.make_sampler(
            self.sampler, self.space.distributions, objectives=objectives, joined=joined
        )
        self.study.set_user_attr("sweeps", joined + 1)
        if isinstance(self.study.sampler, GridSampler):
            account.n_trials = self.n_trials = min(self.n_trials, sampling.grid_size(self.space.distributions))
            self.baseline = False  # each trial is a point of the grid
            if self.enqueue:
                raise InputError(
                    "enqueue: a grid runs its own points alone; leave enqueue out, or take another sampler"
                )
        self.progress = Progress(self.study, self.n_trials, account.counting)
        account.recover()
        if self.baseline and not account.trials():
            self.study.enqueue_trial({}, user_attrs={"baseline": True})
        sampling.enqueue(
            self.study, self.enqueue, self.space.distributions, self.custom_search_space_extender is not None
        )

    def _check_search(self, attributes: dict[str, Any]) -> None:
        """Compare the search with what the study was started with, and write down what is new."""
        if "space" in attributes and any(trial.state != TrialState.WAITING for trial in self.account.trials()):
            space.check_unchanged(attributes["space"], self.space.distributions, self.study.study_name)
        of_no_trial = ("study", "final.seeds", "logger")
        fixed = {key: line for key, line in self.space.fixed.items() if key not in of_no_trial and key[:7] != "logger."}
        now = {"space": space.to_json(self.space.distributions), "fixed": fixed}
        before = attributes.get("fixed", fixed)
        if differ := [key for key in before | fixed if before.get(key) != fixed.get(key)]:
            then, after = (" ".join(d.get(key, f"no {key}") for key in differ) for d in (before, fixed))
            message = "study %s was started with %s, and goes on with %s: its trials may not compare"
            log.warning(message, self.study.study_name, then, after)
        for key, value in now.items():
            if attributes.get(key) != value:
                self.study.set_user_attr(key, value)

    def _prepare_launcher(self) -> None:
        with read_write(self.config.hydra), open_dict(self.config.hydra):
            self.config.hydra.sweep.dir = str(self.folder)
            # jobs compose their configs anew, from these overrides
            overrides: Any = OmegaConf.to_container(self.config.hydra.overrides.hydra, resolve=False)
            overrides.append(f"hydra.sweep.dir={space.quoted(str(self.folder))}")
            if isinstance(self.storage, str) and (safe := str(storage.shown(self.storage))) != self.storage:
                self.config.hydra.sweeper.storage = safe  # each job writes its config down, with what it has from here
                overrides = [line for line in overrides if not line.startswith("hydra.sweeper.storage=")]
                overrides.append(f"hydra.sweeper.storage={space.quoted(safe)}")
            self.config.hydra.overrides.hydra = overrides
        objectives = len(self.study.directions)
        job = Job(self.task_function, self.spec, self.study.study_name, objectives, self.pruner, study=self.study)
        self.launcher = self._launcher(job)

    def _launcher(self, task: TaskFunction) -> Any:
        composer: Any = Composer(self.hydra_context.config_loader)
        self.composer = composer
        context = replace(self.hydra_context, config_loader=composer)
        return Plugins.instance().instantiate_launcher(config=self.config, hydra_context=context, task_function=task)

    # 2. Run its trials

    def _announce(self) -> None:
        slots = self.slots = launchers.slots(self.launcher, self.n_jobs)
        done = len(self.account.counting())
        verb = "all of its" if done >= self.n_trials else "going on after" if done else "running"
        count = f"{done} of {self.n_trials}" if 0 < done < self.n_trials else self.n_trials
        name, where = self.study.study_name, storage.shown(self.spec) or "memory"
        log.info("study %s in %s: %s %s trials, in %s", name, where, verb, count, self.folder)
        if done >= self.n_trials:
            return
        if self.spec is not None:
            log.info("if it is stopped, go on with: %s", report.resume_command(self.config, name))
        elif not slots.in_process:
            log.warning("a study in memory is out of reach for jobs in other processes: none is pruned")
        if slots.why:
            log.info("n_jobs=%d: %s", self.n_jobs, slots.why)

    def _work_off(self) -> None:
        with self.progress:
            while self.account.room() and not self.stopping.is_set():
                if self.slots.threads == 1:
                    self._run_trials()
                else:
                    self._run_threads()
                self.account.recover()  # what a sweep that has died meanwhile leaves is run here, too

    def _run_threads(self) -> None:
        with ThreadPoolExecutor(self.slots.threads) as pool:
            threads: list[Future[None]] = []
            try:
                threads += [pool.submit(self._run_trials) for _ in range(self.slots.threads)]
                while (state := wait(threads, timeout=1.0)).not_done:
                    if any(thread.exception() for thread in state.done):
                        self.stopping.set()
                    self.progress.refresh()
            except KeyboardInterrupt:
                self.interrupted.set()
                self.stopping.set()
                while wait(threads, timeout=0.3).not_done:
                    launchers.end_jobs()  # and so the calls that the threads wait for
                raise
        for thread in threads:
            thread.result()

    def _run_trials(self) -> None:
        """Start a trial when one ends, as long as there are any."""
        while not self.stopping.is_set():
            trials: list[Trial] = []
            while len(trials) < self.slots.batch and (trial := self.account.ask()):
                trials.append(trial)
            if not trials:
                return
            self._run(trials)

    def _run(self, trials: Sequence[Trial]) -> None:
        """Launch trials together, and tell the study how each went."""
        jobs = [(trial.number, overrides) for trial in trials if (overrides := self._overrides(trial)) is not None]
        for number, _ in jobs:
            self._clear_the_way(self.folder / str(number))
        try:
            returns = self._launch(jobs)
        except (HydraException, OmegaConfBaseException) as error:  # of the one job in this process
            for number, _ in jobs:
                self.account.tell(number, Outcome.failed(error))
        except Exception as error:
            if no_space(error):
                raise
            if not self.launched and not any("host" in self.account.trial(number).user_attrs for number, _ in jobs):
                raise InputError(f"the launcher cannot start jobs: {type(error).__name__}: {error}") from error
            reason = " ".join(f"its process ended: {type(error).__name__}: {error}".split())
            for number, _ in jobs:
                self.account.settle(number, reason, excused=self.interrupted.is_set())
        except BaseException as error:
            for number, _ in jobs:
                self.account.settle(number, f"interrupted by {type(error).__name__}", excused=True)
            raise
        else:
            self.launched = True
            full = None
            for (number, _), job in zip(jobs, returns, strict=True):
                if job.status is JobStatus.FAILED and no_space(hydra_private.job_result(job)):
                    full = hydra_private.job_result(job)
                else:
                    self.account.tell(number, self._outcome(job))
            if full:
                raise full

    def _launch(self, jobs: Sequence[tuple[int, list[str]]]) -> Sequence[JobReturn]:
        """A call for each run of numbers that follow each other; other sweeps may have those between."""
        returns: list[JobReturn] = []
        while jobs:
            first = jobs[0][0]
            together = [job for place, job in enumerate(jobs) if job[0] == first + place]
            returns += self.launcher.launch([overrides for _, overrides in together], initial_job_idx=first)
            jobs = jobs[len(together) :]
        return returns

    def _clear_the_way(self, folder: Path) -> None:
        """A trial's folder is there already where a power cut undid the study's last commits."""
        if folder.exists():
            aside = folder.with_name(f"{folder.name}-before-{time.strftime('%Y-%m-%d_%H-%M-%S')}")
            log.warning("%s is there, of a trial that the study does not know; it is now %s", folder, aside)
            folder.rename(aside)

    def _overrides(self, trial: Trial) -> list[str] | None:
        """Draw a trial's parameters. None: they could not be drawn, and the trial has failed."""
        try:
            if trial.user_attrs.get("baseline"):
                trial = sampling.baseline(trial, self.space, self.config)
            for name, distribution in self.space.distributions.items():
                sampling.suggest(trial, name, distribution)
            if self.custom_search_space_extender:
                self.custom_search_space_extender(self.config, trial)
            overrides = self.space.overrides(trial.params)
            if not self.slots.in_process:  # a config that can't be composed is to fail this trial, and not a batch
                self.composer.load_sweep_config(self.config, overrides)
        except Exception as error:  # noqa: BLE001 - the user's function may raise anything: the trial has failed
            self.account.tell(trial.number, Outcome.failed(error))
            return None
        if both := trial.params.keys() & self.space.fixed.keys():
            raise InputError(f"{', '.join(both)} is fixed, but custom_search_space searches it; leave one out")
        return overrides

    def _outcome(self, job: JobReturn) -> Outcome:
        if job.status is JobStatus.FAILED:
            return Outcome.failed(hydra_private.job_result(job))
        return Outcome.of(job.return_value, len(self.study.directions))

    def _told(self, number: int, outcome: Outcome) -> None:
        self.progress.told(number, outcome)
        if outcome.state == "FAIL":
            self.last_failure = outcome
            if self.account.failures() > self.allowed_failures():
                self.stopping.set()

    def allowed_failures(self) -> int:
        return allowed_failures(self.max_failure_rate, self.n_trials)

    # 3. Retrain the best, and say how it went

    def _best_to_retrain(self) -> int | None:
        """The best trial's number, where the study is complete and best/ is not yet that trial's.

        For programs that have `final` in their config, as tuner.train has; final.seeds=0 turns it off.
        """
        account = self.account
        if self.stopping.is_set() or account.room() or account.running():
            return None
        best = ranking.best(self.study, account.trials())
        if best is None or not OmegaConf.select(self.config, "final.seeds"):
            return None
        return None if report.final(self.folder, best.number) else best.number

    def _retrain_best(self) -> None:
        """Run the best configuration once more, with `final.epochs`, into best/. What lies there is moved aside."""
        try:
            with FileLock(self.account.locks / "best.lock", timeout=0):
                number = self._best_to_retrain()
                if number is None:
                    return
                if (self.folder / "best").exists():
                    (self.folder / "best").rename(self.folder / f"best-until-{time.strftime('%Y-%m-%d_%H-%M-%S')}")
                self._launch_last(number)
        except Timeout:
            log.info("another sweep on this study retrains its best")

    def _launch_last(self, number: int) -> None:
        best = self.account.trial(number)
        folder = Path(best.user_attrs.get("output_dir", self.folder / str(number)))
        result = report.read_result(folder)
        epochs = result.get("saved_epoch")
        if epochs is None:
            raise InputError(f"trial {number} is the best, but {folder} has no result.json with its saved_epoch")
        log.info("retraining trial %d, the best, on train + validation for %d epochs, to test it", number, epochs)
        overrides = [*self.space.overrides(best.params), f"final.epochs={epochs}", "hydra.sweep.subdir=best"]
        if "temperature" in result and "temperature" in self.config.final:
            overrides.append(f"final.temperature={result['temperature']}")
        link = Link(self.study.study_name, number, storage.shown(self.spec))
        [job] = self._launcher(LastRun(self.task_function, link)).launch([overrides], initial_job_idx=number)
        if job.status is JobStatus.FAILED:
            log_file = self.folder / "best" / f"{self.config.hydra.job.name}.log"
            error = hydra_private.job_result(job)
            raise InputError(f"retraining trial {number} failed: {error}; see {log_file}, then sweep again")

    def _end(self) -> None:
        trials = self.account.trials()
        results = report.write(self.study, trials, self.folder, self.spec)
        if self.interrupted.is_set():
            log.info("interrupted with %s", self.progress.line())
            if self.spec is not None:
                log.info("go on with: %s", report.resume_command(self.config, self.study.study_name))
            sys.exit(130)
        if self.stopping.is_set():
            log.error("stopped: %d trials failed, and %d may", self.account.failures(), self.allowed_failures())
            if self.last_failure:
                sys.stderr.write(self.last_failure.traceback or f"{self.last_failure.error}\n")
        elif others := self.account.running():
            log.info("%d trials still run in other sweeps, of which the last one writes the results", others)
            return
        log.info("%s", report.summary(results, self.folder))
        if self.stopping.is_set() or not ranking.complete(trials):
            sys.exit(1)


def directions(direction: Any) -> list[str]:
    """minimize or maximize for each objective. direction: one or a list, as text or as upstream's enum."""
    each = [direction] if isinstance(direction, str) or not isinstance(direction, Sequence) else direction
    return [one if isinstance(one, str) else one.name for one in each]


@contextmanager
def interruptible(slots: launchers.Slots) -> Iterator[None]:
    """SIGTERM, which clusters send before they kill, is taken as Ctrl-C.

    Not where workers are forked: their pool ends them by SIGTERM, and a handler of Python's, which they would have too,
    loses it during the fork, so that the pool waited for ever. The study is gone on with all the same.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    if slots.forks or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
