"""One line for a whole sweep: trials done, pruned and failed, the best value so far, the time left."""

import logging
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from tuner.sweep.history import History
from tuner.sweep.outcome import OUTCOME, Outcome
from tuner.sweep.stopping import StopRules, duration

log = logging.getLogger("tuner.sweep")
REFRESH = 2.0  # seconds between looks at running trials, on a terminal
QUIET = 60.0  # seconds without a log line, after which running trials are logged
# A narrow terminal cuts off what comes last.
ON_A_BAR = ("trials", "best", "left", "running", "pruned", "failed", "duplicates", "rules")


class Progress:
    """On a terminal, a progress bar; elsewhere, a log line for each trial that ends, and one a minute while trials run.

    epochs: of each trial; None if they differ, or are not known.
    """

    def __init__(self, history: History, n_trials: int, rules: StopRules, epochs: int | None = None):
        self.history, self.n_trials, self.rules, self.epochs = history, n_trials, rules, epochs
        self.bar: tqdm | None = None
        self.start, self.finished_before = time.monotonic(), 0
        self.said = time.monotonic()  # when the last line was logged
        self.ended = threading.Event()

    def __enter__(self) -> None:
        self.start, self.finished_before = time.monotonic(), self._finished()
        self.ended.clear()
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=self.n_trials, initial=self.finished_before, bar_format="{desc} |{bar}|", dynamic_ncols=True
            )
            self.refresh()
        threading.Thread(target=self._follow, name="progress", daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.ended.set()
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _follow(self) -> None:
        """Show the epochs of running trials, which the main thread may be busy with."""
        while not self.ended.wait(REFRESH):
            try:
                if self.bar is not None:
                    self.refresh()
                elif time.monotonic() - self.said > QUIET and (running := self._parts().get("running")):
                    self.said = time.monotonic()
                    log.info("%s", running)
            except Exception as error:  # noqa: BLE001 - whatever the storage raises; the sweep itself notices, too
                log.debug("the progress cannot be shown: %s", error)

    def trial_ended(self, number: int, outcome: Outcome) -> None:
        """Show the end of a trial."""
        self.said = time.monotonic()
        if outcome.error:
            self._say(f"trial {number} failed: {outcome.error}", logging.WARNING)
        if self.bar is not None:
            self.refresh()
            return
        values = ", ".join(f"{value:.6g}" for value in outcome.values or ())
        log.info("trial %d: %s | %s", number, outcome.reason or values or outcome.state.lower(), self.line())

    def refresh(self) -> None:
        """Update the bar, if there is one: other sweeps may have run trials."""
        if (bar := self.bar) is not None:
            parts = self._parts()
            bar.n = self.history.finished()
            bar.set_description_str(", ".join(parts[name] for name in ON_A_BAR if name in parts))

    def _finished(self) -> int:
        return self.history.look().finished()

    def line(self) -> str:
        """The state of the study, such as "12/30 trials, 3 pruned, best 0.91 (trial 7), 2 min 5 s left"."""
        return ", ".join(text for name, text in self._parts().items() if name != "running")

    def _parts(self) -> dict[str, str]:
        history = self.history.look()
        counts, finished = history.counted(), history.finished()
        parts = {"trials": f"{finished}/{self.n_trials} trials"}
        for name, state in (("pruned", TrialState.PRUNED), ("failed", TrialState.FAIL)):
            if counts[state]:
                parts[name] = f"{counts[state]} {name}"
        if duplicates := history.duplicates():
            parts["duplicates"] = f"{duplicates} duplicate{'s' * (duplicates != 1)}"
        if best := history.best:
            parts["best"] = f"best {best.value:.6g} (trial {best.number})"
        if rules := self.rules.state(history):
            parts["rules"] = ", ".join(rules)
        # all jobs of a stack end before the study gets the first of their outcomes
        running = [trial for trial in history.running() if OUTCOME not in trial.system_attrs]
        if text := training(running, self.history.study.directions, self.epochs):
            parts["running"] = text
        ended = finished + len(history.running()) - len(running) + self._shares(running)
        if ended > self.finished_before:
            seconds = (time.monotonic() - self.start) / (ended - self.finished_before) * (self.n_trials - ended)
            parts["left"] = f"{duration(max(0.0, min(seconds, self.rules.left(history))))} left"
        return parts

    def _shares(self, running: Sequence[FrozenTrial]) -> float:
        """How many trials the epochs of running ones make."""
        return sum(epoch_of(trial) / self.epochs for trial in running) if self.epochs else 0.0

    def _say(self, text: str, level: int) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            log.log(level, text)


def epoch_of(trial: FrozenTrial) -> int:
    """The last epoch that a trial has reported; 0 before the first."""
    return max(trial.intermediate_values, default=0)


def training(
    running: Sequence[FrozenTrial], directions: Sequence[StudyDirection], epochs: int | None = None
) -> str | None:
    """Such as "8 trials in epoch 5 of 25, the best at 0.8912". None before a trial has reported an epoch."""
    begun = [trial for trial in running if trial.intermediate_values]
    if not begun:
        return None
    first, last = min(map(epoch_of, begun)), max(map(epoch_of, begun))
    count = "1 trial" if len(begun) == 1 else f"{len(begun)} trials"
    text = f"{count} in epoch {first if first == last else f'{first} to {last}'}{f' of {epochs}' if epochs else ''}"
    better = max if directions[0] == StudyDirection.MAXIMIZE else min
    best = better(value for trial in begun for value in trial.intermediate_values.values())
    return f"{text}, the best at {best:.4f}" if len(directions) == 1 else text
