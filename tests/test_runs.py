"""Run folders are read as they are found: whole, half-written, damaged, of older versions and of other programs."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tuner import InputError
from tuner.runs import run as run_module
from tuner.runs import table as runs
from tuner.runs.result import on_images, read_result
from tuner.sweep import report

HEADER = "epoch,train_loss,train_accuracy,val_loss,val_accuracy,lr,seconds\n"  # as an older version had it
EPOCHS = "1,0.9,0.5,0.8,0.6,0.001,0.25\n2,0.7,0.625,0.75,0.65,0.0005,0.25\n"
RESULT = {"status": "complete", "val_accuracy": 0.75, "val_loss": 0.5, "epochs": 2, "seconds": 1.5, "device": "cpu"}


def make(folder, config=None, result=None, metrics=None):
    """A run folder of the given files; a dict is written as the run would, text and bytes as they are."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / ".hydra").mkdir(exist_ok=True)
        config = yaml.safe_dump(config) if isinstance(config, dict) else config
    result = json.dumps(result) if isinstance(result, dict) else result
    for name, content in ((".hydra/config.yaml", config), ("result.json", result), ("metrics.csv", metrics)):
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def all_is_logged(caplog):
    caplog.set_level(logging.INFO)


def found(*folders):
    return [str(folder) for folder in runs.find(*folders)]


def test_one_process_at_a_time_writes_a_run(tmp_path):
    first = run_module.Run(tmp_path)
    first.log_epoch(1, {})
    with pytest.raises(InputError, match=r"another process is writing the run in .*: wait for it, or end it"):
        run_module.Run(tmp_path)
    assert len(first.metrics()) == 1
    first.close()
    run_module.Run(tmp_path).close()
    assert not (tmp_path / ".lock").exists()


def test_where_a_file_system_has_no_locks_a_run_says_so_and_goes_on(tmp_path, monkeypatch, caplog):
    def acquire(self, **options):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(run_module.FileLock, "acquire", acquire)
    run = run_module.Run(tmp_path)
    assert "make sure that only one process writes there" in caplog.text
    run.close()


# Which folders are runs


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "日本語 é",
        'it\'s "it"',
        "two\nlines",
        "-m",
        "--csv",
        "#1?x=%20&y",
        "<b>",
        "a,b",
        "$HOME",
        "C:",
        "[red]",
        "~",
    ],
)
def test_any_name_is_a_name(name):
    make(f"outputs/{name}", {"seed": 3}, RESULT)
    frame = runs.load()
    assert list(frame.folder) == [f"outputs/{name}"]
    assert list(frame.seed) == [3]


def test_a_name_that_is_no_text_is_logged_and_skipped(caplog):
    make("outputs/1", {}, RESULT)
    try:
        make(os.fsdecode(b"outputs/caf\xe9"), {}, RESULT)
    except OSError:
        pytest.skip("this file system has no such names")
    assert found("outputs") == ["outputs/1"]
    assert "skipped outputs/caf" in caplog.text


def test_folders_are_found_at_any_depth_in_the_order_of_their_names():
    names = ["s/10", "s/2", "s/best", "s/1", "2026-11-23/12-00-00", "top", "top/below/it", "plots/0"]
    for name in names:
        make(f"multirun/{name}", {}, RESULT)
    for hidden in (".trash/1", "s/1/plots/2", "s/1/.hydra/3"):
        make(f"multirun/{hidden}", {}, RESULT)
    (Path("multirun") / "empty").mkdir()
    assert found("multirun") == [
        *("multirun/2026-11-23/12-00-00", "multirun/plots/0", "multirun/s/1", "multirun/s/2", "multirun/s/10"),
        *("multirun/s/best", "multirun/top", "multirun/top/below/it"),
    ]


def test_each_folder_is_found_once():
    make("outputs/a/1", {}, RESULT)
    make("elsewhere/2", {}, RESULT)
    Path("outputs/link").symlink_to(Path("elsewhere").absolute())
    Path("outputs/again").symlink_to("a")
    Path("outputs/a/up").symlink_to("..")
    Path("outputs/a/itself").symlink_to("itself")
    Path("outputs/a/gone").symlink_to("nowhere")
    assert found("outputs") == ["outputs/a/1", "outputs/link/2"]
    assert found("outputs", "outputs", "outputs/a", "./outputs/a/1", "elsewhere") == found("outputs")
    assert len(runs.load("outputs", "outputs/a")) == 2


@pytest.mark.parametrize("name", ["1", "1/.hydra", "1/.hydra/config.yaml", "1/result.json"])
def test_what_may_not_be_read_is_logged_and_skipped(caplog, closed, name):
    folder, close = closed
    for number in (1, 2):
        make(folder / str(number), {"a": number}, RESULT)
    close(folder / name)
    assert list(runs.load(folder).folder) == [str(folder / "2")]
    assert f"skipped {folder}/1" in caplog.text
    assert "Permission denied" in caplog.text


def test_a_missing_folder_is_a_mistake_and_no_runs_are_an_empty_table():
    with pytest.raises(InputError, match=r"there is no folder nowhere; runs are in outputs/ and multirun/"):
        runs.load("nowhere")
    Path("file").write_text("")
    with pytest.raises(InputError, match="there is no folder file"):
        runs.load("file")
    for frame in (runs.load(), runs.load(".")):
        assert frame.empty
        assert {"folder", "status", "val_accuracy", "started"} <= set(frame)


# What is read of a run


def test_a_run_in_the_table():
    config = {"epochs": 9, "device": "auto", "optimizer": {"lr": 1e-05, "betas": [0.9, 0.99]}, "data": {}, "seed": None}
    make("outputs/1", config, RESULT | {"versions": {"torch": "3"}, "trial": 4})
    frame = runs.load("outputs")
    assert list(frame)[: len(runs.RESULTS) + 2] == ["folder", *runs.RESULTS, "started"]
    row = frame.iloc[0]
    expected = {"config.epochs": 9, "config.device": "auto", "optimizer.lr": 1e-05, "optimizer.betas": "[0.9, 0.99]"}
    expected |= {"data": "{}", "seed": None, "epochs": 2, "device": "cpu", "trial": 4, "val_accuracy": 0.75}
    assert {key: row[key] for key in expected} == expected
    assert row.started == pd.Timestamp.fromtimestamp(Path("outputs/1/.hydra/config.yaml").stat().st_mtime)
    assert "versions" not in frame


def test_keys_that_only_some_runs_have_and_values_of_several_types():
    values = [1, "x", None, True, [1, "é"], 2.5, "10", {"deep": False}, 10**30]
    for number, value in enumerate(values):
        make(f"outputs/{number}", {"key": value, f"only{number % 2}": number}, RESULT)
    frame = runs.load()
    assert list(frame["key"])[:7] == [1, "x", None, True, '[1, "é"]', 2.5, "10"]
    assert frame["key"].isna().tolist() == [False, False, True, *[False] * 4, True, False]
    assert frame["key.deep"].dropna().tolist() == [False]
    assert frame.only1.dropna().tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({"config": {"a": 1}}, {"epochs": 0, "val_accuracy": None, "a": 1}, id="only its config"),
        pytest.param({"metrics": ""}, {"epochs": 0}, id="metrics.csv is empty"),
        pytest.param({"metrics": HEADER}, {"epochs": 0, "val_loss": None}, id="no epoch yet"),
        pytest.param(
            {"metrics": HEADER + EPOCHS}, {"epochs": 2, "val_accuracy": 0.65, "val_loss": 0.75}, id="2 epochs"
        ),
        pytest.param({"metrics": HEADER + EPOCHS + "3,0.1,0"}, {"epochs": 2, "val_accuracy": 0.65}, id="half a line"),
        pytest.param(
            {"metrics": HEADER + "1,0.9,0.5,,,0.1,2\n"}, {"epochs": 1, "val_accuracy": None}, id="no validation"
        ),
        pytest.param(
            {"metrics": HEADER + "1,nan,0.5,inf,0.1,0.1,2\n"}, {"epochs": 1, "val_loss": math.inf}, id="diverging"
        ),
        pytest.param(
            {"metrics": "epoch,val_accuracy\n1,0.5\n"}, {"epochs": 1, "val_accuracy": 0.5}, id="fewer columns"
        ),
    ],
)
def test_a_run_that_goes_on_is_read_as_far_as_it_is(files, expected):
    make("outputs/1", **files)
    row = runs.load().iloc[0]
    assert row.status == "unfinished"
    for key, value in expected.items():
        assert row[key] == value or (value is None and pd.isna(row[key])), key


def test_wherever_a_run_is_while_it_writes_its_whole_epochs_are_read():
    text = HEADER + EPOCHS
    for end in range(len(text) + 1):
        folder = make("outputs/1", metrics=text[:end])
        epochs = max(0, text[:end].count("\n") - 1)
        assert runs.load().epochs.tolist() == [epochs], text[:end]
        if end >= len(HEADER):
            assert len(runs.read_metrics(folder)) == epochs


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        pytest.param({"status": "complete"}, {"val_accuracy": None, "seconds": None}, id="an older version's"),
        pytest.param({"status": "failed", "error": "ValueError: x"}, {"error": "ValueError: x"}, id="failed"),
        pytest.param({"status": "pruned", "val_accuracy": None}, {"val_accuracy": None}, id="null"),
        pytest.param('{"status": "complete", "val_loss": Infinity}', {"val_loss": math.inf}, id="infinity"),
        pytest.param('{"status": "complete", "val_loss": NaN}', {"val_loss": None}, id="nan"),
        pytest.param({"status": "complete", "new_in_2030": [1, 2]}, {"status": "complete"}, id="a newer version's"),
    ],
)
def test_results_with_more_or_less_in_them(result, expected):
    make("outputs/1", {}, result)
    row = runs.load().iloc[0]
    for key, value in expected.items():
        assert row[key] == value or (value is None and pd.isna(row[key])), key


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        ({"seed": 3, "data": {"seed": "${seed}"}}, "data.seed", 3),
        ({"model": {"last_block": "block4", "frozen": "${.last_block}"}}, "model.frozen", "block4"),
        ({"a": {"b": {"x": "${..y}"}, "y": 2}}, "a.b.x", 2),
        ({"a": "${b.c}", "b": {"c": "${.d}", "d": None}}, "a", None),
        ({"epochs": 25, "t": "${epochs}"}, "t", 25),  # the config's, not those that were trained
        ({"lr": 0.5, "device": "${lr}"}, "config.device", 0.5),
        ({"a": "${b}", "b": "${a}"}, "a", "${a}"),  # a circle
        ({"a": "${gone}"}, "a", "${gone}"),
        ({"a": "${b}", "b": {"c": 1}}, "a", "${b}"),  # a group
        ({"a": "${oc.env:HOME}", "b": "${a}"}, "b", "${oc.env:HOME}"),
        ({"study": "${now:%Y}"}, "study", "${now:%Y}"),
        ({"a": "x/${b}", "b": 1}, "a", "x/${b}"),
    ],
)
def test_references_have_the_value_that_they_stand_for(config, key, value):
    make("outputs/1", config, RESULT)
    make("outputs/2", {"other": 1}, RESULT)
    found, missing = runs.load()[key]
    assert found == value or (value is None and pd.isna(found))
    assert pd.isna(missing)
    assert "${" in runs.load(resolve=False)[key][0]


def test_references_that_only_some_runs_have():
    for number, seed in enumerate(("${seed}", 7, "${seed}", "${other}")):
        make(f"outputs/{number}", {"seed": number, "other": "x", "data": {"seed": seed}}, RESULT)
    assert list(runs.load()["data.seed"]) == [0, 7, 2, "x"]


@pytest.mark.parametrize("metrics", [HEADER + EPOCHS, HEADER, None])
@pytest.mark.parametrize("ended", [{"status": "interrupted"}, {"status": "failed", "error": "KeyboardInterrupt: "}])
def test_a_run_that_was_interrupted_is_read_as_far_as_it_came(metrics, ended):
    make("outputs/1", {}, ended, metrics)  # as it is today, and as it was
    row = runs.load().iloc[0]
    assert (row.status, row.error) == (ended["status"], ended.get("error"))
    assert row.epochs == (2 if metrics and "\n2," in metrics else 0)
    assert row.val_accuracy == 0.65 if row.epochs else pd.isna(row.val_accuracy)


WHOLE = json.dumps(RESULT)


UNREADABLE = ".hydra/config.yaml can't be read: "


@pytest.mark.parametrize(
    ("files", "says"),
    [
        pytest.param({"result": ""}, "result.json: Expecting value", id="empty result"),
        pytest.param({"result": WHOLE[:-9]}, "result.json: ", id="truncated result"),
        pytest.param({"result": "[]"}, "result.json: not the result of a run", id="a list"),
        pytest.param({"result": "{}"}, "result.json: not the result of a run", id="no status"),
        pytest.param({"result": '{"status": null}'}, "result.json: not the result of a run", id="null status"),
        pytest.param({"result": '{"status": ["ok"]}'}, "result.json: not the result of a run", id="a list as status"),
        pytest.param({"result": RESULT | {"epochs": "3"}}, "result.json: epochs must be a number, not '3'", id="text"),
        pytest.param(
            {"result": RESULT | {"seconds": [1]}}, "result.json: seconds must be a number, not [1]", id="list as number"
        ),
        pytest.param({"result": RESULT | {"device": {}}}, "result.json: device must be text, not {}", id="no text"),
        pytest.param({"result": WHOLE.replace("1.5", "9" * 400)}, "result.json: int too large", id="huge number"),
        pytest.param({"result": "[" * 100_000}, "result.json: maximum recursion depth", id="deep"),
        pytest.param({"result": b"\x89PNG\xff\x00"}, "result.json: 'utf-8' codec can't decode", id="binary result"),
        pytest.param({"config": b"\xff\xfe\x00", "result": RESULT}, UNREADABLE, id="binary config"),
        pytest.param({"config": "a: [1", "result": RESULT}, UNREADABLE + "while parsing", id="truncated config"),
        pytest.param({"config": "", "result": RESULT}, UNREADABLE + "it has no keys", id="empty config"),
        pytest.param({"config": "- 1", "result": RESULT}, UNREADABLE + "it has no keys", id="list config"),
        pytest.param(
            {"config": "a: &a {b: *a}", "result": RESULT},
            UNREADABLE + "with its aliases written out",
            id="endless config",
        ),
        pytest.param({"config": "a: !!python/name:os.system"}, UNREADABLE + "could not det", id="code in config"),
        pytest.param({"metrics": b"\x00\xff\n\x01\n"}, "metrics.csv: 'utf-8' codec can't decode", id="binary metrics"),
        pytest.param(
            {"metrics": "step,loss\n1,2\n"}, "metrics.csv: its last line '1,2' does not have", id="another program's"
        ),
        pytest.param({"metrics": "epoch,step\n,5\n"}, "metrics.csv: invalid literal", id="PyTorch Lightning's"),
        pytest.param({"metrics": HEADER + "1,2\n"}, "metrics.csv: its last line '1,2' does not have", id="a short row"),
        pytest.param({"metrics": HEADER + "1,a,b,c,d,e,f\n"}, "metrics.csv: could not convert", id="text in metrics"),
    ],
)
def test_a_damaged_folder_is_logged_by_file_and_skipped(caplog, files, says):
    make("outputs/good", {"a": 1}, RESULT)
    make("outputs/bad", **files)
    assert list(runs.load().folder) == ["outputs/good"]
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"skipped outputs/bad: {says}")
    assert "\n" not in message


def test_folders_where_files_belong_are_skipped(caplog):
    make("outputs/good", {"a": 1}, RESULT)
    for number, name in enumerate(("result.json", "metrics.csv")):
        (Path("outputs") / str(number) / name).mkdir(parents=True)
    assert list(runs.load().folder) == ["outputs/good"]
    assert caplog.text.count("skipped") == 2


def test_yaml_that_no_config_has_is_shown_as_text():
    make("outputs/1", "day: 2026-01-31\ndays: [2026-01-31]\n1: one\nset: !!set {x}\n", RESULT)
    row = runs.load().iloc[0]
    assert (row["day"], row["days"], row["1"], row["set"]) == ("2026-01-31", '["2026-01-31"]', "one", "{'x'}")


def test_a_damaged_result_is_no_reason_to_overwrite_a_folder_silently():
    folder = make("outputs/1", {}, "{")
    with pytest.raises(ValueError, match=r"result\.json: "):
        run_module.Run(folder)


# result.json alone


@pytest.mark.parametrize(
    ("content", "of_a_run", "of_any_program"),
    [
        pytest.param(b'{"status": "complete"}', {"status": "complete"}, {"status": "complete"}, id="a run's"),
        pytest.param(b'{"seconds": 3}', None, {"seconds": 3}, id="another program's"),
        pytest.param(b"[1]", None, {}, id="another program's list"),
        pytest.param(b'{"status": "comp', None, {}, id="damaged"),
        pytest.param(b"\x89PNG\xff", None, {}, id="binary"),
        pytest.param(None, None, {}, id="missing"),
    ],
)
def test_results_of_runs_and_of_trials_that_are_any_programs(content, of_a_run, of_any_program, caplog):
    if content is not None:
        Path("result.json").write_bytes(content)
    if of_a_run is None:
        with pytest.raises(FileNotFoundError if content is None else ValueError, match=r"result\.json"):
            read_result(Path())
    else:
        assert read_result(Path()) == of_a_run
    assert report.read_result(Path()) == of_any_program
    assert bool(caplog.messages) == (of_any_program == {} and content is not None)  # damage is logged


@pytest.mark.parametrize("module", ["trial", "job", "sweeper"])
def test_a_sweep_and_its_trials_start_without_what_takes_seconds_to_import(module):
    code = f"import sys, tuner.sweep.{module}; print(sorted({{'pandas', 'matplotlib', 'torch'}} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(Path(report.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("accuracy", "images", "text"),
    [  # scipy.stats.binomtest(hits, images).proportion_ci(method="wilson")
        (0.905, 600, "600 images, 95%: 0.8789 to 0.9260"),
        (1.0, 1, "1 image, 95%: 0.2065 to 1.0000"),
        (0.0, 3, "3 images, 95%: 0.0000 to 0.5615"),
        (0.9314, 1200, "1,200 images, 95%: 0.9157 to 0.9444"),
    ],
)
def test_the_interval_of_an_accuracy(accuracy, images, text):
    assert on_images(accuracy, images) == text
