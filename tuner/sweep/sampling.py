"""Where a trial's parameters come from: the sampler, the default config, and the trials to begin with."""

import functools
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler, GridSampler
from optuna.study import Study
from optuna.trial import Trial

from tuner import InputError
from tuner.sweep import report, space

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


def _points(name: str, distribution: BaseDistribution) -> Any:
    try:
        return OptunaSweeperImpl._to_grid_sampler_choices(distribution)
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
            params = {name: value for name, value in best.items() if name in searched and fits(value, searched[name])}
            log.info("enqueued the best of study %s: %s", wish, params)
        elif not isinstance(wish, Mapping):
            raise InputError(f"enqueue: {wish} must be a dict of parameters, or the name of a study")
        else:
            params = {str(name): value for name, value in wish.items()}
            for name, value in params.items():
                if name in searched and not fits(value, searched[name]):
                    raise InputError(f"enqueue: {name}={value} is outside of {space.words(searched[name])}")
                if name not in searched and not more_is_searched:
                    raise InputError(f"enqueue: {name} is not searched; searched are {', '.join(searched)}")
        study.enqueue_trial(params, user_attrs={"enqueued": True}, skip_if_exists=True)


def _best_of(name: str, beside: Study) -> dict[str, Any]:
    known = optuna.get_all_study_names(beside._storage)
    if name not in known:
        raise InputError(f"enqueue: there is no study {name} in this storage; known: {', '.join(known)}")
    study = optuna.load_study(study_name=name, storage=beside._storage)
    best = report.best_of(study, study.get_trials(deepcopy=False))
    if best is None:
        raise InputError(f"enqueue: study {name} has no best trial: none is complete, or it has several objectives")
    return best.params


class Baseline(Trial):
    """The trial that takes each parameter's value from the composed config, where the space has that value."""

    def __init__(self, study: Study, trial_id: int, space_: space.Space, config: DictConfig):
        super().__init__(study, trial_id)
        self.space, self.config = space_, config

    def _is_fixed_param(self, name: str, distribution: BaseDistribution) -> bool:
        try:
            value = self.space.default(self.config, name)
        except KeyError:
            value = "nothing"
        if not fits(value, distribution):
            of = space.words(distribution)
            log.info("trial %d draws %s: the default, %s, is not in %s", self.number, name, value, of)
            self.set_user_attr("baseline", False)
            return False
        self._fixed_params[name] = value
        return True


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
        where = config._get_full_key(None)
        raise InputError(f"{where}: {reason}; it has {given}; give another by {where}.KEY=VALUE") from error


def fits(value: Any, distribution: BaseDistribution) -> bool:
    """Whether a parameter can have this value."""
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (TypeError, ValueError):
        return False
