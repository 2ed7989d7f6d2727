"""The trials of a sweep: ask the study for parameters, launch jobs with them, tell the study the outcomes."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from optuna.samplers import GridSampler
from optuna.trial import Trial, TrialState

from tuner import InputError
from tuner.files import disk_error
from tuner.sweep import hydra_private, launchers, sampling, slurm
from tuner.sweep.budget import OWNER, Budget
from tuner.sweep.config_cache import CachingConfigLoader
from tuner.sweep.duplicates import IN_A_ROW, WHILE_RUNNING
from tuner.sweep.launchers import Slots
from tuner.sweep.outcome import Outcome, ends_sweep
from tuner.sweep.progress import Progress
from tuner.sweep.search_space import SearchSpace
from tuner.sweep.settings import MIXED
from tuner.sweep.slurm import JobEndedError
from tuner.sweep.storage_files import StorageLostError

log = logging.getLogger("tuner.sweep")
PAUSE, LONGEST_PAUSE = 0.5, 5.0  # seconds between looks at the running trials
NOTICE = 1.0  # seconds that the main thread is given to notice a Ctrl-C, which may end a worker first


@dataclass
class Monitor:
    """Reports the trials that end, and stops the sweep after more than `allowed_failures`."""

    budget: Budget
    progress: Progress
    allowed_failures: int
    stopping: threading.Event = field(default_factory=threading.Event)  # no more trials start
    interrupted: threading.Event = field(default_factory=threading.Event)  # by Ctrl-C or SIGTERM
    last_failure: Outcome | None = None

    def trial_ended(self, number: int, outcome: Outcome) -> None:
        """Called once for each trial that this sweep tells to the study."""
        self.progress.trial_ended(number, outcome)
        if outcome.error:
            self.last_failure = outcome
            if self.budget.failures() > self.allowed_failures:
                self.stopping.set()


@dataclass
class TrialLoop:
    """Runs trials until the budget of the study is used up.

    config: the sweep's. loader: composes the jobs' configs. folder: the sweep's; trial N runs in its subfolder N.
    custom_space: a function (config, trial) that draws further parameters.
    mixed: how the trials differ from the study's others, or None.
    reuses: whether a configuration that was tried is not trained again.
    """

    monitor: Monitor
    config: DictConfig
    loader: CachingConfigLoader
    launcher: Launcher
    slots: Slots
    space: SearchSpace
    custom_space: Callable[[DictConfig, Trial], None] | None
    folder: Path
    mixed: str | None
    reuses: bool
    any_job_returned: bool = False

    @property
    def budget(self) -> Budget:
        """The budget of the study."""
        return self.monitor.budget

    def run(self) -> None:
        """Run all trials that are left, those of sweeps that are killed meanwhile included."""
        with self.monitor.progress:
            while not self.monitor.stopping.is_set():
                if not self.budget.has_room():
                    if not self.budget.of_others():
                        return
                    self._wait_for_others()
                elif self.slots.threads == 1:
                    self._run_trials()
                else:
                    self._run_threads()
                self.budget.recover()

    def _wait_for_others(self) -> None:
        """Wait until the trials of other sweeps have ended, or one of them is lost and must be run again."""
        trials = self.budget.of_others()
        hosts = sorted({str(trial.system_attrs[OWNER]).partition(":")[0] for trial in trials})
        text = "waiting for trial%s %s of other sweeps, on %s: what is lost there is run again here"
        log.info(text, "s" * (len(trials) > 1), ", ".join(str(trial.number) for trial in trials), ", ".join(hosts))
        pause = PAUSE
        while trials and not self.budget.has_room() and not self.monitor.stopping.is_set():
            self.monitor.stopping.wait(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)
            self.monitor.progress.refresh()
            self.budget.recover()
            trials = self.budget.of_others()

    def _run_threads(self) -> None:
        with ThreadPoolExecutor(self.slots.threads) as pool:
            threads: list[Future[None]] = []
            try:
                threads += [pool.submit(self._run_trials) for _ in range(self.slots.threads)]
                while (state := wait(threads, timeout=1.0)).not_done:
                    if any(thread.exception() for thread in state.done):
                        self.monitor.stopping.set()
                    self.monitor.progress.refresh()
            except KeyboardInterrupt:
                self.monitor.interrupted.set()
                self.monitor.stopping.set()
                log.info("interrupted: ending the jobs that run")
                while wait(threads, timeout=0.3).not_done:
                    launchers.kill_jobs(self.launcher)  # the threads wait for them
                raise
        for thread in threads:
            thread.result()

    def _run_trials(self) -> None:
        """Run trials one after another, or batch after batch, until the budget is used up."""
        while not self.monitor.stopping.is_set():
            jobs, only_duplicates = self._draw_jobs()
            if jobs:
                self._run_batch(jobs)
            elif only_duplicates:
                self._wait_for_result()
            else:
                return

    def _draw_jobs(self) -> tuple[list[tuple[int, list[str]]], bool]:
        """New configurations, as many as are launched together: the numbers of their trials, and their overrides.

        There are fewer if the budget is used up, or, as the second value says, if duplicates are drawn again and again.
        """
        jobs: list[tuple[int, list[str]]] = []
        in_a_row = of_running = 0  # duplicates, and those among them of running trials
        while len(jobs) < self.slots.batch and not self.monitor.stopping.is_set():
            with self.budget.lock:  # another sweep does not draw the same configuration meanwhile
                trial = self.budget.ask()
                if trial is None:
                    return jobs, False
                overrides = self._overrides(trial)
                original = self.budget.original(trial) if self.reuses and overrides is not None else None
                if original:
                    self.budget.tell_duplicate(trial, original)
            if original:
                in_a_row += 1
                of_running += original.state == TrialState.RUNNING
                if in_a_row >= IN_A_ROW or of_running >= WHILE_RUNNING:
                    return jobs, True
            elif overrides is not None:
                jobs.append((trial.number, overrides))
                in_a_row = of_running = 0
        return jobs, False

    def _wait_for_result(self) -> None:
        """Wait for a running trial to end: the sampler may then draw something new. If none runs, the search ends."""
        before = None
        while not self.monitor.stopping.is_set():
            history = self.budget.history.look()
            ended = history.finished()
            if before not in (None, ended):
                return
            before = ended
            if not any(OWNER in trial.system_attrs for trial in history.running()):
                self.budget.nothing_new.set()
                return
            self.monitor.stopping.wait(PAUSE)
            self.budget.recover()

    def _run_batch(self, jobs: Sequence[tuple[int, list[str]]]) -> None:
        """Launch jobs together, and tell the study each outcome."""
        for number, _ in jobs:
            move_aside(self.folder / str(number))
        try:
            returns = self._launch(jobs)
        except StorageLostError:
            raise
        except (HydraException, OmegaConfBaseException) as error:  # the config of the one job does not compose
            for number, _ in jobs:
                self.budget.tell(number, Outcome.failed(error))
        except Exception as error:
            if disk_error(error):
                raise
            self._finish_ended(jobs, error)
        except BaseException as error:
            self._finish_lost(jobs, f"interrupted by {type(error).__name__}", interrupted=True)
            raise
        else:
            self.any_job_returned = True
            self._tell(jobs, returns)

    def _finish_ended(self, jobs: Sequence[tuple[int, list[str]]], error: Exception) -> None:
        """Finish the trials of jobs that ended without a result. Raises InputError if the launcher can't start any."""
        of_slurm = error if isinstance(error, JobEndedError) else None
        reason = str(of_slurm or " ".join(f"{type(error).__name__}: {error}".split()))
        has_failed = of_slurm is None or of_slurm.state == "FAILED"
        if has_failed and not self._any_started():
            raise InputError(f"the launcher cannot start jobs: {reason}") from error
        excused = self.monitor.interrupted.wait(NOTICE) or (of_slurm is not None and of_slurm.state == "PREEMPTED")
        self._finish_lost(jobs, reason if of_slurm else f"its process ended: {reason}", interrupted=excused)

    def _tell(self, jobs: Sequence[tuple[int, list[str]]], returns: Sequence[JobReturn]) -> None:
        """Tell the study the outcomes. An error that ends the sweep is raised last: it is no failure of a trial."""
        stop: Exception | None = None
        for (number, _), job in zip(jobs, returns, strict=True):
            result = hydra_private.job_result(job)
            if job.status is not JobStatus.FAILED:
                self.budget.tell(number, Outcome.of(result, len(self.budget.study.directions)))
            elif ends_sweep(result):
                stop = result
            else:
                self.budget.tell(number, Outcome.failed(result))
        if stop:
            raise stop

    def _finish_lost(self, jobs: Sequence[tuple[int, list[str]]], reason: str, *, interrupted: bool) -> None:
        """Finish the trials of jobs that returned nothing: with the outcome a job wrote, else failed, to be retried."""
        for number, _ in jobs:
            self.budget.finish_lost(number, reason, interrupted=interrupted)

    def _launch(self, jobs: Sequence[tuple[int, list[str]]]) -> Sequence[JobReturn]:
        """One call of the launcher for each run of contiguous numbers: duplicates and other sweeps have the others.

        The fused launcher takes any numbers.
        """
        if launchers.is_fused(self.launcher):
            return list(self.launcher.fused.launch_jobs(jobs))  # type: ignore[attr-defined]
        returns: list[JobReturn] = []
        while jobs:
            first = jobs[0][0]
            contiguous = [job for place, job in enumerate(jobs) if job[0] == first + place]
            record = partial(self.budget.record_job, first)
            returns += slurm.launch(self.launcher, [overrides for _, overrides in contiguous], first, record)
            jobs = jobs[len(contiguous) :]
        return returns

    def _any_started(self) -> bool:
        """Whether any job of this sweep has reached its trial."""
        own = [t for t in self.budget.trials() if t.system_attrs.get(OWNER) == self.budget.owner]
        return self.any_job_returned or any("host" in trial.user_attrs for trial in own)

    def _overrides(self, trial: Trial) -> list[str] | None:
        """Draw the parameters of a trial. None: that failed, and so has the trial."""
        try:
            trial = self._drawn(trial)
            overrides = self.space.overrides(trial.params)
            if not self.slots.in_process:  # a config that does not compose must fail one trial, not a batch
                self.loader.load_sweep_config(self.config, overrides)
        except StorageLostError:
            raise
        except Exception as error:  # noqa: BLE001 - the user's function may raise anything: the trial has failed
            self.budget.tell(trial.number, Outcome.failed(error))
            return None
        if both := {name.lstrip("+") for name in trial.params} & self.space.fixed.keys():
            raise InputError(f"{', '.join(both)} is fixed, but custom_search_space searches it; leave one out")
        return overrides

    def _drawn(self, trial: Trial) -> Trial:
        """The trial with its parameters."""
        if self.mixed:
            trial.set_user_attr(MIXED, self.mixed)
        if trial.user_attrs.get("baseline"):
            trial = sampling.baseline_trial(trial, self.space, self.config)
        for name, distribution in self.space.distributions.items():
            sampling.suggest(trial, name, distribution)
        if isinstance(self.budget.study.sampler, GridSampler) and self._is_default(trial):
            trial.set_user_attr("baseline", True)  # a grid does not start with it
        if self.custom_space:
            for name, value in self.space.fixed_values().items():  # as hydra-optuna-sweeper does
                trial.set_user_attr(name, value)
            self.custom_space(self.config, trial)
        return trial

    def _is_default(self, trial: Trial) -> bool:
        """Whether a trial has the values of the composed config."""
        try:
            return all(self.space.default_value(self.config, name) == value for name, value in trial.params.items())
        except KeyError:
            return False


def move_aside(folder: Path) -> None:
    """Rename a folder that the study does not know: a power cut has undone the study's last commits."""
    if folder.exists():
        renamed = folder.with_name(f"{folder.name}-before-{time.strftime('%Y-%m-%d_%H-%M-%S')}")
        log.warning("%s belongs to a trial that the study does not know; renamed to %s", folder, renamed)
        folder.rename(renamed)
