"""Several processes that run a study's trials side by side, as one for each GPU: `hydra.sweeper.workers`.

A worker is this sweep's own command, which joins the study. The study hands out the trials; nothing else is shared.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from tuner import InputError
from tuner.sweep import WORKER, gpus

log = logging.getLogger("tuner.sweep")
LOGS = "workers"  # in the study's folder
GRACE = 60.0  # seconds to put back trials after SIGTERM; then a worker is killed
PAUSE = 1.0  # seconds between two looks at the workers
STARTS = 5  # of a worker: one that dies again and again has a fault of its own


def count(choice: int | str, config: DictConfig, launcher: Launcher, *, in_memory: bool) -> int:
    """The number of processes, this one included, for `hydra.sweeper.workers`: a number, or auto.

    auto: one for each GPU, if jobs run in this process, and have no `device` of their own. Logged if there are several.
    Raises InputError for several workers that can't be.
    """
    name = type(launcher).__name__
    obstacle = None
    if name not in ("BasicLauncher", "FusedLauncher"):
        obstacle = f"{name} has workers of its own: set hydra.sweeper.n_jobs, or hydra/launcher=fused"
    elif in_memory:
        obstacle = "the study is in memory, where no other process reaches it: set hydra.sweeper.storage"
    elif program() is None:
        obstacle = "the command of this program is not known: start it as a command, not from other code"
    if choice == "auto":
        if obstacle or OmegaConf.select(config, "device") != "auto" or (found := gpus.count()) < 2:
            return 1
        log.info("hydra.sweeper.workers: %d (auto: one for each GPU)", found)
        return found
    if not (type(choice) is int and choice >= 1):
        raise InputError(f"hydra.sweeper.workers={choice} must be a whole number of at least 1, or auto")
    if choice > 1 and obstacle:
        raise InputError(f"hydra.sweeper.workers={choice}: {obstacle}")
    return choice


def program() -> list[str] | None:
    """The command of this process without its arguments; None if other code has called it."""
    original, arguments = sys.orig_argv, sys.argv[1:]
    return original[: len(original) - len(arguments)] if original[-len(arguments) :] == arguments else None


@contextmanager
def beside(number: int, overrides: Sequence[str], folder: Path) -> Iterator[None]:
    """Run `number` - 1 workers beside this process, each on its own GPU if there are several.

    overrides: further ones for the workers.   folder: the study's; the output of worker N goes to workers/N.log.
    They end by themselves when no trials are left. One that a signal ends before that is started again, STARTS times at
    most. If the block is left before that, they put their trials back.
    """
    workers = [_Worker.of(place, number, overrides, folder) for place in range(1, number)]
    leaving = threading.Event()
    keeper = threading.Thread(target=_keep, args=(workers, leaving), name="workers", daemon=True)
    try:
        for worker in workers:
            worker.start()
        keeper.start()
        with _threads(number):
            yield
        leaving.set()
        keeper.join()
        for worker in workers:  # no trials are left
            with suppress(subprocess.TimeoutExpired):  # _end() ends it
                worker.process.wait(GRACE)
    finally:
        leaving.set()
        if keeper.ident is not None:
            keeper.join()
        _end([worker.process for worker in workers if worker.starts])
        for worker in workers:
            worker.report()


def _keep(workers: Sequence["_Worker"], leaving: threading.Event) -> None:
    """Start workers again that a signal has ended: kill -9, a crash, the system without memory."""
    while not leaving.wait(PAUSE):
        for worker in workers:
            worker.keep()


@dataclass
class _Worker:
    """A process beside this one, which is started again if it dies.   where: on which GPU.   path: its log."""

    place: int
    command: Sequence[str]
    environment: Mapping[str, str]
    where: str
    path: Path
    starts: int = 0
    told: bool = False

    @classmethod
    def of(cls, place: int, number: int, overrides: Sequence[str], folder: Path) -> "_Worker":
        """Worker `place` of `number` processes, this one included."""
        environment = os.environ | {WORKER: str(place), "OMP_NUM_THREADS": str(max(1, _cores() // number))}
        where = ""
        if visible := gpus.visible():
            environment |= gpus.only(gpu := visible[place % len(visible)])
            where = f" on GPU {gpu}"
        command = [sys.executable, *(program() or [])[1:], *sys.argv[1:], *overrides]
        return cls(place, command, environment, where, folder / LOGS / f"{place}.log")

    def start(self) -> None:
        """Start the process, in a session of its own: Ctrl-C in a terminal reaches this process alone."""
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                start_new_session=True,
            )
        self.starts, self.told = self.starts + 1, False
        log.info("worker %d%s: %s", self.place, self.where, self.path)

    def keep(self) -> None:
        """Start the process again if a signal has ended it. One that ended by itself had a reason."""
        code = self.process.poll() or 0
        again = code < 0 and code != -signal.SIGTERM and self.starts < STARTS
        self.report(", and it is started again" if again else "")
        if not again:
            return
        try:
            self.start()
        except OSError as error:  # no memory, or too many processes: at the next look there may be room
            self.starts += 1
            log.warning("worker %d cannot be started: %s", self.place, error)

    def report(self, more: str = "") -> None:
        """Log how the process has ended, once, unless it was as it should.   more: the end of the line."""
        if self.starts and self.process.poll() not in (None, 0, 130, -signal.SIGTERM) and not self.told:
            self.told = True
            text = "worker %d ended with exit code %d: see %s; the trials that it had are run again%s"
            log.warning(text, self.place, self.process.returncode, self.path, more)


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in workers:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in workers:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Leave the other workers their share of the cores, if this process uses torch."""
    torch = sys.modules.get("torch")
    if torch is None or number == 1:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, _cores() // number))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
