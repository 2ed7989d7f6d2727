"""The jobs of hydra/launcher=submitit_slurm: what squeue says of them, and their end with scancel.

Submitit asks sacct, which needs accounting: without it, submitit waits for ever for a job that was cancelled.
"""

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

log = logging.getLogger("tuner.sweep")
POLL = 10.0  # seconds between two calls of squeue
RESULT_DELAY = 15.0  # seconds after the end of a job in which a shared folder may still lack its result
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)
ADVICE = {
    "FAILED": ": see .submitit/{job}_0_log.err in the study's folder",
    "OUT_OF_MEMORY": ": raise hydra.launcher.mem_gb",
    "TIMEOUT": ": raise hydra.launcher.timeout_min",
}


def is_slurm(launcher: Launcher) -> bool:
    """Whether jobs wait in Slurm's queue."""
    return type(launcher).__name__ == "SlurmLauncher"


class JobEndedError(Exception):
    """A job has ended without a result.   state: Slurm's; None if the job is not known any more."""

    def __init__(self, job: str, state: str | None):
        end = f"ended as {state}{ADVICE.get(state, '').format(job=job)}" if state else "is not in the queue any more"
        super().__init__(f"Slurm job {job} {end}")
        self.state = state


@dataclass
class Queue:
    """This user's jobs, as squeue lists them. It stands in for submitit's watcher, of which two methods are called.

    One call of squeue, at most every POLL seconds, answers for all jobs.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    states: dict[str, str] | None = None  # by job; None: squeue did not answer
    asked: float = float("-inf")  # when
    submitted: dict[str, float] = field(default_factory=dict)  # this process's jobs without a result, and when
    ended: dict[str, float] = field(default_factory=dict)  # when they were first seen to have ended
    cancelled: set[str] = field(default_factory=set)
    recorders: dict[int, Callable[[str], None]] = field(default_factory=dict)  # by thread, see `submitting`

    def is_alive(self, job: str) -> bool | None:
        """Whether a job waits or runs. None: Slurm does not answer, or is not here."""
        with self.lock:
            self._ask(older_than=POLL)
            if self.states is not None and not self._is_listed(job):  # it may be newer than the list
                self._ask(older_than=0)
            return None if self.states is None else self._is_listed(job)

    def _is_listed(self, job: str) -> bool:
        return (self.states or {}).get(job, "COMPLETED") not in ENDED

    def _ask(self, older_than: float) -> None:
        now = time.monotonic()
        if now - self.asked >= older_than:
            self.states, self.asked = _states(), now

    # Submitit's watcher

    def register_job(self, job_id: str) -> None:
        """Submitit calls this in the thread that has submitted a job, as soon as sbatch has given it an id."""
        self.submitted[job_id] = time.monotonic()
        if record := self.recorders.get(threading.get_ident()):
            record(job_id)

    def is_done(self, job_id: str, mode: str = "standard") -> bool:  # noqa: ARG002 - submitit's signature
        """False: submitit asks every second, after it has looked for the result.

        Raises JobEndedError if there will be none, for which submitit has no way that takes no time.
        """
        if job_id in self.cancelled:
            raise JobEndedError(job_id, "CANCELLED")
        with self.lock:
            self._ask(older_than=POLL)
            if self.states is None or self.asked < self.submitted.get(job_id, 0.0) or self._is_listed(job_id):
                self.ended.pop(job_id, None)
            elif time.monotonic() - self.ended.setdefault(job_id, time.monotonic()) >= RESULT_DELAY:
                self.submitted.pop(job_id, None)
                raise JobEndedError(job_id, self.states.get(job_id))
        return False

    @contextmanager
    def submitting(self, record: Callable[[str], None]) -> Iterator[None]:
        """Call `record` with the id of each job that this thread submits: it is known nowhere else before its end."""
        thread, jobs = threading.get_ident(), list[str]()

        def keep(job: str) -> None:
            jobs.append(job)
            record(job)

        self.recorders[thread] = keep
        try:
            yield
        finally:
            del self.recorders[thread]
        for job in jobs:
            self.submitted.pop(job, None)

    def cancel(self) -> None:
        """Cancel the jobs of this process that wait or run."""
        submitted = list(self.submitted.keys() - self.cancelled)
        jobs = sorted((job for job in submitted if self.is_alive(job) is not False), key=int)
        self.cancelled.update(submitted)
        if not jobs:
            return
        log.info("cancelling Slurm job%s %s", "s" * (len(jobs) > 1), ", ".join(jobs))
        try:
            subprocess.run(["scancel", *jobs], check=True, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            reason = " ".join(str(getattr(error, "stderr", None) or error).split())
            log.warning("they may still be there (%s); cancel them with: scancel %s", reason, " ".join(jobs))


QUEUE = Queue()  # of the process: submitit has one watcher for all jobs


def _states() -> dict[str, str] | None:
    """The states of this user's jobs, those included that have just ended. None: squeue does not answer."""
    command = ["squeue", "--me", "--states=all", "--noheader", "--format=%i %T"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.split() for line in done.stdout.splitlines())


@contextmanager
def cancelled_with_sweep() -> Iterator[None]:
    """Jobs that wait or run at the end of this context are cancelled. Those of a process that is killed go on."""
    from submitit import SlurmJob

    before = SlurmJob.watcher
    SlurmJob.watcher = QUEUE  # type: ignore[assignment]
    try:
        yield
    finally:
        QUEUE.cancel()
        SlurmJob.watcher = before


def launch(
    launcher: Launcher,
    overrides: Sequence[Sequence[str]],
    first: int,
    record: Callable[[str], None] = lambda _job: None,
) -> Sequence[JobReturn]:
    """Launch jobs with the numbers `first`, + 1, ...   record: called with the id of a job of Slurm."""
    if not is_slurm(launcher):
        return launcher.launch(overrides, initial_job_idx=first)
    _share_folder(launcher)
    with QUEUE.submitting(record):
        return launcher.launch(overrides, initial_job_idx=first)


def _share_folder(launcher: Launcher) -> None:
    """Jobs get one folder for their logs: Slurm may open a log before submitit has made a folder with the job's id."""
    params = launcher.params  # type: ignore[attr-defined]
    params["submitit_folder"] = str(params["submitit_folder"]).removesuffix("/%j")


def go_on_when_warned() -> None:
    """In a job: use the time that Slurm leaves it. The state with which the job ends tells the sweep why it ended.

    Submitit's handler would end the trial at once, as failed.
    """

    def warned(number: int, _frame: FrameType | None) -> None:
        log.warning("%s: Slurm will end this job soon", signal.Signals(number).name)

    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, warned)
