"""What a sweep knows of all trials of its study: each is counted once, when it ends, however many there are.

The study is the only truth. A trial that has ended never changes, so a look at the study reads only the trials that had
not ended at the look before, and the new ones. Nothing else is kept: another process counts anew, with the same result.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from tuner import rules
from tuner.sweep import duplicates, ranking
from tuner.sweep.optuna_private import RETRY_HISTORY
from tuner.sweep.patient_storage import SURPLUS, changed_trials
from tuner.sweep.settings import MIXED, SAME_AS
from tuner.sweep.stopping import SECONDS, RunTime, lacks_gain


class History:
    """The trials of a study as of the last look(), and what follows from all of them. Threads may share it.

    space: the study's, if it is finite: its configurations that were tried are counted.

    trials: by number.   unfinished: those that have not ended.   complete: as they ended.
    best: as ranking.best.   without_gain: how many trials after the best lack a gain over it.
    longest: the seconds of the longest complete trial.   run_time: the time in which trials ran.
    retries: which trials the copies of lost trials repeat.
    """

    def __init__(self, study: Study, space: Mapping[str, BaseDistribution] | None = None):
        self.study, self.space, self.lock = study, space, threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self.trials: list[FrozenTrial] = []
        self.unfinished: tuple[FrozenTrial, ...] = ()
        self.complete: list[FrozenTrial] = []
        self.best: FrozenTrial | None = None
        self.without_gain, self.longest, self.run_time = 0, 0.0, RunTime()
        self.retries: set[tuple[int, ...]] = set()
        # Of trials that have ended, and of retried ones whether or not they have.
        self._retried: set[int] = set()
        self._counted: Counter[TrialState] = Counter()
        self._duplicates = 0
        self._same: dict[str, list[FrozenTrial]] = defaultdict(list)  # by duplicates.text
        self._points: Counter[tuple[int, ...]] = Counter()

    def look(self) -> "History":
        """Read the trials that may have changed since the last look."""
        with self.lock:
            try:
                self._update(changed_trials(self.study, [trial.number for trial in self.unfinished], len(self.trials)))
            except BaseException:  # such as Ctrl-C: some may be counted already
                self._forget()
                raise
        return self

    def _update(self, changed: list[FrozenTrial]) -> None:
        """Count what has ended.   changed: the trials that had not ended at the last look, then the new ones."""
        known, open_before = len(self.trials), len(self.unfinished)
        for trial in changed[:open_before]:
            self.trials[trial.number] = trial
        self.trials += changed[open_before:]
        ended = [trial for trial in changed if trial.state.is_finished()]
        for trial in ended:
            self._add(trial)
        self._compare_with_best(ended)
        for trial in self.trials[known:]:
            self._add_retry(trial.system_attrs.get(RETRY_HISTORY))
        self.unfinished = tuple(trial for trial in changed if not trial.state.is_finished())

    def _add(self, trial: FrozenTrial) -> None:
        """Count a trial that has ended."""
        if self._counts(trial):
            self._count(trial, 1)
        self._duplicates += SAME_AS in trial.user_attrs
        if duplicates.may_be_repeated(trial):
            self._same[duplicates.text(trial.params)].append(trial)
        if trial.state == TrialState.COMPLETE:
            self.complete.append(trial)
            seconds: Any = trial.user_attrs.get(SECONDS)
            self.longest = max(self.longest, float(seconds) if rules.is_number(seconds) else 0.0)
        self.run_time.add(trial)

    def _counts(self, trial: FrozenTrial) -> bool:
        return is_own(trial) and trial.number not in self._retried

    def _count(self, trial: FrozenTrial, n: int) -> None:
        self._counted[trial.state] += n
        point = self._point(trial)
        if point is not None:
            self._points[point] += n

    def _point(self, trial: FrozenTrial) -> tuple[int, ...] | None:
        return None if self.space is None or MIXED in trial.user_attrs else duplicates.point(trial.params, self.space)

    def _compare_with_best(self, ended: Sequence[FrozenTrial]) -> None:
        best = ranking.best(self.study, [*([self.best] if self.best else []), *ended])
        if best is None:
            return
        if best is not self.best:
            self.best, self.without_gain = best, 0
            ended = self.trials[best.number + 1 :]
        self.without_gain += sum(lacks_gain(trial) for trial in ended if trial.number > best.number)

    def _add_retry(self, history: list[int] | None) -> None:
        """A copy un-counts the trial that it repeats."""
        if not history:
            return
        self.retries.add(tuple(history))
        lost = history[-1]
        if lost in self._retried:
            return
        trial = self.trials[lost] if lost < len(self.trials) else None
        if trial and trial.state.is_finished() and self._counts(trial):
            self._count(trial, -1)
        self._retried.add(lost)

    # What follows

    def counted(self) -> Counter[TrialState]:
        """How many trials count towards the study's budget, by state."""
        with self.lock:
            return self._counted + Counter(trial.state for trial in self.running())

    def finished(self) -> int:
        """How many of those have ended."""
        return self._counted.total()

    def running(self) -> list[FrozenTrial]:
        """The running trials that count."""
        return [trial for trial in self.unfinished if self._counts(trial)]

    def counted_before(self, number: int) -> int:
        """How many of the trials with a lower number count."""
        with self.lock:
            return self.counted().total() - sum(map(self._counts, self.trials[number:]))

    def duplicates(self) -> int:
        """How many trials are duplicates of others."""
        return self._duplicates + sum(SAME_AS in trial.user_attrs for trial in self.unfinished)

    def same(self, params: Mapping[str, Any]) -> list[FrozenTrial]:
        """The trials that a trial with these parameters may repeat, all running ones included."""
        return [*self._same.get(duplicates.text(params), ()), *self.unfinished]

    def tried(self) -> int:
        """How many configurations of the finite space the trials that count have, in whatever state."""
        with self.lock:
            return len({*+self._points, *map(self._point, self.running())} - {None})

    def used(self) -> float:
        """Seconds in which at least one trial ran."""
        with self.lock:
            return self.run_time.seconds(self.unfinished)


def is_own(trial: FrozenTrial) -> bool:
    """Whether a trial counts towards the budget unless it is retried: it has started, and it was not in vain."""
    return trial.state != TrialState.WAITING and SURPLUS not in trial.system_attrs and SAME_AS not in trial.user_attrs


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Of all trials of a study, those that count towards its budget."""
    retried = {trial.system_attrs[RETRY_HISTORY][-1] for trial in trials if RETRY_HISTORY in trial.system_attrs}
    return [trial for trial in trials if is_own(trial) and trial.number not in retried]
