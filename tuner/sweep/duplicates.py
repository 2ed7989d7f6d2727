"""Configurations that a study has tried before: none is trained twice, and a space without others ends the search.

A trial depends on its parameters alone: everything else, the seed included, is the same in all trials of a study.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from tuner.sweep.optuna_private import contains
from tuner.sweep.outcome import Outcome
from tuner.sweep.settings import MIXED, SAME_AS
from tuner.sweep.stopping import ENDED_BY

IN_A_ROW = 100  # duplicates, after which a sampler is taken to have nothing new: NSGA-II had 52 before its last of 12
WHILE_RUNNING = 10  # duplicates of running trials in a row, after which their results are waited for


def find(trials: Sequence[FrozenTrial], number: int, params: Mapping[str, Any]) -> FrozenTrial | None:
    """The trial among `trials` that trial `number` with these parameters would repeat; None if it is new.

    A complete trial is preferred, then a pruned one, then one that runs. A failed trial may be tried again, and so may
    one that ended by its time.
    """
    its_text = text(params)
    same = [
        trial
        for trial in trials
        if trial.number != number
        and may_be_repeated(trial)
        and trial.params == params
        and text(trial.params) == its_text
    ]
    return min(same, key=lambda trial: (_ORDER.index(trial.state), trial.number), default=None)


def may_be_repeated(trial: FrozenTrial) -> bool:
    """Whether a trial may be the original of a duplicate, by its state and its marks."""
    return trial.state in _ORDER and not {SAME_AS, MIXED, ENDED_BY} & trial.user_attrs.keys()


def outcome(original: FrozenTrial) -> Outcome:
    """The outcome of a duplicate, from which the sampler learns.

    That of a running trial is not known yet: its duplicate fails, which samplers ignore.
    """
    same = f"same as trial {original.number}"
    if original.state == TrialState.COMPLETE:
        values = ", ".join(f"{value:.6g}" for value in original.values)
        return Outcome("COMPLETE", list(original.values), reason=f"{same}, {values}: not trained again")
    if original.state == TrialState.PRUNED:
        return Outcome("PRUNED", reason=f"{same}, pruned: not trained again")
    return Outcome("FAIL", reason=f"{same}, which still runs: not trained twice")


_ORDER = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


def text(params: Mapping[str, Any]) -> str:
    """The parameters as text that tells 1, 1.0, true and "1" apart, as an override does."""
    return json.dumps(dict(params), sort_keys=True)


def size(space: Mapping[str, BaseDistribution]) -> int | None:
    """The number of configurations of a space; None if there is no end of them."""
    counts = [_size(distribution) for distribution in space.values()]
    return None if None in counts else math.prod(filter(None, counts))


def _size(distribution: BaseDistribution) -> int | None:
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if distribution.low == distribution.high:
        return 1
    if distribution.step is None:
        return None
    return round((distribution.high - distribution.low) / distribution.step) + 1


def point(params: Mapping[str, Any], space: Mapping[str, BaseDistribution]) -> tuple[int, ...] | None:
    """The place of a configuration in a finite space; None if the parameters are others."""
    if params.keys() != space.keys() or not all(contains(space[name], value) for name, value in params.items()):
        return None
    return tuple(_place(distribution, params[name]) for name, distribution in space.items())


def _place(distribution: BaseDistribution, value: Any) -> int:
    """The index of a value: values of a range with a step may differ by rounding."""
    if isinstance(distribution, CategoricalDistribution):
        return int(distribution.to_internal_repr(value))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return round((value - distribution.low) / (distribution.step or 1))
