"""Where the parameters of a trial come from: the sampler, the default config, and enqueued trials."""

import functools
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from hydra.errors import InstantiationException
from hydra.utils import execution_whitelist, instantiate
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler, GridSampler, TPESampler
from optuna.study import Study
from optuna.trial import Trial

from tuner import InputError, targets
from tuner.sweep import hydra_private, ranking, search_space
from tuner.sweep.bounded_tpe import BoundedTPE
from tuner.sweep.history import History
from tuner.sweep.optuna_private import FixedTrial, contains, storage_of
from tuner.sweep.search_space import SearchSpace

log = logging.getLogger("tuner.sweep")


def make_sampler(
    config: DictConfig,
    distributions: Mapping[str, BaseDistribution],
    *,
    objectives: int,
    earlier_sweeps: int,
    history: History,
) -> BaseSampler:
    """The sampler that a config names. A grid gets all points of the search space.

    history: of the study, of which TPE sees a part.
    earlier_sweeps: how many sweeps have joined the study before. It is added to the seed: the same seed would draw the
    same points again.
    Raises InputError if the sampler can't search this space, or not for so many objectives.
    """
    seed = OmegaConf.select(config, "seed")
    if seed is None or config._target_.endswith(("QMCSampler", "GridSampler")):  # their position is stored in the study
        earlier_sweeps = 0
    sampler = build(config, targets.SAMPLERS, **({"seed": seed + earlier_sweeps} if earlier_sweeps else {}))
    if isinstance(sampler, functools.partial) and sampler.func is GridSampler:
        return sampler({name: _points(name, distribution) for name, distribution in distributions.items()})
    if isinstance(sampler, CmaEsSampler) and objectives > 1:
        raise InputError(
            f"CMA-ES takes one objective, and this search has {objectives}: choose another hydra/sweeper/sampler"
        )
    return BoundedTPE(sampler, history) if isinstance(sampler, TPESampler) else sampler


def grid_size(distributions: Mapping[str, BaseDistribution]) -> int:
    """The number of points of a grid over a search space."""
    return math.prod(len(_points(name, distribution)) for name, distribution in distributions.items())


def _points(name: str, distribution: BaseDistribution) -> Sequence[Any]:
    try:
        return hydra_private.grid_points(distribution)
    except ValueError as error:
        raise InputError(
            f"a grid needs choices or ranges with a step, and {name} is {search_space.describe(distribution)}: "
            f"give it as '{name}=choice(A,B,C)', or choose another hydra/sweeper/sampler"
        ) from error


def enqueue(
    study: Study, entries: Sequence[Any], distributions: Mapping[str, BaseDistribution], *, custom_space: bool
) -> None:
    """Queue the first trials. An entry is a dict of parameters, or the name of a study whose best trial is taken.

    Parameters that the study has already are not queued again. custom_space: a custom_search_space may add parameters.
    Raises InputError for a parameter that is not searched, or a value outside of its range.
    """
    for entry in entries:
        if isinstance(entry, str):
            best = _best_params(entry, study)
            params = {
                name: value
                for name, value in best.items()
                if name in distributions and contains(distributions[name], value)
            }
            log.info("enqueued the best of study %s: %s", entry, params)
        elif not isinstance(entry, Mapping):
            raise InputError(f"enqueue: {entry} must be a dict of parameters, or the name of a study")
        else:
            params = {str(name): value for name, value in entry.items()}
            for name, value in params.items():
                if name in distributions and not contains(distributions[name], value):
                    raise InputError(
                        f"enqueue: {name}={value} is outside of {search_space.describe(distributions[name])}"
                    )
                if name not in distributions and not custom_space:
                    raise InputError(f"enqueue: {name} is not searched; searched are {', '.join(distributions)}")
        study.enqueue_trial(params, user_attrs={"enqueued": True}, skip_if_exists=True)


def _best_params(name: str, same_storage: Study) -> dict[str, Any]:
    store = storage_of(same_storage)
    names = optuna.get_all_study_names(store)
    if name not in names:
        raise InputError(f"enqueue: no study {name} in this storage; known: {', '.join(names)}")
    study = optuna.load_study(study_name=name, storage=store)
    best = ranking.best(study, study.get_trials(deepcopy=False))
    if best is None:
        raise InputError(f"enqueue: study {name} has no best trial: none is complete, or it has several objectives")
    return best.params


def suggest(trial: Trial, name: str, distribution: BaseDistribution) -> None:
    """Draw a parameter from its distribution."""
    if isinstance(distribution, FloatDistribution):
        trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    elif isinstance(distribution, IntDistribution):
        trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    else:
        assert isinstance(distribution, CategoricalDistribution)
        trial.suggest_categorical(name, distribution.choices)


def baseline_trial(trial: Trial, space: SearchSpace, config: DictConfig) -> Trial:
    """A trial that takes its parameters from the composed config. A value outside of the space is drawn instead."""

    def default_value(name: str, distribution: BaseDistribution) -> Any:
        try:
            value = space.default_value(config, name)
        except KeyError:
            value = "nothing"
        if contains(distribution, value):
            return value
        described = search_space.describe(distribution)
        log.info("trial %d draws %s: the default, %s, is not in %s", trial.number, name, value, described)
        trial.set_user_attr("baseline", False)
        raise LookupError(name)

    return FixedTrial(trial, default_value)


def build(config: DictConfig, trusted: tuple[str, ...], **options: Any) -> Any:
    """The sampler, pruner or function that a config names. Raises InputError for an argument that it can't take."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # the user chose it by name
            with execution_whitelist(trusted, reset=True):
                return instantiate(config, **options)
    except InstantiationException as error:
        raise InputError(" ".join(str(error).split())) from error
    except (TypeError, ValueError) as error:  # raised by Optuna
        reason = " ".join(str(error).split()).rstrip(".")
        keys = [str(key) for key in config if not str(key).startswith("_")]
        values = ", ".join(f"{key}={'null' if config[key] is None else config[key]}" for key in keys)
        group = hydra_private.full_key(config)
        raise InputError(f"{group}: {reason}; got {values}; set others with {group}.KEY=VALUE") from error
