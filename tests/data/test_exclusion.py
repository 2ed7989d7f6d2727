"""data.exclude: the listed images leave train and val; the pool, its features and the test split stay."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TINY, result
from PIL import Image

from tuner import InputError
from tuner.data import Samples, image_folder, summary, synthetic
from tuner.data.exclusion import digest_text, without
from tuner.training import setup


@pytest.fixture
def data():
    return synthetic.load(n=40)


@pytest.fixture
def listed(tmp_path):
    """Writes a list of images."""

    def write(*rows):
        path = tmp_path / "list.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        return path

    return write


def left(data):
    return set(torch.cat([data.train, data.val]).tolist())


def test_rows_by_name_digest_or_both(data, listed):
    digest = [digest_text(value) for value in data.pool.digests.tolist()]
    path = listed(("note", "digest", "file"), ("", "", "3"), ("", digest[5], ""), ("", digest[7], "7"))
    found = without(data, path)
    assert left(found) == set(range(len(data.pool))) - {3, 5, 7}
    assert (found.excluded, found.pool, found.test) == (3, data.pool, data.test)
    assert found.hashes["test"] == data.hashes["test"]
    assert found.hashes["train"] != data.hashes["train"]


def test_only_rows_with_yes_count(data, listed):
    found = without(data, listed(("file", "exclude"), ("1", "no"), ("2", "yes"), ("2", "Yes")))
    assert left(found) == set(range(len(data.pool))) - {2}


def test_a_digest_is_no_number_for_a_spreadsheet():
    assert digest_text(-1) == "0xffffffffffffffff"
    assert digest_text(10) == "0x000000000000000a"


def test_names_that_look_like_formulas(tmp_path, listed):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(5):
            pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    data = image_folder.load(tmp_path / "images", size=8, cache_dir=tmp_path / "cache")
    name = data.pool.name(0)
    assert without(data, listed(("file",), (f"'{name}",))).excluded == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("name",), ("1",)], "list.csv must have a column `file`, `image` or `digest`; it has name"),
        ([], "list.csv must have a column `file`, `image` or `digest`; it has none"),
        (
            [("file",), ("x.png",)],
            "line 2 of list.csv: x.png is not among the training and validation images, which have names such as",
        ),
        ([("file", "digest"), ("1", "0x12")], "line 2 of list.csv: 1 has other pixels than the list says"),
        ([("file", "digest"), ("", "")], "line 2 of list.csv: names no image"),
        ([("digest",), ("pixels",)], "line 2 of list.csv: the digest pixels must be a hexadecimal number"),
        ([("file", "exclude"), ("1", "maybe")], "line 2 of list.csv: exclude=maybe must be yes or no"),
    ],
)
def test_a_faulty_list_is_refused(data, listed, rows, message):
    with pytest.raises(InputError, match="^" + message.replace("(", r"\(")):
        without(data, listed(*rows))


def test_a_class_that_loses_its_images_is_refused(data, listed):
    rows = [(row,) for row in range(len(data.pool)) if data.pool.labels[row] == 2]
    with pytest.raises(InputError, match=r"leaves class 'class2' without training images: keep some of them"):
        without(data, listed(("file",), *rows))
    with pytest.raises(InputError, match=r"leaves no validation images: keep some of them"):
        without(data, listed(("file",), *((row,) for row in data.val.tolist())))
    with pytest.raises(InputError, match=r"there is no file nowhere.csv"):
        without(data, "nowhere.csv")


def test_a_test_image_is_refused(tmp_path, listed):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    data = image_folder.load(tmp_path / "images", size=8, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="is a test image, and only training and validation images can be excluded"):
        without(data, listed(("file",), (data.test.name(0),)))


def test_a_run_and_its_evaluation_leave_the_images_out(command, call, listed):
    path = listed(("file",), *((row,) for row in range(10)))
    code, out = command(*TINY, f"data.exclude={path}", "hydra.run.dir=run")
    assert code == 0, out
    assert "data.exclude: 10 images left out of training and validation" in out
    found = result("run")
    assert (found["n_excluded"], found["n_train"] + found["n_val"]) == (10, 310)
    for split in ("train", "val", "test"):  # refused if its images were others than those of the run
        code, out, err = call("evaluate", "run", "--split", split)
        assert code == 0, err
    code, out, err = call("evaluate", "run", "data.noise=30")
    assert code == 0, err
    path.unlink()
    code, out, err = call("evaluate", "run", "--split", "val")
    assert code == 1
    assert "set data.exclude to your CSV file" in err


def test_a_search_retrains_without_the_images(command, listed):
    path = listed(("file",), *((row,) for row in range(10)))
    words = ("-m", "hparams_search=random", "study=s", "final.seeds=1", f"data.exclude={path}", *TINY)
    code, out = command(*words, "hydra.sweeper.n_trials=2")
    assert code == 0, out
    assert result("multirun/s/best")["n_train"] == 310
    listed(("file",), ("3",))
    setup._latest.clear()  # as in a new process
    code, out = command(*words, "hydra.sweeper.n_trials=3")
    assert code == 1
    assert "study s had other images" in out


def test_an_image_that_was_moved_is_named(data, listed):
    digest = digest_text(int(data.pool.digests[5]))
    with pytest.raises(InputError, match=r"^line 2 of list.csv: old is now 5: correct the line or, if its label"):
        without(data, listed(("file", "digest"), ("old", digest)))


def test_copies_are_counted_without_the_images_that_are_left_out(data, listed):
    data.pool.images[data.train[0]] = data.test.images[0]
    data = replace(data, pool=Samples(data.pool.images, data.pool.labels))
    assert data.test_duplicates == 1
    found = without(data, listed(("file",), (str(int(data.train[0])),)))
    assert found.test_duplicates == 0
    assert "data.exclude: 1 image left out of training and validation" in summary.lines(found)
    assert sum(summary.summary(found)["splits"].values()) == len(data.pool) + len(data.test) - 1
