"""The account of a study: which trials count, which may still be asked for, what becomes of those that were lost."""

import math
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from tuner.sweep import optuna_private
from tuner.sweep.optuna_private import FAILED_TRIAL, FIXED_PARAMS, set_system_attr, set_user_attr
from tuner.sweep.trial import OUTCOME, Outcome

LOCKS = ".locks"  # in the study's folder
# System attributes of a trial.
OWNER = "owner"  # the sweep that runs it
SURPLUS = "surplus"  # asked for beyond the budget: it never ran
EXCUSED = "excused"  # it was interrupted, which is no attempt
HISTORY = optuna_private.RETRY_HISTORY  # the trials that it was before


class Account:
    """A study's budget of `n_trials`, shared by all the sweeps on it.

    A trial counts while it runs and when it is complete, pruned or failed. One that was lost, because its process was
    killed or interrupted, does not: a copy with the same parameters takes its place, at most `retries` times.

    locks: a folder that the sweeps share, with a lock of the study and one of each sweep that is alive.
    told: called with the number and outcome of each trial that the study is told of here.
    """

    def __init__(
        self, study: Study, locks: Path, name: str, *, n_trials: int, retries: int, told: Callable[[int, Outcome], None]
    ):
        self.study, self.locks, self.owner = study, locks, name
        self.n_trials, self.retries, self.told = n_trials, retries, told
        self.lock = FileLock(locks / "study.lock", poll_interval=0.005)
        self.exhausted = threading.Event()  # the sampler has no more points

    @contextmanager
    def alive(self) -> Iterator[None]:
        """While this sweep runs. The system ends the lock with the process, however that ends."""
        lock = FileLock(self._alive(self.owner))
        with lock:
            try:
                yield
            finally:
                self.release()
                self._alive(self.owner).unlink(missing_ok=True)

    def release(self) -> None:
        """Settle what this sweep leaves where it was interrupted or an error ended it."""
        with self.lock:
            for trial in self.trials():
                if trial.state == TrialState.RUNNING and trial.system_attrs.get(OWNER) == self.owner:
                    self.settle(trial.number, "the sweep was interrupted", excused=True)

    def _alive(self, owner: str) -> Path:
        return self.locks / f"{owner}.alive"

    def _is_alive(self, owner: str | None) -> bool:
        if owner is None or owner == self.owner:
            return owner == self.owner
        path = self._alive(owner)
        if not path.exists():  # ended; or on a machine that does not share this folder, where only that one can tell
            return not owner.startswith(f"{socket.gethostname()}:")
        return _is_locked(path)

    # What there is

    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def trial(self, number: int) -> FrozenTrial:
        return optuna_private.frozen_trial(self.study, number)

    def counting(self) -> list[FrozenTrial]:
        """The trials that use up the budget."""
        return counting(self.trials())

    def room(self, counting: list[FrozenTrial] | None = None) -> bool:
        """Whether the budget has another trial."""
        known = self.counting() if counting is None else counting
        more = not self.exhausted.is_set() or any(t.state == TrialState.WAITING for t in self.trials())
        return len(known) < self.n_trials and more

    def running(self) -> int:
        return sum(trial.state == TrialState.RUNNING for trial in self.trials())

    def failures(self) -> int:
        return sum(trial.state == TrialState.FAIL for trial in self.counting())

    # Ask and tell

    def ask(self) -> Trial | None:
        """The next trial, or None where the budget is used up."""
        with self.lock:
            known = self.counting()
            if not self.room(known):
                return None
            trial = self.study.ask()
            set_system_attr(self.study, trial, OWNER, self.owner)
            if trial.number > max((t.number for t in known), default=-1) + 1:  # others came between, or lost ones lie
                known = [t for t in self.counting() if t.number < trial.number]
        if len(known) < self.n_trials:
            return trial
        set_system_attr(self.study, trial, SURPLUS, True)  # a sweep on another machine, without this lock, was faster
        self.study.tell(trial, state=TrialState.FAIL)
        return None

    def tell(self, number: int, outcome: Outcome) -> None:
        """Tell the study how a trial ended, unless it knows."""
        if outcome.error:
            trial = self.trial(number)
            if trial.state.is_finished():
                return
            if "error" not in trial.user_attrs:  # its job could not
                set_user_attr(self.study, trial, "error", outcome.error)
                set_user_attr(self.study, trial, "traceback", outcome.traceback)
        if optuna_private.tell(self.study, number, outcome.values, outcome.trial_state):
            self.exhausted.set()
        self.told(number, outcome)

    def settle(self, number: int, reason: str, *, excused: bool = False) -> None:
        """End a trial whose job is gone: with the outcome that the job wrote down, or as lost, to be tried again."""
        with self.lock:
            trial = self.trial(number)
            if trial.state.is_finished():
                return
            if written := trial.system_attrs.get(OUTCOME):
                self.tell(number, Outcome(**written))
                return
            excused = excused or EXCUSED in trial.system_attrs
            if excused:
                set_system_attr(self.study, trial, EXCUSED, True)
            if self._retry(trial, excused):
                reason += "; it is tried again"
            self.tell(number, Outcome("FAIL", error=reason))

    def _retry(self, trial: FrozenTrial, excused: bool) -> bool:
        """Have a lost trial's parameters tried again, unless they were often enough, or are already."""
        before: list[int] = trial.system_attrs.get(HISTORY, [])
        attempts = [number for number in before if EXCUSED not in self.trial(number).system_attrs]
        if len(attempts) >= self.retries and not excused:
            return False
        history = [*before, trial.number]
        if all(other.system_attrs.get(HISTORY) != history for other in self.trials()):
            kept = {key: value for key, value in trial.system_attrs.items() if key not in (OWNER, EXCUSED)}
            kept |= {FIXED_PARAMS: kept.get(FIXED_PARAMS, {}) | trial.params}
            kept |= {FAILED_TRIAL: history[0], HISTORY: history}
            flags = {key: value for key, value in trial.user_attrs.items() if key in ("baseline", "enqueued")}
            waiting = FrozenTrial(
                number=-1,
                trial_id=-1,
                state=TrialState.WAITING,
                value=None,
                datetime_start=None,
                datetime_complete=None,
                params={},
                distributions={},
                user_attrs=flags,
                system_attrs=kept,
                intermediate_values={},
            )
            self.study.add_trial(waiting)
        return True

    def recover(self) -> None:
        """Settle the trials whose sweep has died."""
        with self.lock:
            dead = set()
            for trial in self.trials():
                owner = trial.system_attrs.get(OWNER)
                if trial.state == TrialState.RUNNING and not self._is_alive(owner):
                    self.settle(trial.number, "the sweep that ran it was killed")
                    dead.add(owner)
            for owner in filter(None, dead):
                self._alive(owner).unlink(missing_ok=True)


def counting(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that use up a study's budget: not those that wait, or that were tried again."""
    again = {trial.system_attrs[HISTORY][-1] for trial in trials if HISTORY in trial.system_attrs}
    return [
        trial
        for trial in trials
        if trial.state != TrialState.WAITING and trial.number not in again and SURPLUS not in trial.system_attrs
    ]


def is_swept(folder: Path) -> bool:
    """Whether a sweep is at work on the study that has this folder; one of another machine until its file is gone.

    For readers: it takes no lock, which sweeps would take for a living one.
    """
    owners = [path.stem.split(":") for path in (folder / LOCKS).glob("*.alive")]
    return any(host != socket.gethostname() or psutil.pid_exists(int(pid)) for host, pid, _ in owners)


def _is_locked(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def allowed_failures(rate: float, n_trials: int) -> int:
    """How many of `n_trials` may fail before a sweep gives up."""
    return math.floor(rate * n_trials + 1e-9)
