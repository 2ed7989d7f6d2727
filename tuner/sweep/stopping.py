"""When a study ends before its `n_trials`: after a time, at a target, or when nothing improves any more.

The rules look at the study alone. So they go on where a killed sweep stopped, and hold for all sweeps that share it.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tuner import InputError, rules
from tuner.sweep.settings import SAME_AS

if TYPE_CHECKING:
    from tuner.sweep.history import History

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

    def reason(self, history: "History") -> str | None:
        """Why no more trials should start; None if they should."""
        if self.left(history) <= 0:
            last = f"the last run{'s' * (self.last_runs > 1)}"
            free = history.longest * self.last_runs
            kept = f", of which {duration(free)} are kept for {last}" if free else ""
            limit = f"the limit is {duration(self.timeout or 0)}{kept}"
            return f"{TIMEOUT}: trials have run for {duration(history.used())}; {limit}"
        best = history.best
        if best is None:
            return None
        sign = 1 if history.study.direction == StudyDirection.MAXIMIZE else -1
        if self.target is not None and sign * best.values[0] >= sign * self.target:
            return f"target: trial {best.number} has {best.values[0]:.6g}"
        if self.stop_when_flat and (flat := history.without_gain) >= self.stop_when_flat:
            return f"stop_when_flat: the last {flat} trials are not better than trial {best.number}"
        return None

    def left(self, history: "History") -> float:
        """Seconds until the timeout, less what is kept free for the last runs."""
        if self.timeout is None:
            return math.inf
        return self.timeout - history.used() - history.longest * self.last_runs

    def state(self, history: "History") -> list[str]:
        """How near the rules are, for the line of progress."""
        parts = [f"{duration(history.used())} of {duration(self.timeout)}"] if self.timeout is not None else []
        if self.stop_when_flat and history.best:
            parts.append(f"{history.without_gain} of {self.stop_when_flat} without gain")
        return parts


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


Period = tuple[datetime, datetime]


class RunTime:
    """The time in which at least one trial ran. The time between two commands does not count, nor do lost trials."""

    def __init__(self) -> None:
        self.periods: list[Period] = []  # of ended trials, in order; they do not overlap
        self.total = timedelta()  # of them

    def add(self, trial: FrozenTrial) -> None:
        """Add a trial that has ended."""
        if trial.datetime_start is None or trial.datetime_complete is None or SECONDS not in trial.user_attrs:
            return
        start, end = trial.datetime_start, max(trial.datetime_complete, trial.datetime_start)
        first = last = self._place(start)
        while last < len(self.periods) and self.periods[last][0] <= end:
            last += 1
        joined = sorted([*self.periods[first:last], (start, end)])
        self.total += _length(joined) - _length(self.periods[first:last])
        self.periods[first:last] = [(joined[0][0], max(end for _, end in joined))]

    def seconds(self, unfinished: Iterable[FrozenTrial]) -> float:
        """Seconds so far, with the trials that still run."""
        now = datetime.now()
        starts = [t.datetime_start for t in unfinished if t.datetime_start and t.state == TrialState.RUNNING]
        if not starts:
            return self.total.total_seconds()
        since = self.periods[self._place(min(starts)) :]
        running = [(start, max(now, start)) for start in starts]
        return (self.total - _length(since) + _length(sorted([*since, *running]))).total_seconds()

    def _place(self, start: datetime) -> int:
        """The index of the first period that ends after `start`, or then."""
        return bisect_left(self.periods, start, key=lambda period: period[1])


def _length(periods: Sequence[Period]) -> timedelta:
    """How long periods in order are, where they overlap only once."""
    total, until = timedelta(), datetime.min
    for start, end in periods:
        total += max(end, until) - max(start, until)
        until = max(end, until)
    return total


def lacks_gain(trial: FrozenTrial) -> bool:
    """Whether a trial that comes after the best one and is not better says so: it has ended, complete or pruned."""
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return False
    return SAME_AS not in trial.user_attrs and trial.user_attrs.get(ENDED_BY) != TIMEOUT


def duration(seconds: float) -> str:
    """12 s, 3 min 5 s, 2 h 10 min"""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
