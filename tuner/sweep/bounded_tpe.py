"""TPE in a study of many trials: it sees a part of them, as its cost grows with what it sees."""

import heapq
import logging
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tuner.sweep.history import History
from tuner.sweep.optuna_private import PartOfStudy

log = logging.getLogger("tuner.sweep")
LIMIT = 2000  # trials
BEST = 25  # of them, chosen by their values


class BoundedTPE(BaseSampler):
    """TPE, which sees at most LIMIT trials: the BEST ones, those that run, and the latest of the others.

    TPE compares two densities: of its good trials, which are the 25 best at most, and of all others, which weigh less
    the older they are. So in a large study the first density stays the same, and the second loses what weighed least.
    A study with several objectives is seen as a whole: there, a tenth of all trials are good.

    history: of the study. It was read when the trial was asked for, so TPE need not read the study itself.
    """

    def __init__(self, sampler: TPESampler, history: History):
        self.sampler, self.history = sampler, history
        self.ended = 0  # complete trials that `best` takes into account
        self.best: list[FrozenTrial] = []

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As TPE does."""
        return self.sampler.infer_relative_search_space(self._seen(study), trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As TPE does."""
        return self.sampler.sample_relative(self._seen(study), trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As TPE does."""
        return self.sampler.sample_independent(self._seen(study), trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """As TPE does."""
        self.sampler.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """As TPE does."""
        self.sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """As TPE does."""
        self.sampler.reseed_rng()

    def _seen(self, study: Study) -> Study:
        """What TPE sees of a study."""
        if type(study) is not Study:  # what Hyperband shows of it
            return study
        if len(self.history.trials) <= LIMIT or len(study.directions) > 1:
            return PartOfStudy(study, self.history.trials)
        if not self.best:
            log.info("TPE sees %d trials from now on, the %d best and the latest: each costs time", LIMIT, BEST)
        self._update_best(study)
        seen = {trial.number: trial for trial in (*self.best, *self.history.unfinished)}
        latest = self.history.trials[-(LIMIT - len(seen)) :] if len(seen) < LIMIT else []
        seen |= {trial.number: trial for trial in latest}
        return PartOfStudy(study, [seen[number] for number in sorted(seen)])

    def _update_best(self, study: Study) -> None:
        sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
        new = self.history.complete[self.ended :]
        self.ended += len(new)
        self.best = heapq.nsmallest(BEST, [*self.best, *new], key=lambda trial: (sign * trial.values[0], trial.number))
