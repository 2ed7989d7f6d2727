"""The file of a study: what it is, before it is opened, and whether it is still the same."""

import json
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from tuner import InputError
from tuner.sweep.optuna_private import JOURNAL_OPERATIONS, TABLES

SQLITE, JOURNAL = "sqlite:///", "journal:///"


class StorageLostError(InputError):
    """A study can't be written any more. The sweep stops; no trial fails by it."""


@dataclass(frozen=True)
class Place:
    """A file or folder that must stay where it is while a sweep runs. identity: its device and inode, on `host`."""

    path: Path
    identity: tuple[int, int] | None
    host: str

    @classmethod
    def of(cls, path: Path) -> "Place":
        """What is there now."""
        return cls(path, _identity(path), socket.gethostname())

    def check(self) -> None:
        """Raises StorageLostError if the path now holds nothing, or something else. On another machine: nothing."""
        now = _identity(self.path)
        if now == self.identity or (now and self.host != socket.gethostname()):
            return
        what = "replaced by another one" if now else "deleted, renamed or moved"
        raise StorageLostError(
            f"{self.path} was {what} while the sweep ran, so nothing more is written. What was written before is in "
            "it, and results of trials are in their run folders: put it back where it was"
        )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def check_journal(path: Path) -> None:
    """Raises InputError unless a file is absent, empty, or a journal of Optuna, perhaps cut off in its last line."""
    if not _has_content(path):
        return
    with path.open("rb") as file:
        line = file.readline(1_000_000)
    if line.endswith(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        known = isinstance(record, dict) and record.get("op_code") in JOURNAL_OPERATIONS and "worker_id" in record
    else:  # a kill or a power cut left a part of the first line
        start = b'{"op_code":'
        known = line.startswith(start) or start.startswith(line)
    if not known:
        raise InputError("the file is not a journal of Optuna, and is left as it is; choose another file")


def check_sqlite(path: Path) -> None:
    """Raises InputError unless a file is absent, empty, or an SQLite database without other programs' tables alone."""
    if not _has_content(path):
        return
    with path.open("rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise InputError("the file is not a database of SQLite, and is left as it is; choose another file")
    if path.with_name(f"{path.name}-journal").exists():  # a process was killed in a transaction: who writes undoes it
        return
    tables = _tables(path)
    if not (tables <= TABLES or {"studies", "trials", "version_info"} <= tables):
        raise InputError(
            f"the file is the database of another program, with the tables {', '.join(sorted(tables)[:5])}, and is "
            "left as it is; choose another file"
        )


def _tables(path: Path) -> set[str]:
    query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    for live in (False, True):
        try:
            with closing(sqlite_reader(path, live)()) as connection:
                return {name for (name,) in connection.execute(query)}
        except sqlite3.DatabaseError as error:
            if live:  # otherwise a process may just have opened it
                raise InputError(f"the file is a damaged database: {error}; choose another file") from error
    raise AssertionError


def _has_content(path: Path) -> bool:
    if path.exists() and not path.is_file():
        raise InputError("it is a folder or a device; give a file")
    if not path.exists():
        return False
    with path.open("rb+") as file:  # raises OSError if it can't be read and written
        return file.read(1) != b""


def sqlite_reader(path: Path, live: bool) -> Callable[[], sqlite3.Connection]:
    """Opens an SQLite file for reading. live: also see what is written by a process that opens it later."""
    at_rest = _write_ahead(path) and not path.with_name(f"{path.name}-wal").exists()  # no process has it open
    how = "immutable=1" if at_rest and not live else "mode=ro"  # mode=ro leaves two files beside it
    address = f"file:{quote(str(path))}?{how}"
    return partial(sqlite3.connect, address, timeout=120, uri=True, check_same_thread=False)


def _write_ahead(path: Path) -> bool:
    """Whether an SQLite file has a write-ahead log: byte 18 of its header, https://sqlite.org/fileformat.html."""
    with path.open("rb") as file:
        return file.read(19)[18:] == b"\2"
