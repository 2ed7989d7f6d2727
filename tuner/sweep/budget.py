"""The budget of a study: which trials count towards `n_trials`, which one is next, and what becomes of lost ones."""

import json
import math
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from tuner.sweep import duplicates, leases, optuna_private, slurm
from tuner.sweep.history import History, counted
from tuner.sweep.leases import LEASE, Renewals, Watch, new_lease
from tuner.sweep.optuna_private import FAILED_TRIAL, FIXED_PARAMS, RETRY_HISTORY, set_system_attr
from tuner.sweep.outcome import OUTCOME, OUTCOME_FILE, Outcome
from tuner.sweep.patient_storage import REQUEST, SURPLUS, set_attributes
from tuner.sweep.settings import SAME_AS
from tuner.sweep.stopping import ENDED_BY, TIMEOUT, StopRules
from tuner.sweep.storage_files import Place, StorageLostError

LOCKS = ".locks"  # in the study's folder
CLOCK_ERROR = 5.0  # seconds by which the start of a process may seem to change when the clock is set
# System attributes of a trial.
OWNER = "owner"  # the sweep that runs it
INTERRUPTED = "excused"  # its sweep was interrupted: it does not count as an attempt
OUTLIVES = "outlives"  # its job may outlive its sweep: its lease tells whether it is lost
SLURM_JOB = "slurm_job"  # its job, for which the queue tells it, too


class Budget:
    """A study's `n_trials`, shared by all sweeps on the study.

    A trial counts while it runs, and once it is complete, pruned or failed. A trial whose process was killed or
    interrupted is lost. It does not count: a copy with the same parameters replaces it, at most `retries` times.
    A duplicate of another trial does not count either.

    locks: a folder shared by the sweeps. It holds a lock for the study, and one for each running sweep.
    owner: this sweep's name, from `new_owner`.   rules: may end the study before `n_trials`.
    jobs_outlive: whether jobs go on without this sweep, as on a cluster.
    space: the study ends when all its configurations have been tried. None: trials may have further parameters.
    on_trial_end: called with the number and the outcome of each trial that this sweep tells to the study.
    """

    def __init__(
        self,
        study: Study,
        locks: Path,
        owner: str,
        *,
        n_trials: int,
        retries: int,
        rules: StopRules | None = None,
        space: Mapping[str, BaseDistribution] | None = None,
        on_trial_end: Callable[[int, Outcome], None] = lambda _number, _outcome: None,
    ):
        self.study, self.locks, self.owner = study, locks, owner
        self.n_trials, self.retries, self.on_trial_end = n_trials, retries, on_trial_end
        self.rules = rules or StopRules()
        self.configurations = None if space is None else duplicates.size(space)
        self.history = History(study, None if self.configurations is None else space)
        self.place = Place.of(locks.parent)
        self.lock = FileLock(locks / "study.lock", poll_interval=0.005)
        self.jobs_outlive = False
        self.renewals, self.watch = Renewals(study, {OWNER: owner}), Watch()
        self.sampler_exhausted = threading.Event()  # a grid has no more points
        self.nothing_new = threading.Event()  # the sampler draws duplicates only

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Mark this sweep as running, and renew the leases of its trials.

        The operating system releases the lock even if the process is killed.
        """
        lock = FileLock(self._lock_file(self.owner))
        with lock:
            try:
                yield
            finally:
                self.renewals.end()
                self.release()
                self._lock_file(self.owner).unlink(missing_ok=True)

    def release(self) -> None:
        """Finish the trials that this sweep leaves running after an interrupt or an error.

        If the study can't be written, a file says so to the next sweep.
        """
        self.place.check()
        try:
            with self.lock:
                for trial in self.trials():
                    if trial.state == TrialState.RUNNING and trial.system_attrs.get(OWNER) == self.owner:
                        self.finish_lost(trial.number, "the sweep was interrupted", interrupted=True)
        except StorageLostError:
            self._released_file(self.owner).touch()
            raise

    def _lock_file(self, owner: str) -> Path:
        return self.locks / f"{owner}.alive"

    def _released_file(self, owner: str) -> Path:
        return self.locks / f"{owner}.released"

    def _why_lost(self, trial: FrozenTrial) -> str | None:
        """Why nobody runs a running trial any more; None if somebody may.

        The lock of its sweep tells that at once, if it ran on this machine and its jobs ended with it. Otherwise
        Slurm's queue or the lease does. Of an earlier version's trials on another machine, nothing can be told.
        """
        owner, attributes = str(trial.system_attrs[OWNER]), trial.system_attrs
        if owner == self.owner:
            return None
        if self._released_file(owner).exists():
            return "the sweep that ran it lost its storage"
        host = owner.partition(":")[0]
        if host == socket.gethostname():
            is_running = self._lock_file(owner).exists() and _is_locked(self._lock_file(owner))
            if is_running:
                return None
            if OUTLIVES not in attributes or OUTCOME in attributes:
                return "the sweep that ran it was killed"
        if SLURM_JOB in attributes:
            alive = slurm.QUEUE.is_alive(attributes[SLURM_JOB])
            if alive:
                return None
            if alive is False and host == socket.gethostname():  # the queue of another machine may be another one
                return f"its Slurm job {attributes[SLURM_JOB]} has ended, and so has its sweep"
        if LEASE in attributes and self.watch.has_expired(trial.number, attributes[LEASE]):
            return f"it gave no sign of life for {leases.EXPIRY:.0f} s; its sweep ran on {host}"
        return None

    # Trials by state

    def trials(self) -> list[FrozenTrial]:
        """All trials of the study."""
        return self.study.get_trials(deepcopy=False)

    def trial(self, number: int) -> FrozenTrial:
        """One trial by its number."""
        return optuna_private.frozen_trial(self.study, number)

    def counted(self) -> list[FrozenTrial]:
        """The trials that count towards the budget."""
        return counted(self.trials())

    def has_room(self) -> bool:
        """Whether another trial may start."""
        history = self.history.look()
        more = bool(self._queue()) or not (self.sampler_exhausted.is_set() or self._exhausted())
        return history.counted().total() < self.n_trials and more and self.rules.reason(history) is None

    def _queue(self) -> list[FrozenTrial]:
        """The trials that waited at the last look."""
        return [trial for trial in self.history.unfinished if trial.state == TrialState.WAITING]

    def stopped(self) -> str | None:
        """Why no more trials should start before `n_trials` are done; None without a reason."""
        return self.rules.reason(self.history.look()) or self._exhausted()

    def _exhausted(self) -> str | None:
        """Why there is no new configuration; None if there may be one."""
        if self.nothing_new.is_set():
            return f"the last {duplicates.IN_A_ROW} draws gave no new configuration"
        n = self.configurations
        if n is None or len(self.history.trials) < n:
            return None
        which = "the only configuration" if n == 1 else f"all {n} configurations"
        tried = f"{which} of the space {'has' if n == 1 else 'have'} been evaluated"
        return tried if self.history.tried() >= n else None

    def _running(self) -> list[FrozenTrial]:
        return [trial for trial in self.history.look().unfinished if trial.state == TrialState.RUNNING]

    def running(self) -> int:
        """The number of running trials, those of other sweeps included."""
        return len(self._running())

    def of_others(self) -> list[FrozenTrial]:
        """The running trials of other sweeps, which end or are lost some time."""
        own = (None, self.owner)
        return [t for t in self._running() if LEASE in t.system_attrs and t.system_attrs.get(OWNER) not in own]

    def failures(self) -> int:
        """The number of failed trials that count."""
        return self.history.look().counted()[TrialState.FAIL]

    # Ask and tell

    def ask(self) -> Trial | None:
        """The next trial, or None if the budget is used up. Raises StorageLostError if the study's folder has moved."""
        self.place.check()
        with self.lock:
            if not self.has_room():
                return None
            attributes = {OWNER: self.owner, LEASE: new_lease()} | ({OUTLIVES: True} if self.jobs_outlive else {})
            trial = optuna_private.ask(self.study, attributes, self._queue())
            if trial.number > len(self.history.trials):  # another sweep asked in between
                self.history.look()
        if self.history.counted_before(trial.number) < self.n_trials:
            self.renewals.hold(trial)
            return trial
        set_system_attr(self.study, trial, SURPLUS, True)  # a sweep that does not share this lock was faster
        self.study.tell(trial, state=TrialState.FAIL)
        return None

    def record_job(self, number: int, job: str) -> None:
        """Keep the id of a trial's Slurm job: nobody renews the trial's lease while the job waits without its sweep."""
        with suppress(UpdateFinishedTrialError):  # it was taken for lost: its job does not run it
            set_system_attr(self.study, self.trial(number), SLURM_JOB, job)

    def tell(self, number: int, outcome: Outcome) -> None:
        """Report the end of a trial to the study, unless the study has it already."""
        if outcome.error:
            trial = self.trial(number)
            if trial.state.is_finished():
                return
            if "error" not in trial.user_attrs:  # the job could not write it
                set_attributes(self.study, trial, {"error": outcome.error, "traceback": outcome.traceback})
        if outcome.state == TrialState.PRUNED.name:
            self._put_off(number)
        self.renewals.drop(number)
        if optuna_private.tell(self.study, number, outcome.values, outcome.trial_state):
            self.sampler_exhausted.set()
        self.on_trial_end(number, outcome)

    def original(self, trial: Trial) -> FrozenTrial | None:
        """The trial that this one, whose parameters are drawn, would repeat; None if it is new.

        Running trials of programs that are not sweeps are no originals: they may never end. Nor are the lost trials
        that this one replaces: one of them still seems to run if the sweep that recovered it was killed meanwhile.
        """
        params, lost = trial.params, self.trial(trial.number).system_attrs.get(RETRY_HISTORY, [])
        others = [t for t in self.history.same(params) if t.number not in lost]
        known = [t for t in others if t.state != TrialState.RUNNING or OWNER in t.system_attrs]
        return duplicates.find(known, trial.number, params)

    def tell_duplicate(self, trial: Trial, original: FrozenTrial) -> None:
        """Mark a trial as a duplicate, and give it the outcome of the one with the same parameters."""
        trial.set_user_attr(SAME_AS, original.number)
        if original.state == TrialState.PRUNED and original.intermediate_values:  # TPE ranks it by the last one
            step, value = max(original.intermediate_values.items())
            trial.report(value, step)
        self.tell(trial.number, duplicates.outcome(original))

    def _put_off(self, number: int) -> None:
        """Queue a trial again that ended only because the search's time was over: it runs when there is more time."""
        trial = self.trial(number)
        if trial.user_attrs.get(ENDED_BY) == TIMEOUT and not trial.state.is_finished():
            set_system_attr(self.study, trial, INTERRUPTED, True)
            self._retry(trial, interrupted=True)

    def finish_lost(self, number: int, reason: str, *, interrupted: bool = False) -> None:
        """Finish a trial whose job is gone: with the outcome that the job wrote, else as failed and to be retried."""
        with self.lock:
            trial = self.trial(number)
            if trial.state.is_finished():
                return
            file = _outcome_file(trial)
            if written := trial.system_attrs.get(OUTCOME) or (file and json.loads(file.read_text())):
                set_system_attr(self.study, trial, OUTCOME, written)
                self.tell(number, Outcome(**written))
                if file:
                    file.unlink()
                return
            interrupted = interrupted or INTERRUPTED in trial.system_attrs
            if interrupted:
                set_system_attr(self.study, trial, INTERRUPTED, True)
            if self._retry(trial, interrupted):
                reason += "; it is retried"
            self.tell(number, Outcome("FAIL", error=reason))

    def _retry(self, trial: FrozenTrial, interrupted: bool) -> bool:
        """Queue a lost trial's parameters again. False: it was retried often enough."""
        previous: list[int] = trial.system_attrs.get(RETRY_HISTORY, [])
        attempts = [number for number in previous if INTERRUPTED not in self.trial(number).system_attrs]
        if len(attempts) >= self.retries and not interrupted:
            return False
        history = [*previous, trial.number]
        if tuple(history) not in self.history.look().retries:
            self.study.add_trial(_copy_to_retry(trial, history))
        return True

    def recover(self) -> None:
        """Finish the trials of sweeps that were killed, or that could not write to the study.

        A trial without an owner is left alone: a program that is not a sweep may be running it.
        """
        with self.lock:
            dead_owners = set()
            for trial in self._running():
                if OWNER not in trial.system_attrs:
                    continue
                if reason := self._why_lost(trial):
                    owner = trial.system_attrs[OWNER]
                    released = self._released_file(owner).exists()
                    self.finish_lost(trial.number, reason, interrupted=released)
                    dead_owners.add(owner)
            for owner in dead_owners - {trial.system_attrs.get(OWNER) for trial in self._running()}:
                self._lock_file(owner).unlink(missing_ok=True)
                self._released_file(owner).unlink(missing_ok=True)

    def without_owner(self) -> list[int]:
        """The numbers of running trials that no sweep has asked for."""
        return [trial.number for trial in self._running() if OWNER not in trial.system_attrs]


def _outcome_file(trial: FrozenTrial) -> Path | None:
    """The file that a job leaves if it can't write its outcome to the study; None if there is none."""
    folder = trial.user_attrs.get("output_dir")
    file = Path(folder) / OUTCOME_FILE if folder else None
    return file if file and file.is_file() else None


def _copy_to_retry(trial: FrozenTrial, history: list[int]) -> FrozenTrial:
    """A waiting trial with the parameters that a lost one was given or has drawn. history: the trials it repeats."""
    own = (OWNER, INTERRUPTED, OUTLIVES, LEASE, REQUEST, SLURM_JOB)
    attributes = {key: value for key, value in trial.system_attrs.items() if key not in own}
    attributes[FIXED_PARAMS] = attributes.get(FIXED_PARAMS, {}) | trial.params
    attributes |= {FAILED_TRIAL: history[0], RETRY_HISTORY: history}
    return FrozenTrial(
        number=-1,
        trial_id=-1,
        state=TrialState.WAITING,
        value=None,
        datetime_start=None,
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={key: value for key, value in trial.user_attrs.items() if key in ("baseline", "enqueued")},
        system_attrs=attributes,
        intermediate_values={},
    )


def sweep_is_running(folder: Path) -> bool:
    """Whether a sweep runs on the study with this folder. A sweep of another machine counts while its file exists.

    It takes no lock: a reader that held one would make the sweep look alive.
    """
    return any(_may_run(path.stem) for path in (folder / LOCKS).glob("*.alive"))


def new_owner() -> str:
    """A name for this sweep: HOST:PID:START:ID, with the second of the epoch in which this process started."""
    start = round(psutil.Process().create_time())
    return f"{socket.gethostname()}:{os.getpid()}:{start}:{uuid.uuid4().hex[:8]}"


def _may_run(owner: str) -> bool:
    host, pid, *start, _ = owner.split(":")  # owners of earlier versions have no START
    if host != socket.gethostname():
        return True
    try:
        started = psutil.Process(int(pid)).create_time()
    except psutil.Error:
        return False
    return not start or abs(started - int(start[0])) < CLOCK_ERROR  # otherwise another process has this number now


def _is_locked(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def allowed_failures(rate: float, n_trials: int) -> int:
    """How many of `n_trials` may fail before a sweep stops."""
    return math.floor(rate * n_trials + 1e-9)
