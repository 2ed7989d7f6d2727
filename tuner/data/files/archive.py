"""Archives of image folders: unpacked once into the cache, as the folder CACHE/archives/KEY.

KEY is a hash of the archive's path, size and times of change. Only folders and image files are unpacked. An archive may
come from a stranger: each member is checked before anything of it is written, and the sizes before they fill a disk.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from tqdm import tqdm

from tuner import InputError, cache_files
from tuner.cache_files import ARCHIVES, Cache, format_bytes
from tuner.data.files.image_file import is_image

OPEN: dict[str, Callable[[Path, str], IO[bytes]]] = {  # suffix -> how a tar file is read
    **{".tar": lambda path, mode: cast(IO[bytes], path.open(mode))},
    **dict.fromkeys((".tar.gz", ".tgz"), cast(Any, gzip.open)),
    **dict.fromkeys((".tar.xz", ".txz"), cast(Any, lzma.open)),
    **dict.fromkeys((".tar.bz2", ".tbz2", ".tbz"), cast(Any, bz2.open)),
}
OTHERS = (".rar", ".7z", ".gz", ".bz2", ".xz", ".zst", ".lz", ".cab", ".iso", ".lzh", ".arj")  # not unpacked
MOST_MEMBERS = 5_000_000
MOST_BYTES = 500 * 10**9  # of all members
CHUNK = 2**20  # bytes that are read at once
DAMAGE = (  # what the libraries raise for a damaged archive
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, OSError, ValueError, NotImplementedError, RuntimeError, OverflowError, IndexError),
)
WAY_OUT = "unpack it yourself, and set data.root to the folder"


@dataclass(frozen=True)
class _Member:
    """A member of an archive. fault: why it is refused, if it is.   open: opens its content."""

    name: str
    size: int
    is_folder: bool
    fault: str | None
    open: Callable[[], IO[bytes]]


def unpacked(path: Path, cache: Cache) -> Path | None:
    """The folder with the images of an archive; None if the file's name is not that of one.

    Raises InputError for an archive that is damaged, unsafe, too large, of an unknown kind, or without images.
    """
    name = path.name.lower()
    if name.endswith((".zip", *OPEN)):
        status = path.stat()
        key = {
            "archive": str(path.resolve()),
            "stamp": [status.st_size, status.st_mtime_ns, status.st_ctime_ns],
        }
        folder = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
        target = cache.folder / ARCHIVES / folder
        cache_files.obtain_folder(cache, target, partial(_unpack, path), key, what=str(path))
        return target
    if name.endswith(OTHERS):
        raise InputError(f"data.root={path}: of archives, {', '.join(('.zip', *OPEN))} are read; {WAY_OUT}")
    return None


def _unpack(path: Path, folder: Path) -> None:
    """Unpack the folders and image files of an archive into an empty folder."""
    free = shutil.disk_usage(folder).free
    seen: dict[PurePosixPath, bool] = {}  # name -> whether it is a folder
    total = images = needed = 0
    other_archive = ""
    members = _zip_members(path) if path.suffix.lower() == ".zip" else _tar_members(path)
    for count, member in enumerate(tqdm(members, desc="unpacking", unit="file", disable=None), 1):
        name = _checked(path, member, seen)
        total += member.size
        if count > MOST_MEMBERS or total > MOST_BYTES:
            raise InputError(
                f"{path} has more than {MOST_MEMBERS:,} members or {format_bytes(MOST_BYTES)}: if that is right, "
                f"{WAY_OUT}"
            )
        if any(part.startswith((".", "__MACOSX")) for part in name.parts):
            continue
        if member.is_folder:
            (folder / name).mkdir(parents=True, exist_ok=True)
        elif is_image(name.name):
            needed += member.size
            if needed > free:
                raise InputError(
                    f"the images of {path} need more than the {format_bytes(free)} that are free in {folder.parent}: "
                    "set cache_dir to a larger disk, or free some with `python -m tuner.cache --prune`"
                )
            _write(path, member, folder / name)
            images += 1
        elif name.name.lower().endswith((".zip", *OPEN, *OTHERS)):
            other_archive = str(name)
    if not images:
        hint = f"; it has another archive, {other_archive}: {WAY_OUT}" if other_archive else ""
        raise InputError(f"there is no image in {path}{hint}")


def _checked(path: Path, member: _Member, seen: dict[PurePosixPath, bool]) -> PurePosixPath:
    """The path of a member below the folder. Raises InputError for one that is not safe, and notes it in `seen`."""
    name = PurePosixPath(member.name)
    fault = member.fault
    if name.is_absolute() or ".." in name.parts or re.search(r"\\|^[A-Za-z]:|[\0\ud800-\udfff]", member.name):
        fault = "has a name that leads elsewhere or is not valid text"
    elif seen.get(name, member.is_folder) != member.is_folder or (name in seen and not member.is_folder):
        fault = "is there twice"
    elif any(seen.setdefault(parent, True) is False for parent in list(name.parents)):
        fault = "lies in a file"
    if fault:
        raise InputError(f"{path} is not unpacked, because its member {member.name!r} {fault}: {WAY_OUT}")
    seen[name] = member.is_folder
    return name


def _write(path: Path, member: _Member, target: Path) -> None:
    """Write the content of a member: so many bytes as its size says."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _damage(path):
        content = member.open()
    with content, target.open("xb") as file:
        while True:
            with _damage(path):
                chunk = content.read(CHUNK)
            if not chunk:
                return
            file.write(chunk)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what the libraries raise for a damaged archive into an InputError."""
    try:
        yield
    except InputError:
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is damaged or not an archive ({reason}): get it again, or {WAY_OUT}") from error


def _zip_members(path: Path) -> Iterator[_Member]:
    with _damage(path):
        archive = zipfile.ZipFile(path)
    with archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            fault = None if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "is a link or a device"
            fault = "is encrypted" if info.flag_bits & 1 else fault
            yield _Member(info.filename, info.file_size, info.is_dir(), fault, partial(archive.open, info))


def _tar_members(path: Path) -> Iterator[_Member]:
    suffix = next(suffix for suffix in OPEN if path.name.lower().endswith(suffix))
    with OPEN[suffix](path, "rb") as file:
        blocks = _Blocks(file)
        with _damage(path):
            archive = tarfile.open(fileobj=cast(Any, blocks), mode="r:")  # noqa: SIM115 - closed with its file
        while True:
            with _damage(path):
                info = archive.next()
                if info is None:
                    if blocks.last.strip(b"\0") or not blocks.last:  # tarfile passes over what is not a header
                        raise tarfile.ReadError("it ends too early")
                    return
            is_known = info.isdir() or (info.isreg() and not info.issparse())
            fault = None if is_known else "is a link, a device or a sparse file"
            yield _Member(info.name, info.size, info.isdir(), fault, partial(_content, archive, info))
            cast(Any, archive).members = []  # which would fill the memory


def _content(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(info)
    assert content is not None  # it is a regular file
    return content


class _Blocks:
    """A file as tarfile reads it, which takes headers of any size into memory. Raises TarError for a large one.

    last: what was read last.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.last = file, b""
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int) -> bytes:
        """Called by tarfile."""
        if size > 2 * CHUNK:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self.last = self.file.read(size)
        return self.last
