"""When a study ends before its `n_trials`: after a time, at a target, or when nothing improves any more.

The rules look at the study alone. So they go on where a killed sweep stopped, and hold for all sweeps that share it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tuner import InputError, rules
from tuner.sweep import ranking
from tuner.sweep.settings import SAME_AS

STOPPED = "stopped"  # attribute of a study: why it ended before its n_trials; null if it did not
ENDED_BY = "ended_by"  # attribute of a trial: the rule that ended it
RULES = ("timeout", "target", "stop_when_flat")  # that end a study
TIMEOUT = "timeout"  # the rule that ends a trial only for now: it runs again when the search gets more time
SECONDS = "seconds"  # attribute of a trial: how long its job took. A lost trial has none.


@dataclass(frozen=True)
class StopRules:
    """The rules that are set; None: the rule is not.

    timeout: seconds in which trials run. The time of the longest complete trial is kept free for each
        of the last runs.
    trial_timeout: seconds after which a trial ends, as if pruned, at its next report.
    target: the study ends with a value as good as this.
    stop_when_flat: it ends after so many trials in a row that are not better than the best before them.
    last_runs: how many runs end the search: one retrains its best, another its default config.
    """

    timeout: float | None = None
    trial_timeout: float | None = None
    target: float | None = None
    stop_when_flat: int | None = None
    last_runs: int = 0

    def reason(self, study: Study, trials: Sequence[FrozenTrial]) -> str | None:
        """Why no more trials should start; None if they should.   trials: all of the study."""
        if self.left(trials) <= 0:
            last = f"the last run{'s' * (self.last_runs > 1)}"
            kept = f", of which {duration(free)} are kept for {last}" if (free := self._kept_free(trials)) else ""
            limit = f"the limit is {duration(self.timeout or 0)}{kept}"
            return f"{TIMEOUT}: trials have run for {duration(used(trials))}; {limit}"
        best = ranking.best(study, trials)
        if best is None:
            return None
        sign = 1 if study.direction == StudyDirection.MAXIMIZE else -1
        if self.target is not None and sign * best.values[0] >= sign * self.target:
            return f"target: trial {best.number} has {best.values[0]:.6g}"
        if self.stop_when_flat and (flat := _since(best, trials)) >= self.stop_when_flat:
            return f"stop_when_flat: the last {flat} trials are not better than trial {best.number}"
        return None

    def left(self, trials: Sequence[FrozenTrial]) -> float:
        """Seconds until the timeout, less what is kept free for the last runs."""
        if self.timeout is None:
            return math.inf
        return self.timeout - used(trials) - self._kept_free(trials)

    def state(self, study: Study, trials: Sequence[FrozenTrial]) -> list[str]:
        """How near the rules are, for the line of progress."""
        parts = [f"{duration(used(trials))} of {duration(self.timeout)}"] if self.timeout is not None else []
        best = ranking.best(study, trials)
        if self.stop_when_flat and best:
            parts.append(f"{_since(best, trials)} of {self.stop_when_flat} without gain")
        return parts

    def _kept_free(self, trials: Sequence[FrozenTrial]) -> float:
        times = (trial.user_attrs.get(SECONDS) for trial in trials if trial.state == TrialState.COMPLETE)
        longest = max((float(seconds) for seconds in times if seconds and rules.is_number(seconds)), default=0.0)
        return longest * self.last_runs


def because(reason: str, group: str = "") -> str:
    """The reason why a study ended, for the end of a sentence.   group: of the rules' keys, with its dot."""
    return f"by {group}{reason}" if reason.split(":")[0] in RULES else f"as {reason}"


def of_options(options: dict[str, Any], *, objectives: int, last_runs: int) -> StopRules:
    """The rules from the options of hydra.sweeper. Raises InputError for a value that a rule can't have."""
    times: dict[str, float | None] = {}
    for key in ("timeout", "trial_timeout"):
        rules.or_null(rules.DURATION).check(f"hydra.sweeper.{key}", options[key])
        times[key] = None if options[key] is None else rules.seconds(options[key])
    target, flat = options["target"], options["stop_when_flat"]
    rules.or_null(rules.whole(1)).check("hydra.sweeper.stop_when_flat", flat)
    if target is not None and not math.isfinite(target):
        raise InputError(f"hydra.sweeper.target={target} must be a finite number")
    for key, value in {"target": target, "stop_when_flat": flat}.items():
        if value is not None and objectives > 1:
            raise InputError(f"hydra.sweeper.{key}={value} needs one objective, and this study has {objectives}")
    return StopRules(**times, target=target, stop_when_flat=flat, last_runs=last_runs)


def used(trials: Sequence[FrozenTrial]) -> float:
    """Seconds in which at least one trial ran. The time between two commands does not count, nor do lost trials."""
    now, total, until = datetime.now(), timedelta(), datetime.min
    for start, end in sorted(filter(None, (_interval(trial, now) for trial in trials))):
        total += max(end, until) - max(start, until)
        until = max(end, until)
    return total.total_seconds()


def _interval(trial: FrozenTrial, now: datetime) -> tuple[datetime, datetime] | None:
    if trial.datetime_start is None:
        return None
    if trial.state == TrialState.RUNNING:
        return trial.datetime_start, max(now, trial.datetime_start)
    if trial.datetime_complete is None or SECONDS not in trial.user_attrs:
        return None
    return trial.datetime_start, max(trial.datetime_complete, trial.datetime_start)


def _since(best: FrozenTrial, trials: Sequence[FrozenTrial]) -> int:
    """The number of trials after the best that have ended, complete or pruned, duplicates left out."""
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    later = [trial.user_attrs for trial in trials if trial.number > best.number and trial.state in ended]
    return sum(SAME_AS not in attributes and attributes.get(ENDED_BY) != TIMEOUT for attributes in later)


def duration(seconds: float) -> str:
    """12 s, 3 min 5 s, 2 h 10 min"""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
