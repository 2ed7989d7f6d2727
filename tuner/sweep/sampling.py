"""Where a trial's parameters come from: the sampler, the default config, and the trials to begin with."""

import functools
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler, GridSampler
from optuna.study import Study
from optuna.trial import Trial

from tuner import InputError
from tuner.sweep import hydra_private, ranking, space
from tuner.sweep.optuna_private import FixedTrial, contains, storage_of

log = logging.getLogger("tuner.sweep")
SAMPLERS = ("hydra_plugins.hydra_optuna_sweeper.*", "optuna.samplers.*")
PRUNERS = ("optuna.pruners.*",)


def make_sampler(
    config: DictConfig, distributions: Mapping[str, BaseDistribution], *, objectives: int, joined: int
) -> BaseSampler:
    """The sampler that a config names; a grid's is that of the whole space.

    joined: the sweeps on the study before this one. A seed grows by them, or the same points would come again.
    Raises InputError where it can't search this space, or for so many objectives.
    """
    seed = OmegaConf.select(config, "seed")
    if seed is None or config._target_.endswith(("QMCSampler", "GridSampler")):  # their place in one order is stored
        joined = 0
    sampler = made(config, SAMPLERS, **({"seed": seed + joined} if joined else {}))
    if isinstance(sampler, functools.partial) and sampler.func is GridSampler:
        return sampler({name: _points(name, distribution) for name, distribution in distributions.items()})
    if isinstance(sampler, CmaEsSampler) and objectives > 1:
        raise InputError(
            f"CMA-ES has one objective, and this search {objectives}: choose another hydra/sweeper/sampler"
        )
    return sampler


def grid_size(distributions: Mapping[str, BaseDistribution]) -> int:
    """The number of points of a grid over a search space."""
    return math.prod(len(_points(name, distribution)) for name, distribution in distributions.items())


def _points(name: str, distribution: BaseDistribution) -> Sequence[Any]:
    try:
        return hydra_private.grid_points(distribution)
    except ValueError as error:
        raise InputError(
            f"a grid needs choices or ranges with a step, and {name} is {space.words(distribution)}: give it as "
            f"'{name}=choice(A,B,C)', or choose another hydra/sweeper/sampler"
        ) from error


def enqueue(
    study: Study, wishes: Sequence[Any], searched: Mapping[str, BaseDistribution], more_is_searched: bool
) -> None:
    """Trials to begin with: dicts of parameters, or names of studies whose best one is taken.

    Those that the study has already are not added again. Raises InputError for a parameter that is not searched, or a
    value outside of its space.
    """
    for wish in wishes:
        if isinstance(wish, str):
            best = _best_of(wish, study)
            params = {
                name: value for name, value in best.items() if name in searched and contains(searched[name], value)
            }
            log.info("enqueued the best of study %s: %s", wish, params)
        elif not isinstance(wish, Mapping):
            raise InputError(f"enqueue: {wish} must be a dict of parameters, or the name of a study")
        else:
            params = {str(name): value for name, value in wish.items()}
            for name, value in params.items():
                if name in searched and not contains(searched[name], value):
                    raise InputError(f"enqueue: {name}={value} is outside of {space.words(searched[name])}")
                if name not in searched and not more_is_searched:
                    raise InputError(f"enqueue: {name} is not searched; searched are {', '.join(searched)}")
        study.enqueue_trial(params, user_attrs={"enqueued": True}, skip_if_exists=True)


def _best_of(name: str, beside: Study) -> dict[str, Any]:
    known = optuna.get_all_study_names(storage_of(beside))
    if name not in known:
        raise InputError(f"enqueue: there is no study {name} in this storage; known: {', '.join(known)}")
    study = optuna.load_study(study_name=name, storage=storage_of(beside))
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


def baseline(trial: Trial, searched: space.Space, config: DictConfig) -> Trial:
    """The trial that takes each parameter's value from the composed config, where the space has that value."""

    def choose(name: str, distribution: BaseDistribution) -> Any:
        try:
            value = searched.default(config, name)
        except KeyError:
            value = "nothing"
        if contains(distribution, value):
            return value
        of = space.words(distribution)
        log.info("trial %d draws %s: the default, %s, is not in %s", trial.number, name, value, of)
        trial.set_user_attr("baseline", False)
        raise LookupError(name)

    return FixedTrial(trial, choose)


def made(config: DictConfig, trusted: tuple[str, ...], **options: Any) -> Any:
    """The sampler or pruner that a config names. Raises InputError for an argument that it can't take."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # it was chosen by name
            return instantiate(config, **options, _execution_whitelist_=trusted)
    except InstantiationException as error:
        raise InputError(" ".join(str(error).split())) from error
    except (TypeError, ValueError) as error:  # of Optuna
        reason = " ".join(str(error).split()).rstrip(".")
        keys = [str(key) for key in config if not str(key).startswith("_")]
        given = ", ".join(f"{key}={'null' if config[key] is None else config[key]}" for key in keys)
        where = hydra_private.full_key(config)
        raise InputError(f"{where}: {reason}; it has {given}; give another by {where}.KEY=VALUE") from error
