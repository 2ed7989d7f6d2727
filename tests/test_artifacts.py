"""Copies of run folders in a place that all machines reach, and what reads them."""

import hashlib
import io
import os
import shutil
import sys
import tarfile
from pathlib import Path

import optuna
import pytest

from tuner import InputError, artifacts

SEARCH = ("-m", "hparams_search=random", "study=mine", "data=synthetic", "model=tiny", "epochs=2", "batch_size=32")
SEARCH += ("plots=false", "final.seeds=1", "artifacts=store")


@pytest.fixture
def run(tmp_path):
    """A folder with a file in a subfolder, and files that are not copied."""
    folder = tmp_path / "7"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("a: 1\n")
    (folder / "result.json").write_text("{}")
    (folder / ".packing-killed").mkdir()
    (folder / ".lock").touch()
    (folder / "checkpoint.pt").touch()
    return folder


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(artifacts, "PAUSES", (0.0, 0.0))


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_a_run_folder_comes_back_as_it_was(run, tmp_path, scheme):
    place = f"{scheme}{tmp_path}/store/a study"
    artifacts.check(place)
    url = artifacts.put(run, place, "7")
    assert url.startswith(f"{place}/7-")
    artifacts.fetch(url, tmp_path / "elsewhere" / "7")
    there = {".hydra/config.yaml": "a: 1\n", "result.json": "{}", ".copy-of": url}
    assert content(tmp_path / "elsewhere" / "7") == there
    assert sorted(path.name for path in tmp_path.glob("**/.*")) == [
        *(".copy-of", ".hydra", ".hydra", ".lock")  # nothing temporary is left
    ]
    artifacts.fetch(url, tmp_path / "elsewhere" / "7")  # another process was faster


def test_a_copy_that_is_damaged_or_missing_is_not_used(run, tmp_path, caplog):
    url = artifacts.put(run, f"{tmp_path}/store", "7")
    whole = Path(url).read_bytes()
    Path(url).write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"-[0-9a-f]{64}\.tar is damaged: its SHA-256 is [0-9a-f]{64}$"):
        artifacts.fetch(url, tmp_path / "8")
    Path(url).unlink()
    with pytest.raises(InputError, match=r"^there is no .*\.tar$"):
        artifacts.fetch(url, tmp_path / "8")
    with pytest.raises(InputError, match=r"its name must end with -HASH\.tar, a SHA-256"):
        artifacts.fetch(f"{tmp_path}/store/7-abc.tar", tmp_path / "8")
    assert not (tmp_path / "8").exists()
    artifacts.bring({"8": url}, tmp_path)
    assert f"{tmp_path}/8 is missing: there is no {url}" in caplog.text


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "link/outside"])
def test_a_copy_is_unpacked_into_its_folder_alone(tmp_path, name):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo(name))
    url = tmp_path / f"7-{hashlib.sha256(packed.getvalue()).hexdigest()}.tar"
    url.write_bytes(packed.getvalue())
    with pytest.raises(InputError, match="cannot be unpacked"):
        artifacts.fetch(str(url), tmp_path / "runs" / "7")
    assert not list(tmp_path.rglob("outside"))
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("place", "reason"),
    [("foo://bucket", "Protocol not known: foo"), ("/proc/none", "No such file"), ("s3://bucket", "Install s3fs")],
)
def test_a_place_that_cannot_be_used_is_told_before_a_run_starts(command, monkeypatch, place, reason):
    if place.startswith("s3:"):
        monkeypatch.setitem(sys.modules, "s3fs", None)
    for words in (SEARCH, ("data=synthetic", "model=tiny")):
        code, output = command(*words, f"artifacts={place}")
        assert code == 1
        assert f"artifacts={place} cannot be used: " in output
        assert reason in output
    assert not Path("multirun").exists()


def test_a_copy_of_another_best_is_replaced(run, tmp_path):
    first = artifacts.put(run, f"{tmp_path}/store", "best")
    (run / "result.json").write_text("{1: 2}")
    second = artifacts.put(run, f"{tmp_path}/store", "best")
    here = tmp_path / "study"
    for url in (first, second, second):
        assert artifacts.bring({"best": url}, here)
    assert (here / "best" / "result.json").read_text() == "{1: 2}"
    assert [path.name[:11] for path in sorted(here.iterdir())] == ["best", "best-until-"]


def test_a_place_that_is_away_is_asked_once(run, tmp_path, monkeypatch, impatient, caplog):
    asked = []

    def refused(url, _packed):
        asked.append(url)
        raise PermissionError("403")

    monkeypatch.setattr(artifacts, "_download", refused)
    urls = {str(number): f"{tmp_path}/store/{number}-{'0' * 64}.tar" for number in range(100)}
    assert not artifacts.bring(urls, tmp_path / "study")
    assert len(asked) == 3  # attempts
    assert caplog.text.count("cannot be read: 403") == 1


@pytest.mark.parametrize("place", ["ftp://me:secret@host/runs", "simplecache::ftp://me:secret@host/runs"])
def test_a_password_in_the_url_is_refused_and_not_repeated(command, place):
    code, output = command("data=synthetic", "model=tiny", f"artifacts={place}")
    assert code == 1
    assert "artifacts=URL has a password" in output
    assert "secret" not in output + "".join(path.read_text() for path in Path().rglob("*") if path.is_file())


def test_a_study_names_only_folders_of_its_own():
    study = optuna.create_study()
    study.set_user_attr(artifacts.ARTIFACTS, {"best": "a", "../../elsewhere": "b", "default": 3})
    assert artifacts.of_study(study) == {"best": "a"}


def test_a_search_finds_the_run_folders_that_are_not_on_this_machine(command, call):
    code, output = command(*SEARCH, "hydra.sweeper.n_trials=3")
    assert code == 0, output
    urls = artifacts.of_study(optuna.load_study(study_name="mine", storage="sqlite:///multirun/optuna.db"))
    assert list(urls) == ["0", "1", "2", "best"]
    assert all(Path(url).is_absolute() and Path(url).exists() for url in urls.values())
    shutil.rmtree("multirun/mine")
    code, output = command(*SEARCH, "hydra.sweeper.n_trials=4")
    assert code == 0, output
    assert "bringing 4 run folders from " in output
    assert "retraining" not in output or "trial 3" in output  # only a new best
    shutil.rmtree("multirun/mine")
    code, out, said = call("study", "mine", "--storage", "sqlite:///multirun/optuna.db")
    assert code == 0, out + said
    assert "run folders that are not here: " in out
    code, out, said = call("study", "mine", "--storage", "sqlite:///multirun/optuna.db", "--fetch")
    assert code == 0, out + said
    assert sorted(path.name for path in Path("multirun/mine").iterdir() if path.is_dir()) == [
        "0",
        "1",
        "2",
        "3",
        "best",
    ]
    code, out, said = call("study", "multirun/mine")
    assert "retrained on train + validation and tested" in out
    assert "run folders that are not here: " not in out
    code, out, said = call("evaluate", urls["best"])
    assert code == 0, out + said
    code, out, said = call("compare", urls["0"], urls["1"])
    assert code == 0, out + said
    code, out, said = call("export", urls["best"], "--format", "onnx")
    assert (code, said.splitlines()[-1]) == (
        1,
        f"{urls['best']} is a copy of a run: say where to write the model, --out FILE",
    )


def test_a_result_is_not_lost_when_its_folder_cannot_be_copied(command, monkeypatch, impatient):
    def full(_packed, _url):
        raise OSError("the bucket is full")

    monkeypatch.setattr(artifacts, "_upload", full)
    code, output = command(*SEARCH, "hydra.sweeper.n_trials=2")
    assert code == 0, output
    assert "stays on this machine: it cannot be copied to " in output
    study = optuna.load_study(study_name="mine", storage="sqlite:///multirun/optuna.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    assert artifacts.of_study(study) == {}
    assert Path("multirun/mine/best/result.json").exists()


def test_a_single_run_is_copied(command, call):
    code, output = command("data=synthetic", "model=tiny", "epochs=2", "plots=false", "artifacts=store")
    assert code == 0, output
    [copy] = Path("store/runs").iterdir()
    assert f"copied; use it anywhere: python -m tuner.predict {Path.cwd()}/store/runs/{copy.name}" in output
    shutil.rmtree("outputs")
    code, out, said = call("evaluate", copy)
    assert code == 0, out + said
    assert list((Path(os.environ["TUNER_CACHE"]) / "archives").iterdir())
