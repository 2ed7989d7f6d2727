"""Files that are never half-written, and disks that are full."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

NO_SPACE = ("no space left", "disk is full", "disk quota exceeded")  # as the system, SQLite and others say it


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes `path`'s place when it is whole and on the disk; an exception leaves `path` as it was."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def no_space(error: BaseException | None) -> str | None:
    """What an error, or one that it came from, says of a full disk; None: it is about something else."""
    seen: list[BaseException] = []  # a chain may be a ring
    while error is not None and not any(error is one for one in seen):
        seen.append(error)
        line = str(error).partition("\n")[0]
        if any(sign in line.lower() for sign in NO_SPACE):
            return line
        error = error.__cause__ or error.__context__
    return None
