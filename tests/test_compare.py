"""`python -m tuner.compare` as its users meet it: tables of runs, and two runs side by side."""

import csv
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY
from test_paired import of, scored
from test_runs import EPOCHS, HEADER, RESULT, make

from tuner import InputError, compare, plots
from tuner.runs import table as runs
from tuner.runs.metrics import METRICS

FLOATS = [1 / 3, 0.1 + 0.2, 5e-324, 1e22, 0.9999999999999999, 1e-05, 123456.789012345]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    caplog.set_level(logging.INFO)


@pytest.fixture
def compared(monkeypatch, capfd):
    """Run `python -m tuner.compare ARGUMENTS`; gives what it printed."""

    def run(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["tuner.compare", *arguments])
        compare.main()
        return capfd.readouterr().out

    return run


def many(configs, **columns):
    """A finished run in outputs/ for each config, with the results of the same place in `columns`."""
    for number, config in enumerate(configs):
        make(f"outputs/{number}", config, RESULT | {key: values[number] for key, values in columns.items()})


def cells(output):
    """The words of a printed table's lines."""
    return [line.split() for line in output.split("\n\n")[0].splitlines()]


def numbers(output):
    """The runs of a printed CSV, by the names of their folders."""
    return [int(row["folder"].rpartition("/")[2]) for row in csv.DictReader(io.StringIO(output))]


# The table


def test_options_stand_anywhere(compared):
    many([{}] * 3, val_accuracy=[0.1, 0.2, 0.3])
    assert numbers(compared("outputs/0", "--csv", "outputs/2", "outputs/1")) == [2, 1, 0]


def test_runs_from_the_best_with_what_differs(compared):
    config = {"optimizer": {"lr": 1e-3}, "study": "${now:%Y}", "cache_dir": "/a", "same": 7, "device": "cpu"}
    other = {"optimizer": {"lr": 1e-4}, "study": "x", "cache_dir": "/b", "same": 7, "logger": {"uri": "u"}, "epochs": 3}
    make("outputs/day/one", config, RESULT | {"val_accuracy": 0.91234567})
    make("multirun/s/0", other, RESULT | {"val_accuracy": None, "status": "failed", "error": "boom"})
    make("multirun/s/1", other, RESULT | {"val_accuracy": 0.95, "test_accuracy": 0.9})
    make("multirun/s/2", other, metrics=HEADER + EPOCHS)
    assert cells(compared()) == [
        ["folder", "status", "val_accuracy", "test_accuracy", "optimizer.lr", "config.epochs", "epochs", "seconds"],
        ["multirun/s/1", "complete", "0.9500", "0.9000", "0.0001", "3", "2", "1.5"],
        ["outputs/day/one", "complete", "0.9123", "-", "0.001", "-", "2", "1.5"],
        ["multirun/s/2", "unfinished", "0.6500", "-", "0.0001", "3", "2", "-"],
        ["multirun/s/0", "failed", "-", "-", "0.0001", "3", "2", "1.5"],
    ]
    assert compared().endswith("\n\n4 runs: 2 complete, 1 failed, 1 unfinished\n")


def test_one_run_and_none(compared):
    with pytest.raises(InputError, match=r"no runs found; python -m tuner\.train writes runs to outputs/"):
        compared()
    make("outputs/1", {"a": 1}, "{")
    with pytest.raises(InputError, match="no runs found"):
        compared("outputs")
    make("outputs/1", {"a": 1}, RESULT)
    assert cells(compared()) == [
        ["folder", "val_accuracy", "epochs", "seconds"],
        ["outputs/1", "0.7500", "2", "1.5"],
    ]
    assert compared("outputs/1").endswith("1 run: 1 complete\n")
    with pytest.raises(InputError, match="there is no folder elsewhere"):
        compared("outputs", "elsewhere")


@pytest.mark.parametrize(
    ("values", "differ"),
    [
        ([1, 1, 1], False),
        ([1, 2, 1], True),
        ([1, None, 1], True),
        ([None, None, None], False),
        ([None, "absent", None], False),
        ([1, "absent", 1], True),
        ([[1, 2], [1, 2], [1, 2]], False),
        ([[1, 2], [2, 1], [1, 2]], True),
        (["1", 1, 1], True),
        ([True, False, True], True),
    ],
)
def test_what_differs(values, differ):
    many([{} if value == "absent" else {"key": value} for value in values])
    assert compare.differing(runs.load()) == ["key"] * differ


def test_a_run_without_a_config_does_not_differ():
    many([{"key": 1}, {"key": 1}])
    make("outputs/imported", None, RESULT)
    assert compare.differing(runs.load()) == []
    make("outputs/2", {"key": 2}, RESULT)
    assert compare.differing(runs.load()) == ["key"]


def follow(*seeds):
    """The configs of runs with these seeds; of a pair the second is data.seed, which otherwise follows seed."""
    both = [seed if isinstance(seed, tuple) else (seed, "${seed}") for seed in seeds]
    model = {"last_block": "block4", "frozen": "${.last_block}"}
    return [{"seed": seed, "data": {"seed": of_data}, "model": model} for seed, of_data in both]


def test_references_are_compared_by_what_they_stand_for(compared):
    many(follow(0, 1, (2, 0)))
    assert numbers(compared("--csv", "--where", "data.seed=0", "--sort", "folder")) == [0, 2]
    assert numbers(compared("--csv", "--where", "model.frozen=block4")) == [0, 1, 2]
    assert [row["data.seed"] for row in json.loads(compared("--json", "--sort", "seed"))] == [0, 1, 0]
    by_data = json.loads(compared("--group-by", "data.seed", "--json"))
    assert {row["data.seed"]: row["runs"] for row in by_data} == {0: 2, 1: 1}


def test_a_key_that_follows_another_is_no_difference_of_its_own(compared):
    many(follow(0, 1))
    assert compare.differing(runs.load(resolve=False)) == ["seed"]
    [row] = json.loads(compared("--over", "seed", "--json"))
    assert row["runs"] == 2
    assert json.loads(compared("outputs/0", "outputs/1", "--json"))["config"] == [{"key": "seed", "a": 0, "b": 1}]
    many(follow(0, 1, (2, 5)))
    assert sorted(row["runs"] for row in json.loads(compared("--over", "seed", "--json"))) == [1, 2]


def test_two_runs_of_which_one_says_what_the_other_refers_to(compared):
    [same, _] = follow(0, 0)
    make("outputs/0", same, RESULT)
    make("outputs/1", same | {"model": {"last_block": "block4", "frozen": "block2"}, "data": {"seed": 0}}, RESULT)
    both = json.loads(compared("outputs/0", "outputs/1", "--json"))
    assert both["config"] == [{"key": "model.frozen", "a": "block4", "b": "block2"}]


def test_of_many_runs_the_terminal_shows_thirty_and_files_get_all(compared):
    many([{"a": number} for number in range(33)])
    assert len(cells(compared())) == 31
    assert compared().endswith("33 runs: 33 complete; 3 more with --top 0\n")
    assert len(cells(compared("--top", "0"))) == 34
    assert len(json.loads(compared("--json"))) == len(numbers(compared("--csv"))) == 33
    assert numbers(compared("--csv", "--sort", "a", "--top", "2")) == [0, 1]
    with pytest.raises(InputError, match=r"--top -1 must be a number of rows, or 0 for all"):
        compared("--top", "-1")


def test_columns(compared):
    many([{"a": 1, "b": 2}, {"a": 1, "b": 2}])
    for wanted in ("b,started,a", " b , started ,a, ", "folder,b,started,a,b"):
        rows = list(csv.reader(io.StringIO(compared("--csv", "--columns", wanted))))
        assert rows[0] == ["folder", "b", "started", "a"]
        assert rows[1][:2] == ["outputs/0", "2"]
    with pytest.raises(InputError, match="no run has c; known keys:"):
        compared("--columns", "a,c")


# As wide as the terminal


def on_two_data_sets():
    """Nine runs of a search on one data set, two on another, which have many keys that differ."""
    for number in range(9):
        data = {"_target_": "tuner.data.fmnist_small.load", "seed": "${seed}"}
        config = {"data": data, "seed": 0, "optimizer": {"lr": 0.1**number}, "wide": number % 2, "keep": "best"}
        make(f"multirun/mine/{number}", config, RESULT | {"val_accuracy": 0.1 * number, "n_train": 70, "n_val": 10})
    for number in range(2):
        data = {"_target_": "tuner.data.image_folder.load", "root": "photos", "seed": "${seed}"}
        many = {f"model.setting_of_the_head_{i}": number + i for i in range(20)}
        config = {"data": data, "seed": number, "keep": "last", "weights": f"/data/{number}.pt"} | many
        make(f"outputs/2026-11-28/03-51-52-03450{number}", config, RESULT | {"val_accuracy": 0.25, "n_train": 20})


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_it_fits_the_terminal(compared, monkeypatch, width):
    on_two_data_sets()
    monkeypatch.setenv("COLUMNS", str(width))
    for options in ((), ("--over", "seed")):
        assert max(map(len, compared(*options).splitlines())) <= width
    assert max(map(len, compared("--wide").splitlines())) > 200


def test_data_sets_have_a_table_each_of_what_differs_in_it(compared, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    on_two_data_sets()
    first, second, hidden, summary = compared().split("\n\n")
    heading, common, *rows = first.splitlines()
    assert heading == "fmnist_small: 9 complete runs, 80 images"
    assert common == "keep=best, seed=0"
    assert rows[0].split() == ["folder", "val_accuracy", "optimizer.lr", "wide", "epochs", "seconds"]
    assert rows[1].split() == ["multirun/mine/8", "0.8000", "1e-08", "0", "2", "1.5"]
    assert len(rows) == 10
    assert second.startswith("image_folder: 2 complete runs in outputs/2026-11-28, 20 images\nkeep=last\n")
    assert "03-51-52-034500" in second
    assert "photos" not in second  # of all runs of this data set
    hidden = " ".join(hidden.split())
    assert hidden.startswith("not shown: ")
    assert hidden.endswith("more; --wide shows all columns, --columns KEY,... the ones you name")
    assert summary == "11 runs: 11 complete\n"


def test_data_sets_of_one_loader_are_told_apart_by_their_keys(compared):
    for number, root in enumerate(("/data/cats", "/data/dogs")):
        data = {"_target_": "tuner.data.image_folder.load", "root": root, "size": "${model.image_size}"}
        make(f"outputs/{number}", {"data": data, "model": {"image_size": 32 + number}}, RESULT)
    make("outputs/imported", None, RESULT)
    headings = [part.splitlines()[0] for part in compared().split("\n\n")[:3]]
    assert headings == [
        "image_folder, root=/data/cats: 1 complete run",
        "image_folder, root=/data/dogs: 1 complete run",
        "no config: 1 complete run",
    ]


def test_each_data_set_has_some_of_the_rows(compared):
    for number in range(40):
        data = {"_target_": f"tuner.data.{'synthetic' if number else 'fmnist_small'}.load"}
        make(f"outputs/{number}", {"data": data}, RESULT | {"val_accuracy": number / 100})
    printed = compared()
    assert "fmnist_small: 1 complete run" in printed
    assert printed.endswith("40 runs: 40 complete; 24 more with --top 0\n")
    assert "fmnist_small" not in compared("--top", "3")


def test_comparing_runs_waits_for_no_library_that_it_does_not_need():
    heavy = ("torch", "torchvision", "sklearn", "scipy", "plotly", "matplotlib", "optuna", "hydra", "sqlalchemy")
    code = f"import sys, tuner.compare; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


# --where

VALUES = [1e-4, 1e-3, 0.5, "cosine", "1", None, True, False, [1, "b"], "a=b"]


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("key<1e-3", [0, 7]),  # false is 0, as everywhere in Python
        ("key<=1e-3", [0, 1, 7]),
        ("key>0.1", [2, 4, 6]),
        ("key >= .5", [2, 4, 6]),
        ("key=0.001", [1]),
        ("key==1e-3", [1]),
        ("key!=0.001", [0, 2, 3, 4, 5, 6, 7, 8, 9]),
        (" key = cosine ", [3]),
        ("key=COSINE", [3]),
        ("key!=cosine", [0, 1, 2, 4, 5, 6, 7, 8, 9]),
        ("key=null", [5]),
        ("key=", [5]),
        ("key!=null", [0, 1, 2, 3, 4, 6, 7, 8, 9]),
        ("key=true", [6]),
        ("key=True", [6]),
        ("key=false", [7]),
        ("key=[1, b]", [8]),
        ('key=[1,"b"]', [8]),
        ("key!=[1,b]", [0, 1, 2, 3, 4, 5, 6, 7, 9]),
        ("key=[1", []),
        ("key=@nothing", []),
        ("key=a=b", [9]),
        ("status=complete", list(range(10))),
        ("status!=complete", []),
        ("val_accuracy>0.1", list(range(10))),
        ("test_accuracy=null", list(range(10))),
        ("test_accuracy<1", []),
        ("val_loss<inf", list(range(10))),
        ("started>2020-01-31", list(range(10))),
        ("started<2020-01-31T12:00", []),
        ("started=null", []),
        ("config.epochs=25", list(range(10))),
        ("epochs=25", []),
    ],
)
def test_where(compared, condition, rows):
    many([{"key": value, "epochs": 25} for value in VALUES])
    assert sorted(numbers(compared("--csv", "--where", condition))) == rows


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("lr<1", "no run has lr; known keys: optimizer.lr$"),
        ("optimiser.lr<1", "no run has optimiser.lr; known keys: optimizer.lr$"),
        ("zzzz=1", "no run has zzzz; known keys: status, val_accuracy, .*optimizer.lr"),
        ("nonsense", "--where 'nonsense' must be KEY, one of <= >= != == < > =, and a value"),
        ("", "--where '' must be"),
        ("<3", "--where '<3' must be"),
        (
            "status<complete",
            "--where 'status<complete': < compares numbers, and 'complete' is not a number; use = or !=",
        ),
        ("optimizer.lr<null", "< compares numbers, and 'null' is not a number"),
        ("optimizer.lr<", "< compares numbers, and '' is not a number"),
        ("started>yesterday-ish", "'yesterday-ish' is not a time; write it as 2026-01-31T12:00"),
    ],
)
def test_a_condition_that_is_wrong(compared, condition, says):
    many([{"optimizer": {"lr": 1e-3}}])
    with pytest.raises(InputError, match=says):
        compared("--where", condition)


def test_conditions_are_all_to_hold_and_are_told(compared):
    many([{"lr": lr, "seed": seed} for lr in (0.1, 0.2) for seed in (0, 1)])
    output = compared("--where", "lr=0.1", "--where", "seed>0")
    assert [row[0] for row in cells(output)] == ["folder", "outputs/1"]
    assert output.endswith("4 runs: 4 complete; 1 with lr=0.1 and seed>0\n")


def test_no_row_left(compared):
    many([{"lr": 0.1}, {"lr": 0.2}])
    none = ("--where", "lr>1")
    assert compared(*none).endswith("2 runs: 2 complete; 0 with lr>1\n")
    assert json.loads(compared(*none, "--json")) == []
    assert compared(*none, "--csv") == "folder,status,val_accuracy,epochs,seconds\n"
    assert "0 with lr>1" in compared(*none, "--over", "lr")
    for wanted in ("--html", "--plots"):
        with pytest.raises(InputError, match="--plots and --html need a run, and no run meets the conditions"):
            compared(*none, wanted)


# --sort


@pytest.mark.parametrize(
    ("values", "order", "reverse"),
    [
        ([3, 1, None, 2], [1, 3, 0, 2], [0, 3, 1, 2]),
        (["b", "a", None, "c"], [1, 0, 3, 2], [3, 0, 1, 2]),
        (
            ["x", 10, None, 9.5, "10.5", [1], "a"],
            [3, 1, 4, 5, 6, 0, 2],
            [4, 1, 3, 0, 6, 5, 2],
        ),  # numbers, text, missing
        ([True, False], [1, 0], [0, 1]),
        ([1, 1, 1], [0, 1, 2], [0, 1, 2]),
        (["b", 2, "b", 2, None, None], [1, 3, 0, 2, 4, 5], [1, 3, 0, 2, 4, 5]),  # equal ones stay in order
        ([10**30, 2, None], [1, 0, 2], [0, 1, 2]),
        ([None, None], [0, 1], [0, 1]),
    ],
)
def test_sort(compared, values, order, reverse):
    many([{"key": value} for value in values])
    before = runs.load()
    after = compare.ordered(before, "key")
    assert numbers(compared("--csv", "--sort", "key")) == order
    assert numbers(compared("--csv", "--sort", "key", "--reverse")) == reverse
    assert after.loc[before.index].equals(before)  # its values are as they were


def test_scores_that_are_only_in_newer_runs(compared):
    config = {"val_note": "text", "lr": 1}
    make("outputs/older", config | {"lr": 2}, RESULT)
    new = {"val_auroc": 0.9, "test_auroc": None, "test_log_loss": 1, "test_accuracies": [1], "test_duplicates": 3}
    make("outputs/newer", config, RESULT | new)
    assert compared("--csv").splitlines()[0] == "folder,status,val_accuracy,epochs,seconds,lr"
    rows = json.loads(compared("--columns", "val_auroc,test_log_loss,config.val_note", "--sort", "val_auroc", "--json"))
    assert [list(row.values())[1:] for row in rows] == [[0.9, 1, "text"], [None, None, "text"]]
    assert compared("--where", "val_auroc>0.5", "--columns", "val_auroc", "--csv").count("outputs/") == 1
    for key in ("test_auroc", "test_accuracies", "test_duplicates"):  # null, a list, and no score
        with pytest.raises(InputError, match=f"no run has {key}; known keys: .*"):
            compared("--columns", key)
    assert set(json.loads(compared("outputs/older", "outputs/newer", "--json"))["config"][0].values()) == {"lr", 1, 2}


def test_accuracies_and_starts_descend_and_all_else_ascends(compared):
    many([{}, {}, {}], val_accuracy=[0.1, None, 0.3], val_loss=[0.1, None, 0.3], seconds=[3, 1, 2])
    for number, time in enumerate((100, 300, 200)):
        os.utime(f"outputs/{number}/.hydra/config.yaml", (time, time))
    assert numbers(compared("--csv")) == [2, 0, 1]
    assert numbers(compared("--csv", "--reverse")) == [0, 2, 1]
    assert numbers(compared("--csv", "--sort", "val_loss")) == [0, 2, 1]
    assert numbers(compared("--csv", "--sort", "seconds")) == [1, 2, 0]
    assert numbers(compared("--csv", "--sort", "started")) == [1, 2, 0]
    for metric in METRICS.values():  # by the name alone: comparing runs does not wait for torch
        assert compare.highest_first(f"val_{metric.name}") == metric.larger_is_better, metric.name
    assert not any(map(compare.highest_first, ("val_loss", "test_ece_calibrated", "test_accuracy_std", "epochs")))
    with pytest.raises(InputError, match=r"no run has accuracy; known keys: .*accuracy"):
        compared("--sort", "accuracy")


# Groups


def test_groups(compared):
    configs = [{"lr": lr, "seed": seed, "only": 1} for lr in (0.1, 0.2) for seed in range(3)]
    configs += [{"lr": None, "seed": 0}, {"seed": 1}, {"lr": 0.3, "seed": 0}]
    accuracies = [0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.05, 0.07, None]
    many(configs, val_accuracy=accuracies)
    make("outputs/pruned", {"lr": 0.1}, RESULT | {"status": "pruned", "val_accuracy": 0.9})
    make("outputs/running", {"lr": 0.1}, metrics=HEADER + EPOCHS)
    expected = [  # null and missing are one group; unfinished ones and those without an accuracy are in none
        {"lr": 0.2, "runs": 3, "val_accuracy": pytest.approx(0.6), "val_accuracy_std": pytest.approx(0.1)},
        {"lr": 0.1, "runs": 3, "val_accuracy": pytest.approx(0.2), "val_accuracy_std": pytest.approx(0.1)},
        {"lr": None, "runs": 2, "val_accuracy": pytest.approx(0.06), "val_accuracy_std": pytest.approx(0.02 / 2**0.5)},
    ]
    assert json.loads(compared("--group-by", "lr", "--json")) == expected
    assert json.loads(compared("--group-by", " lr,lr ", "--json")) == expected
    assert json.loads(compared("--over", "seed, only", "--json")) == expected
    assert json.loads(compared("--group-by", "lr", "--json", "--reverse")) == expected[::-1]
    assert json.loads(compared("--group-by", "lr", "--json", "--sort", "lr", "--top", "1")) == [expected[1]]
    assert [list(row) for row in json.loads(compared("--group-by", "lr", "--json", "--columns", "runs"))] == [
        ["runs"]
    ] * 3
    assert "11 runs: 9 complete" in compared("--over", "seed")


def test_groups_of_one_of_nothing_and_of_values_of_several_types(compared):
    many([{"key": value} for value in (0.5, "x", None, [1], "x", False)], test_accuracy=[0.5] * 6)
    rows = json.loads(compared("--group-by", "key", "--json"))
    assert {json.dumps(row["key"]): row["runs"] for row in rows} == {
        **{"0.5": 1, '"x"': 2, "null": 1, '"[1]"': 1, "false": 1},
    }
    assert [row["val_accuracy_std"] for row in rows if row["runs"] == 1] == [None] * 4
    assert rows[0]["test_accuracy"] == 0.5
    [row] = json.loads(compared("--over", "key", "--json"))
    assert (row["runs"], row["val_accuracy"], row["val_accuracy_std"]) == (6, 0.75, 0)


@pytest.mark.parametrize("option", ["--over", "--group-by"])
def test_a_group_by_an_unknown_key(compared, option):
    many([{"seed": 0}, {"seed": 1}])
    with pytest.raises(InputError, match=r"no run has sede; known keys: .*seed"):
        compared(option, "sede")


def test_groups_one_way_or_the_other(compared, capfd):
    with pytest.raises(SystemExit):
        compared("--over", "seed", "--group-by", "lr")
    assert "not allowed with" in capfd.readouterr().err


# CSV and JSON


def test_csv_and_json_parse_back_to_the_very_values(compared):
    texts = ["a,b", 'say "x"', "two\nlines", "é 日本", "nan", "007", ""]
    many([{"lr": lr, "text": text, "seed": 2**60} for lr, text in zip(FLOATS, texts, strict=True)], val_accuracy=FLOATS)
    make('outputs/x, "y"\'\n;', {"lr": None, "list": [1, "é"], "flag": True}, RESULT | {"val_accuracy": None})
    options = ("--columns", "val_accuracy,lr,text,flag,list,started", "--sort", "folder")
    as_csv = list(csv.DictReader(io.StringIO(compared("--csv", *options))))
    as_json = json.loads(compared("--json", *options))
    assert [row["folder"] for row in as_csv] == [row["folder"] for row in as_json] == sorted(runs.load().folder)
    for rows, of_text in ((as_csv, float), (as_json, lambda value: value)):
        assert [of_text(row["val_accuracy"]) for row in rows[:-1]] == FLOATS
        assert [of_text(row["lr"]) for row in rows[:-1]] == FLOATS
        assert [row["text"] for row in rows[:-1]] == texts
        assert rows[-1]["list"] == '[1, "é"]'
    last = as_json[-1]
    assert (last["val_accuracy"], last["lr"], last["text"], last["flag"]) == (None, None, None, True)
    assert (as_csv[-1]["val_accuracy"], as_csv[-1]["lr"], as_csv[-1]["flag"]) == ("", "", "True")
    assert last["started"] == runs.load().started.iloc[-1].isoformat()
    assert "NaN" not in compared("--json")


def test_json_of_what_is_not_finite(compared):
    make("outputs/1", {}, '{"status": "complete", "val_loss": Infinity, "val_accuracy": NaN}')
    [row] = json.loads(compared("--json", "--columns", "val_loss,val_accuracy"))
    assert (row["val_loss"], row["val_accuracy"]) == (None, None)


# Two runs


def two(a=None, b=None, config_a=None, config_b=None):
    """Run folders a and b, with these predictions."""
    for name, rows, config in (("a", a, config_a), ("b", b, config_b)):
        make(name, {"seed": 0, "same": 1} | (config or {}), RESULT | {"val_accuracy": 0.5 if name == "a" else 0.75})
        if rows is not None:
            scored(Path(name), rows)


def test_two_runs_side_by_side(compared):
    # a is right on the first 2 of 8, b on the last 7
    answers = [("x" if i % 2 else "y") for i in range(8)]
    a = of("test", [(label, label if i < 2 else "?") for i, label in enumerate(answers)])
    b = of("test", [(label, label if i > 0 else "?") for i, label in enumerate(answers)])
    two(a, b, {"lr": 0.1, "a_only": None}, {"lr": 0.2, "b_only": [1]})
    printed = compared("a", "b/")
    assert printed.startswith("a  a\nb  b\n\nConfig, where they differ\n")
    lines = [line.split() for line in printed.splitlines()]
    assert ["lr", "0.1", "0.2"] in lines
    assert ["b_only", "-", "[1]"] in lines
    assert ["val_accuracy", "0.5", "0.75", "0.25"] in lines
    assert ["status", "complete", "complete", "-"] in lines
    assert not [line for line in lines if line[:1] in (["seed"], ["same"], ["a_only"])]
    assert "Accuracy by class, on the same 8 test images" in printed
    assert ["x", "4", "0.2500", "1.0000", "0.75"] in lines
    assert ["y", "4", "0.2500", "0.7500", "0.5"] in lines
    assert printed.endswith(
        "on the same 8 test images b alone gets 6 right, a alone 1: a difference of +0.6250, no more than chance "
        "explains (exact McNemar test, p = 0.12)\n"
    )

    both = json.loads(compared("a", "b", "--json"))
    assert both["config"] == [{"key": "lr", "a": 0.1, "b": 0.2}, {"key": "b_only", "a": None, "b": "[1]"}]
    assert {"key": "val_accuracy", "a": 0.5, "b": 0.75, "difference": 0.25} in both["results"]
    assert (both["both_right"], both["only_a"], both["only_b"], both["both_wrong"]) == (1, 1, 6, 0)
    assert both["p_value"] == 0.125
    assert [row["class"] for row in both["classes"]] == ["y", "x"]
    rows = list(csv.DictReader(io.StringIO(compared("a", "b", "--csv"))))
    assert {row["table"] for row in rows} == {"config", "results", "classes"}
    assert [(row["a"], row["b"]) for row in rows if row["key"] == "lr"] == [("0.1", "0.2")]


def test_two_runs_of_the_same_config_without_predictions(compared, caplog):
    two()
    printed = compared("a", "b")
    assert "Their configs are the same" in printed
    assert "Accuracy by class" not in printed
    assert printed.endswith("McNemar's test is not possible: the runs have no predictions for the same images\n")
    assert "a has no predictions.csv: it is unfinished, or of an older version" in caplog.text
    both = json.loads(compared("a", "b", "--json"))
    assert (both["config"], both["split"], both["images"], both["p_value"], both["classes"]) == (
        [],
        None,
        0,
        None,
        None,
    )
    assert {row["table"] for row in csv.DictReader(io.StringIO(compared("a", "b", "--csv")))} == {"results"}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"result": {"status": "pruned", "val_accuracy": 0.1, "epochs": 1}}, ["pruned", "0.1"]),
        ({"metrics": HEADER + EPOCHS}, ["unfinished", "0.65"]),
        ({"config": {"seed": 1}}, ["unfinished", "epochs"]),
        ({"result": {"status": "failed", "error": "ValueError: too [b]bold[/b]"}}, ["ValueError: too [b]bold[/b]"]),
    ],
)
def test_beside_a_run_that_is_not_complete(compared, files, says):
    make("a", {"seed": 0}, RESULT)
    scored(Path("a"), of("test", [("x", "x")]))
    make("b", **files)
    printed = compared("a", "b")
    for text in (*says, "is not possible"):
        assert text in printed
    json.loads(compared("a", "b", "--json"))


def test_two_runs_one_of_which_is_damaged(compared):
    two()
    Path("b/result.json").write_text("{")
    with pytest.raises(InputError, match="a and b must both be run folders that can be read"):
        compared("a", "b")


def test_a_run_beside_itself(compared):
    two(of("test", [("x", "x")] * 3), None)
    assert "a difference of +0.0000, no more than chance explains (exact McNemar test, p = 1)" in compared("a", "a")
    assert compared("a", "a", "--html", "--plots")
    assert Path("comparison/compare.html").exists()


def test_what_asks_for_a_table_of_two_runs_gets_one(compared):
    two()
    assert compared("a", "b").startswith("a  a\n")
    for options in (("--where", "seed=0"), ("--columns", "seed"), ("--over", "seed"), ("--group-by", "seed")):
        assert compared("a", "b", *options).endswith(("2 runs: 2 complete\n", "2 with seed=0\n"))
    make("a/below/it", {}, RESULT)
    assert "3 runs" in compared("a", "b")


# Pictures; the page is in test_present.py


def test_pictures(compared):
    for number in range(3):
        make(f"outputs/{number} é $x$ <b>", {"lr": number}, RESULT, HEADER + EPOCHS)
    make("outputs/broken curve", {"lr": 9}, RESULT, b"\xff\xfe")
    make("outputs/no epoch", {"lr": 9}, RESULT, HEADER)
    make("outputs/another's curve", {"lr": 9}, RESULT, "step,loss\n1,2\n")
    make("outputs/text", {"lr": 9}, RESULT, HEADER + "1,a,b,c,d,e,f\n")
    make("outputs/no accuracy", {"lr": 9}, {"status": "failed"})
    for options in ((), ("--group-by", "lr"), ("--over", "lr")):
        compared("--plots", "--out", "a b/" + "".join(options), *options)
        made = sorted(path.name for path in Path("a b/" + "".join(options)).iterdir())
        assert made == (["bars.png"] if options else ["bars.png", "curves.png"])


@pytest.mark.parametrize(
    ("folders", "given", "labels"),
    [
        (["outputs/x/1", "multirun/a/0"], (), ["outputs/x/1", "multirun/a/0"]),  # not below the name of this folder
        (["outputs/x/1", "outputs/x/2"], (), ["x/1", "x/2"]),
        (["outputs/1", "outputs/2"], (), ["outputs/1", "outputs/2"]),
        (["a", "b"], ("a", "b"), ["a", "b"]),
    ],
)
def test_labels_of_pictures(folders, given, labels):
    for folder in folders:
        make(folder, {}, RESULT)
    assert compare._labels(runs.load(*given)) == labels


def test_bars_of_groups_say_how_many_runs_they_are(compared, monkeypatch):
    many([{"lr": lr, "seed": seed} for lr in (0.1, 0.2) for seed in range(3)][:5])
    drawn, bars = [], plots.bars
    monkeypatch.setattr(plots, "bars", lambda table: drawn.append(table) or bars(table))
    compared("--over", "seed", "--plots")
    compared("--plots")
    assert sorted(drawn[0]["count"]) == [2, 3]
    assert "count" not in drawn[1]


@pytest.mark.parametrize(("out", "says"), [("file", "File exists"), ("file/below", "Not a directory")])
def test_out_that_cannot_be_a_folder(compared, out, says):
    make("outputs/1", {}, RESULT)
    Path("file").write_text("")
    with pytest.raises(InputError, match=f"--out {out} can't be a folder: {says}"):
        compared("--html", "--out", out)


def test_curves_that_cannot_be_read_are_logged(compared, caplog):
    make("outputs/1", {}, RESULT, HEADER + EPOCHS)
    make("outputs/2", {}, RESULT, b"\xff\xfe")
    compared("--plots")
    assert "no curve for outputs/2: metrics.csv: " in caplog.text


def test_runs_without_any_accuracy_have_pictures_that_say_so(compared):
    make("outputs/1", {}, {"status": "failed"})
    compared("--plots", "--html")
    assert sorted(path.name for path in Path("comparison").iterdir()) == ["bars.png", "compare.html"]


# The whole way


def test_real_runs_of_several_seeds(command, compared):
    code, output = command("-m", "seed=0,1,2", "study=mine", *TINY)
    assert code == 0, output
    code, output = command(*TINY, "optimizer.lr=1e-4", "plots=false", "hydra.run.dir='outputs/a b'")
    assert code == 0, output
    frame = runs.load()
    assert sorted(frame.folder) == ["multirun/mine/0", "multirun/mine/1", "multirun/mine/2", "outputs/a b"]
    for row in frame.itertuples():
        result = json.loads(Path(row.folder, "result.json").read_text())
        assert {name: result[name] for name in ("val_accuracy", "val_loss", "seconds", "n_train")} == {
            name: getattr(row, name) for name in ("val_accuracy", "val_loss", "seconds", "n_train")
        }
    assert "config.epochs" in frame

    header, *lines = cells(compared())
    assert header[-4:] == ["seed", "optimizer.lr", "epochs", "seconds"]
    assert len(lines) == 4
    rows = json.loads(compared("--over", "seed", "--json"))
    by_lr = {row["optimizer.lr"]: row for row in rows}
    mine = frame[frame.folder.str.startswith("multirun")]
    assert sorted(row["runs"] for row in rows) == [1, 3]
    assert by_lr[mine["optimizer.lr"].iloc[0]]["val_accuracy"] == pytest.approx(mine.val_accuracy.mean())
    assert by_lr[mine["optimizer.lr"].iloc[0]]["val_accuracy_std"] == pytest.approx(mine.val_accuracy.std())

    both = json.loads(compared("multirun/mine/0", "multirun/mine/1", "--json"))  # seeds share some validation images
    assert both["config"] == [{"key": "seed", "a": 0, "b": 1}]
    assert both["split"] == "validation"
    assert 0 < both["images"] < frame.n_val[0]
    assert sum(both[key] for key in ("both_right", "only_a", "only_b", "both_wrong")) == both["images"]
    both = json.loads(compared("multirun/mine/0", "outputs/a b", "--json"))  # one tested, one not
    assert (both["split"], both["images"]) == ("validation", frame.n_val[0])
    assert sum(row["images"] for row in both["classes"]) == both["images"]


def test_the_command_ends_quietly_when_its_reader_does_and_tells_mistakes_in_a_line():
    many([{"a": f"{number:0300}"} for number in range(300)])  # more than a pipe holds
    command = f"{sys.executable} -m tuner.compare"
    environment = os.environ | {"PYTHONPATH": str(Path(compare.__file__).parent.parent), "OMP_NUM_THREADS": "1"}

    def run(line):
        return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=120)

    done = run(f"{command} --csv | head -1; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 141  # as of SIGPIPE
    assert done.stdout == "folder,status,val_accuracy,epochs,seconds,a\n"
    assert done.stderr == ""
    done = run(f"{command} --where lr=1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("no run has lr; known keys: ")
    assert "Traceback" not in done.stderr
