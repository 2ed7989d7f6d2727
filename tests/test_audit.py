"""tuner.audit finds planted faults, suggests what to leave out, and writes a table and a page."""

import csv
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import TINY, result

from tuner import audit
from tuner.analysis.findings import COLUMNS, Images, confusions, duplicates, outliers, relative_distance
from tuner.analysis.label_errors import label_errors
from tuner.bank.copies import Copies
from tuner.data import Data, Samples, synthetic
from tuner.training.folds import fold_numbers
from tuner.training.out_of_fold import FOLDS

EASY = (*TINY, "epochs=10")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A CSV file of 300 images in 3 classes: rows 0 to 9 have the label of another class; rows 290 to 299 are brighter
    copies of rows 100 to 109; row 289 is noise."""
    data = synthetic.load(n=500, classes=3, noise=30)
    images, labels = data.pool.images[:300].clone(), data.pool.labels[:300].clone()
    labels[:10] = (labels[:10] + 1) % 3
    images[290:], labels[290:] = (images[100:110].float() * 0.9).to(torch.uint8), labels[100:110]
    images[289] = torch.randint(256, images[289].shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path = tmp_path_factory.mktemp("faulty") / "faulty.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", *(f"p{i}" for i in range(256))])
        writer.writerows([f"c{label}", *image.flatten().tolist()] for label, image in zip(labels, images, strict=True))
    return path


def test_planted_faults(call, command, faulty):
    words = ("data=csv", f"data.path={faulty}", "data.test_path=null", *EASY[1:])
    code, out, err = call("audit", *words, "--out", "found")
    assert code == 0, err
    assert "train without them: python -m tuner.train data=csv" in out
    table = pd.read_csv("found/audit.csv")
    assert list(table) == list(COLUMNS)
    kinds = table.kind.value_counts()
    suspects = table[table.kind == "label"]
    assert 6 <= len(suspects) <= 12  # those of the ten that are not in the test split
    assert set(suspects.exclude) == {"yes"}
    assert kinds["near copy"] == 20
    assert "outlier" in kinds
    across = table[table.group.notna()].groupby("group").filter(lambda part: part.split.nunique() > 1)
    assert len(across) > 0
    assert (across[across.split == "test"].exclude == "no").all()
    assert (across.groupby("group").exclude.apply(lambda part: (part == "yes").sum()) >= 1).all()
    page = Path("found/audit.html").read_text()
    assert page.count("<img") == len(table)
    assert "c0" in page

    code, output = command(*words, "plots=false", "data.exclude=found/audit.csv", "hydra.run.dir=run")
    assert code == 0, output
    gone = table[table.exclude == "yes"].file.nunique()
    assert result("run")["n_excluded"] == gone

    code, out, err = call("audit", *words, "data.exclude=found/audit.csv", "--json", "--out", "again")
    assert code == 0, err
    found = {row["finding"]: row["images"] for row in json.loads(out)["findings"]}
    assert found["suspected labels"] <= 3
    assert found["near copies"] < 20


def test_a_run_says_that_there_are_near_copies(command, faulty):
    words = ("data=csv", f"data.path={faulty}", "plots=false", *EASY[1:])
    code, out = command(*words, "hydra.run.dir=run")
    assert code == 0, out
    copies = result("run")["near_copies"]
    assert 1 <= copies <= 10
    assert f"{copies} validation and test images have a near copy in training: python -m tuner.audit" in out
    code, out = command(*TINY, "hydra.run.dir=other")
    assert result("other")["near_copies"] == 0
    assert "near copy" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data=nothing",), "Could not find 'data/nothing'"),
        (("epoch=3",), "Could not override 'epoch'"),
        (("data=csv",), "data.path has no default"),
        ((*TINY, "optimizer.lr=1e30"), "the loss is not finite"),
        ((*TINY, "--out", "file"), "--out file can't be a folder"),
    ],
)
def test_a_mistake_is_one_line(call, words, message):
    Path("file").touch()
    code, _, err = call("audit", *words)
    assert code == 1
    assert message in err.splitlines()[-1]


def test_confident_learning_counts_as_in_the_paper():
    # class 0: mean self-confidence 0.6; class 1: 0.65
    p = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9], [0.4, 0.6]] * 3)
    labels = torch.tensor([0, 0, 0, 1, 1] * 3)
    found = label_errors(p, labels)
    assert found.suspects.tolist() == [2, 7, 12]
    assert found.suggested.tolist() == [1, 1, 1]
    assert found.margin.tolist() == pytest.approx([-0.6] * 3)
    # counted: 6 of class 0 as 0 and 3 as 1; 3 of class 1 as 1, 3 as none; 9 and 6 images
    torch.testing.assert_close(found.joint, torch.tensor([[6.0, 3.0], [0.0, 6.0]]) / 15)
    assert found.noise.tolist() == pytest.approx([1 / 3, 0])


def test_labels_of_a_tiny_class_are_not_judged():
    p = torch.tensor([[0.9, 0.1]] * 8 + [[0.8, 0.2]] * 4)
    assert label_errors(p, torch.tensor([0] * 8 + [1] * 4)).suspects.tolist() == []


def test_folds_are_stratified_and_keep_groups_together():
    labels = torch.arange(100) % 4
    groups = torch.arange(100)
    groups[1::4][:10] = 1  # ten copies
    fold = fold_numbers(labels, groups, FOLDS, seed=0)
    assert fold[groups == 1].unique().numel() == 1
    for label in (0, 2, 3):
        assert torch.bincount(fold[labels == label], minlength=FOLDS).tolist() == [5] * FOLDS
    assert not torch.equal(fold, fold_numbers(labels, groups, FOLDS, seed=1))


def images(labels, splits):
    """Images, with these labels in these splits: pool, then test."""
    pixels = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    labels, pool = torch.tensor(labels), len(labels) - splits.count("test")
    rows = {name: torch.tensor([i for i, s in enumerate(splits) if s == name], dtype=torch.int64) for name in splits}
    none = torch.empty(0, dtype=torch.int64)
    parts = Samples(pixels[:pool], labels[:pool]), Samples(pixels[pool:], labels[pool:])
    return Images(Data(*parts, rows.get("train", none), rows.get("val", none), ("a", "b"), 0))


@pytest.mark.parametrize(
    ("labels", "splits", "exclude"),
    [
        ([0, 0], ["train", "train"], ["no", "no"]),
        ([0, 0], ["train", "val"], ["yes", "no"]),
        ([0, 0, 0], ["train", "val", "test"], ["yes", "yes", "no"]),
        ([0, 1], ["train", "train"], ["yes", "yes"]),
        ([0, 1], ["val", "test"], ["yes", "no"]),
        ([0, 1], ["train", "left out"], None),
    ],
)
def test_which_copies_to_leave_out(labels, splits, exclude):
    pairs = torch.tensor([[0, i] for i in range(1, len(labels))])
    found = duplicates(
        images(labels, splits), Copies(pairs, torch.full((len(pairs),), 0.002), torch.zeros(len(pairs), dtype=bool))
    )
    assert [row["exclude"] for row in found] == (exclude or [])


def test_outliers_are_relative_to_their_class():
    distance = torch.cat([torch.linspace(1, 2, 20), torch.linspace(10, 20, 20), torch.tensor([9.0])])
    labels = torch.tensor([0] * 20 + [1] * 20 + [0])
    score = relative_distance(distance, labels)
    assert score.argmax() == 40
    assert (score[:40] < 4).all()
    few = images(labels.tolist(), ["train"] * 41)
    assert [row["row"] for row in outliers(few, torch.arange(41), distance)] == [40]
    assert relative_distance(torch.tensor([1.0, 100.0]), torch.tensor([0, 0])).tolist() == [0, 0]


def test_confused_classes():
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 1, 0, 1, 0, 2])
    found = confusions(predicted, labels, ("a", "b", "c"))
    assert found.to_dict("list") == {
        "label": ["a", "b"],
        "predicted": ["b", "a"],
        "images": [2, 1],
        "share": [0.6667, 0.5],
    }


def test_the_summary_alone_and_a_config_of_ones_own(call, tmp_path):
    config = tmp_path / "my" / "data" / "mine.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(
        "_target_: tuner.data.synthetic.load\nn: 40\nclasses: 2\nsize: 8\nval_share: 0.2\ntest_share: 0.2\n"
        "seed: ${seed}\n"
    )
    code, out, err = call("audit", "data=mine", "--config-dir", "my", "--summary")
    assert code == 0, err
    assert out.splitlines() == [
        "data: 40 images of 2 classes (class0, class1), 20 of each",
        "splits: 26 to train, 6 for validation, 8 to test; gray, 8 x 8 pixels",
        "an accuracy of 0.8 on 6 validation images has two standard errors of 0.327, which is coarse: a "
        "smaller difference between two runs says nothing. Set data.folds=5 (0.141), compare several seeds, or add "
        "images",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["my"]
    code, out, err = call("audit", "--config-dir", "nowhere")
    assert (code, err.strip()) == (1, "--config-dir nowhere is not a folder")


def test_a_new_audit_keeps_what_an_earlier_list_leaves_out(call, faulty):
    words = ("data=csv", f"data.path={faulty}", *EASY[1:])
    assert call("audit", *words, "--out", "first")[0] == 0
    code, _, err = call("audit", *words, "data.exclude=first/audit.csv", "--out", "second")
    assert code == 0, err
    first, second = (pd.read_csv(f"{name}/audit.csv") for name in ("first", "second"))
    assert {*first.digest[first.exclude == "yes"]} == {*second.digest[second.kind == "left out"]}
    assert (second.exclude[second.kind == "left out"] == "yes").all()
    assert "plotly" not in Path("second/audit.html").read_text()


@pytest.mark.parametrize(
    ("without", "p_value", "says"), [(0.7, 0.01, "makes it worse"), (0.7, 0.5, "train without them")]
)
def test_it_does_not_recommend_what_makes_it_worse(without, p_value, says):
    accuracy = {"images": 9, "trained_on_all": 0.9, "trained_without": without, "p_value": p_value}
    found = audit.Audit(None, pd.DataFrame({"exclude": ["yes"]}), None, None, None, accuracy)
    assert says in audit.next_step(found, ["data=csv"], Path("a"))[0]
