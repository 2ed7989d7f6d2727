"""Which trials of a study are complete, the best, on the Pareto front, and the default config's; where they are.

A trial that differs from its study (study_mixed=true) is none of these, and neither is a duplicate of another one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tuner.runs.layout import PREDICTIONS
from tuner.sweep.settings import MIXED, SAME_AS, SETTINGS

if TYPE_CHECKING:
    from tuner.runs.selection import Gain


def complete(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that have ended with a value."""
    return [trial for trial in trials if state(trial) == TrialState.COMPLETE.name]


def state(trial: FrozenTrial) -> str:
    """COMPLETE, PRUNED, FAIL, RUNNING or WAITING; MIXED for a trial that differs from its study; DUPLICATE."""
    if SAME_AS in trial.user_attrs:
        return "DUPLICATE"
    return "MIXED" if MIXED in trial.user_attrs else trial.state.name


def best(study: Study, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The best complete trial, the earliest of equals. None without one, or with several objectives."""
    return None if len(study.directions) > 1 else next(iter(ranked(study, trials)), None)


def ranked(study: Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The complete trials of a study with one objective, the best first, the earliest of equals first."""
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    return sorted(complete(trials), key=lambda trial: (sign * trial.values[0], trial.number))


def folder_of(trial: FrozenTrial, sweep: Path | None) -> Path | None:
    """The trial's run folder, also if the sweep's folder was moved, or copied to another machine; None if unknown."""
    written = Path(text) if (text := trial.user_attrs.get("output_dir")) else None
    if sweep and not (written and written.exists()):
        here = sweep / str(trial.number)
        return here if here.exists() else written
    return written


def gain(study: Study, trials: Sequence[FrozenTrial], sweep: Path | None) -> "Gain | None":
    """The gain in accuracy of the best over the default config, corrected for choosing the best.

    None if the default is the best, the objective is not the accuracy, or predictions are missing.
    """
    from tuner.runs import selection  # imports pandas, which trials do not need

    first, second = best(study, trials), baseline(trials)
    if first is None or second is None or first.number == second.number:
        return None
    candidates = [second, *(trial for trial in complete(trials) if trial.number != second.number)]
    folders = [folder for trial in candidates if (folder := folder_of(trial, sweep))]
    if len(folders) < len(candidates) or not all((folder / PREDICTIONS).exists() for folder in folders):
        return None
    found = selection.gain_of(folders[0], folders[1:], folds(study))
    is_of_accuracy = found and abs(found.announced - (first.values[0] - second.values[0])) < 1e-4
    return found if is_of_accuracy else None


def folds(study: Study) -> int | None:
    """The number of folds by which the trials are judged, as the study's settings have it; None for one split."""
    settings = study.user_attrs.get(SETTINGS)
    found = settings.get("data.folds") if isinstance(settings, dict) else None
    return found if type(found) is int and found > 1 else None


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
