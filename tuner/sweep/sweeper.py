"""The sweep: open the study, run its trials, retrain the best configuration, write the results."""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from optuna.samplers import GridSampler
from optuna.trial import Trial, TrialState

from tuner import InputError, artifacts, earlier, targets
from tuner.files import disk_error
from tuner.rules import FOLDER_NAME
from tuner.sweep import (
    WORKER,
    hydra_private,
    launchers,
    options,
    password_config,
    ranking,
    report,
    sampling,
    search_space,
    settings,
    stopping,
    storage,
    workers,
)
from tuner.sweep.budget import LOCKS, Budget, allowed_failures, new_owner
from tuner.sweep.config_cache import CachingConfigLoader
from tuner.sweep.job import Job
from tuner.sweep.progress import Progress
from tuner.sweep.retraining import Retraining
from tuner.sweep.storage_files import Place, StorageLostError
from tuner.sweep.study_folder import name_objectives, open_study
from tuner.sweep.trial import Shared, stages_of
from tuner.sweep.trial_loop import Monitor, TrialLoop

log = logging.getLogger("tuner.sweep")


class AsyncSweeper:
    """A sweeper with hydra-optuna-sweeper's options, and those of tuner.sweep.plugin.TunerSweeperConf.

    What was done is recorded in the study alone. Any number of sweeps share its budget, at once or one after another,
    on any machine that reaches its storage.
    """

    def __init__(
        self,
        *,
        sampler: DictConfig,
        direction: Any,
        storage: Any,
        storage_patience: float,
        study_name: str | None,
        n_trials: int,
        n_jobs: int,
        workers: int | str,
        max_failure_rate: float,
        custom_search_space: str | None,
        params: Mapping[str, str] | None,
        pruner: DictConfig,
        fail_fast: bool,
        retries: int,
        baseline: bool,
        enqueue: Sequence[Any],
        irrelevant: Sequence[str],
        study_mixed: bool,
        artifacts: str | None,
        timeout: float | str | None,
        trial_timeout: float | str | None,
        target: float | None,
        stop_when_flat: int | None,
    ):
        self.sampler, self.pruner_config, self.params = sampler, pruner, params or {}
        self.direction, self.storage, self.study_name = direction, storage, study_name
        self.n_trials, self.n_jobs, self.workers, self.retries = n_trials, n_jobs, workers, retries
        self.storage_patience = storage_patience
        self.max_failure_rate = 0.0 if fail_fast else max_failure_rate
        self.custom_search_space, self.baseline, self.enqueue = custom_search_space, baseline, enqueue
        self.irrelevant, self.study_mixed = list(irrelevant), study_mixed
        self.stop_options = {"timeout": timeout, "trial_timeout": trial_timeout}
        self.stop_options |= {"target": target, "stop_when_flat": stop_when_flat}
        self.artifacts = artifacts
        self.copies_away = False  # the place of the run folders' copies cannot be read
        self.missing: InputError | None = None  # why the best trial is not retrained

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials that the study lacks, then retrain its best configuration.

        Exits with 130 if interrupted, and with 1 if too many trials failed, none was completed, or a disk cannot be
        written. That does not count as a failed trial.
        """
        try:
            self._sweep(arguments)
        except StorageLostError as error:
            log.error("%s, then continue with: %s", error, self._resume_command())
            sys.exit(1)
        except InputError as error:
            log.error("%s", error)
            sys.exit(1)
        except KeyboardInterrupt:  # before or after the trials
            log.error("interrupted; continue with: %s", self._resume_command())
            sys.exit(130)
        except Exception as error:
            reason = disk_error(error)
            if reason is None:
                raise
            message = "a disk is full or cannot be written (%s): change that, then continue with: %s"
            log.error(message, reason, self._resume_command())
            sys.exit(1)

    def _resume_command(self) -> str:
        return (
            report.resume_command(self.config, self.study_name, self.shown) if self.study_name else "the same command"
        )

    def _sweep(self, arguments: list[str]) -> None:
        self._check_options()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.spec = storage.resolve(self.storage)
        secret_keys = password_config.keys_with_password(self.config, self.spec)
        self.shown = password_config.without_password(sys.argv[1:], secret_keys, self.spec)
        arguments = password_config.keep_off_disk(self.config, arguments, self.spec)
        self.custom_space = self._load_custom_space()
        overrides = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        self.space = search_space.parse(overrides, self.hydra_context.config_loader)
        self._fix_name()
        stages = stages_of(self.task_function)
        check = stages.check if stages else lambda _cfg: None
        options.check_composes(self.space, self.config, self.hydra_context.config_loader, check)
        with nullcontext() if self.config.hydra.verbose else launchers.quiet_logs():
            self._open_study()
            with self.budget.alive():
                with self.budget.lock:  # no other sweep on this study is here at the same time
                    self._compare_search()
                    self._prepare_jobs()
                    self._prepare_study()
                    self._write_results()  # from now on, the folder says where the study is kept
                self._announce()
                try:
                    self._run()
                except KeyboardInterrupt:
                    self.monitor.interrupted.set()
                    hydra_private.configure_log(self.hydra_context, self.config)  # the log was the interrupted job's
                    self.budget.release()  # before the results are written
                except StorageLostError:
                    raise
                except BaseException:
                    self._write_results()
                    raise
                self._finish()

    def _fix_name(self) -> None:
        """Give the folder and the jobs the study's name: ${now:...} in it is another time wherever it is resolved."""
        given = OmegaConf.to_container(self.config.hydra.sweeper, resolve=False)
        reference = re.fullmatch(r"\$\{(\w+)\}", str(given["study_name"] if isinstance(given, dict) else ""))
        if reference and self.study_name:
            key = reference[1]
            with read_write(self.config), open_dict(self.config):
                self.config[key] = self.study_name
            self.space.fixed[key] = f"{key}={search_space.quoted(self.study_name)}"

    def _check_options(self) -> None:
        options.check_numbers({key: getattr(self, key) for key in options.LIMITS})
        options.check_subdir(self.config)
        self.artifacts = artifacts.resolved(self.artifacts)
        if self.artifacts:
            artifacts.check(self.artifacts)
        retrains, compares = (bool(OmegaConf.select(self.config, f"final.{key}")) for key in ("seeds", "default"))
        objectives = len(options.directions(self.direction))
        self.rules = stopping.of_options(self.stop_options, objectives=objectives, last_runs=retrains * (1 + compares))
        if self.study_name and OmegaConf.select(self.config, "study") == self.study_name:
            FOLDER_NAME.check("study", self.study_name)

    def _load_custom_space(self) -> Callable[[DictConfig, Trial], None] | None:
        if not self.custom_search_space:
            return None
        config = OmegaConf.create({"_target_": earlier.target(self.custom_search_space), "_partial_": True})
        function: Callable[[DictConfig, Trial], None] = sampling.build(config, self.hydra_context.execution_whitelist)
        return function

    # 1. The study

    def _open_study(self) -> None:
        self.pruner = sampling.build(self.pruner_config, targets.PRUNERS)
        folder = Path(self.config.hydra.sweep.dir).absolute()
        goals = options.directions(self.direction)
        if stages_of(self.task_function):
            options.warn_of_direction(goals, OmegaConf.select(self.config, "objective"))
        is_worker = WORKER in os.environ  # what starts workers may not see that one has been refused
        store = storage.connect(self.spec, patience=self.storage_patience, joining=is_worker)
        with storage.damage_named(self.spec):
            self.study, self.folder = open_study(self.study_name, store, goals, folder)
            self.study.get_trials(deepcopy=False)  # all that was written can be read
        self.study_name = self.study.study_name
        self.study.pruner = self.pruner
        locks = self.folder / LOCKS
        locks.mkdir(exist_ok=True)
        is_whole = not (self.custom_space or self.study_mixed)
        self.budget = Budget(
            self.study,
            locks,
            new_owner(),
            n_trials=self.n_trials,
            retries=self.retries,
            rules=self.rules,
            space=self.space.distributions if is_whole else None,
        )

    def _compare_search(self) -> None:
        """Compare the search with the one that the study was started with, and record what is new."""
        attributes = self.study.user_attrs
        started = any(trial.state != TrialState.WAITING for trial in self.budget.trials())
        if "space" in attributes and started:
            search_space.check_unchanged(attributes["space"], self.space.distributions, self.study.study_name)
        now = settings.settings_of(self.config, [*self.irrelevant, *self.space.names()], resolve=False)
        before = attributes.get(settings.SETTINGS) if started else None
        self.mixed = settings.compare(self.study.study_name, before, now, self.space.names(), self.study_mixed)
        record: dict[str, Any] = {"space": search_space.to_json(self.space.distributions)}
        if not self.mixed:
            record |= {settings.SETTINGS: now, "fixed": self.space.fixed}
        if not self.mixed and WORKER not in os.environ:
            record[settings.COMMAND] = list(self.shown)
        for key, value in record.items():
            if attributes.get(key) != value:
                self.study.set_user_attr(key, value)

    def _prepare_study(self) -> None:
        """Give the study its names and sampler, recover what killed sweeps left, and queue the first trials."""
        name_objectives(self.study, OmegaConf.select(self.config, "objective"))
        earlier_sweeps = self.study.user_attrs.get("sweeps", 0)
        distributions, objectives = self.space.distributions, len(self.study.directions)
        own = {"objectives": objectives, "earlier_sweeps": earlier_sweeps, "history": self.budget.history}
        self.study.sampler = sampling.make_sampler(self.sampler, distributions, **own)
        self.study.set_user_attr("sweeps", earlier_sweeps + 1)
        grid = isinstance(self.study.sampler, GridSampler)
        if grid and self.enqueue:
            raise InputError("enqueue: a grid runs only its own points; leave enqueue out, or take another sampler")
        if grid:
            self.budget.n_trials = min(self.n_trials, sampling.grid_size(distributions))
        epochs = OmegaConf.select(self.config, "epochs")
        epochs = epochs if isinstance(epochs, int) and "epochs" not in self.space.distributions else None
        progress = Progress(self.budget.history, self.budget.n_trials, self.rules, epochs)
        limit = allowed_failures(self.max_failure_rate, self.budget.n_trials)
        self.monitor = Monitor(self.budget, progress, limit)
        self.budget.on_trial_end = self.monitor.trial_ended
        self.budget.recover()
        if self.baseline and not grid and not self.budget.trials():
            self.study.enqueue_trial({}, user_attrs={"baseline": True})
        sampling.enqueue(self.study, self.enqueue, distributions, custom_space=self.custom_space is not None)

    def _prepare_jobs(self) -> None:
        """Jobs get the study's folder: they compose their configs again, from these overrides."""
        with read_write(self.config.hydra), open_dict(self.config.hydra):
            self.config.hydra.sweep.dir = str(self.folder)
            overrides: Any = OmegaConf.to_container(self.config.hydra.overrides.hydra, resolve=False)
            overrides.append(f"hydra.sweep.dir={search_space.quoted(str(self.folder))}")
            self.config.hydra.overrides.hydra = overrides
        self.loader: Any = CachingConfigLoader(self.hydra_context.config_loader)
        objectives, name, shared = len(self.study.directions), self.study.study_name, self._shared()
        file = storage.file_of(self.spec) if self.spec else None
        places = [Place.of(path) for path in (self.folder, file) if path]
        own = self.pruner, shared, self.storage_patience, places, self.artifacts, self.study
        self.job = Job(self.task_function, self.spec, name, objectives, *own)
        self.launcher = self._launcher(self.job)
        self.job.has_password = launchers.sends_jobs_in_memory(self.launcher)
        self.budget.jobs_outlive = launchers.jobs_outlive_sweep(self.launcher)
        self.retraining = Retraining(
            self.config,
            self.loader,
            shared,
            self.budget,
            self.space,
            self.folder,
            self.spec,
            self.task_function,
            self._launcher,
            self.artifacts,
        )

    def _shared(self) -> Shared:
        attributes = self.study.user_attrs.items()
        images = {key: value for key, value in attributes if key.startswith(settings.IMAGES)}
        return Shared(self.irrelevant, images, self.study_mixed, self.rules)

    def _launcher(self, task: TaskFunction, here: bool = False) -> Launcher:
        """The launcher of the config.   here: one that runs jobs in this process."""
        context = replace(self.hydra_context, config_loader=self.loader)
        if here:
            launcher = hydra_private.BasicLauncher()
            launcher.setup(config=self.config, hydra_context=context, task_function=task)
            return launcher
        return Plugins.instance().instantiate_launcher(config=self.config, hydra_context=context, task_function=task)

    # 2. The trials, and the retraining of the best

    def _announce(self) -> None:
        self.n_workers = workers.count(self.workers, self.config, self.launcher, in_memory=self.spec is None)
        if launchers.is_fused(self.launcher):
            self.launcher.fused.workers = self.n_workers  # type: ignore[attr-defined]
        self.slots = launchers.slots(self.launcher, self.n_jobs)
        done, n_trials = self.budget.history.look().counted().total(), self.budget.n_trials
        verb = "all of its" if done >= n_trials else "continuing after" if done else "running"
        count = f"{done} of {n_trials}" if 0 < done < n_trials else n_trials
        name, place = self.study.study_name, storage.redacted(self.spec) or "memory"
        log.info("study %s in %s: %s %s trials, in %s", name, place, verb, count, self.folder)
        if done >= n_trials:
            return
        if not self.budget.has_room():
            if stopped := self.budget.stopped():
                log.info("no more trials, %s", stopping.because(stopped, "hydra.sweeper."))
            return
        if self.spec is not None:
            log.info("if it is stopped, continue with: %s", self._resume_command())
        elif not self.slots.in_process:
            log.warning("the study is in memory, which jobs in other processes can't reach: no trial is pruned")
        if self.slots.why:
            log.info("n_jobs=%d: %s", self.n_jobs, self.slots.why)

    def _run(self) -> None:
        if not (self.budget.has_room() or self.budget.of_others() or self.retraining.left()):
            return
        loop = TrialLoop(
            self.monitor,
            self.config,
            self.loader,
            self.launcher,
            self.slots,
            self.space,
            self.custom_space,
            self.folder,
            self.mixed,
            reuses=not self.study_mixed,  # or the images may be others
        )
        # Ray installs signal handlers when it starts, so `interruptible` comes second
        number = self.n_workers if self.budget.has_room() else 1
        file = storage.file_of(self.spec) if self.spec else None
        needs = launchers.Needs(self.folder, file, settings.targets_of(self.config), self.artifacts)
        processes = launchers.workers_end_with_sweep(self.launcher, self.spec, number, needs)
        with processes as see_folder, interruptible(self.slots):
            self.job.places = self.job.places if see_folder else ()
            with workers.beside(number, self._overrides_of_workers(), self.folder):
                loop.run()
            if not self.monitor.stopping.is_set():
                self._bring_run_folders()
                self.retraining.here = not see_folder
                try:
                    self.retraining.run()
                except InputError as error:  # reported after the summary of the trials, which are all there
                    self.missing = error

    def _bring_run_folders(self) -> None:
        """Bring the run folders here that other machines have copied to `artifacts`."""
        if WORKER not in os.environ and not self.copies_away:
            self.copies_away = not artifacts.bring(artifacts.of_study(self.study), self.folder)

    def _overrides_of_workers(self) -> list[str]:
        """What a worker does otherwise than this sweep: it retrains nothing, and has no workers itself."""
        name = self.study.study_name
        lines = [f"{report.name_key(self.config, name)}={search_space.quoted(name)}", "hydra.sweeper.workers=1"]
        if launchers.is_fused(self.launcher):
            lines.append(f"hydra.launcher.stack={self.slots.batch}")
        return [*lines, "final.seeds=0"] if OmegaConf.select(self.config, "final.seeds") is not None else lines

    # 3. The results

    def _write_results(self) -> dict[str, Any]:
        counted = self.budget.history.look().counted().total()
        stopped = None if counted >= self.budget.n_trials else self.budget.stopped()
        if stopped != self.study.user_attrs.get(stopping.STOPPED):
            self.study.set_user_attr(stopping.STOPPED, stopped)
        return report.write(self.study, self.budget.trials(), self.folder, self.spec, stopped)

    def _finish(self) -> None:
        if not self.monitor.interrupted.is_set():
            self._bring_run_folders()
        results = self._write_results()
        if self.monitor.interrupted.is_set():
            log.info("interrupted with %s", self.monitor.progress.line())
            if self.spec is not None:
                log.info("continue with: %s", self._resume_command())
            sys.exit(130)
        if self.monitor.stopping.is_set():
            failures, allowed = self.budget.failures(), self.monitor.allowed_failures
            log.error("stopped: %d trials failed, and %d may", failures, allowed)
            if failure := self.monitor.last_failure:
                sys.stderr.write(failure.traceback or f"{failure.error}\n")
        elif others := self.budget.running():
            log.info("%d trials still run in other sweeps; the last of these sweeps writes the results", others)
            if strangers := self.budget.without_owner():
                log.warning(
                    "trials %s are run by a program that is not a sweep; if it was killed: optuna tell --study-name %s "
                    "--trial-number NUMBER --state fail --storage URL",
                    *(strangers, self.study.study_name),
                )
            return
        log.info("%s", report.summary(results, self.folder))
        if self.missing:
            raise self.missing
        if self.monitor.stopping.is_set() or not ranking.complete(self.budget.trials()):
            sys.exit(1)


@contextmanager
def interruptible(slots: launchers.Slots) -> Iterator[None]:
    """Treat SIGTERM and SIGUSR1, which clusters send before SIGKILL, as Ctrl-C.

    Not with forked workers: their pool ends them with SIGTERM, and they inherit this handler, which can lose a signal
    that comes during the fork. The pool would wait forever. The study can be continued all the same.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    if slots.forks or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
