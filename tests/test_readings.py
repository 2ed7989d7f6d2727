"""How often each test split was read on this machine, and by how many studies."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import yaml
from helpers import TINY, result

from tuner import cache_files
from tuner.runs import readings
from tuner.runs.readings import Readings

HASH = "0123456789abcdef"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def recorded(cache):
    """The readings of the one test split that was read, as they are on disk."""
    [file] = (cache / "readings").iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("times", "studies", "text"),
    [
        (1, 0, "was read once on this machine"),
        (1, 1, "was read once on this machine, by 1 study"),
        (7, 3, "was read 7 times on this machine, by 3 studies"),
        (1200, 1, "was read 1,200 times on this machine, by 1 study"),
    ],
)
def test_what_is_said(times, studies, text):
    assert str(Readings(times, studies)) == text


def test_readings_are_counted_by_split_and_studies_by_name_and_storage(tmp_path):
    assert readings.of_split(HASH) is None
    for study, storage in [(None, None), ("a", "x"), ("a", "x"), ("a", "y"), ("b", "x"), (None, None)]:
        last = readings.record(HASH, tmp_path, study, storage)
    assert last == readings.of_split(HASH) == readings.of_result({"split_hashes": {"test": HASH}}) == Readings(6, 3)
    assert readings.record("f" * 16, tmp_path) == Readings(1, 0)


@pytest.mark.parametrize("damaged", [b"", b"\n", b'{"study": "a"\n', b"\xff\n", b"[]\n", b"[" * 10**5 + b"\n"])
def test_a_damaged_line_loses_no_other_one(cache, tmp_path, damaged):
    readings.record(HASH, tmp_path, "a")
    path = cache / "readings" / f"{HASH}.jsonl"
    path.write_bytes(path.read_bytes() + damaged)
    assert readings.record(HASH, tmp_path, "b") == Readings(2 + bool(damaged.strip()), 2)


@pytest.mark.parametrize("split", [None, 3, "../x", "0123456789ABCDEF", f"{HASH}\n", {"test": HASH}])
def test_what_is_no_hash_is_never_a_file_name(split):
    assert readings.of_split(split) is None
    assert readings.of_result({"split_hashes": split}) is None


def test_processes_that_record_at_once_lose_nothing(tmp_path):
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(readings.record, [HASH] * 40, [tmp_path] * 40, map(str, range(40))))
    assert readings.of_split(HASH) == Readings(40, 40)


def test_a_link_is_not_followed(cache, tmp_path, caplog):
    (cache / "readings").mkdir(parents=True)
    (tmp_path / "target").write_text("")
    (cache / "readings" / f"{HASH}.jsonl").symlink_to(tmp_path / "target")
    assert readings.record(HASH, tmp_path) is None
    assert (tmp_path / "target").read_text() == ""
    assert "not counted" in caplog.text


def test_the_cache_never_removes_them(cache, tmp_path, call):
    readings.record(HASH, tmp_path, "a")
    os.utime(cache / "readings" / f"{HASH}.jsonl", (0, 0))
    cache_files.evict(cache, 0)
    for arguments in ([], ["--prune"], ["--limit", "1B"]):
        code, out, err = call("cache", *arguments)
        assert code == 0, err
        assert (f"the test split {HASH} was read once on this machine, by 1 study" in out) == (not arguments)
    assert readings.of_split(HASH) == Readings(1, 1)


# Commands


def test_runs_and_evaluations_of_a_test_split_are_counted(cache, command, call):
    words = (*TINY, "epochs=1")
    code, output = command(*words, "test=false", "hydra.run.dir=untested")
    assert code == 0, output
    assert result("untested")["test_readings"] is None
    assert not (cache / "readings").exists()

    code, output = command(*words, "hydra.run.dir=tested")
    assert code == 0, output
    assert "this test split was read once on this machine\n" in output
    assert result("tested")["test_readings"] == {"times": 1, "studies": 0}

    for split, times in (("val", 1), ("test", 2), ("all", 3)):
        code, out, err = call("evaluate", "tested", "--split", split, "--json")
        assert code == 0, err
        assert json.loads(out)["split"] == split
        assert (f"this test split was read {times} times on this machine\n" in err) == (split != "val")
    assert [entry["run"] for entry in recorded(cache)] == [str(Path("tested").absolute())] * 3

    code, out, err = call("compare", "tested", "untested", "--top", "0")
    assert code == 0, err
    split = result("tested")["split_hashes"]["test"]
    assert out.splitlines()[-1] == f"the test split {split} (1 run) was read 3 times on this machine"
    code, out, err = call("compare", "tested", "untested")
    assert out.splitlines()[-1] == f"the test split {split} (1 run) was read 3 times on this machine"


def test_a_search_reads_it_once_where_it_retrains_its_best(cache, command, call):
    for name in ("one", "two"):
        search = ("-m", "hparams_search=random", f"study={name}", "hydra.sweeper.n_trials=2", "final.seeds=2", *TINY)
        code, output = command(*search, "epochs=1")
        assert code == 0, output
    folder, line = Path("multirun/two"), "this test split was read 2 times on this machine, by 2 studies"
    assert output.count(line) == 1
    assert result(folder / "best")["test_readings"] == {"times": 2, "studies": 2}
    written = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert written["final"]["test_readings"] == {"times": 2, "studies": 2}
    assert [(entry["study"], Path(entry["run"]).name) for entry in recorded(cache)] == [
        ("one", "best"),
        ("two", "best"),
    ]
    code, out, err = call("study", "multirun/one")
    assert code == 0, err
    assert line in out


def test_a_cache_folder_that_cannot_be_written_is_a_warning(tmp_path, command, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "file"))
    code, output = command(*TINY, "epochs=1", "hydra.run.dir=run", f"cache_dir={tmp_path / 'other'}")
    assert code == 0, output
    assert "this reading of the test split is not counted: " in output
    assert result("run")["test_readings"] is None
    assert result("run")["test_accuracy"] is not None
