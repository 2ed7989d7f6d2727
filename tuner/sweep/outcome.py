"""How a trial ended: from what its job returned to what the study records."""

import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra.errors import ConfigCompositionException
from optuna.trial import Trial, TrialState

from tuner import InputError
from tuner.files import disk_error
from tuner.runs.layout import OUTCOME_FILE as OUTCOME_FILE
from tuner.sweep.optuna_private import set_system_attr
from tuner.sweep.settings import MixedStudyError
from tuner.sweep.storage_files import StorageLostError

OUTCOME = "outcome"  # system attribute of a trial: its Outcome as a dict, from the job to whoever tells the study
OF_USER = (InputError, ConfigCompositionException)


@dataclass(frozen=True)
class Pruned:
    """What a pruned job returns. It did not fail, and Hydra logs no traceback."""

    reason: str | None = None


@dataclass
class Outcome:
    """How a trial ended: `state` is COMPLETE, with values, PRUNED, with a reason, or FAIL, with an error.

    An error has its traceback, unless the user made a mistake.
    """

    state: str
    values: list[float] | None = None
    error: str | None = None
    traceback: str | None = None
    reason: str | None = None

    @classmethod
    def of(cls, returned: Any, objectives: int) -> "Outcome":
        """From what a job returned: finite numbers, as many as there are objectives, or it failed."""
        if isinstance(returned, Pruned):
            return cls("PRUNED", reason=returned.reason)
        wanted = "a finite number" if objectives == 1 else f"{objectives} finite numbers"
        values = [] if isinstance(returned, str | Mapping) else [returned] if objectives == 1 else returned
        try:
            values = [float(value) for value in values]
        except (TypeError, ValueError, OverflowError):
            values = []
        if len(values) == objectives and all(map(math.isfinite, values)):
            return cls("COMPLETE", values)
        return cls("FAIL", error=f"the objective must return {wanted}, not {returned!r}"[:2000])

    @classmethod
    def failed(cls, error: BaseException) -> "Outcome":
        """FAIL, with the error in one line of at most 2,000 characters.

        The end of its traceback, too, unless the error is about what the user gave: then its line says it all.
        """
        text = " ".join(f"{type(error).__name__}: {error}".split())[:2000]
        if isinstance(error, OF_USER):
            return cls("FAIL", error=text)
        return cls("FAIL", error=text, traceback="".join(traceback.format_exception(error))[-20_000:])

    @property
    def trial_state(self) -> TrialState:
        """`state` as Optuna's enum."""
        return TrialState[self.state]


def ends_sweep(error: Any) -> bool:
    """Whether a job's error ends the sweep and is no failure of its trial: a full disk, a lost study, other images."""
    return isinstance(error, MixedStudyError | StorageLostError) or disk_error(error) is not None


def set_outcome(trial: Trial, outcome: Outcome) -> None:
    """Record the outcome in the study. The sweep, or one that resumes it, tells it to Optuna."""
    set_system_attr(trial.study, trial, OUTCOME, outcome.__dict__)
