"""What a run says of its data before it trains."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TINY, result
from PIL import Image

from tuner.data import FileStatistics, Samples, copies, from_splits, image_folder, summary

CLASSES = ("cat", "dog")


def data(train=20, val=10, test=8, classes=CLASSES, files=(None, None)):
    """A data set with so many images, of the classes in turn."""
    n = train + val
    pixels = torch.arange(4 * (n + test)).view(-1, 1, 2, 2)
    images = torch.cat([pixels // 256, pixels % 256], 3).to(torch.uint8)
    labels = torch.arange(n + test) % len(classes)
    pool = Samples(images[:n], labels[:n], files=files[0])
    return from_splits(
        pool, Samples(images[n:], labels[n:], files=files[1]), torch.arange(train), torch.arange(train, n), classes
    )


def test_classes_sizes_and_splits():
    assert summary.lines(data(1000, 600, 400))[:3] == [
        "data: 2,000 images of 2 classes (cat, dog), 1,000 of each",
        "splits: 1,000 to train, 600 for validation, 400 to test; gray, 2 x 4 pixels",
        "an accuracy of 0.8 on 600 validation images has two standard errors of 0.033",
    ]


def test_uneven_classes_and_many():
    text = summary.lines(data(25, 10, 1, classes=[f"c{i}" for i in range(12)]))
    assert text[0] == "data: 36 images of 12 classes (c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, ...), 3 of each"
    text = summary.lines(data(21, 10, 8))
    assert text[0] == "data: 39 images of 2 classes (cat, dog), from 19 (dog) to 20 (cat) of a class"


@pytest.mark.parametrize(
    ("train", "val", "says"),
    [
        (350, 50, r"0.113, which is coarse: .*\. Set data.folds=5 \(0.040\), compare several seeds, or add images"),
        (7, 1, r"0.800, which is coarse: .*\. Set data.val_share=0.3 \(0.566\), compare several seeds, or add images"),
        (2, 1, r"on 1 validation image has two standard errors of 0.800, which is coarse"),
        (350, 256, r"two standard errors of 0.050$"),
    ],
)
def test_it_says_if_validation_is_too_coarse_and_what_to_do(train, val, says):
    assert re.search(says, summary.lines(data(train, val))[-1])


def test_folds_score_the_training_images_too():
    assert summary.lines(data(100, 60, 40), folds=5)[1:] == [
        "splits: 160 in 5 folds to train and for validation, 40 to test; gray, 2 x 4 pixels",
        "an accuracy of 0.8 on 160 validation images has two standard errors of 0.063, which is coarse: a smaller "
        "difference between two runs says nothing. Compare several seeds, or add images",
    ]


def test_without_validation_nothing_is_said_of_it():
    assert len(summary.lines(data(30, 0))) == 2


def test_the_files():
    pool = FileStatistics({"RGB": 300, "L": 80}, (32, 64, 500), (30, 64, 400), 2, None, 65535)
    test = FileStatistics({"RGB": 60, "I;16": 1}, (16, 50, 80), (40, 50, 600), 1, 4095, 65535)
    text = summary.lines(data(files=(pool, test)))
    assert text[2] == (
        "files: 360 RGB, 80 L, 1 I;16; 16 to 500 wide (median 64) and 30 to 600 high (64) pixels; 3 skipped"
    )
    same = replace(pool, modes={"L": 5}, widths=(8, 8, 8), heights=(6, 6, 6), skipped=0)
    assert summary.lines(data(files=(same, None)))[2] == "files: 5 L; 8 x 6 pixels"


def test_it_counts_copies(tmp_path, caplog):
    for split in ("train", "val"):
        for label in "ab":
            for i in range(6):
                noise = np.random.default_rng([i, ord(label)]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                path = tmp_path / "root" / split / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noise).save(path)
    found = image_folder.load(tmp_path / "root", size=8, cache_dir=tmp_path / "cache")
    copies.report(found)
    held_out = 12 - len(found.train)
    assert (found.val_duplicates, len(found.val)) == (12 - held_out, 12)
    assert summary.summary(found)["copies"]["validation"] == found.val_duplicates
    assert f"{12 - held_out} of 12 validation images have an exact copy in training" in caplog.text


def test_a_run_logs_it_records_it_and_draws_what_the_network_is_given(command, tmp_path):
    code, printed = command(*TINY, "plots=true", "test=false", "hydra.run.dir=run")
    assert code == 0, printed
    assert "data: 400 images of 4 classes (class0, class1, class2, class3)" in printed
    assert result(tmp_path / "run")["data"]["splits"] == {"train": 256, "validation": 64, "test": 80}
    with Image.open(tmp_path / "run" / "plots" / "data.png") as picture:
        assert picture.width > 1000
