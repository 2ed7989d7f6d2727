"""Files of the cache: safetensors files that are written once and then memory-mapped by readers; unpacked archives.

One process writes a file or a folder under a temporary name while others wait, so what is in place is always complete.
"""

import json
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from tuner import InputError
from tuner.files import replacing

log = logging.getLogger(__name__)

SIZES = {"U8": 1, "BF16": 2, "F32": 4}  # safetensors' dtype -> bytes per value
UNREADABLE = (SafetensorError, OSError, KeyError, TypeError, ValueError)  # raised for a damaged file
KEY = ".key.json"  # in a folder
T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """A kind of cache file, as messages name it."""

    file: str  # "the feature bank"
    content: str  # "the features"
    doing: str  # "computing"
    done: str  # "computed"
    smaller: str  # advice that makes the files smaller: "set model.pool"


ARCHIVE = Kind("the unpacked archive", "the unpacked images", "unpacking", "unpacked", "unpack it yourself")


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
    """The result of `read` for a cache file. A missing or damaged file is written first; a damaged one with a warning.

    read: reads the file; raises one of UNREADABLE if it is damaged.   write: writes the content.
    what: a description of the content, for the log.   count: number of images.   size: bytes that must be free.
    If an intact file exists, its folder may be read-only. Only one process writes a file; others wait for it.
    Raises InputError if the folder cannot be written or has not enough free space, OSError if a file that was just
    written is damaged.
    """
    content = _read(path, kind, read, logging.DEBUG)  # needs no lock, because a file appears complete
    if content is None:
        with _locked(path, kind):
            content = _read(path, kind, read, logging.WARNING)  # another process may have written it meanwhile
            if content is None:
                _write(path, kind, write, what, count, size)
                content = _read(path, kind, read, logging.WARNING)
    else:
        log.info("%s: cached in %s (%s)", what, path, format_bytes(size))
        with suppress(OSError):
            os.utime(path)  # the time of last use, for --prune
    if content is None:
        raise OSError(f"{path} is damaged right after it was written: check the disk, or set cache_dir to another one")
    return content


def obtain_folder(path: Path, write: Callable[[Path], None], key: Mapping[str, object], *, what: str) -> None:
    """Make sure that the folder of an unpacked archive is in the cache.

    write: fills an empty folder.   key: what the folder depends on, for the list of the cache.
    what: the archive, for the log.
    Raises InputError if the cache folder cannot be written, and what `write` raises.
    """
    if not path.is_dir():
        with _locked(path, ARCHIVE):
            if not path.is_dir():  # another process may have written it meanwhile
                log.info("%s: unpacking it into %s", what, path)
                _fill(path, write, key)
    log.info("%s: unpacked in %s", what, path)
    with suppress(OSError):
        os.utime(path)  # the time of last use, for --prune


def _fill(path: Path, write: Callable[[Path], None], key: Mapping[str, object]) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        for leftover in path.parent.glob(f".{path.name}.*"):  # of a killed process, because we hold the lock
            remove(leftover)
        partial.mkdir()
        write(partial)
        (partial / KEY).write_text(json.dumps(key), "utf-8")
        os.sync()  # once, instead of a sync of each of many small files
        partial.rename(path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def header(
    metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, tuple[int, ...]]], length: int | None = None
) -> bytes:
    """The header of a safetensors file: https://github.com/huggingface/safetensors#format.

    tensors: name -> (dtype, a key of SIZES; shape), in the order of the data.
    length: pad the header to at least this many bytes, to overwrite a longer one.
    """
    start = 0
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, (dtype, shape) in tensors.items():
        end = start + math.prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    coded = json.dumps(entries).encode()
    coded += b" " * max(-len(coded) % 8, (length or 0) - 8 - len(coded))
    return len(coded).to_bytes(8, "little") + coded


def files(cache_dir: Path, folder: str) -> Iterator[Path]:
    """The cache files and folders in a folder, including unfinished ones."""
    for path in (cache_dir / folder).glob("*"):
        if path.suffix in (".safetensors", ".partial") or path.is_dir():
            yield path


def key_of(path: Path) -> Any:
    """The key that a cache file or folder was written with. Raises one of UNREADABLE if it is damaged."""
    if path.is_dir():
        return json.loads((path / KEY).read_text("utf-8"))
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["key"])


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def remove(path: Path) -> None:
    """Delete a file or a folder. A folder that is deleted only in part is not left in place."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    partial = path if path.suffix == ".partial" else path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    path.rename(partial)
    shutil.rmtree(partial)


def format_bytes(size: float) -> str:
    """A number of bytes with its unit."""
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
        for leftover in path.parent.glob(f".{path.name}.*"):  # of a killed process, because we hold the lock
            leftover.unlink()
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise InputError(
                f"{kind.content} need {format_bytes(size)} and {path.parent} has {format_bytes(free)} free; set "
                f"cache_dir to a larger disk, {kind.smaller}, or free some with `python -m tuner.cache --prune`"
            )
        log.info("%s: %s them into %s (%s)", what, kind.doing, path, format_bytes(size))
        with replacing(path) as file:
            write(file)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    seconds = time.perf_counter() - start
    log.info("%s %s in %.0f s (%.0f images/s)", kind.content.removeprefix("the "), kind.done, seconds, count / seconds)


@contextmanager
def _locked(path: Path, kind: Kind) -> Iterator[None]:
    """Hold the lock of a file while writing it. The operating system frees the lock if the process dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process is %s %s: waiting for it", kind.doing, path)
            lock.acquire()
    except (
        OSError,
        NotImplementedError,
    ) as error:  # NotImplementedError: older filelock on a file system without locks
        raise _unwritable(path.parent, error) from error
    try:
        yield
    finally:
        lock.release()


def _unwritable(folder: Path, error: OSError | NotImplementedError) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"the cache folder {folder} cannot be written ({reason}); set cache_dir=FOLDER")
