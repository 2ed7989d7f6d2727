"""Which trials of a study are complete, the best, on the Pareto front, and the default config's.

A trial that differs from its study (study_mixed=true) is none of these.
"""

from collections.abc import Sequence

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tuner.sweep.settings import MIXED


def complete(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that have ended with a value."""
    return [trial for trial in trials if trial.state == TrialState.COMPLETE and MIXED not in trial.user_attrs]


def state(trial: FrozenTrial) -> str:
    """COMPLETE, PRUNED, FAIL, RUNNING or WAITING; MIXED for a trial that differs from its study."""
    return "MIXED" if MIXED in trial.user_attrs else trial.state.name


def best(study: Study, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The best complete trial, the earliest of equals. None without one, or with several objectives."""
    candidates = complete(trials)
    if not candidates or len(study.directions) > 1:
        return None
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    return min(candidates, key=lambda trial: (sign * trial.values[0], trial.number))


def pareto_front(study: Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The complete trials that no other trial dominates."""
    signs = [-1 if direction == StudyDirection.MAXIMIZE else 1 for direction in study.directions]
    costs = {trial.number: [s * v for s, v in zip(signs, trial.values, strict=True)] for trial in complete(trials)}

    def dominated(cost: list[float]) -> bool:
        return any(other != cost and all(o <= c for o, c in zip(other, cost, strict=True)) for other in costs.values())

    return [trial for trial in complete(trials) if not dominated(costs[trial.number])]


def baseline(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The complete trial of the default config, if there is one."""
    return next((trial for trial in complete(trials) if trial.user_attrs.get("baseline")), None)
