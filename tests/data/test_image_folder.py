"""One folder per class, with or without folders for the splits: split and label of each image, and errors."""

import logging
import os
import re
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tuner import InputError
from tuner.data import Data, copies, digests, image_folder
from tuner.data.files.image_file import EXTENSIONS, read


def draw(path, seed=None):
    """Write an image of noise; each path gets different noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32(os.fsencode(path)) if seed is None else seed
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)).save(path)


def make(root, folders):
    """Write this many images to each folder."""
    for folder, count in folders.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            draw(root / folder / f"{i}.png")
    return root


def load(root, **options) -> Data:
    return image_folder.load(root, **{"size": 4, "cache_dir": root.parent / "cache"} | options)


def names(data) -> dict[str, set[str]]:
    """The image names of each split."""
    rows = {"train": data.train.tolist(), "val": data.val.tolist()}
    splits = {split: {data.pool.names[row] for row in rows[split]} for split in rows}
    assert sum(map(len, splits.values())) == len(data.pool)
    return splits | {"test": set(data.test.names or ())}


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["dog", "cat", "Owl"], ("Owl", "cat", "dog")),
        (["10", "9", "2"], ("2", "9", "10")),
        (["007", "10", "8"], ("007", "8", "10")),
        (["10", "9", "2b"], ("10", "2b", "9")),
        (["été", "a b", "c.png"], ("a b", "c.png", "été")),
    ],
)
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_folder_is_a_class(root, folders, classes, fit):
    make(root, dict.fromkeys(folders, 4))
    make(root, {f"{folders[0]}/deep/deeper": 2, ".hidden": 2})
    data = load(root, fit=fit)
    assert data.classes == classes
    assert data.fit == fit
    assert set.union(*names(data).values()) == {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.png")
        if path.is_file() and ".hidden" not in path.parts
    }
    for samples in (data.pool, data.test):
        assert list(samples.names) == sorted(samples.names)
        for name, image, label in zip(samples.names, samples.images, samples.labels, strict=True):
            assert classes[label] == name.split("/")[0]
            assert torch.equal(image, read(root / name, (3, 4, 4), fit))


@pytest.mark.parametrize("train", ["train", "training", "Train", "TRAINING"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "VAL"])
@pytest.mark.parametrize("test", ["test", "testing", "Test"])
def test_folders_of_splits_in_all_spellings(root, caplog, train, val, test):
    make(root, {f"{train}/a": 3, f"{train}/b": 1, f"{val}/a": 1, f"{val}/b": 2, f"{test}/b": 1})
    with caplog.at_level(logging.INFO):
        data = load(root)
    assert data.classes == ("a", "b")
    assert names(data) == {
        "train": {f"{train}/a/0.png", f"{train}/a/1.png", f"{train}/a/2.png", f"{train}/b/0.png"},
        "val": {f"{val}/a/0.png", f"{val}/b/0.png", f"{val}/b/1.png"},
        "test": {f"{test}/b/0.png"},
    }
    for samples in (data.pool, data.test):
        assert [data.classes[label] for label in samples.labels] == [name.split("/")[1] for name in samples.names]
    splits = ", ".join(f"{name} ({part})" for name, part in sorted([(train, "train"), (val, "val"), (test, "test")]))
    assert f"{root} is divided into splits: {splits}" in caplog.messages


@pytest.mark.parametrize(
    ("folders", "sizes"),
    [  # train/ has 20 images per class: test takes a fifth of them, validation an eighth of the rest
        ([], {"train": 28, "val": 4, "test": 8}),
        (["train"], {"train": 28, "val": 4, "test": 8}),
        (["train", "test"], {"train": 36, "val": 4, "test": 10}),
        (["train", "val"], {"train": 32, "val": 10, "test": 8}),
        (["train", "val", "test"], {"train": 40, "val": 10, "test": 10}),
    ],
)
def test_a_split_without_a_folder_is_drawn_from_train(root, folders, sizes):
    for part in folders or [""]:
        for name in ("a", "b"):
            make(root, {f"{part}/{name}".removeprefix("/"): 20 if part in ("", "train") else 5})
    runs = [load(root, seed=seed) for seed in (0, 0, 1)]
    names_of = [names(run) for run in runs]
    for run, splits in zip(runs, names_of, strict=True):
        assert {part: len(images) for part, images in splits.items()} == sizes
        for labels in (run.pool.labels[run.train], run.pool.labels[run.val], run.test.labels):
            assert labels.sum() * 2 == len(labels)  # equally many of each class
        assert not splits["test"] & (splits["train"] | splits["val"])
        for part in splits:
            assert part not in folders or {name.split("/")[0] for name in splits[part]} == {part}
    assert names_of[0] == names_of[1]
    assert names_of[0]["test"] == names_of[2]["test"]
    assert (names_of[0]["val"] == names_of[2]["val"]) == ("val" in folders)


def test_shares(root):
    data = load(make(root, {"a": 20, "b": 40}), test_share=0.5, val_share=0.2)
    assert torch.bincount(data.test.labels).tolist() == [10, 20]
    assert torch.bincount(data.pool.labels[data.val]).tolist() == [2, 4]


def message(root, **options):
    with pytest.raises(InputError) as error:
        load(root, **options)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(root), "ROOT")


FLAT = {"train": 2, "test": 2}
SPLIT = {"train/a": 4, "train/b": 4}
ENOUGH = "add images or leave the class out"
FOLDERS = (
    "put its images into one folder per class, or list them in a CSV file with columns image,label and use data=csv"
)
ONE = f"add a folder of images for each other class; or, if a/ has images of several classes, {FOLDERS}"
STRANGER = (
    "rename it, add training images of that class, or leave the split out by naming the others in data.splits, as in "
    "'{train: FOLDER}'"
)
ELSEWHERE = "move it elsewhere, or name the splits, as in 'data.splits={train: train}'"
MESSAGES = {
    "images and no folders": (
        {".": 3},
        f"ROOT has 3 images and no folders: {FOLDERS}",
    ),
    "nothing": ({".": 0}, f"ROOT has no folders: {FOLDERS}"),
    "one class": ({"a": 4}, f"ROOT has only one class, 'a': {ONE}"),
    "one class in train/": (
        {"train/a": 4, "test/a": 2},
        f"ROOT/train has only one class, 'a': {ONE}",
    ),
    "classes without images": (
        {"a": 0, "b": 0},
        f"there is no image in ROOT: image files end in {', '.join(sorted(EXTENSIONS))}",
    ),
    "test/ without images": (
        SPLIT | {"test/a": 0},
        f"there is no image in ROOT/test: image files end in {', '.join(sorted(EXTENSIONS))}",
    ),
    "an image beside the classes": (
        {"a": 4, "b": 4, ".": 1},
        "0.png lies directly in ROOT: move each image into the folder of its class",
    ),
    "an image in test/": (
        SPLIT | {"test/a": 1, "test": 1},
        "0.png lies directly in ROOT/test: move each image into the folder of its class",
    ),
    "a class in test/ only": (
        SPLIT | {"test/c": 1},
        f"ROOT/test/c is not a class folder; the classes are 'a', 'b': {STRANGER}",
    ),
    "a class in val/ only": (
        SPLIT | {"val/A": 1},
        "ROOT/val/A differs from the class 'a' of the training split only in case, spaces or other separators: rename "
        "one",
    ),
    "a folder that is not a split": (
        SPLIT | {"extra/a": 1},
        f"train/ divides ROOT into splits, but extra/ is not named like a split (train, val, test): {ELSEWHERE}",
    ),
    "two folders for a split": (
        {"train/a": 4, "train/b": 4, "val/a": 1, "validation/b": 1},
        f"train/ divides ROOT into splits, but validation/ is a second val split: {ELSEWHERE}",
    ),
    "two folders to train on": (
        {"Train/a": 4, "train/b": 4},
        f"Train/ divides ROOT into splits, but train/ is a second train split: {ELSEWHERE}".replace(
            ": train}", ": Train}"
        ),
    ),
    "splits without classes": (
        FLAT,
        f"in ROOT, test, train are named like splits, but train/ has no class folders: {FOLDERS}; or set "
        "data.splits=none if every folder is a class",
    ),
    "nothing to train on": (
        {"val/a": 2, "test/a": 2},
        "in ROOT, test, val are named like splits, but there is no training split: add one, or name its folder, as in "
        "'data.splits={train: FOLDER, test: test}'; or set data.splits=none if every folder is a class",
    ),
    "two images of a class": (
        {"a": 2, "b": 9},
        f"class 'a' has 2 images; at least 3 are needed, one each for training, validation and test: {ENOUGH}",
    ),
    "no image of a class": (
        {"a": 9, "b": 0},
        f"class 'b' has 0 images; at least 3 are needed, one each for training, validation and test: {ENOUGH}",
    ),
    "one image of a class, test/": (
        {"train/a": 1, "train/b": 9, "test/a": 1},
        f"class 'a' has 1 image; at least 2 are needed, one each for training and validation: {ENOUGH}",
    ),
    "one image of a class, val/": (
        {"train/a": 1, "train/b": 9, "val/a": 1},
        f"class 'a' has 1 image; at least 2 are needed, one each for training and test: {ENOUGH}",
    ),
    "no image of a class, val/ and test/": (
        {"train/a": 0, "train/b": 9, "val/a": 1, "test/a": 1},
        "class 'a' has no readable image in ROOT/train: add some or remove its folder",
    ),
}


@pytest.mark.parametrize("what", MESSAGES)
def test_error_messages(root, what):
    folders, says = MESSAGES[what]
    assert message(make(root, folders)) == says


@pytest.mark.parametrize(
    "folders",
    [
        {"a": 3, "b": 3},
        {"train/a": 2, "train/b": 2, "test/b": 1},
        {"train/a": 2, "train/b": 2, "val/b": 1},
        {"train/a": 1, "train/b": 1, "val/b": 1, "test/a": 1},
    ],
)
def test_one_image_per_class_and_drawn_split_is_enough(root, folders):
    data = load(make(root, folders))
    assert data.pool.labels[data.train].unique().tolist() == [0, 1]
    assert len(data.val) > 0 < len(data.test)


def test_root_is_a_folder(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    says = "name a folder that has one folder of images per class"
    assert message(root) == f"data.root=ROOT does not exist (relative to {root.parent}): {says}"
    root.touch()
    assert message(root) == f"data.root=ROOT is a file: {says}"


@pytest.mark.parametrize(
    ("shut", "says"),
    [
        ("", "the folder {0}/images cannot be read: Permission denied"),
        ("..", "data.root={0}/images cannot be read: Permission denied"),
        ("train", "the folder {0}/images/train cannot be read: Permission denied"),
        ("train/a", "the folder {0}/images/train/a cannot be read: Permission denied"),
        ("test", "the folder {0}/images/test cannot be read: Permission denied"),
    ],
)
def test_folders_that_cannot_be_read(closed, shut, says):
    folder, close = closed
    folder /= "above"
    make(folder / "images", SPLIT | {"test/a": 1})
    close((folder / "images" / shut).resolve())
    with pytest.raises(InputError, match=f"^{re.escape(says.format(folder))}$"):
        load(folder / "images")


def test_names_that_are_not_utf8_are_refused(root):
    make(root, {"a": 3, "caf\udce9": 3})
    with pytest.raises(InputError, match=r"caf\\xe9 is not valid UTF-8: rename the file or folder$"):
        load(root)


@pytest.mark.parametrize("name", ["train", "test", "val", "Training"])
def test_a_class_may_be_called_like_a_split(root, caplog, name):
    make(root, {"car": 4, name: 4, "zebra": 4})
    for splits in ("auto", "none"):
        caplog.clear()
        data = load(root, splits=splits)
        assert data.classes == tuple(sorted(["car", name, "zebra"]))
        assert len(data.pool) + len(data.test) == 12
        assert caplog.messages == [
            f"{name}/ in {root} is taken for a class, as it has no class folders and no other folder is named like a "
            "split (data.splits=none: without this warning)"
        ] * (splits == "auto")


@pytest.mark.parametrize(
    ("folders", "classes", "pool", "test"),
    [
        ({"a": 1}, ("a",), 1, 0),
        ({"a": 4}, ("a",), 4, 0),
        ({"a": 1, "b": 1}, ("a", "b"), 2, 0),
        ({"a": 1, "b": 0}, ("a", "b"), 1, 0),
        ({"train/a": 1, "test/a": 2}, ("a",), 1, 2),
        ({"train/a": 1, "train/b": 2, "val/b": 3}, ("a", "b"), 6, 0),
        ({"train/a": 1, "train/b": 2, "val/b": 3, "test/a": 1}, ("a", "b"), 6, 1),
    ],
)
def test_without_division_no_split_is_drawn(root, folders, classes, pool, test):
    data = load(make(root, folders), divide=False)
    assert data.classes == classes
    assert (len(data.pool), len(data.train), len(data.val), len(data.test)) == (pool, pool, 0, test)
    assert data.train.tolist() == list(range(pool))
    assert data.test.images.shape == (test, 3, 4, 4)
    assert data.fit == "crop"
    splits = [name.split("/")[0] for name in [*data.pool.names, *(data.test.names or ())]]
    assert splits.count("test") == test


def test_copies_of_test_images_are_counted_and_logged(root, caplog):
    make(root, {"train/a": 3, "train/b": 3, "val/a": 1, "test/a": 4})
    for copy, of in {"test/a/0": "train/a/1", "test/a/1": "train/a/1", "test/a/3": "val/a/0"}.items():
        (root / f"{copy}.png").write_bytes((root / f"{of}.png").read_bytes())
    says = "3 of 4 test images have an exact copy in training or validation"
    for divide in (True, False):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            data = load(root, divide=divide)
            copies.report(data)
        assert data.test_duplicates == 3
        assert says in caplog.messages


def test_without_copies_nothing_is_logged(root, caplog):
    with caplog.at_level(logging.INFO):
        data = load(make(root, {"a": 5, "b": 5}))
        copies.report(data)
    assert data.test_duplicates == 0
    assert "copy" not in caplog.text


def spoil(root, *names):
    for name in names:
        (root / f"{name}.png").write_text("no image")


def test_broken_files_are_refused_or_skipped(root):
    make(root, {"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2, "test/a": 2, "test/b": 2})
    broken = ("train/a/1", "val/a/0", "test/b/1")
    spoil(root, *broken)
    says = message(root)
    assert says.startswith("3 files cannot be used as images: repair or remove them, or skip them with data.skip")
    assert all(f"{name}.png (" in says for name in broken)
    data = load(root, skip_broken=True)
    names_of = names(data)
    assert {part: len(images) for part, images in names_of.items()} == {"train": 7, "val": 3, "test": 3}
    for part, images in names_of.items():
        assert {name.split("/")[0] for name in images} == {part}
    for samples in (data.pool, data.test):
        for name, image, label, digest in zip(
            samples.names, samples.images, samples.labels, samples.digests, strict=True
        ):
            image_of_file = read(root / name, (3, 4, 4), "crop")
            assert torch.equal(image, image_of_file)
            assert digest == digests(image_of_file[None])[0]
            assert data.classes[label] == name.split("/")[1]


@pytest.mark.parametrize(
    ("folders", "broken", "says"),
    [
        (
            {"train/a": 1, "train/b": 2, "val/a": 1, "test/a": 1},
            ["train/a/0"],
            "class 'a' has no readable image in ROOT/train: add some or remove its folder",
        ),
        (
            {"train/a": 1, "train/b": 2, "val/a": 1, "test/a": 1},
            ["val/a/0"],
            "ROOT/val has no readable image: add some",
        ),
        (
            {"train/a": 2, "train/b": 2, "test/a": 1},
            ["test/a/0"],
            "ROOT/test has no readable image to test on: add some",
        ),
        (
            {"train/a": 2, "train/b": 2, "test/a": 1},
            ["train/b/0", "train/b/1"],
            f"class 'b' has 0 images; at least 2 are needed, one each for training and validation: {ENOUGH}",
        ),
        (
            {"a": 3, "b": 3},
            ["a/0", "a/1", "a/2", "b/0", "b/1", "b/2"],
            "ROOT has no readable image to test on: add some",
        ),
    ],
)
def test_no_readable_image_is_left(root, folders, broken, says):
    spoil(make(root, folders), *broken)
    assert message(root, skip_broken=True) == says


def move(root, name, to):
    (root / f"{name}.png").rename(root / f"{to}.png")


HASHES = {
    "nothing": (lambda root: None, {}, set()),
    "a name": (lambda root: move(root, "train/a/0", "train/a/00"), {}, set()),
    "the name of a folder": (lambda root: (root / "train").rename(root / "training"), {}, set()),
    "an image to train on": (lambda root: draw(root / "train/b/1.png", seed=1), {}, {"train"}),
    "an image for validation": (lambda root: draw(root / "val/a/0.png", seed=1), {}, {"val"}),
    "an image to test on": (lambda root: draw(root / "test/b/1.png", seed=1), {}, {"test"}),
    "the label of an image to train on": (lambda root: move(root, "train/a/3", "train/b/!"), {}, {"train"}),
    "the label of an image for validation": (lambda root: move(root, "val/a/1", "val/b/!"), {}, {"val"}),
    "the label of an image to test on": (lambda root: move(root, "test/a/1", "test/b/!"), {}, {"test"}),
    "one image more": (lambda root: draw(root / "val/a/9.png"), {}, {"val"}),
    "one image less": (lambda root: (root / "train/a/2.png").unlink(), {}, {"train"}),
    "the order": (lambda root: move(root, "test/a/0", "test/a/5"), {}, {"test"}),
    "the seed": (lambda root: None, {"seed": 1}, set()),
    "the size": (lambda root: None, {"size": 5}, {"train", "val", "test"}),
}


@pytest.mark.parametrize("what", HASHES)
def test_hashes_show_which_split_changed(root, what):
    change, options, changed = HASHES[what]
    make(root, {"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2, "test/a": 2, "test/b": 2})
    before = load(root).hashes
    change(root)
    after = load(root, **options).hashes
    assert {split for split in before if before[split] != after[split]} == changed
    assert sorted(before) == ["test", "train", "val"]
    assert len(set(before.values())) == 3


def test_another_seed_changes_the_hashes_of_the_drawn_splits(root):
    make(root, {"a": 12, "b": 12})
    first, second = load(root, seed=0).hashes, load(root, seed=1).hashes
    assert {split for split in first if first[split] != second[split]} == {"train", "val"}
