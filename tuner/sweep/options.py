"""The options of a search, checked before its study is opened."""

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from tuner import InputError
from tuner.sweep import search_space
from tuner.sweep.config_cache import CachingConfigLoader
from tuner.sweep.search_space import SearchSpace
from tuner.sweep.settings import flat

log = logging.getLogger("tuner.sweep")
MOST = 20  # choices of a parameter that are tried before the search starts
LIMITS = {  # lowest and highest value
    "n_trials": (0, None),
    "n_jobs": (1, None),
    "max_failure_rate": (0, 1),
    "retries": (0, None),
    "storage_patience": (0, None),
}


def check_numbers(options: Mapping[str, float]) -> None:
    """Raises InputError for a number out of LIMITS.   options: by their keys in hydra.sweeper."""
    for key, value in options.items():
        lowest, highest = LIMITS[key]
        if value < lowest or (highest is not None and value > highest):
            limits = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
            raise InputError(f"hydra.sweeper.{key}={value} must be {limits}")


def check_subdir(config: DictConfig) -> None:
    """Raises InputError if all trials would have one folder."""
    subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index,call-overload]
    if "${" not in str(subdir):
        raise InputError(f"hydra.sweep.subdir={subdir} is one folder for all trials; include ${{hydra.job.num}}")


def check_composes(
    space: SearchSpace, config: DictConfig, loader: ConfigLoader, check: Callable[[DictConfig], object]
) -> None:
    """Raises InputError if no trial can run: a key may be misspelt, or all values of a parameter may break a rule.

    Warns of single values that break one.   check: raises InputError for a config that no job can run with.
    """
    _check_names(space, config)
    caching = CachingConfigLoader(loader)

    def refusal(params: Mapping[str, Any]) -> InputError | None:
        return _refusal(caching, config, space.overrides(params), check)

    ends = {name: search_space.ends(distribution)[:MOST] for name, distribution in space.distributions.items()}
    first_error = refusal({name: values[0] for name, values in ends.items()})
    if default_error := refusal({}):  # the searched values may be what it lacks
        if first_error:
            raise default_error
        return
    for name, values in ends.items():
        errors = [error for value in values if (error := _returned(refusal, {name: value}))]
        if len(errors) == len(values):
            raise errors[0]
        for error in errors:
            log.warning("some trials will fail: %s", error)


def _returned(function: Callable[[Any], InputError | None], argument: Any) -> InputError | None:
    """The error that a function returns or raises."""
    try:
        return function(argument)
    except InputError as error:
        return error


def _check_names(space: SearchSpace, config: DictConfig) -> None:
    plain = OmegaConf.to_container(config, resolve=False)
    known = [*config.hydra.runtime.choices, *(key for key, _ in flat(plain))]
    for name in space.distributions:
        if name not in known and name[0] != "+" and (close := difflib.get_close_matches(name, known, 1)):
            raise InputError(f"{name} is not a key of the config; did you mean {close[0]}? A new one: +{name}=...")


def _refusal(
    loader: CachingConfigLoader, config: DictConfig, overrides: list[str], check: Callable[[DictConfig], object]
) -> InputError | None:
    """What `check` says against a job with these overrides. Raises InputError if they do not compose."""
    try:
        job = loader.load_sweep_config(config, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(" ".join(str(error).split())) from error
    with read_write(job), open_dict(job):
        del job["hydra"]  # jobs do not get it
    try:
        check(job)
    except InputError as error:
        return error
    return None


def directions(direction: Any) -> list[str]:
    """minimize or maximize for each objective. direction: one or a list, as text or as upstream's enum.

    Raises InputError for another word.
    """
    each = [direction] if isinstance(direction, str) or not isinstance(direction, Sequence) else direction
    names = [item if isinstance(item, str) else getattr(item, "name", str(item)) for item in each]
    for name in names:
        if name not in ("minimize", "maximize"):
            raise InputError(f"hydra.sweeper.direction={name} must be minimize or maximize")
    if not names:
        raise InputError("hydra.sweeper.direction=[] must have a direction for each objective")
    return names


def warn_of_direction(goals: Sequence[str], objective: Any) -> None:
    """Warn of a direction that makes the worst trial the best.   objective: of tuner.train."""
    if "minimize" not in goals:
        return
    from tuner.runs.metrics import OBJECTIVES  # imports torch and scikit-learn, which other programs may not need

    wanted = ["maximize", "minimize"] if objective == "accuracy_and_cost" else ["maximize"]
    if objective in OBJECTIVES and list(goals) != wanted:
        message = "objective=%s is better the larger it is: direction=%s makes the worst trial the best; give %s"
        log.warning(message, objective, ",".join(goals), f"hydra.sweeper.direction=[{','.join(wanted)}]")
