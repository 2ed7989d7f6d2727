"""One line for a whole sweep: trials done, pruned and failed, the best value so far, the time left."""

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from tuner.sweep import ranking
from tuner.sweep.budget import counted
from tuner.sweep.outcome import OUTCOME, Outcome
from tuner.sweep.settings import SAME_AS
from tuner.sweep.stopping import StopRules, duration

log = logging.getLogger("tuner.sweep")


class Progress:
    """In a terminal, a progress bar; elsewhere, a log line for each trial that ends."""

    def __init__(self, study: Study, n_trials: int, trials: Callable[[], list[FrozenTrial]], rules: StopRules):
        self.study, self.n_trials, self.trials, self.rules = study, n_trials, trials, rules
        self.bar: tqdm | None = None
        self.start, self.finished_before = time.monotonic(), 0

    def __enter__(self) -> None:
        self.start, self.finished_before = time.monotonic(), self._finished()
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.n_trials, initial=self.finished_before, bar_format="{bar:20} {desc}", leave=True)
            self.refresh()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def trial_ended(self, number: int, outcome: Outcome) -> None:
        """Show the end of a trial."""
        if outcome.error:
            self._say(f"trial {number} failed: {outcome.error}", logging.WARNING)
        if self.bar is not None:
            self.refresh()
            return
        values = ", ".join(f"{value:.6g}" for value in outcome.values or ())
        log.info("trial %d: %s | %s", number, outcome.reason or values or outcome.state.lower(), self.line())

    def refresh(self) -> None:
        """Update the bar, if there is one: other sweeps may have run trials."""
        if self.bar is not None:
            self.bar.n = self._finished()
            self.bar.set_description_str(self.line())

    def _finished(self) -> int:
        return sum(trial.state.is_finished() for trial in counted(self.trials()))

    def line(self) -> str:
        """The state of the study, such as "12/30 trials, 3 pruned, best 0.91 (trial 7), 2 min 5 s left"."""
        everything = self.trials()
        trials = counted(everything)
        counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
        finished = sum(trial.state.is_finished() for trial in trials)
        parts = [f"{finished}/{self.n_trials} trials"]
        parts += [f"{counts[TrialState.PRUNED]} pruned"] if counts[TrialState.PRUNED] else []
        parts += [f"{counts[TrialState.FAIL]} failed"] if counts[TrialState.FAIL] else []
        if duplicates := sum(SAME_AS in trial.user_attrs for trial in everything):
            parts.append(f"{duplicates} duplicate{'s' * (duplicates != 1)}")
        if best := ranking.best(self.study, trials):
            parts.append(f"best {best.value:.6g} (trial {best.number})")
        parts += self.rules.state(self.study, everything)
        if finished > self.finished_before:
            # all jobs of a stack end before the study gets the first of their outcomes
            ended = sum(trial.state.is_finished() or OUTCOME in trial.system_attrs for trial in trials)
            seconds = (time.monotonic() - self.start) / (ended - self.finished_before) * (self.n_trials - ended)
            parts.append(f"{duration(min(seconds, max(0.0, self.rules.left(everything))))} left")
        return ", ".join(parts)

    def _say(self, text: str, level: int) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            log.log(level, text)
