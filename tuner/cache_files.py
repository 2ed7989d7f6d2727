"""Files of the cache: safetensors files that are written once and then memory-mapped by readers; unpacked archives.

One process writes a file or a folder under a temporary name while others wait, so what is in place is always complete.
A cache may have a limit. Before a file is written, those unused for longest are removed until it fits, see Cache.
"""

import json
import logging
import math
import os
import re
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
from tuner.rules import SIZE, as_bytes, or_null

log = logging.getLogger(__name__)

SIZES = {"U8": 1, "BF16": 2, "F32": 4}  # safetensors' dtype -> bytes per value
UNREADABLE = (SafetensorError, OSError, KeyError, TypeError, ValueError)  # raised for a damaged file
KEY = ".key.json"  # in a folder
ARCHIVES = "archives"
FOLDERS = ("banks", "images", ARCHIVES)  # of a cache
NAME = re.compile(r"[0-9a-f]{24}(\.safetensors)?|\.[0-9a-f]{24}(\.safetensors)?\.[0-9a-f]+\.partial")
DAY = 86400  # seconds
T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """A kind of cache file, as messages name it."""

    file: str  # "the feature bank"
    content: str  # "the features"
    doing: str  # "computing"
    done: str  # "computed"
    smaller: str  # advice that makes the files smaller: "set model.pool"


@dataclass(frozen=True)
class Cache:
    """A folder of cache files, and the bytes that they may take together; None: any number.

    Before a file is written, those unused for longest are removed until it fits. If it does not fit even then, a
    warning says so, and it is written: the features of the test images are computed after the training, so a refusal
    would lose a trained model. Two processes that write at once may also exceed the limit.
    """

    folder: Path
    limit: int | None = None

    @classmethod
    def of(cls, cache_dir: str | Path, cache_limit: str | None, prefix: str = "") -> "Cache":
        """From values of the config.   prefix: of their keys, such as "data.". Raises InputError for a wrong limit."""
        or_null(SIZE).check(f"{prefix}cache_limit", cache_limit)
        return cls(Path(cache_dir).expanduser(), None if cache_limit is None else as_bytes(cache_limit))


def machine_cache() -> Path:
    """The cache folder of this machine, unless `cache_dir` names another."""
    return Path(os.environ.get("TUNER_CACHE", "~/.cache/tuner")).expanduser()


@dataclass(frozen=True)
class Entry:
    """A file of a cache, or the folder of an unpacked archive.   size: in bytes.   used: time of last use, seconds."""

    path: Path
    size: int
    used: float

    @property
    def is_unfinished(self) -> bool:
        """Whether it is being written, or was left by a process that was killed."""
        return self.path.suffix == ".partial"

    @property
    def days_unused(self) -> float:
        """Days since its last use."""
        return (time.time() - self.used) / DAY

    @property
    def text(self) -> str:
        """Its name, size and last use."""
        return f"{self.path.name} ({format_bytes(self.size)}, used {self.days_unused:.1f} days ago)"


ARCHIVE = Kind("the unpacked archive", "the unpacked images", "unpacking", "unpacked", "unpack it yourself")


def obtain(
    cache: Cache,
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

    path: CACHE/FOLDER/KEY.safetensors, with a folder of FOLDERS.
    read: reads the file; raises one of UNREADABLE if it is damaged.   write: writes the content.
    what: a description of the content, for the log.   count: number of images.   size: bytes that must be free.
    If an intact file exists, its folder may be read-only. Only one process writes a file; others wait for it.
    Files unused for longest are removed if the cache would exceed its limit.
    Raises InputError if the folder cannot be written or has not enough free space, OSError if a file that was just
    written is damaged.
    """
    content = _read(path, kind, read, logging.DEBUG)  # needs no lock, because a file appears complete
    if content is None:
        with _locked(path, kind):
            content = _read(path, kind, read, logging.WARNING)  # another process may have written it meanwhile
            if content is None:
                _write(cache, path, kind, write, what, count, size)
                content = _read(path, kind, read, logging.WARNING)
    else:
        log.info("%s: cached in %s (%s)", what, path, format_bytes(size))
        with suppress(OSError):
            os.utime(path)  # the time of last use
    if content is None:
        raise OSError(f"{path} is damaged right after it was written: check the disk, or set cache_dir to another one")
    return content


def obtain_folder(
    cache: Cache, path: Path, write: Callable[[Path], None], key: Mapping[str, object], *, what: str
) -> None:
    """Make sure that the folder of an unpacked archive is in the cache.

    path: CACHE/archives/KEY.   write: fills an empty folder.
    key: what the folder depends on, for the list of the cache.   what: the archive, for the log.
    The size is not known before: files unused for longest are removed afterwards if the cache exceeds its limit.
    Raises InputError if the cache folder cannot be written, and what `write` raises.
    """
    if not path.is_dir():
        with _locked(path, ARCHIVE):
            if not path.is_dir():  # another process may have written it meanwhile
                log.info("%s: unpacking it into %s", what, path)
                _fill(path, write, key)
                _make_room(cache, path, ARCHIVE, size_of(path))
    log.info("%s: unpacked in %s", what, path)
    with suppress(OSError):
        os.utime(path)  # the time of last use


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


def entries(folder: Path) -> list[Entry]:
    """The files and folders of a cache, including unfinished ones, the longest unused first.

    Others are left out, by their names: somebody may have chosen a folder that has an `images` of its own.
    """
    found = []
    for path in (path for name in FOLDERS for path in (folder / name).glob("*")):
        if _is_ours(path):
            with suppress(FileNotFoundError):  # another process may remove it meanwhile
                found.append(Entry(path, size_of(path), path.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def _is_ours(path: Path) -> bool:
    if not NAME.fullmatch(path.name) or path.is_symlink():
        return False
    return bool(path.suffix) or (path / KEY).is_file()


def evict(folder: Path, most: int, keep: Path | None = None) -> tuple[list[Entry], int]:
    """Remove what is unused for longest until the files of a cache, without `keep`, take at most so many bytes.

    These stay, even if the cache is then larger:
    - files that this process has mapped (known on Linux only) or that any process is writing;
    - unfinished files, and unpacked archives, used within a day: another run may be writing or reading them;
    - files that another process has used meanwhile, and what cannot be removed.
    Other processes that have mapped a removed file keep its content; on Windows it cannot be removed.
    returns: what was removed, and the bytes of what is left without `keep`.
    """
    mapped = _mapped()
    stay = [entry for entry in entries(folder) if entry.path != keep]
    left, removed = sum(entry.size for entry in stay), []
    for entry in stay:
        if left <= most:
            break
        may_be_read = entry.is_unfinished or entry.path.is_dir()
        if str(entry.path.resolve()) not in mapped and not (may_be_read and entry.days_unused < 1) and _remove(entry):
            removed.append(entry)
            left -= entry.size
    return removed, left


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
    except RuntimeError:  # torch's, if another process removes the file between two steps of reading it
        if path.exists():
            raise
        return None
    except UNREADABLE as error:
        log.log(level, "%s %s is damaged (%s): %s it again", kind.file, path, error, kind.doing)
        return None


def _remove(entry: Entry) -> bool:
    """Remove a file, unless a process is writing it or has used it since it was listed. Whether it was removed."""
    key = entry.path.name.removeprefix(".").partition(".")[0]
    lock = FileLock(entry.path.with_name(f"{key}.lock"))
    try:
        with lock.acquire(timeout=0):
            if entry.path.stat().st_mtime != entry.used:
                return False
            remove(entry.path)
            return True
    except (OSError, NotImplementedError):  # OSError: a Timeout of the lock, or another process has removed the file
        return False


def _mapped() -> set[str]:
    """The files that this process has mapped into its memory; none where the system has no list of them."""
    try:
        lines = Path("/proc/self/maps").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return set()
    return {line.split(maxsplit=5)[5] for line in lines if "/" in line}


def _make_room(cache: Cache, path: Path, kind: Kind, size: int) -> None:
    """Keep a cache with a file of `size` bytes at `path` within its limit; where that fails, warn."""
    if cache.limit is None:
        return
    removed, left = evict(cache.folder, cache.limit - size, keep=path)
    limit = f"cache_limit={format_bytes(cache.limit)}"
    for entry in removed:
        log.info("removed %s to make room for %s: %s", entry.text, kind.content, limit)
    if size + left > cache.limit:
        rest = f", and others that cannot be removed now take {format_bytes(left)}" if left else ""
        log.warning(
            "the cache exceeds %s: %s need %s%s; raise the limit, or %s",
            *(limit, kind.content, format_bytes(size), rest, kind.smaller),
        )


def _write(
    cache: Cache, path: Path, kind: Kind, write: Callable[[BinaryIO], None], what: str, count: int, size: int
) -> None:
    start = time.perf_counter()
    try:
        for leftover in path.parent.glob(f".{path.name}.*"):  # of a killed process, because we hold the lock
            leftover.unlink()
        _make_room(cache, path, kind, size)
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
