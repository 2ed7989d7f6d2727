"""A study's pruner, for trials that report in turns: the study is read once a round, not once a report."""

import threading

from optuna.pruners import BasePruner
from optuna.study import Study
from optuna.trial import Trial

from tuner.sweep.history import History
from tuner.sweep.optuna_private import StudyView


class Pruning:
    """Decides after each report whether a trial ends.

    Reading the running trials from a database takes longer than an epoch of a stack of heads on a GPU. So they are read
    when a trial reports that has reported since the last reading: once an epoch in a stack, once a report for a trial
    alone. Between two readings the reports of this process are added to what was read.
    """

    def __init__(self, study: Study, pruner: BasePruner):
        self.history, self.view = History(study), StudyView(study, pruner)
        self.reported: set[int] = set()
        self.lock = threading.Lock()  # a launcher may run its jobs in threads

    def should_prune(self, trial: Trial, number: int, value: float, step: int) -> bool:
        """Report a value of a trial to the study, and ask the pruner, as Trial.report and Trial.should_prune do."""
        trial.report(value, step)
        with self.lock:
            if number in self.reported or not self.view.add(number, value, step):
                self.view.show(self.history.look().trials)
                self.reported.clear()
            self.reported.add(number)
            return self.view.should_prune(number)
