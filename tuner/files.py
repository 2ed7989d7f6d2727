"""Atomic writes, and recognising a disk that cannot be written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

DISK_ERRORS = (  # in messages of the operating system, SQLite and others
    *("no space left", "disk is full", "disk quota exceeded", "read-only file system", "readonly database"),
    *("input/output error", "disk i/o error"),
)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` after it was written and synced; after an exception `path` is unchanged."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
