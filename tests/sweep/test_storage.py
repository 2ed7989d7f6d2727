import shutil
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from sqlalchemy import create_engine, text

from tuner import InputError
from tuner.sweep import storage

FILES = ("sqlite", "journal")


def start(script, *arguments):
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def add_trial(study, x=0.5):
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.report(x, 1)
    trial.set_user_attr("output_dir", "run/0")
    study.tell(trial, x)


# Where it is


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, None),
        ("sqlite:///:memory:", None),
        ("sqlite:///optuna.db", "sqlite:///{cwd}/optuna.db"),
        ("sqlite:///multirun/deep/optuna.db", "sqlite:///{cwd}/multirun/deep/optuna.db"),
        ("sqlite:///{cwd}/elsewhere/optuna.db", "sqlite:///{cwd}/elsewhere/optuna.db"),
        ("sqlite:///~/optuna.db", "sqlite:///{home}/optuna.db"),
        ("journal:///deep/studies.log", "journal:///{cwd}/deep/studies.log"),
        ("journal:///~/studies/log", "journal:///{home}/studies/log"),
        ("postgresql://ann:secret@host:5432/db?x=1", "postgresql://ann:secret@host:5432/db?x=1"),
        ("mysql+pymysql://host/db", "mysql+pymysql://host/db"),
    ],
)
def test_a_storage_is_the_same_in_any_folder(tmp_path, monkeypatch, choice, expected):
    cwd, home = tmp_path / "here", tmp_path / "home"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("HOME", str(home))
    spec = storage.resolve(choice and choice.format(cwd=cwd))
    assert spec == (expected and expected.format(cwd=cwd, home=home))
    assert storage.resolve(spec) == spec
    if spec and spec.startswith((storage.SQLITE, storage.JOURNAL)):
        file = Path(spec.split(":///")[1])
        assert file.is_absolute()
        assert file.parent.is_dir()


def test_a_config_is_resolved(tmp_path):
    it = {"_target_": "optuna.storages.RDBStorage", "url": "postgresql://${host}/db"}
    config = OmegaConf.create({"host": "db.example", "it": it})
    expected = '{"_target_": "optuna.storages.RDBStorage", "url": "postgresql://db.example/db"}'
    assert storage.resolve(config.it) == storage.resolve(expected) == expected


@pytest.mark.parametrize("choice", ["mysql", "optuna.db", "", "/tmp/optuna.db", 5])
def test_what_is_no_url_is_refused(choice):
    with pytest.raises(InputError, match=rf"hydra.sweeper.storage={choice} must be a URL \(sqlite:///FILE"):
        storage.resolve(choice)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, None),
        ("sqlite:////a/optuna.db", "sqlite:////a/optuna.db"),
        ("journal:////a/ann:secret@b", "journal:////a/ann:secret@b"),
        ("postgresql://ann:secret@host:5432/db", "postgresql://ann:***@host:5432/db"),
        ("postgresql://ann:sec@ret@host:5432/db", "postgresql://ann:***@host:5432/db"),
        ("postgresql://ann:se/c@re:t@host/db", "postgresql://ann:***@host/db"),
        ("postgresql://host/db?user=ann&password=sec@ret", "postgresql://host/db?user=ann&password=***"),
        ("mysql+pymysql://ann@host/db", "mysql+pymysql://ann@host/db"),
    ],
)
def test_a_storage_is_shown_without_its_password(spec, expected):
    assert storage.redacted(spec) == expected


def test_a_config_is_shown_without_its_password():
    config = {"_target_": "optuna.storages.RDBStorage", "url": "postgresql://ann:secret@host/db"}
    shown = storage.redacted(storage.resolve(OmegaConf.create(config)))
    assert "optuna.storages.RDBStorage" in shown
    assert "secret" not in shown


# What is kept there


@pytest.mark.parametrize("kind", [*FILES, "config"])
def test_optuna_reads_what_was_written(tmp_path, kind):
    file = tmp_path / "studies"
    backend = {"_target_": "optuna.storages.journal.JournalFileBackend", "file_path": str(file)}
    config = OmegaConf.create({"_target_": "optuna.storages.JournalStorage", "log_storage": backend})
    spec = storage.resolve(config if kind == "config" else f"{kind}:///{file}")
    add_trial(optuna.create_study(study_name="s", storage=storage.connect(spec)))
    assert storage.connect(spec) is storage.connect(spec)  # one a process
    plain = optuna.storages.RDBStorage(spec) if kind == "sqlite" else JournalStorage(JournalFileBackend(str(file)))
    [trial] = optuna.load_study(study_name="s", storage=plain).trials
    assert (trial.value, trial.intermediate_values) == (0.5, {1: 0.5})
    assert trial.user_attrs == {"output_dir": "run/0"}
    if kind == "sqlite":
        plain.engine.dispose()


def test_memory_is_new_each_time():
    first, second = storage.connect(None), storage.connect(None)
    assert isinstance(first, InMemoryStorage)
    assert first is not second
    add_trial(optuna.create_study(storage=first))


def test_sqlite_has_a_write_ahead_log_and_leaves_flushing_to_checkpoints(tmp_path):
    with storage.connect(f"sqlite:///{tmp_path}/optuna.db").inner._backend.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1  # NORMAL


AT_ONCE = """
import sys, time, optuna
from contextlib import closing
from pathlib import Path
from tuner.sweep import storage
for spec in sys.argv[1:]:
    print("ready", flush=True)
    while not Path(spec.split(":///")[1]).with_suffix(".go").exists():
        time.sleep(0.001)
    study = optuna.create_study(study_name="s", storage=storage.connect(spec), load_if_exists=True)
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    study.tell(trial, trial.params["x"])
"""


def test_processes_may_make_it_at_once(tmp_path):
    specs = [f"{kind}:///{tmp_path}/{kind}" for kind in FILES]
    processes = [start(AT_ONCE, *specs) for _ in range(6)]
    for kind in FILES:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 6
        (tmp_path / f"{kind}.go").touch()
    for process in processes:
        with process:
            assert process.wait(60) == 0
    for spec in specs:
        trials = optuna.load_study(study_name="s", storage=storage.connect(spec)).trials
        assert [(trial.number, trial.state) for trial in trials] == [(i, TrialState.COMPLETE) for i in range(6)]


# What may go wrong


@pytest.mark.parametrize("lost", [1, 10])
def test_a_torn_journal_loses_its_last_line_only(tmp_path, lost):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    study = optuna.create_study(study_name="s", storage=storage.connect(f"journal:///{whole}"))
    for x in (0.1, 0.2):
        add_trial(study, x)
    shutil.copy(whole, torn)
    with torn.open("rb+") as file:  # as a power cut leaves it, which undoes the end of trial 1
        file.truncate(torn.stat().st_size - lost)
    for _ in range(2):
        study = optuna.load_study(study_name="s", storage=storage.connect(f"journal:///{torn}"))
        add_trial(study, 0.3)
    trials = optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(torn)))).trials
    assert [trial.value for trial in trials] == [0.1, None, 0.3, 0.3]
    assert trials[1].intermediate_values == {1: 0.2}
    before, after = whole.read_bytes().splitlines(), torn.read_bytes().splitlines()
    assert after[: len(before) - 1] == before[:-1]


def test_a_journal_of_half_a_line_is_empty(tmp_path):
    (tmp_path / "log").write_bytes(b'{"op_code":0,"wor')
    add_trial(optuna.create_study(study_name="s", storage=storage.connect(f"journal:///{tmp_path}/log")))
    optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(tmp_path / "log"))))


HOLD = """
import sys, time
from tuner.sweep import storage
storage.connect(sys.argv[1]).inner._backend._lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_process_leaves_no_lock_of_the_journal(tmp_path):
    spec = f"journal:///{tmp_path}/log"
    with start(HOLD, spec) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Timeout), FileLock(tmp_path / ".log.lock", timeout=0):
            pass
        holder.kill()
    before = time.monotonic()
    add_trial(optuna.create_study(study_name="s", storage=storage.connect(spec)))
    assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "mssql+pymssql://ann:secret@host/db",
            r"the storage mssql\+pymssql://ann:\*\*\*@host/db cannot be used: No module named 'pymssql'",
        ),
        ("wrong://ann:secret@host/db", r"the storage wrong://ann:\*\*\*@host/db .*wrong"),
        ("journal:///{tmp}/gone/log", "the storage journal:///{tmp}/gone/log cannot be used: .*No such file"),
        ("sqlite:///{tmp}/gone/optuna.db", "the storage sqlite:///{tmp}/gone/optuna.db cannot be used: .*No such file"),
        ("sqlite:///{tmp}/text", "the storage sqlite:///{tmp}/text cannot be used: .*not a database"),
        ('{"_target_": "optuna.storages.Wrong"}', "optuna.storages.Wrong"),
        ('{"_target_": "os.getcwd"}', "os.getcwd"),
        ('{"_target_": "optuna.storages.RDBStorage", "url": "sqlite:////dev/null/optuna.db"}', "Not a directory"),
    ],
)
def test_a_storage_that_cannot_be_used_is_named(tmp_path, spec, message):
    (tmp_path / "text").write_text("no database" * 100)
    with pytest.raises(InputError, match=message.replace("{tmp}", str(tmp_path))) as error:
        storage.connect(spec.replace("{tmp}", str(tmp_path)))
    assert "secret" not in str(error.value)


def test_a_server_that_is_not_there_is_named_without_the_password():
    pytest.importorskip("psycopg")
    where = "postgresql://ann:{}@127.0.0.1:1/db"
    with pytest.raises(InputError, match="refused") as error:
        storage.connect(where.format("secret"))
    assert str(error.value).startswith(f"the storage {where.format('***')} cannot be used: ")
    assert "secret" not in str(error.value)


# For reading alone


def at_rest(spec):
    storage.connect(spec).inner._backend.engine.dispose()  # as when its process ends


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def values(store):
    return [trial.value for trial in optuna.load_study(study_name="s", storage=store).trials]


@pytest.mark.parametrize("name", ["optuna.db", "my studies.db", "ünï.db", "a%20b#?&'.db", "{x}.db"])
@pytest.mark.parametrize("kind", ["sqlite", "plain", "journal"])
def test_a_reader_changes_nothing(tmp_path, kind, name):
    original, folder = tmp_path / "original", tmp_path / "it"
    folder.mkdir()
    spec = f"{'journal' if kind == 'journal' else 'sqlite'}:///{original}"
    store = optuna.storages.RDBStorage(spec) if kind == "plain" else storage.connect(spec)
    add_trial(optuna.create_study(study_name="s", storage=store))
    if kind != "journal":
        (store if kind == "plain" else store.inner._backend).engine.dispose()
    original.rename(folder / name)  # Optuna itself can't make some of these
    before = contents(folder)
    reader = storage.open_read_only(f"{spec.split(':')[0]}:///{folder / name}")
    assert values(reader) == [0.5]
    study = reader.get_all_studies()[0]._study_id
    for change in (lambda: reader.delete_study(study), lambda: reader.set_study_user_attr(study, "a", 1)):
        with pytest.raises((InputError, optuna.exceptions.StorageInternalError)):
            change()
    assert contents(folder) == before


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("live", [False, True])
def test_a_reader_sees_what_a_sweep_writes(tmp_path, kind, live):
    spec = f"{kind}:///{tmp_path}/it"
    study = optuna.create_study(study_name="s", storage=storage.connect(spec))
    reader = storage.open_read_only(spec, live=live)
    for x in (0.1, 0.2):
        add_trial(study, x)
        assert values(reader)[-1] == x


def test_a_live_reader_sees_a_sweep_that_begins_later(tmp_path):
    spec = f"sqlite:///{tmp_path}/it"
    study = optuna.create_study(study_name="s", storage=storage.connect(spec))
    at_rest(spec)
    reader = storage.open_read_only(spec, live=True)
    assert values(reader) == []
    add_trial(study)
    assert values(reader) == [0.5]


def test_a_sweep_that_ends_after_a_reader_leaves_one_file(tmp_path):
    spec = f"sqlite:///{tmp_path}/it"
    add_trial(optuna.create_study(study_name="s", storage=storage.connect(spec)))
    reader = storage.open_read_only(spec)  # it is still there
    assert values(reader) == [0.5]
    at_rest(spec)
    assert list(contents(tmp_path)) == ["it"]
    assert values(storage.open_read_only(spec)) == [0.5]


KILLED = """
import os, signal, sys, optuna
from tuner.sweep import storage
study = optuna.create_study(study_name="s", storage=storage.connect(sys.argv[1]))
study.tell(study.ask(), 0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_sweep_wrote_is_read(tmp_path):
    spec = f"sqlite:///{tmp_path}/it"
    with start(KILLED, spec) as process:
        process.wait(60)
    assert "it-wal" in contents(tmp_path)
    assert values(storage.open_read_only(spec)) == [0.5]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sqlite:///{tmp}/gone", "no file {tmp}/gone: give the storage that holds the study"),
        ("journal:///{tmp}/gone", "no file {tmp}/gone: give the storage that holds the study"),
        ("sqlite:///{tmp}", "no file {tmp}: give the storage that holds the study"),
        ("sqlite:///{tmp}/text", "the storage sqlite:///{tmp}/text cannot be used: file is not a database"),
        ("sqlite:///{tmp}/empty", "the storage sqlite:///{tmp}/empty cannot be used: no such table: version_info"),
        ("sqlite:///{tmp}/old", "the storage sqlite:///{tmp}/old cannot be used: .*optuna storage upgrade"),
        ("journal:///{tmp}/text", "{tmp}/text is not a journal of Optuna: JSONDecodeError"),
        ("journal:///{tmp}/json", "{tmp}/json is not a journal of Optuna: KeyError: 'op_code'"),
        ("journal:///{tmp}/old", "{tmp}/old is not a journal of Optuna: UnicodeDecodeError"),
        ("postgresql://ann:secret@127.0.0.1:1/db", r"postgresql://ann:\*\*\*@127.0.0.1:1/db cannot be used: .*refused"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, spec, message, live):
    if spec.startswith("postgresql"):
        pytest.importorskip("psycopg")
    (tmp_path / "text").write_text("no database\n" * 100)
    (tmp_path / "json").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "empty").touch()
    optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/old").engine.dispose()
    with closing(sqlite3.connect(tmp_path / "old")) as old, old:
        old.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=message.replace("{tmp}", str(tmp_path))) as error:
        storage.open_read_only(spec.replace("{tmp}", str(tmp_path)), live=live)
    assert "secret" not in str(error.value)
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_a_process_keeps_one_connection_to_a_server(postgresql):
    study = optuna.create_study(storage=storage.connect(storage.resolve(postgresql)))
    with ThreadPoolExecutor(4) as pool:
        for trial in pool.map(lambda _: study.ask(), range(8)):
            study.tell(trial, 0.0)
    query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    with create_engine(postgresql).connect() as connection:
        assert connection.execute(text(query)).scalar() == 1
