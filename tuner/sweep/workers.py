"""Several processes that run a study's trials side by side, as one for each GPU: `hydra.sweeper.workers`.

A worker is this sweep's own command, which joins the study. The study hands out the trials; nothing else is shared.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from tuner import InputError
from tuner.sweep import WORKER, gpus

log = logging.getLogger("tuner.sweep")
LOGS = "workers"  # in the study's folder
GRACE = 60.0  # seconds to put back trials after SIGTERM; then a worker is killed


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
    They end by themselves when no trials are left. If the block is left before that, they put their trials back.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(place, number, overrides, folder)) for place in range(1, number)]
        stack.callback(_end, workers)
        with _threads(number):
            yield
        for process in workers:  # no trials are left
            with suppress(subprocess.TimeoutExpired):  # _end() ends it
                process.wait(GRACE)


@contextmanager
def _worker(place: int, number: int, overrides: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    path = folder / LOGS / f"{place}.log"
    path.parent.mkdir(exist_ok=True)
    environment = os.environ | {WORKER: str(place), "OMP_NUM_THREADS": str(max(1, _cores() // number))}
    where = ""
    if visible := gpus.visible():
        environment |= gpus.only(gpu := visible[place % len(visible)])
        where = f" on GPU {gpu}"
    command = [sys.executable, *(program() or [])[1:], *sys.argv[1:], *overrides]
    with path.open("ab") as output:  # in a session of its own: Ctrl-C in a terminal reaches this process alone
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    log.info("worker %d%s: %s", place, where, path)
    with process:
        yield process
    if process.returncode not in (0, 130):
        text = "worker %d ended with exit code %d: see %s; the trials that it had are run again"
        log.warning(text, place, process.returncode, path)


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in workers:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in workers:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()


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
