"""Storages of studies: SQLite, Optuna's journal file, any other database of SQLAlchemy, or memory."""

import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, GrpcStorageProxy, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages import journal as journals
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from tuner import InputError
from tuner.files import disk_error
from tuner.sweep import passwords, storage_config
from tuner.sweep.optuna_private import BaseJournalFileLock, cached
from tuner.sweep.passwords import redacted as redacted
from tuner.sweep.patient_storage import Patience, driver_error, is_away, patient
from tuner.sweep.storage_files import JOURNAL as JOURNAL
from tuner.sweep.storage_files import SQLITE as SQLITE
from tuner.sweep.storage_files import Place, StorageLostError, check_journal, check_sqlite, sqlite_reader

PROXY = "grpc://"  # of Optuna's storage proxy
# How a server that is gone without a word is noticed, in seconds.
LIBPQ = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
ERRORS = (OSError, ImportError, RuntimeError, ValueError, KeyError, TypeError, AssertionError)


def resolve(choice: Any) -> str | None:
    """`hydra.sweeper.storage` as text that means the same in any folder and process. None means in memory.

    choice: a URL, such as postgresql+psycopg://USER:PASSWORD@HOST/DB, grpc://HOST:PORT, sqlite:///FILE or
    journal:///FILE; or a config with one of Optuna's classes as `_target_`, see tuner.sweep.storage_config. FILE is
    relative to the current folder unless it starts with another /. Its folder is created.
    """
    if isinstance(choice, DictConfig):
        return _resolve_config(OmegaConf.to_container(choice, resolve=True))
    if choice is None or choice in ("sqlite://", f"{SQLITE}:memory:"):
        return None
    if "://" not in str(choice):
        raise InputError(
            f"hydra.sweeper.storage={choice} must be a URL (sqlite:///FILE, journal:///FILE, postgresql://...) or null"
        )
    passwords.check(str(choice))
    if str(choice).startswith(PROXY):
        return _resolve_proxy(str(choice))
    for scheme in (SQLITE, JOURNAL):
        if str(choice).startswith(scheme):
            return f"{scheme}{_with_folder(str(choice).removeprefix(scheme), choice)}"
    return str(choice)


def _resolve_proxy(url: str) -> str:
    match = re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})/?", url.removeprefix(PROXY))
    if not match:
        raise InputError(f"hydra.sweeper.storage={url} must be {PROXY}HOST:PORT, where Optuna's storage proxy listens")
    return json.dumps({"_target_": storage_config.GRPC, "host": match[1], "port": int(match[2])})


def _with_folder(file: str, choice: Any) -> Path:
    path = Path(file).expanduser().absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot create the folder of the storage {redacted(str(choice))}: {error}; choose another one"
        ) from error
    return path


def _resolve_config(config: Any) -> str:
    storage_config.check(config)
    backend = config.get("log_storage", {})
    if "url" in config:
        url = resolve(config["url"])
        if url is None:
            raise InputError("hydra.sweeper.storage.url must be that of a database; for a study in memory: null")
        config["url"] = url
    elif "file_path" in backend:
        backend["file_path"] = str(_with_folder(backend["file_path"], backend["file_path"]))
    return json.dumps(config)


def file_of(spec: str) -> Path | None:
    """The file that a storage is kept in; None for a server."""
    url = _as_url(spec)
    return next((Path(url.removeprefix(scheme)) for scheme in (SQLITE, JOURNAL) if url.startswith(scheme)), None)


def _as_url(spec: str) -> str:
    """A storage as URL: of an RDBStorage its own, of a journal in a file journal:///FILE. Others as they are."""
    if not spec.startswith("{"):
        return spec
    config = _config(spec)
    backend = config.get("log_storage", {})
    path = backend.get("file_path")
    return str(config["url"]) if "url" in config else f"{JOURNAL}{path}" if path else spec


def _config(spec: str) -> dict[str, Any]:
    """A storage that was given as a config."""
    try:
        config: dict[str, Any] = json.loads(spec)
    except ValueError as error:
        raise InputError(f"the storage is neither a URL nor a config in JSON: {error}") from error
    storage_config.check(config)
    return config


def connect(spec: str | None, *, patience: float = 0.0, joining: bool = False) -> BaseStorage:
    """The storage, opened for reading and writing.

    patience: how long a call may wait for a server that does not answer, in seconds.   joining: also this one.
    Raises InputError if it can't be reached, or if its file is something else. Such a file is left as it is.
    """
    if spec is None:
        return InMemoryStorage()
    try:
        path = file_of(spec)
        if path:
            (check_sqlite if _as_url(spec).startswith(SQLITE) else check_journal)(path)
            path.open("ab").close()  # now it is there, and has an identity
        return _open(spec, Place.of(path) if path else None, patience, joining, os.getpid())
    except (*ERRORS, SQLAlchemyError, OptunaError) as error:
        raise _unusable(spec, error) from error


def _unusable(spec: str, error: Exception) -> InputError:
    if isinstance(error, StorageLostError):
        return error
    cause: BaseException = driver_error(error) or error
    if isinstance(error, ImportError | OptunaError):
        cause = error.__cause__ or cause
    reason = " ".join(str(cause).split()) or type(cause).__name__
    if isinstance(cause, KeyError | TypeError | AssertionError | UnicodeError | json.JSONDecodeError):
        reason = f"{'it is damaged: ' if spec.startswith((SQLITE, JOURNAL)) else ''}{type(cause).__name__}: {reason}"
    return InputError(f"the storage {redacted(spec)} cannot be used: {passwords.hidden(reason, spec)}")


@contextmanager
def damage_named(spec: str | None) -> Iterator[None]:
    """Raise errors about what a storage holds, such as a parameter without a value, as InputErrors that name it."""
    try:
        yield
    except (*ERRORS, SQLAlchemyError, OptunaError, LookupError, AttributeError) as error:
        if spec is None or isinstance(error, InputError | OSError) or disk_error(error):
            raise
        raise _unusable(spec, error) from error


@lru_cache
def _open(spec: str, place: Place | None, patience: float, joining: bool, _pid: int) -> BaseStorage:
    """One per file and process: connections don't survive a fork."""
    waiting = Patience(spec, str(redacted(spec)), patience)
    inner = waiting.call(lambda: _build(spec)) if joining else _build(spec)
    return patient(inner, waiting, place)


def _build(spec: str) -> BaseStorage:
    if not spec.startswith("{"):
        return _journal({"file_path": spec.removeprefix(JOURNAL)}) if spec.startswith(JOURNAL) else _database(spec, {})
    config = _config(spec)
    arguments = {key: value for key, value in config.items() if key != "_target_" and value is not None}
    if config["_target_"] == storage_config.RDB:
        return _database(arguments.pop("url"), arguments.pop("engine_kwargs", {}), **arguments)
    if config["_target_"] == storage_config.GRPC:
        return _proxy(**arguments)
    return _journal(arguments["log_storage"])


def _proxy(host: str = "localhost", port: int = 13000) -> BaseStorage:
    store = GrpcStorageProxy(host=host, port=port)
    try:
        store.wait_server_ready(timeout=10)  # its calls would wait for ever
    except ConnectionError as error:
        raise ConnectionError(f"no proxy answers at {PROXY}{host}:{port}") from error
    return store


def _journal(config: dict[str, Any]) -> BaseStorage:
    arguments = {key: value for key, value in config.items() if key != "_target_" and value is not None}
    if config.get("_target_") == storage_config.REDIS:
        return JournalStorage(_Redis(**arguments))
    path, lock = arguments["file_path"], arguments.get("lock_obj")
    if lock is None:
        return JournalStorage(JournalFileBackend(path, lock_obj=_JournalLock(path)))
    options = {"filepath": path} | {key: value for key, value in lock.items() if key != "_target_"}
    kind = {
        storage_config.SYMLINK_LOCK: journals.JournalFileSymlinkLock,
        storage_config.OPEN_LOCK: journals.JournalFileOpenLock,
    }[lock["_target_"]]
    return JournalStorage(JournalFileBackend(path, lock_obj=kind(**options)))


def _database(url: str, engine: dict[str, Any], **arguments: Any) -> BaseStorage:
    connection: dict[str, Any]
    if url.startswith(SQLITE):
        if "?" in url:
            raise InputError("sqlite:///FILE takes no options after ?")
        connection = {"factory": _Sqlite, "timeout": 120}
    else:
        storage_config.check_server(url)
        connection = LIBPQ if url.startswith(("postgresql:", "postgresql+psycopg")) else {}
        engine = {"pool_pre_ping": True, "pool_size": 1, **engine}  # kept open by each of many processes
    engine = {**engine, "connect_args": connection | engine.get("connect_args", {})}
    url = url.replace("{", "{{").replace("}", "}}")  # RDBStorage formats it
    for _ in range(20):
        try:
            return cached(RDBStorage(url, engine_kwargs=engine, **arguments))
        except (DBAPIError, RuntimeError) as error:  # several processes created the tables at once: all but one failed
            if is_away(error):
                raise
            time.sleep(0.05)
    return cached(RDBStorage(url, engine_kwargs=engine, **arguments))


def open_read_only(spec: str, *, live: bool = False, patience: float = 0.0) -> BaseStorage:
    """The storage, opened for reading: nothing in it is created or changed, and a running sweep is not slowed down.

    live: also see what a sweep writes that starts later.   patience: how long to wait for a server, in seconds.
    Storages for which `enforces_read_only` is False would let the caller write.
    Raises InputError if the storage can't be reached or holds no studies.
    """
    url = _as_url(spec)
    path = file_of(spec)
    if path and not path.is_file():
        raise InputError(f"no file {path}: give the storage that holds the study")
    if url.startswith("{"):
        return connect(spec, patience=patience, joining=patience > 0)
    waiting = Patience(spec, str(redacted(spec)), patience)
    try:
        if url.startswith(JOURNAL):
            return _read_journal(url.removeprefix(JOURNAL))
        options: dict[str, Any] = {"poolclass": NullPool}  # each query has its own connection, and holds no lock
        if path:
            options["creator"] = sqlite_reader(path, live)
            url = SQLITE  # `creator` opens the file: its path may contain anything
        else:
            storage_config.check_server(url)
            passwords.check(url)
            options["execution_options"] = {"postgresql_readonly": True}
        build = partial(RDBStorage, url, engine_kwargs=options, skip_table_creation=True)
        return cached(waiting.call(build) if patience else build())
    except (*ERRORS, SQLAlchemyError, OptunaError) as error:
        cause = error.__cause__ if isinstance(error, OptunaError) and isinstance(error.__cause__, Exception) else error
        raise _unusable(spec, getattr(cause, "orig", None) or cause) from error


def enforces_read_only(spec: str) -> bool:
    """Whether `open_read_only` prevents writing: in SQLite, a journal and PostgreSQL."""
    return _as_url(spec).startswith((SQLITE, JOURNAL, "postgresql"))


def _read_journal(path: str) -> BaseStorage:
    try:
        return JournalStorage(_JournalReader(path))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a journal of Optuna: {type(error).__name__}: {error}") from error


class _Redis(JournalRedisBackend):
    def load_snapshot(self) -> None:
        """None: a snapshot is a pickle, and a server could have its code run. The journal itself has everything."""


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
