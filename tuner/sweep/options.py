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
from tuner.sweep.search_space import SearchSpace
from tuner.sweep.settings import flat

log = logging.getLogger("tuner.sweep")
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
    """Raises InputError if the first value of each searched parameter gives no config: a key may be misspelt.

    check: raises InputError for a config that no job can run with. It is told if it refuses that one and the default.
    """
    overrides = space.overrides({name: search_space.first(d) for name, d in space.distributions.items()})
    plain = OmegaConf.to_container(config, resolve=False)
    known = [*config.hydra.runtime.choices, *(key for key, _ in flat(plain))]
    for name in space.distributions:
        if name not in known and name[0] != "+" and (close := difflib.get_close_matches(name, known, 1)):
            raise InputError(f"{name} is not a key of the config; did you mean {close[0]}? A new one: +{name}=...")
    try:
        _check(loader.load_sweep_config(config, overrides), check)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(" ".join(str(error).split())) from error
    except InputError:  # the values of another trial may be valid
        _check(loader.load_sweep_config(config, list(space.fixed.values())), check)


def _check(config: DictConfig, check: Callable[[DictConfig], object]) -> None:
    with read_write(config), open_dict(config):
        del config["hydra"]  # jobs do not get it
    check(config)


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
