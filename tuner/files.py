"""Writing files, of which no planted link leads elsewhere; and recognising a disk that cannot be written."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from tuner import InputError

DISK_ERRORS = (  # in messages of the operating system, SQLite and others
    *("no space left", "disk is full", "disk quota exceeded", "read-only file system", "readonly database"),
    *("input/output error", "disk i/o error"),
)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` after it was written and synced; after an exception `path` is unchanged.

    It is a new file: links are not followed, neither at `path` nor under its temporary name.
    """
    partial = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if str(error.filename) == str(partial):
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        partial.unlink(missing_ok=True)


def link(path: Path, target: Path) -> None:
    """Make a symbolic link, in place of one that may be there. Raises OSError if another file or folder is."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    temporary.symlink_to(target)
    try:
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def appending(path: Path) -> TextIO:
    """A text file, opened to append to it. Raises OSError if it is a link."""
    no_link = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag
    return open(
        path, "a", newline="", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | no_link, 0o666)
    )


def subfolder(folder: Path, name: str) -> Path:
    """FOLDER/NAME, made if it is missing. Raises InputError if it is a link: files would land elsewhere."""
    path = folder / name
    if path.is_symlink():
        raise InputError(f"{path} is a link, and files are written into it: remove the link")
    path.mkdir(exist_ok=True)
    return path


def disk_error(error: BaseException | None) -> str | None:
    """The message of an error, or of one of its causes, about a full, read-only or failing disk; else None."""
    seen: list[BaseException] = []  # a chain of causes may be circular
    while error is not None and not any(error is earlier for earlier in seen):
        seen.append(error)
        line = str(error).partition("\n")[0]
        if any(sign in line.lower() for sign in DISK_ERRORS):
            return line
        error = error.__cause__ or error.__context__
    return None
