"""One line for a whole sweep: trials done, pruned and failed, the best value so far, the time left."""

import logging
import sys
import time
from types import TracebackType

from optuna.trial import TrialState
from tqdm import tqdm

from tuner.sweep.history import History
from tuner.sweep.outcome import OUTCOME, Outcome
from tuner.sweep.stopping import StopRules, duration

log = logging.getLogger("tuner.sweep")


class Progress:
    """In a terminal, a progress bar; elsewhere, a log line for each trial that ends."""

    def __init__(self, history: History, n_trials: int, rules: StopRules):
        self.history, self.n_trials, self.rules = history, n_trials, rules
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
        return self.history.look().finished()

    def line(self) -> str:
        """The state of the study, such as "12/30 trials, 3 pruned, best 0.91 (trial 7), 2 min 5 s left"."""
        history = self.history.look()
        counts, finished = history.counted(), history.finished()
        parts = [f"{finished}/{self.n_trials} trials"]
        parts += [f"{counts[TrialState.PRUNED]} pruned"] if counts[TrialState.PRUNED] else []
        parts += [f"{counts[TrialState.FAIL]} failed"] if counts[TrialState.FAIL] else []
        if duplicates := history.duplicates():
            parts.append(f"{duplicates} duplicate{'s' * (duplicates != 1)}")
        if best := history.best:
            parts.append(f"best {best.value:.6g} (trial {best.number})")
        parts += self.rules.state(history)
        if finished > self.finished_before:
            # all jobs of a stack end before the study gets the first of their outcomes
            ended = finished + sum(OUTCOME in trial.system_attrs for trial in history.running())
            seconds = (time.monotonic() - self.start) / (ended - self.finished_before) * (self.n_trials - ended)
            parts.append(f"{duration(min(seconds, max(0.0, self.rules.left(history))))} left")
        return ", ".join(parts)

    def _say(self, text: str, level: int) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            log.log(level, text)
