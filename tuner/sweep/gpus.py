"""One GPU for each process that runs trials, when there are several."""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"
_held: list[FileLock] = []  # until this process ends


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. CUDA is not started."""
    listed = os.environ.get(VISIBLE)
    return [str(index) for index in range(count())] if listed is None else [name for name in listed.split(",") if name]


def count() -> int:
    """The number of GPUs that torch sees; 0 without torch. CUDA is not started."""
    if find_spec("torch") is None:
        return 0
    from tuner.device import cuda_devices  # imports torch, which only a sweep of several processes needs here

    return cuda_devices()


def only(gpu: str) -> dict[str, str]:
    """The environment of a process that uses this one alone, as its cuda:0."""
    return {VISIBLE: gpu}


def take_one() -> str | None:
    """Keep this process to one GPU: a free one, or any if none is. None: there are not several.

    Call it before CUDA is started. Processes of one user on one machine take different ones. A lock is held until the
    process ends, however it does.
    """
    names = visible()
    if _held or len(names) < 2:
        return None
    folder = Path(tempfile.gettempdir()) / f"tuner-gpus-{getattr(os, 'getuid', int)()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    chosen = names[os.getpid() % len(names)]
    for name in names:
        lock = FileLock(folder / f"{name.replace('/', '_')}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        _held.append(lock)
        chosen = name
        break
    os.environ |= only(chosen)
    return chosen
