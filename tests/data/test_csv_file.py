"""CSV files of pixels: formats, labels and shapes."""

import bz2
import gzip
import lzma

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tuner.data import csv_file


def table(place=0, header=True, labels=("0", "1", "2"), pixels=4, n=12):
    """The text of a file. Image i has the label i mod 3, in column `place`, and the pixels i, i + 1, ..."""
    lines = [[f"p{i}" for i in range(pixels)], *([str(i + j) for j in range(pixels)] for i in range(n))]
    for i, cells in enumerate(lines):
        cells.insert(place, labels[(i - 1) % len(labels)] if i else "label")
    return "\n".join(",".join(cells) for cells in lines[0 if header else 1 :]) + "\n"


@pytest.fixture
def load(tmp_path):
    """Write a file and load it."""

    def write_and_load(content, name="data.csv", test=None, **options):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        if test is not None:
            (tmp_path / "test.csv").write_text(test)
            options["test_path"] = tmp_path / "test.csv"
        return csv_file.load(tmp_path / name, **options)

    return write_and_load


def images_of(*parts, classes):
    """(first pixel, class name) of each image, sorted."""
    return sorted(
        (int(image.flatten()[0]), classes[label])
        for part in parts
        for image, label in zip(part.images, part.labels.tolist(), strict=True)
    )


TABLE = table()
EXPECTED = [(i, str(i % 3)) for i in range(12)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("data.csv", TABLE, id="plain"),
        pytest.param("data.csv.gz", gzip.compress(TABLE.encode()), id="gz"),
        pytest.param("data.csv.xz", lzma.compress(TABLE.encode()), id="xz"),
        pytest.param("DATA.CSV.BZ2", bz2.compress(TABLE.encode()), id="bz2"),
        pytest.param("data.txt", TABLE, id="another ending"),
        pytest.param("data.csv", TABLE.replace("\n", "\r\n"), id="CRLF"),
        pytest.param("data.csv", b"\xef\xbb\xbf" + TABLE.encode(), id="byte order mark"),
        pytest.param("data.csv", "\n" + TABLE.replace("\n", "\n\n") + "   \n\n", id="blank lines"),
        pytest.param("data.csv", TABLE.rstrip(), id="no newline at the end"),
        pytest.param("data.csv", '"' + TABLE.rstrip().replace(",", '","').replace("\n", '"\n"') + '"', id="quoted"),
        pytest.param("data.csv", TABLE.replace(",", " , "), id="spaces around commas"),
        pytest.param("data.csv", TABLE.replace("\n", ".0\n"), id="whole floats"),
        pytest.param("data.csv", table(place=2), id="label in the middle"),
        pytest.param("data.csv", table(place=4), id="label last"),
    ],
)
def test_reads(load, name, content):
    data = load(content, name)
    assert images_of(data.pool, data.test, classes=data.classes) == EXPECTED
    assert data.pool.images.shape[1:] == data.test.images.shape[1:] == (1, 2, 2)
    assert data.pool.images.dtype == torch.uint8
    assert data.pool.labels.dtype == torch.int64
    assert data.pool.images.is_contiguous()


@pytest.mark.parametrize(("place", "label"), [(0, 0), (0, -5), (2, 2), (4, 4), (4, -1)])
def test_without_a_header_the_label_is_a_column_number(load, place, label):
    data = load(table(place, header=False), header=False, label=label)
    assert images_of(data.pool, data.test, classes=data.classes) == EXPECTED


def test_reads_what_numpy_savetxt_writes(tmp_path):
    np.savetxt(tmp_path / "data.csv", np.array([[i % 3, i, 1, 2, 3] for i in range(12)]), delimiter=",")
    data = csv_file.load(tmp_path / "data.csv", header=False, label=0)
    assert images_of(data.pool, data.test, classes=data.classes) == EXPECTED


def test_the_label_column_has_any_name(load):
    data = load(TABLE.replace("label", "7"), label=7)  # as data.label=7 arrives from the command line
    assert images_of(data.pool, data.test, classes=data.classes) == EXPECTED


def test_a_home_folder_and_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "data.csv").write_text(TABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(csv_file.load("~/data.csv").test) == 3
    monkeypatch.chdir(tmp_path)
    assert len(csv_file.load("data.csv").test) == 3


@pytest.mark.parametrize(
    ("labels", "classes", "names", "expected"),
    [
        (("0", "1", "2"), None, ("0", "1", "2"), ("0", "1", "2")),
        (("9", "10", "-1"), None, ("-1", "9", "10"), ("9", "10", "-1")),
        (("1.0", "02", "+3"), None, ("1", "2", "3"), ("1", "2", "3")),
        (("owl", "cat", "7"), None, ("7", "cat", "owl"), ("owl", "cat", "7")),
        (("12e1", "1_0", "cat"), None, ("12e1", "1_0", "cat"), ("12e1", "1_0", "cat")),
        (("0", "1", "2"), ["cat", "dog", "owl"], ("cat", "dog", "owl"), ("cat", "dog", "owl")),
        (("dog", "0.0", "owl"), ["cat", "dog", "owl"], ("cat", "dog", "owl"), ("dog", "cat", "owl")),
        (("3", "7", "5"), ["7", "5", "3"], ("7", "5", "3"), ("3", "7", "5")),
        (("3", "7", "5"), OmegaConf.create([7, 5, 3]), ("7", "5", "3"), ("3", "7", "5")),
    ],
)
def test_labels(load, labels, classes, names, expected):
    data = load(table(labels=labels), classes=classes)
    assert data.classes == names
    assert images_of(data.pool, data.test, classes=data.classes) == [(i, expected[i % 3]) for i in range(12)]


@pytest.mark.parametrize(
    ("pixels", "options", "shape"),
    [
        (4, {}, (1, 2, 2)),
        (12, {}, (3, 2, 2)),
        (12, {"height": 3, "width": 4}, (1, 3, 4)),
        (12, {"height": 1, "width": 4}, (3, 1, 4)),
        (12, {"channels": 3}, (3, 2, 2)),
        (36, {}, (1, 6, 6)),
        (18, {"height": 2, "width": 3, "channels": 3}, (3, 2, 3)),
    ],
)
def test_the_shape_is_given_or_derived_from_the_number_of_pixels(load, pixels, options, shape):
    data = load(table(pixels=pixels), **options)
    assert data.pool.images.shape[1:] == shape
    c, h, w = shape
    first = data.pool.images[0]
    start = int(first[0, 0, 0])
    assert torch.equal(first, torch.arange(start, start + pixels).reshape(h, w, c).permute(2, 0, 1))


def test_a_second_file_is_the_test_split(load):
    test = table(n=4, place=3, labels=("2", "0"))  # another label column, and not all classes
    data = load(TABLE, test=test, val_share=0.25)
    assert images_of(data.pool, classes=data.classes) == EXPECTED
    assert images_of(data.test, classes=data.classes) == [(0, "2"), (1, "0"), (2, "2"), (3, "0")]
    assert (len(data.train), len(data.val), data.test_duplicates) == (9, 3, 4)


def test_seed_and_shares_control_the_splits(load):
    first, same, other = (load(table(n=60), val_share=0.5, test_share=0.4, seed=seed) for seed in (1, 1, 2))
    assert (len(first.train), len(first.val), len(first.test)) == (18, 18, 24)
    assert torch.equal(first.val, same.val)
    assert not torch.equal(first.val, other.val)
    assert torch.equal(first.test.images, other.test.images)


def test_without_division_no_split_is_drawn(load):
    for test, expected in ((None, (4, 0, 0)), (table(n=2), (4, 0, 2))):
        data = load(table(n=4), test=test, divide=False)
        assert (len(data.train), len(data.val), len(data.test)) == expected


def test_almost_black_images_cause_a_warning(load, caplog):
    load("label,a,b,c,d\n" + "cat,0,0,0,1\ndog,0,1,0,1\n" * 3)
    assert caplog.messages[0] == (
        "data.csv has no pixel above 1, so its images are almost black: should pixels reach 255?"
    )
