"""Files of the cache: each a safetensors file, written once, and memory-mapped by whoever reads it.

One process writes a file while others wait, under a temporary name, so that what is there is whole.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from tuner import InputError
from tuner.files import replacing

log = logging.getLogger(__name__)

SIZES = {"U8": 1, "BF16": 2, "F32": 4}  # bytes a value, by safetensors' names
UNREADABLE = (SafetensorError, OSError, KeyError, TypeError, ValueError)  # what a damaged file leads to
T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """How messages speak of a kind of stored files: "the feature bank", "the features", "computing", "computed"."""

    file: str
    content: str
    doing: str
    done: str
    smaller: str  # what makes it so


def obtain(
    path: Path,
    kind: Kind,
    read: Callable[[Path], T],
    write: Callable[[BinaryIO], None],
    *,
    what: str,
    count: int,
    size: int,
) -> T:
    """What `read` makes of a file, which is written first where there is none, or it is damaged, with a warning.

    read: raises one of UNREADABLE for a file that is damaged.   write: fills the file.
    what: it holds, for the log.   count: images in it.   size: bytes; as much must be free.
    Where the file is there and whole, its folder may be read-only. Of several processes one writes and the others wait.
    Raises InputError where the folder must be written and can't be, or has no room.
    """
    found = _read(path, kind, read, logging.DEBUG)  # without the lock: a file comes into being whole
    if found is None:
        with _locked(path, kind):
            found = _read(path, kind, read, logging.WARNING)  # another process may have been first
            if found is None:
                _write(path, kind, write, what, count, size)
                found = _read(path, kind, read, logging.WARNING)
    else:
        log.info("%s: cached in %s (%s)", what, path, text(size))
        with suppress(OSError):
            os.utime(path)  # the time of last use, for --prune
    if found is None:
        raise OSError(f"{path} is damaged though it was just written: check the disk, or set cache_dir to another one")
    return found


def header(
    metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, tuple[int, ...]]], length: int | None = None
) -> bytes:
    """What a safetensors file begins with: https://github.com/huggingface/safetensors#format.

    tensors: dtype, one of SIZES, and shape of each, in the order in which they follow.
    length: bytes that it has at least, to take the place of a longer one.
    """
    content, start = {"__metadata__": dict(metadata)}, 0
    entries: dict[str, object] = dict(content)
    for name, (dtype, shape) in tensors.items():
        end = start + math.prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    coded = json.dumps(entries).encode()
    coded += b" " * max(-len(coded) % 8, (length or 0) - 8 - len(coded))
    return len(coded).to_bytes(8, "little") + coded


def files(cache_dir: Path, folder: str) -> Iterator[Path]:
    """The files of a kind, finished or not."""
    yield from (cache_dir / folder).glob("*.safetensors")
    yield from (cache_dir / folder).glob(".*.partial")


def text(size: float) -> str:
    """A number of bytes."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _read(path: Path, kind: Kind, read: Callable[[Path], T], level: int) -> T | None:
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        log.log(level, "%s %s is damaged (%s): %s it again", kind.file, path, error, kind.doing)
        return None


def _write(path: Path, kind: Kind, write: Callable[[BinaryIO], None], what: str, count: int, size: int) -> None:
    start = time.perf_counter()
    try:
        for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed: we hold the lock, none works
            left.unlink()
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise InputError(
                f"{kind.content} need {text(size)} and {path.parent} has {text(free)} free; set cache_dir to a larger "
                f"disk, {kind.smaller}, or free some with `python -m tuner.cache --prune`"
            )
        log.info("%s: %s them into %s (%s)", what, kind.doing, path, text(size))
        with replacing(path) as file:
            write(file)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    seconds = time.perf_counter() - start
    log.info("%s %s in %.0f s (%.0f images/s)", kind.content.removeprefix("the "), kind.done, seconds, count / seconds)


@contextmanager
def _locked(path: Path, kind: Kind) -> Iterator[None]:
    """Hold a file's lock, so that one process writes it while the others wait. The system frees it should we die."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process is %s %s: waiting for it", kind.doing, path)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # older versions of filelock: no locks on this file system
        raise _unwritable(path.parent, error) from error
    try:
        yield
    finally:
        lock.release()


def _unwritable(folder: Path, error: OSError | NotImplementedError) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"the cache folder {folder} cannot be written ({reason}); set cache_dir=FOLDER")
