"""Hydra plugins and their config schemas: `hydra/launcher=fused`, and `hydra/sweeper=tuner`, which extends upstream."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_optuna_sweeper.config import OptunaSweeperConf
from omegaconf import MISSING, DictConfig

from tuner.sweep import passwords


@dataclass
class NopPruner:
    """Prunes no trial."""

    _target_: str = "optuna.pruners.NopPruner"


@dataclass
class MedianPruner:
    """Prunes a trial whose best value so far is worse than the median of the other trials at the same step."""

    _target_: str = "optuna.pruners.MedianPruner"
    n_startup_trials: int = 5
    n_warmup_steps: int = 0
    interval_steps: int = 1
    n_min_trials: int = 1


@dataclass
class PercentilePruner(MedianPruner):
    """Prunes a trial whose best value so far is outside the best `percentile` percent at the same step."""

    _target_: str = "optuna.pruners.PercentilePruner"
    percentile: float = 25.0


@dataclass
class SuccessiveHalvingPruner:
    """Asynchronous successive halving: each rung keeps the best 1 / reduction_factor. Li et al., arXiv:1810.05934."""

    _target_: str = "optuna.pruners.SuccessiveHalvingPruner"
    min_resource: Any = "auto"  # epochs before the first rung; auto: by the first trials
    reduction_factor: int = 4  # one of so many trials passes a rung
    min_early_stopping_rate: int = 0  # rungs that are left out at the start
    bootstrap_count: int = 0  # trials that a rung waits for, before one passes it


@dataclass
class HyperbandPruner:
    """Successive halving with several minimum resources at once. Li et al., arXiv:1603.06560."""

    _target_: str = "optuna.pruners.HyperbandPruner"
    min_resource: int = 1  # epochs before the first rung
    max_resource: Any = "auto"  # epochs of a whole trial; auto: by the first complete ones
    reduction_factor: int = 3  # one of so many trials passes a rung
    bootstrap_count: int = 0  # trials that a rung waits for, before one passes it


@dataclass
class WilcoxonPruner:
    """Prunes a trial that a Wilcoxon signed-rank test finds worse than the best, paired by step."""

    _target_: str = "optuna.pruners.WilcoxonPruner"
    p_threshold: float = 0.1  # a trial with a smaller p-value is pruned
    n_startup_steps: int = 2  # steps before a trial is pruned


@dataclass
class ThresholdPruner:
    """Prunes a trial that reports NaN or a value outside lower..upper."""

    _target_: str = "optuna.pruners.ThresholdPruner"
    lower: float | None = None  # a trial that reports less is pruned
    upper: float | None = None  # a trial that reports more is pruned
    n_warmup_steps: int = 0  # epochs of a trial, before it is pruned
    interval_steps: int = 1  # epochs between two looks


@dataclass
class PatientPruner:
    """Prunes after `patience` steps without improvement, if `wrapped_pruner` (null: always) would prune, too."""

    _target_: str = "optuna.pruners.PatientPruner"
    wrapped_pruner: Any = None  # another pruner that must agree; null: none
    patience: int = 5  # epochs without improvement
    min_delta: float = 0.0  # the least that counts as one


PRUNERS = {
    "none": NopPruner,
    "median": MedianPruner,
    "percentile": PercentilePruner,
    "successive_halving": SuccessiveHalvingPruner,
    "hyperband": HyperbandPruner,
    "wilcoxon": WilcoxonPruner,
    "threshold": ThresholdPruner,
    "patient": PatientPruner,
}


@dataclass
class TunerSweeperConf(OptunaSweeperConf):
    """hydra-optuna-sweeper's keys, with safer defaults, and some more."""

    _target_: str = "tuner.sweep.plugin.TunerSweeper"
    defaults: list[Any] = field(default_factory=lambda: [{"sampler": "tpe"}, {"pruner": "none"}])
    pruner: Any = MISSING  # not a dataclass, because it may come from a YAML file
    # sqlite:///FILE, journal:///FILE, or any database URL; null: in memory, which cannot be resumed or inspected
    storage: Any = "sqlite:///multirun/optuna.db"
    # how long a call may wait for a database server that does not answer, in seconds; then the sweep stops
    storage_patience: float = 600.0
    # number of jobs that run at once, if the launcher can
    n_jobs: int = 1
    # processes that run trials side by side with the launchers basic and fused; auto: one for each GPU
    workers: Any = "auto"
    # the sweep stops when more than this share of n_trials has failed; 0: at the first failure
    max_failure_rate: float = 0.5
    # the same as max_failure_rate: 0
    fail_fast: bool = False
    # how often a trial whose process was killed is retried before it counts as failed
    retries: int = 2
    # the search ends after so much time in which trials run, as 2h: trials end at their next epoch, and the time of the
    # last run is kept free
    timeout: Any = None
    # a trial ends after so much time, as if pruned
    trial_timeout: Any = None
    # the search ends with a value as good as this
    target: float | None = None
    # the search ends after so many trials in a row without a better one
    stop_when_flat: int | None = None
    # whether trial 0 uses the config without any searched values
    baseline: bool = True
    # the first trials: dicts of parameters, or names of studies in the same storage, whose best trial is used
    enqueue: list[Any] = field(default_factory=list)
    # keys and groups that do not affect the objective: they may be others when a study is continued
    irrelevant: list[str] = field(
        default_factory=lambda: [
            *("name", "study", "study_mixed", "final", "logger", "cache_dir", "cache_limit", "device", "test", "plots"),
            *("artifacts",),
            *("data.cache_dir", "data.cache_limit"),
            *("data.root", "data.path", "data.test_path"),  # hashes of the images are compared
        ]
    )
    # a folder that all machines reach, or a URL of fsspec: run folders are copied there before their outcomes are told
    artifacts: str | None = None
    # continue a study with other settings or images: its new trials are marked, and no result counts them
    study_mixed: bool = False


class TunerSweeper(Sweeper):
    """The sweeper for Hydra. tuner.sweep.sweeper is imported only when a sweep starts."""

    def __init__(self, **options: Any):
        from tuner.sweep.sweeper import AsyncSweeper

        self.sweeper = AsyncSweeper(**options)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Prepare the sweep. Hydra calls this once, before `sweep`."""
        self.sweeper.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep that the command-line overrides describe. Returns what AsyncSweeper.sweep returns."""
        return self.sweeper.sweep(arguments)


@dataclass
class FusedLauncherConf:
    """The keys of hydra/launcher=fused."""

    _target_: str = "tuner.sweep.plugin.FusedLauncher"
    # the largest number of trials that train together; auto: by the device
    stack: Any = "auto"


class FusedLauncher(Launcher):
    """The launcher for Hydra. tuner.sweep.fused is imported only when jobs are launched."""

    def __init__(self, stack: int | str):
        from tuner.sweep.fused import Fused

        self.fused = Fused(stack)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Prepare launches. Raises InputError if `stack` is neither auto nor a whole number of at least 1."""
        self.fused.setup(hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs with the numbers initial_job_idx, + 1, ... Returns a JobReturn per job, in order."""
        return self.fused.launch(job_overrides, initial_job_idx)


def store(name: str) -> None:
    """Register the sweeper with Hydra as `hydra/sweeper=NAME`."""
    ConfigStore.instance().store(
        group="hydra/sweeper", name=name, node=TunerSweeperConf, provider="tuner", replace=True
    )


def register() -> None:
    """Register the plugins for tuner's own commands, installed or not; `hydra/sweeper=optuna` is then ours."""
    Plugins.instance().register(TunerSweeper)
    Plugins.instance().register(FusedLauncher)
    store("optuna")


logging.getLogger("hydra._internal.hydra").addFilter(passwords.Filter())  # before Hydra logs anything
store("tuner")
for _name, _node in PRUNERS.items():
    ConfigStore.instance().store(group="hydra/sweeper/pruner", name=_name, node=_node, provider="tuner", replace=True)
ConfigStore.instance().store(
    group="hydra/launcher", name="fused", node=FusedLauncherConf, provider="tuner", replace=True
)
