"""All uses of undocumented names of Hydra, OmegaConf and their plugins, which may change with any release.

Each function has a contract test in tests/sweep/test_hydra_private.py.
"""

import functools
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal import utils as internal_utils
from hydra._internal.core_plugins.basic_launcher import BasicLauncher as BasicLauncher
from hydra.core import utils
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution

BASIC_LAUNCHER_LOG = "hydra._internal.core_plugins.basic_launcher"  # the name of the basic launcher's logger

# Jobs


def setup_globals() -> None:
    """Register Hydra's resolvers (`now`, `hydra` ...), as a launcher must before it composes."""
    utils.setup_globals()


def configure_log(context: HydraContext, config: DictConfig) -> None:
    """Set up the log of the sweep. Each job replaces it with its own."""
    hydra = config.hydra
    utils.configure_log(hydra.hydra_logging, hydra.verbose, execution_whitelist=context.execution_whitelist)


def filter_overrides(overrides: Sequence[str]) -> Sequence[str]:
    """The overrides that are not Hydra's own."""
    return utils.filter_overrides(overrides)


def run_job(context: HydraContext, task_function: TaskFunction, config: DictConfig) -> JobReturn:
    """Run one job of a multirun in this process, with its own folder, log and callbacks."""
    return utils.run_job(
        task_function=task_function,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
        hydra_context=context,
    )


def job_files(config: DictConfig) -> dict[str, str]:
    """What Hydra writes into the folder of the running job: path -> YAML.   config: of the task function."""
    hydra: Any = HydraConfig.instance().cfg
    parts = {"config": config, "hydra": hydra, "overrides": hydra.hydra.overrides.task}
    return {f".hydra/{name}.yaml": OmegaConf.to_yaml(part) for name, part in parts.items()}


@contextmanager
def files_in_one_line() -> Iterator[None]:
    """Hydra reports a folder that can't be made, or another file that can't be used, in a line, without a traceback."""

    def run_and_report(func: Any) -> Any:
        def run() -> Any:
            try:
                return func()
            except OSError as error:
                if error.filename is None:
                    raise
                raise CompactHydraException(f"{error.filename} cannot be used: {error.strerror}") from error

        return before(run)

    before = internal_utils.run_and_report
    internal_utils.run_and_report = run_and_report
    try:
        yield
    finally:
        internal_utils.run_and_report = before


def job_result(job: JobReturn) -> Any:
    """The return value of a job, or the exception that ended it. JobReturn.return_value would raise and print it."""
    return job._return_value


_JOBS_OF_RAY: dict[int, Any] = {}  # thread -> Ray's reference to the job that it waits for


def follow_jobs_of_ray() -> None:
    """Remember the jobs that hydra-ray-launcher starts: it waits for them, and does not say which they are."""
    from hydra_plugins.hydra_ray_launcher import _core

    start = _core.launch_job_on_ray  # type: ignore[attr-defined]
    if hasattr(start, "__wrapped__"):
        return

    @functools.wraps(start)
    def followed(*arguments: Any, **options: Any) -> Any:
        job = start(*arguments, **options)
        _JOBS_OF_RAY[threading.get_ident()] = job
        return job

    _core.launch_job_on_ray = followed  # type: ignore[attr-defined]


def cancel_jobs_of_ray() -> None:
    """End the jobs that threads wait for, on whichever node. Those that have ended are not touched."""
    if _JOBS_OF_RAY:
        import ray

        for job in list(_JOBS_OF_RAY.values()):
            ray.cancel(job, force=True)


def stop_joblib_workers() -> None:
    """End the worker processes that joblib keeps for later calls, if it has any."""
    if "joblib.externals.loky" not in sys.modules:
        return
    from joblib.externals.loky import reusable_executor

    if reusable_executor._executor is not None:
        reusable_executor._executor.shutdown(wait=True)


def end_messages_of_joblib_workers() -> None:
    """Let joblib see that its workers, which were killed, write no more.

    Its thread would wait for ever for the rest of a message that a worker was writing, as this process, too, holds the
    end of the pipe into which they write.
    """
    if "joblib.externals.loky" not in sys.modules:
        return
    from joblib.externals.loky import reusable_executor

    queue = getattr(reusable_executor._executor, "_result_queue", None)  # None without workers, or after their end
    if queue is not None:
        queue._writer.close()


# Overrides


def parse_overrides(lines: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Parse overrides such as x=1, +db=pg, ~y or z=choice(1,2). loader: needed for glob(), which lists a group."""
    return OverridesParser.create(config_loader=loader).parse_overrides(list(lines))


def set_values(config: DictConfig, overrides: list[Override]) -> None:
    """Set parsed overrides of values, not of groups, in a composed config."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    ConfigLoaderImpl._apply_overrides_to_config(overrides, config)


def element_value(element: Any) -> Any:
    """The Python value of an element of a parsed choice or range, where strings may be a QuotedString."""
    return Override._convert_value(element)


def element_text(element: Any) -> str:
    """A Python value, or an element of a parsed choice, as the text after the `=` of an override."""
    return Override._get_value_element_as_str(element)


def full_key(config: DictConfig) -> str:
    """The key of a config in its root config, such as hydra.sweeper.pruner."""
    return config._get_full_key(None)


# hydra-optuna-sweeper


def distribution(override: Override) -> BaseDistribution:
    """Optuna's distribution for a parsed range, interval or choice. Raises ValueError if Optuna can't search it."""
    from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override

    searched: BaseDistribution = create_optuna_distribution_from_override(override)
    return searched


def grid_points(searched: BaseDistribution) -> Sequence[Any]:
    """The values that a grid takes from a distribution. Raises ValueError for a range without a step."""
    from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl

    points: Sequence[Any] = OptunaSweeperImpl._to_grid_sampler_choices(searched)
    return points
