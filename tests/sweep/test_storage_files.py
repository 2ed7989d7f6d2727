"""The file of a study: checked before it is opened, and watched while a sweep runs."""

import os
import re
import shutil
import sqlite3
from contextlib import closing

import optuna
import pytest

from tuner import InputError
from tuner.sweep import storage
from tuner.sweep.storage_files import Place, StorageLostError
from tuner.sweep.trial_loop import TrialLoop

SQLITE, JOURNAL = "sqlite", "journal"


def database(path, *tables):
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in tables:
            connection.execute(f"CREATE TABLE {table} (x)")


def of_another_program(path):
    database(path, "albums", "tracks")


def of_mlflow(path):
    database(path, "alembic_version", "experiments", "runs")


def with_a_log(path):
    database(path, "albums")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def damaged(path):
    of_another_program(path)
    path.write_bytes(path.read_bytes()[:100] + b"\xff" * 5000)


FOREIGN = {
    "one_line": lambda path: path.write_text('{"a": 1}'),
    "text": lambda path: path.write_text("dear diary\nmonday\n"),
    "one_word": lambda path: path.write_text("x"),
    "numbers": lambda path: path.write_text("5\n6\n"),
    "list": lambda path: path.write_text("[1, 2]\n"),
    "json_lines": lambda path: path.write_text('{"a": 1}\n{"b": 2}\n'),
    "op_code_of_another": lambda path: path.write_text('{"op_code": "insert", "worker_id": "x"}\n'),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "nul": lambda path: path.write_bytes(b"\0"),
    "database": of_another_program,
    "mlflow": of_mlflow,
    "log": with_a_log,
    "damaged": damaged,
    "folder": lambda path: path.mkdir(),
    "fifo": os.mkfifo,
}


def contents(folder):
    files = sorted(folder.iterdir())
    return {path.name: path.read_bytes() if path.is_file() else None for path in files}


@pytest.mark.parametrize("kind", [SQLITE, JOURNAL])
@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_file_that_is_something_else_is_refused_unchanged(tmp_path, foreign, kind):
    path = tmp_path / "it"
    FOREIGN[foreign](path)
    before = contents(tmp_path)
    with pytest.raises(
        InputError, match=f"the storage {kind}:///{path} cannot be used: .*(choose another|give a) file"
    ):
        storage.connect(f"{kind}:///{path}")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", [SQLITE, JOURNAL])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_file_without_permission_is_refused(closed, kind, what):
    folder, close = closed
    inner = folder / "inner"
    inner.mkdir()
    (inner / "it").touch()
    close(inner / "it" if what == "file" else inner)
    with pytest.raises(InputError, match=f"the storage {kind}:///{inner}/it cannot be used: .*Permission denied"):
        storage.connect(f"{kind}:///{inner}/it")


@pytest.mark.parametrize("kind", [SQLITE, JOURNAL])
def test_an_empty_file_is_taken(tmp_path, kind):
    (tmp_path / "it").touch()
    optuna.create_study(study_name="s", storage=storage.connect(f"{kind}:///{tmp_path}/it"))


def test_a_journal_may_be_cut_off_in_its_first_line(tmp_path):
    whole = b'{"op_code":0,"worker_id":"w","study_name":"s","directions":[1]}'
    for length in range(len(whole) + 1):
        path = tmp_path / str(length)
        path.write_bytes(whole[:length])
        optuna.create_study(study_name="new", storage=storage.connect(f"journal:///{path}"))


def test_a_journal_damaged_in_the_middle_is_refused_unchanged(tmp_path):
    path = tmp_path / "it"
    study = optuna.create_study(study_name="s", storage=storage.connect(f"journal:///{path}"))
    study.tell(study.ask(), 0.5)
    lines = path.read_bytes().splitlines(keepends=True)
    for damage in (b"\xff\xfe\n", b"{}\n", b'{"op_code":99,"worker_id":"w"}\n', b"[]\n", b"half a li"):
        path.write_bytes(b"".join([lines[0], damage, *lines[1:]]))
        storage._open.cache_clear()
        before = contents(tmp_path)
        with pytest.raises(InputError, match=f"the storage journal:///{path} cannot be used: it is damaged"):
            storage.connect(f"journal:///{path}")
        assert contents(tmp_path) == before


# While a sweep runs


def test_a_place_is_the_same_file(tmp_path):
    path = tmp_path / "it"
    path.write_text("a")
    place = Place.of(path)
    path.write_text("b")
    place.check()
    (tmp_path / "other").write_text("b")
    (tmp_path / "other").replace(path)
    with pytest.raises(StorageLostError, match="it was replaced by another one while the sweep ran, so nothing more"):
        place.check()
    Place(path, place.identity, "another-machine").check()  # which numbers files in its own way
    path.unlink()
    for lost in (place, Place(path, place.identity, "another-machine")):
        with pytest.raises(StorageLostError, match="it was deleted, renamed or moved while the sweep ran"):
            lost.check()


@pytest.mark.parametrize("kind", [SQLITE, JOURNAL])
@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_a_file_that_is_gone_is_not_written_again(tmp_path, kind, change):
    path = tmp_path / "it"
    study = optuna.create_study(study_name="s", storage=storage.connect(f"{kind}:///{path}"))
    trial = study.ask()
    path.rename(tmp_path / "elsewhere")
    if change == "replaced":
        path.write_text("something else")
    for use in (study.ask, lambda: study.tell(trial, 0.5), lambda: trial.set_user_attr("a", 1), study.get_trials):
        with pytest.raises(StorageLostError, match=f"{path} was {change}"):
            use()
    assert not path.exists() or path.read_text() == "something else"
    path.unlink(missing_ok=True)
    (tmp_path / "elsewhere").rename(path)
    study.tell(trial, 0.5)


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
@pytest.mark.parametrize("lost", ["sqlite", "journal", "folder"])
def test_a_sweep_stops_when_its_study_is_moved(toy, launcher, lost):
    kind = "journal" if lost == "journal" else "sqlite"
    database = toy.folder / "multirun" / "it"
    what = toy.folder / "multirun" / "toy" if lost == "folder" else database
    options = [f"hydra/launcher={launcher}", "hydra.sweeper.n_jobs=2", f"hydra.sweeper.storage={kind}:///{database}"]
    options += ["hydra.sweeper.n_trials=5", "hydra.sweeper.retries=0", "seconds=0.3"]
    with toy.start(*options) as sweep:
        toy.wait_for(2)
        what.rename(toy.folder / "elsewhere")
        out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 1, out + err
    assert re.search(f"{what} was (deleted, renamed or moved|replaced by another one) while the sweep ran", out)
    assert "put it back where it was, then continue with: python -m toy -m" in out
    assert "Traceback" not in out + err
    assert len(toy.starts()) < 5
    if lost == "folder":
        shutil.rmtree(what, ignore_errors=True)  # Hydra made it for a job that was about to start
    assert not what.exists()
    (toy.folder / "elsewhere").rename(what)
    done = toy.command(*options, "hydra.sweeper.retries=2")
    assert done.returncode == 0, done.stdout + done.stderr
    study = toy.study(storage=f"{kind}:///{database}")
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 5
    assert len(toy.starts()) == len(set(toy.starts()))


def test_a_job_that_is_about_to_start_does_not_run_in_a_new_folder(toy):
    launch, folder = TrialLoop._launch, toy.folder / "multirun" / "toy"

    def launch_late(loop, jobs):
        if jobs[0][0] == 1:
            folder.rename(toy.folder / "elsewhere")  # Hydra makes another one for the job
        return launch(loop, jobs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrialLoop, "_launch", launch_late)
        done = toy.run("hydra.sweeper.n_trials=3")
    assert done.returncode == 1
    assert f"{folder} was replaced by another one while the sweep ran" in done.stdout
    assert toy.starts() == [0]
    assert toy.states() == ["COMPLETE", "RUNNING"]
    shutil.rmtree(folder)
    (toy.folder / "elsewhere").rename(folder)
    assert toy.run("hydra.sweeper.n_trials=3").returncode == 0
    assert toy.states().count("COMPLETE") == 3
