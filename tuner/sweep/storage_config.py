"""Which storages may be opened: databases and drivers by name, Optuna's classes by name, their arguments as data.

A storage may come from a file of somebody else (`python -m tuner.study FOLDER`). So what is named is never looked up or
called: a class is one of `CLASSES`, and an option one of those listed. Options that load code, read other files or
write (SQLAlchemy's `plugin`, `creator` and `module`, MySQL's `plugin_dir`, libpq's `sslkeylogfile`) are not among them.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from tuner import InputError

DRIVERS = {
    "postgresql": ("psycopg", "psycopg2", "pg8000"),
    "mysql": ("mysqldb", "pymysql", "mysqlconnector"),
    "mariadb": ("mysqldb", "pymysql", "mysqlconnector", "mariadbconnector"),
    "mssql": ("pymssql",),
}
# Options of a connection, in a URL after ? or in engine_kwargs.connect_args.
CONNECTION = (
    *("user", "password", "host", "port", "database", "dbname", "application_name", "client_encoding", "charset"),
    *("connect_timeout", "timeout", "login_timeout", "read_timeout", "write_timeout", "target_session_attrs"),
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"),
    *("options", "sslmode", "sslrootcert", "sslcert", "ssl_ca", "ssl_cert", "ssl_check_hostname", "ssl_disabled"),
    *("channel_binding", "gssencmode", "unix_socket"),
)
SCALAR = (str, int, float, bool)
ENGINE: dict[str, Any] = {
    **dict.fromkeys(("pool_size", "max_overflow", "pool_recycle"), (int,)),
    "pool_timeout": (int, float),
    "pool_pre_ping": (bool,),
    "isolation_level": (str,),
    "connect_args": dict.fromkeys(CONNECTION, SCALAR),
}
RDB, JOURNAL, GRPC = (f"optuna.storages.{name}" for name in ("RDBStorage", "JournalStorage", "GrpcStorageProxy"))
FILE, REDIS, SYMLINK_LOCK, OPEN_LOCK = (
    f"optuna.storages.journal.{name}"
    for name in ("JournalFileBackend", "JournalRedisBackend", "JournalFileSymlinkLock", "JournalFileOpenLock")
)
LOCK = {"filepath": (str,), "grace_period": (int,)}
# The arguments of each class, with their types: a set of classes, a dict of options, or types of values.
CLASSES: dict[str, dict[str, Any]] = {
    RDB: {
        "url": (str,),
        "engine_kwargs": ENGINE,
        "heartbeat_interval": (int,),
        "grace_period": (int,),
        "skip_compatibility_check": (bool,),
        "skip_table_creation": (bool,),
    },
    JOURNAL: {"log_storage": {FILE, REDIS}},
    GRPC: {"host": (str,), "port": (int,)},
    FILE: {"file_path": (str,), "lock_obj": {SYMLINK_LOCK, OPEN_LOCK}},
    REDIS: {"url": (str,), "use_cluster": (bool,), "prefix": (str,)},
    SYMLINK_LOCK: LOCK,
    OPEN_LOCK: LOCK,
}
REQUIRED = {RDB: "url", JOURNAL: "log_storage", FILE: "file_path", REDIS: "url"}


def check(config: Any, classes: set[str] = {RDB, JOURNAL, GRPC}, name: str = "") -> None:  # noqa: B006 - not changed
    """Raises InputError unless a config names one of these classes, with arguments that are data."""
    target = config.get("_target_") if isinstance(config, Mapping) else None
    place = f"storage.{name}" if name else "storage"
    if not isinstance(target, str) or target not in classes:
        raise InputError(f"{place}._target_={target} must be one of {', '.join(sorted(classes))}")
    arguments = {str(key): value for key, value in config.items() if key != "_target_"}
    _check_options(arguments, CLASSES[target], place)
    if (needed := REQUIRED.get(target)) and needed not in arguments:
        raise InputError(f"{place}: {target} needs {needed}")
    if target == REDIS and ("?" in config["url"] or not config["url"].startswith(("redis://", "rediss://"))):
        raise InputError(f"{place}.url must be redis://[USER:PASSWORD@]HOST[:PORT][/DB], without options after ?")


def _check_options(options: Mapping[str, Any], allowed: Mapping[str, Any], place: str) -> None:
    for key, value in options.items():
        kind = allowed.get(key)
        if kind is None:
            raise InputError(f"{place}.{key} is not an option that a storage may have; known: {', '.join(allowed)}")
        if isinstance(kind, set):
            if value is not None:
                check(value, kind, f"{place}.{key}".removeprefix("storage."))
        elif isinstance(kind, dict):
            if not isinstance(value, Mapping):
                raise InputError(f"{place}.{key} must be options, KEY: VALUE")
            _check_options({str(name): inner for name, inner in value.items()}, kind, f"{place}.{key}")
        elif value is not None and type(value) not in kind:
            types = " or ".join(each.__name__ for each in kind)
            raise InputError(f"{place}.{key} must be of type {types}, and is a {type(value).__name__}")


def check_server(url: str) -> None:
    """Raises InputError unless a URL names a database server, a driver and options that are known."""
    try:
        parsed = make_url(url)
        backend, driver, options = parsed.get_backend_name(), parsed.drivername.partition("+")[2], parsed.query
    except (ArgumentError, ValueError) as error:
        raise InputError("it is not a URL such as postgresql+psycopg://USER:PASSWORD@HOST:PORT/DB") from error
    if backend not in DRIVERS:
        raise InputError(f"{backend} must be sqlite, journal, {' or '.join(DRIVERS)}")
    if driver and driver not in DRIVERS[backend]:
        raise InputError(f"the driver {driver} must be {' or '.join(DRIVERS[backend])}")
    for key in options:
        if key not in CONNECTION:
            raise InputError(
                f"the option {key} is not allowed in a storage; set it in the driver's own configuration, or use "
                f"one of {', '.join(CONNECTION)}"
            )
