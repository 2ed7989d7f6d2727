"""CSV files whose rows name image files."""

import logging

import pytest
import torch
from PIL import Image

from tuner import InputError
from tuner.data import csv_file
from tuner.data.files import image_file


@pytest.fixture
def photos(tmp_path):
    """Twelve images of two classes, in a folder next to the table."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (20 + i, 30), (20 * i, 0, 255 * (i % 2))).save(folder / f"{i}.png")
    return tmp_path


def table(folder, lines, name="t.csv"):
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def rows(which=range(12)):
    return [f"my photos/{i}.png,{'odd' if i % 2 else 'even'}" for i in which]


def load(path, folder, **options):
    return csv_file.load(path, size=16, cache_dir=folder / "cache", **options)


def test_a_column_without_numbers_names_image_files(photos, caplog):
    caplog.set_level(logging.INFO)
    data = load(table(photos, ["image,label", *rows()]), photos)
    assert "column 'image' names image files" in caplog.text
    assert data.classes == ("even", "odd")
    assert data.fit == "crop"
    assert len(data.pool) + len(data.test) == 12
    for samples in (data.pool, data.test):
        for name, image, label in zip(samples.names, samples.images, samples.labels, strict=True):
            assert torch.equal(image, image_file.read(photos / name, (3, 16, 16), "crop"))
            assert data.classes[label] == ("odd" if int(name.split("/")[1][:-4]) % 2 else "even")


@pytest.mark.parametrize("image", ["file", None])
def test_other_columns_are_ignored(photos, image):
    lines = ["label,file,width", *(f"{row.split(',')[1]},{row.split(',')[0]},20" for row in rows())]
    data = load(table(photos, lines), photos, image=image)
    assert data.classes == ("even", "odd")
    assert len(data.pool) + len(data.test) == 12


def test_two_columns_of_files_are_asked_about(photos):
    lines = ["label,file,mask", *(f"{row.split(',')[1]},{row.split(',')[0]},{row.split(',')[0]}" for row in rows())]
    says = r"set data\.image to the column of image files; the columns are 'label', 'file', 'mask'"
    with pytest.raises(InputError, match=says):
        load(table(photos, lines), photos)


def test_paths_may_be_absolute_and_the_test_file_elsewhere(photos, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    test = table(elsewhere, ["label,image", *(f"even,{photos}/my photos/{i}.png" for i in (0, 2))], "test.csv")
    data = load(table(photos, ["image,label", *rows(range(1, 12))]), photos, test_path=test)
    assert (len(data.pool), len(data.test)) == (11, 2)
    assert data.test.labels.tolist() == [0, 0]


def test_without_division_no_split_is_drawn(photos):
    data = load(table(photos, ["image,label", *rows(range(2))]), photos, divide=False)
    assert (len(data.train), len(data.val), len(data.test)) == (2, 0, 0)


def test_without_a_header(photos):
    data = load(table(photos, rows()), photos, header=False, label=1)
    assert len(data.pool) + len(data.test) == 12


@pytest.mark.parametrize(
    ("lines", "options", "says"),
    [
        (["image,label", *rows(), "my photos/12.png,even"], {}, r"my photos/12.png \(No such file or directory\)"),
        (["image,label", *rows(), ",even"], {"image": "image"}, "line 14 of t.csv names no file: fill it in"),
        (["image,label", f"{'70 ' * 2000},even", *rows()], {}, r"70 70 70 .* \(File name too long\)"),
        (["image,label"], {"image": "image"}, "t.csv has a header and no rows: it needs one line per image"),
        (["image,label", *rows(), "my photos/1.png,"], {}, "line 14 of t.csv has no label"),
        (["image,label", *rows(), "my photos/1.png,a,b"], {}, "line 14 of t.csv has 3 values; 2 expected"),
        (
            ["image,label", *rows()],
            {"image": "photo"},
            "data.image=photo must be a column of t.csv other than the label: 'image'",
        ),
        (
            ["image,label", *rows()],
            {"image": "label"},
            "data.image=label must be a column of t.csv other than the label",
        ),
        (["image,label", *rows()], {"height": 3, "width": 3}, "data.height, data.width and data.channels apply to"),
        (["image,label", *rows()], {"fit": "zoom"}, "data.fit=zoom must be one of crop, pad, stretch"),
        (["image,label", *rows()], {"classes": ["even", "x"]}, "label odd in line 3 of t.csv is not a class"),
        (["image,label", *rows(), "t.csv,odd"], {}, r"t.csv \(its content is not an image"),
        (["image,label", *rows()], {"test_path": "test.csv"}, "test.csv has no column 'image', but t.csv has: rename"),
    ],
)
def test_error_messages(photos, monkeypatch, lines, options, says):
    monkeypatch.chdir(photos)
    table(photos, ["path,label", "my photos/1.png,odd"], "test.csv")
    with pytest.raises(InputError, match=says):
        load(table(photos, lines), photos, **options)


def test_broken_files_can_be_skipped(photos, caplog):
    path = table(photos, ["image,label", *rows(), "t.csv,odd"])
    data = load(path, photos, skip_broken=True)
    assert len(data.pool) + len(data.test) == 12
    assert "1 file cannot be used as an image, skipped" in caplog.text


@pytest.mark.parametrize("others", [["b\0.png,even"] * 6, rows()], ids=["all", "one"])
def test_a_null_byte_in_a_name_is_one_line(photos, others):
    """It once ended in a traceback: no file system takes such a name."""
    path = table(photos, ["image,label", *["a\0.png,odd"] * 6, *others])
    with pytest.raises(InputError, match=r"a(\\x00|\0)\.png") as error:
        load(path, photos)
    assert "\n" not in str(error.value)
