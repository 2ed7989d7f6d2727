"""Storages of studies: SQLite, Optuna's journal file, any other database of SQLAlchemy, or memory."""

import json
import os
import re
import sqlite3
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import hydra
from filelock import FileLock
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from tuner import InputError
from tuner.sweep.optuna_private import BaseJournalFileLock, cached

SQLITE, JOURNAL = "sqlite:///", "journal:///"
TRUSTED = ("optuna.storages.*",)


def resolve(choice: Any) -> str | None:
    """`hydra.sweeper.storage` as text that means the same in any folder and process. None means in memory.

    choice: a URL, such as postgresql+psycopg://USER:PASSWORD@HOST/DB, sqlite:///FILE or journal:///FILE; or a config
    with one of Optuna's classes as `_target_`. FILE is relative to the current folder unless it starts with another /.
    Its folder is created.
    """
    if isinstance(choice, DictConfig):
        return json.dumps(OmegaConf.to_container(choice, resolve=True))
    if choice is None or choice in ("sqlite://", f"{SQLITE}:memory:"):
        return None
    for scheme in (SQLITE, JOURNAL):
        if str(choice).startswith(scheme):
            path = Path(str(choice).removeprefix(scheme)).expanduser().absolute()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"cannot create the folder of the storage {choice}: {error}; choose another one"
                ) from error
            return f"{scheme}{path}"
    if "://" not in str(choice):
        raise InputError(
            f"hydra.sweeper.storage={choice} must be a URL (sqlite:///FILE, journal:///FILE, postgresql://...) or null"
        )
    return str(choice)


def redacted(spec: str | None) -> str | None:
    """The storage without its password, for logs and files."""
    if spec is None:
        return None
    # up to the last @: SQLAlchemy's URL.render_as_string shows half of pa@ss, as it takes ss@host for the host
    spec = re.sub(r"(://[^:/@\s]*:)\S*@", r"\1***@", spec)
    return re.sub(r"([?&]password=|\"password\": \")[^&\"\s]*", r"\1***", spec)


def connect(spec: str | None) -> BaseStorage:
    """The storage, opened for reading and writing. Raises InputError if it can't be reached."""
    if spec is None:
        return InMemoryStorage()
    try:
        return _open(spec, os.getpid())
    except (OSError, ImportError, RuntimeError, SQLAlchemyError, InstantiationException, OptunaError) as error:
        raise _unusable(spec, error) from error


def _unusable(spec: str, error: Exception) -> InputError:
    cause = error.__cause__ if isinstance(error, ImportError) and error.__cause__ else error
    reason = " ".join(str(cause).split())
    return InputError(f"the storage {redacted(spec)} cannot be used: {redacted(reason)}")


@lru_cache
def _open(spec: str, _pid: int) -> BaseStorage:  # one per process: connections don't survive a fork
    if spec.startswith("{"):
        store = hydra.utils.instantiate(json.loads(spec), _execution_whitelist_=TRUSTED)
        return cached(store)
    if spec.startswith(JOURNAL):
        path = spec.removeprefix(JOURNAL)
        return JournalStorage(JournalFileBackend(path, lock_obj=_JournalLock(path)))
    options: dict[str, Any] = {"connect_args": {"factory": _Sqlite, "timeout": 120}} if spec.startswith(SQLITE) else {}
    for _ in range(20):
        try:
            return cached(RDBStorage(spec, engine_kwargs=options))
        except (DBAPIError, RuntimeError):  # several processes created the tables at once: all but one failed
            time.sleep(0.05)
    return cached(RDBStorage(spec, engine_kwargs=options))


def open_read_only(spec: str, *, live: bool = False) -> BaseStorage:
    """The storage, opened for reading: nothing in it is created or changed, and a running sweep is not slowed down.

    live: also see what a sweep writes that starts later. Storages for which `enforces_read_only` is False would let the
    caller write. Raises InputError if the storage can't be reached or holds no studies.
    """
    for scheme in (SQLITE, JOURNAL):
        if spec.startswith(scheme) and not Path(spec.removeprefix(scheme)).is_file():
            raise InputError(f"no file {spec.removeprefix(scheme)}: give the storage that holds the study")
    if spec.startswith("{"):
        return connect(spec)  # a class given by the user: only it knows how to read
    try:
        if spec.startswith(JOURNAL):
            return _read_journal(spec.removeprefix(JOURNAL))
        options: dict[str, Any] = {"poolclass": NullPool}  # each query has its own connection, and holds no lock
        if spec.startswith(SQLITE):
            options["creator"] = _sqlite_reader(Path(spec.removeprefix(SQLITE)), live)
        else:
            options["execution_options"] = {"postgresql_readonly": True}
        url = SQLITE if spec.startswith(SQLITE) else spec  # `creator` opens the file: its path may contain anything
        return cached(RDBStorage(url, engine_kwargs=options, skip_table_creation=True))
    except (OSError, ImportError, RuntimeError, SQLAlchemyError, OptunaError) as error:
        cause = error.__cause__ if isinstance(error, OptunaError) and isinstance(error.__cause__, Exception) else error
        raise _unusable(spec, getattr(cause, "orig", None) or cause) from error


def enforces_read_only(spec: str) -> bool:
    """Whether `open_read_only` prevents writing: in SQLite, a journal and PostgreSQL."""
    return spec.startswith((SQLITE, JOURNAL, "postgresql"))


def _read_journal(path: str) -> BaseStorage:
    try:
        return JournalStorage(_JournalReader(path))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a journal of Optuna: {type(error).__name__}: {error}") from error


def _sqlite_reader(path: Path, live: bool) -> Callable[[], sqlite3.Connection]:
    at_rest = _write_ahead(path) and not path.with_name(f"{path.name}-wal").exists()  # no process has it open
    how = "immutable=1" if at_rest and not live else "mode=ro"  # mode=ro leaves two files beside it
    address = f"file:{quote(str(path))}?{how}"
    return partial(sqlite3.connect, address, timeout=120, uri=True, check_same_thread=False)


def _write_ahead(path: Path) -> bool:
    """Whether an SQLite file has a write-ahead log: byte 18 of its header, https://sqlite.org/fileformat.html."""
    with path.open("rb") as file:
        return file.read(19)[18:] == b"\2"


class _JournalReader(JournalFileBackend):
    def append_logs(self, logs: list[dict[str, Any]]) -> None:  # noqa: ARG002 - Optuna's signature
        raise InputError("this study was opened for reading only")


class _Sqlite(sqlite3.Connection):
    """A connection with a write-ahead log: commits take a third of the time, and readers don't wait for writers.

    With synchronous=NORMAL a power cut may undo the last commits, but never damages the file.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")


class _JournalLock(BaseJournalFileLock):
    """A lock that the system releases when the process ends. Optuna's default outlives a killed process by 30 s."""

    def __init__(self, path: str):
        self.path = Path(path)
        self.lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), poll_interval=0.005)

    def acquire(self) -> bool:
        self.lock.acquire()
        with self.path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if file.read(1) not in (b"", b"\n"):  # a power cut left half a line, which no reader accepts
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.lock.release()
