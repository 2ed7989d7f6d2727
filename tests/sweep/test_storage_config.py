"""Which storages may be opened: an exact list of classes, drivers and options, and nothing else is called."""

import importlib
import json
import pkgutil

import optuna
import pytest
import yaml
from omegaconf import OmegaConf

from tuner import InputError
from tuner.analysis import loaded_study
from tuner.sweep import storage, storage_config


def public_names() -> list[str]:
    """Every class, function and module in optuna.storages, as a `_target_`, by each path that leads to it."""
    modules = [optuna.storages]
    found = [found.name for found in pkgutil.walk_packages(optuna.storages.__path__, "optuna.storages.")]
    modules += [importlib.import_module(name) for name in found if "alembic" not in name]
    return sorted({f"{module.__name__}.{name}" for module in modules for name in dir(module)})


@pytest.fixture
def nothing_runs(monkeypatch):
    """A server, a database and a file that are opened fail the test."""

    def refuse(*arguments, **options):
        raise AssertionError(f"it was called with {arguments}")

    for name in ("run_grpc_proxy_server", "RDBStorage", "JournalStorage", "GrpcStorageProxy", "InMemoryStorage"):
        monkeypatch.setattr(optuna.storages, name, refuse)
    for name in ("RDBStorage", "JournalStorage", "GrpcStorageProxy", "JournalFileBackend", "_Redis"):
        monkeypatch.setattr(storage, name, refuse)


def test_nothing_else_in_optuna_is_called(nothing_runs):
    names = public_names()
    allowed = {storage_config.RDB, storage_config.JOURNAL, storage_config.GRPC}
    assert allowed <= set(names)
    assert "optuna.storages.run_grpc_proxy_server" in names
    assert len(names) > 300
    for name in names:
        inner = {"_target_": name, "url": "redis://h", "file_path": "f", "filepath": "f"}
        for config in (
            {"_target_": name},
            {"_target_": name, "storage": {"_target_": storage_config.RDB, "url": "sqlite:///x"}},
            {"_target_": storage_config.JOURNAL, "log_storage": inner},
            {"_target_": storage_config.JOURNAL, "log_storage": {"_target_": storage_config.FILE, "lock_obj": inner}},
        ):
            if name == storage_config.GRPC and len(config) == 1:  # without arguments it is a client on this machine
                continue
            for use in (storage.connect, storage.open_read_only, lambda text: storage.resolve(OmegaConf.create(text))):
                with pytest.raises(InputError):
                    use(json.dumps(config))


RDB = {"_target_": "optuna.storages.RDBStorage", "url": "sqlite:///{tmp}/x.db"}
JOURNAL = {"_target_": "optuna.storages.JournalStorage"}
FILE = {"_target_": "optuna.storages.journal.JournalFileBackend", "file_path": "{tmp}/x.log"}
SERVER = "postgresql+psycopg://h/db"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_target_": "os.system", "command": "touch {tmp}/ran"},
            "_target_=os.system must be one of optuna.storages.Grpc",
        ),
        ({"_target_": "optuna.storages.InMemoryStorage"}, "must be one of"),
        ({"_target_": ["optuna.storages.RDBStorage"], "url": "x"}, "must be one of"),
        ({"url": "sqlite:///x.db"}, "_target_=None must be one of"),
        (RDB | {"_partial_": True}, "storage._partial_ is not an option"),
        (RDB | {"_args_": ["x"]}, "storage._args_ is not an option"),
        (RDB | {"url": {"_target_": "os.getcwd"}}, "storage.url must be of type str, and is a dict"),
        (RDB | {"heartbeat_stale_trial_callback": {"_target_": "os.getcwd"}}, "is not an option"),
        (RDB | {"engine_kwargs": {"creator": {"_target_": "os.getcwd"}}}, "engine_kwargs.creator is not an option"),
        (RDB | {"engine_kwargs": {"module": "os"}}, "engine_kwargs.module is not an option"),
        (RDB | {"engine_kwargs": {"plugins": ["x"]}}, "engine_kwargs.plugins is not an option"),
        (RDB | {"engine_kwargs": {"poolclass": "x"}}, "engine_kwargs.poolclass is not an option"),
        (RDB | {"engine_kwargs": "pool_size"}, "engine_kwargs must be options"),
        (RDB | {"engine_kwargs": {"connect_args": {"factory": "x"}}}, "connect_args.factory is not an option"),
        (RDB | {"engine_kwargs": {"connect_args": {"timeout": {"_target_": "os.getcwd"}}}}, "must be of type"),
        (RDB | {"engine_kwargs": {"connect_args": {"plugin_dir": "/evil"}}}, "plugin_dir is not an option"),
        (RDB | {"url": "sqlite:///:memory:"}, "in memory"),
        ({"_target_": "optuna.storages.RDBStorage"}, "needs url"),
        (JOURNAL, "needs log_storage"),
        (JOURNAL | {"log_storage": RDB}, "storage.log_storage._target_=optuna.storages.RDBStorage must be one of"),
        (JOURNAL | {"log_storage": FILE | {"lock_obj": "x"}}, "storage.log_storage.lock_obj._target_=None must be"),
        (
            JOURNAL
            | {"log_storage": {"_target_": "optuna.storages.journal.JournalRedisBackend", "url": "redis://h?x=1"}},
            "without options",
        ),
        ({"_target_": "optuna.storages.GrpcStorageProxy", "host": "h", "port": "x"}, "port must be of type int"),
    ],
    ids=str,
)
def test_arguments_are_data(tmp_path, nothing_runs, config, message):
    config = json.loads(json.dumps(config).replace("{tmp}", str(tmp_path)))
    for use in (storage.resolve, lambda it: storage.connect(storage.resolve(it))):
        with pytest.raises(InputError, match=message):
            use(OmegaConf.create(config))
    if "memory" not in message:
        for use in (storage.connect, storage.open_read_only):
            with pytest.raises(InputError, match=message):
                use(json.dumps(config))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"{SERVER}?plugin=x", "the option plugin is not allowed"),
        (f"{SERVER}?sslkeylogfile=/x", "the option sslkeylogfile is not allowed"),
        (f"{SERVER}?sslkey=engine:x", "the option sslkey is not allowed"),
        ("mysql+mysqldb://h/db?plugin_dir=/evil", "the option plugin_dir is not allowed"),
        ("mysql+mysqldb://h/db?read_default_file=/evil", "the option read_default_file is not allowed"),
        ("mysql+pyodbc://h/db?driver=/evil.so", "the driver pyodbc must be mysqldb or"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER=/evil.so", "the driver pyodbc must be pymssql"),
        ("sqlite+pysqlite://", "sqlite must be sqlite, journal, postgresql or"),
        ("sqlite+pysqlite:///file:x?uri=true&vfs=y", "must be sqlite, journal"),
        ("duckdb:///x", "duckdb must be sqlite, journal, postgresql"),
        ("postgresql://h:port/db", "it is not a URL such as"),
    ],
)
def test_a_url_names_a_known_driver_and_known_options(nothing_runs, url, message):
    for spec in (url, json.dumps({"_target_": storage_config.RDB, "url": url})):
        for use in (storage.connect, storage.open_read_only):
            with pytest.raises(InputError, match=message):
                use(spec)


def test_sqlite_takes_no_options(tmp_path):
    with pytest.raises(InputError, match=r"sqlite:///FILE takes no options after \?"):
        storage.connect(f"sqlite:///{tmp_path}/x.db?uri=true&mode=memory")


def test_what_is_on_the_list_works(tmp_path):
    lock = {"_target_": "optuna.storages.journal.JournalFileOpenLock", "filepath": f"{tmp_path}/x.log"}
    options = {"pool_size": 2, "connect_args": {"timeout": 5}}
    configs = [
        {"_target_": storage_config.JOURNAL, "log_storage": FILE | {"lock_obj": lock}},
        {"_target_": storage_config.JOURNAL, "log_storage": FILE | {"lock_obj": None}},
        RDB | {"engine_kwargs": options, "heartbeat_interval": None},
    ]
    for number, config in enumerate(configs):
        spec = storage.resolve(OmegaConf.create(json.loads(json.dumps(config).replace("{tmp}", str(tmp_path)))))
        optuna.create_study(study_name=str(number), storage=storage.connect(spec)).add_trial(
            optuna.trial.create_trial(value=0.5)
        )
        study = optuna.load_study(study_name=str(number), storage=storage.open_read_only(spec))
        assert study.best_value == 0.5
        assert storage.enforces_read_only(spec)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_snapshot_of_redis_is_not_unpickled(monkeypatch):
    read = []
    monkeypatch.setattr(storage._Redis, "__init__", lambda self, url: read.append(url))
    monkeypatch.setattr(storage.JournalRedisBackend, "read_logs", lambda self, number: iter(()))
    monkeypatch.setattr(storage.JournalRedisBackend, "load_snapshot", lambda self: b"cos\nsystem\n(S'false'\ntR.")
    backend = {"_target_": storage_config.REDIS, "url": "redis://h/0"}
    assert (
        storage._build(json.dumps({"_target_": storage_config.JOURNAL, "log_storage": backend})).get_all_studies() == []
    )
    assert read == ["redis://h/0"]


EVIL = [
    json.dumps({"_target_": "optuna.storages.run_grpc_proxy_server", "host": "0.0.0.0", "port": 1}),
    json.dumps({"_target_": "os.system", "command": "false"}),
    {"_target_": "os.system", "command": "false"},
    ["sqlite:///x.db"],
    5,
]


@pytest.mark.parametrize("written", EVIL, ids=str)
def test_a_folder_from_somebody_else_runs_nothing(tmp_path, nothing_runs, written):
    (tmp_path / "optimization_results.yaml").write_text(yaml.safe_dump({"study": "s", "storage": written}))
    with pytest.raises(InputError, match="storage"):
        loaded_study.load(tmp_path)
