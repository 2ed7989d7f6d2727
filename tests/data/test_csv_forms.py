"""The forms in which people bring CSV files: Excel's, Kaggle's with ids, one-hot labels, columns in another order."""

import gzip
import logging

import pytest
import torch
from PIL import Image

from tuner import InputError
from tuner.data import csv_file
from tuner.data.tables.csv_columns import layout

HEADER = ["label", "p0", "p1", "p2", "p3"]
ROWS = [["cat" if i % 2 else "dog", *(str(i + j) for j in range(4))] for i in range(12)]


def written(folder, rows, name="data.csv", delimiter=",", encoding="utf-8", before=""):
    text = before + "".join(delimiter.join(row) + "\r\n" for row in rows)
    content = text.encode(encoding)
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


def pixels(data):
    """(class, pixels) of all images, sorted."""
    samples = (data.pool, data.test)
    return sorted(
        (data.classes[y], *x.flatten().tolist()) for s in samples for x, y in zip(s.images, s.labels, strict=True)
    )


EXPECTED = sorted((row[0], *map(int, row[1:])) for row in ROWS)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"delimiter": ";"}, "data.csv"),
        ({"delimiter": "\t"}, "data.tsv"),
        ({"delimiter": ";", "before": "sep=;\r\n"}, "data.csv"),
        ({"delimiter": "|", "before": '"sep=|"\r\n'}, "data.csv"),
        ({"encoding": "utf-16"}, "data.csv"),
        ({"encoding": "utf-16", "delimiter": "\t"}, "data.txt"),  # what Excel calls Unicode text
        ({"encoding": "utf-8-sig", "delimiter": ";"}, "data.csv.gz"),
    ],
)
@pytest.mark.parametrize("decimals", [False, True])
def test_what_excel_writes(tmp_path, options, name, decimals):
    comma = options.get("delimiter", ",") != ","
    rows = [
        [row[0], *(f"{p},0" if decimals and comma else f"{p}.0" if decimals else p for p in row[1:])] for row in ROWS
    ]
    assert pixels(csv_file.load(written(tmp_path, [HEADER, *rows], name, **options))) == EXPECTED


def test_a_table_of_excel_without_a_header(tmp_path):
    rows = [[str(i % 2), *(f"{p},0" for p in row[1:])] for i, row in enumerate(ROWS)]
    data = csv_file.load(written(tmp_path, rows, delimiter=";"), header=False, label=0)
    assert pixels(data) == sorted((str(i % 2), *map(int, row[1:])) for i, row in enumerate(ROWS))


def test_line_numbers_count_the_line_of_the_separator(tmp_path):
    rows = [HEADER, *ROWS[:3], ["cat", "1", "x", "3", "4"]]
    with pytest.raises(InputError, match=r"^line 6 of data\.csv, column 'p1': 'x' is not a number"):
        csv_file.load(written(tmp_path, rows, delimiter=";", before="sep=;\r\n"))


def test_a_semicolon_in_a_name_does_not_separate(tmp_path):
    data = csv_file.load(written(tmp_path, [HEADER, *([row[0] + ";x", *row[1:]] for row in ROWS)]))
    assert data.classes == ("cat;x", "dog;x")


@pytest.mark.parametrize("place", [0, 1, 5])
@pytest.mark.parametrize("text", ["{}", "a{}ü", "{}.0"])
@pytest.mark.parametrize("name", ["id", "Id", "image_id", ""])
def test_ids_name_the_images_and_are_no_pixels(tmp_path, place, text, name):
    if not name and place:  # pandas writes its index first
        name = "ID"
    rows = [[*row[:place], text.format(1000 + i), *row[place:]] for i, row in enumerate(ROWS)]
    header = [*HEADER[:place], name, *HEADER[place:]]
    data = csv_file.load(written(tmp_path, [header, *rows]))
    assert pixels(data) == EXPECTED
    names = {text.format(1000 + i): [int(p) for p in row[1:]] for i, row in enumerate(ROWS)}
    for samples in (data.pool, data.test):
        assert [image.flatten().tolist() for image in samples.images] == [names[name] for name in samples.names]


def test_any_column_may_be_the_id(tmp_path):
    rows = [["filename", *HEADER], *([f"{i}.png", *row] for i, row in enumerate(ROWS))]
    data = csv_file.load(written(tmp_path, rows), id="filename")
    assert {*data.pool.names, *data.test.names} == {f"{i}.png" for i in range(12)}


@pytest.mark.parametrize("one", ["1", "1.0"])
def test_one_hot_labels(tmp_path, one):
    header = ["dog", "p0", "p1", "p2", "p3", "cat"]
    zero = one.replace("1", "0")
    rows = [[one if r[0] == "dog" else zero, *r[1:], one if r[0] == "cat" else zero] for r in ROWS]
    path = written(tmp_path, [header, *rows])
    assert pixels(csv_file.load(path, label=["cat", "dog"])) == EXPECTED
    path = written(tmp_path, [header, *rows, ["1", "1", "2", "3", "4", "1"]])
    with pytest.raises(InputError, match=r"^line 14 of data.csv has 1, 1 in the columns of the labels: one must be 1"):
        csv_file.load(path, label=["cat", "dog"])


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [1, 2, 3, 4, 0], [2, 0, 1, 4, 3]])
def test_the_columns_of_the_test_file_are_matched_by_name(tmp_path, caplog, order):
    caplog.set_level(logging.INFO)
    path = written(tmp_path, [HEADER, *ROWS])
    test = written(tmp_path, [[row[i] for i in order] for row in (HEADER, *ROWS)], "test.csv")
    data = csv_file.load(path, test_path=test)
    assert torch.equal(data.test.images, data.pool.images)
    if order != [1, 2, 3, 4, 0]:
        assert "the columns of test.csv are matched to those of data.csv by name, in another order" in caplog.messages


def test_further_columns_of_the_test_file_are_not_used(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = written(tmp_path, [HEADER, *ROWS])
    test = written(tmp_path, [["note", *HEADER], *([str(i), *row] for i, row in enumerate(ROWS))], "test.csv")
    data = csv_file.load(path, test_path=test)
    assert torch.equal(data.test.images, data.pool.images)
    assert "the columns of test.csv are matched to those of data.csv by name; not used: 'note'" in caplog.messages


@pytest.mark.parametrize("header", [True, False])
def test_without_common_names_columns_are_matched_by_position_and_it_says_so(tmp_path, caplog, header):
    caplog.set_level(logging.INFO)
    path = written(tmp_path, [HEADER, *ROWS] if header else ROWS)
    test = written(tmp_path, [["label", "a", "b", "c", "d"], *ROWS] if header else ROWS, "test.csv")
    options = {} if header else {"header": False, "label": 0}
    data = csv_file.load(path, test_path=test, **options)
    assert torch.equal(data.test.images, data.pool.images)
    why = "its pixel columns have other names" if header else "there are no names"
    assert f"the columns of test.csv are matched to those of data.csv by position ({why})" in caplog.messages


@pytest.fixture
def images(tmp_path):
    """Twelve images in a folder beside the table."""
    for i in range(12):
        path = tmp_path / "photos" / f"{i}.JPG"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(path, "JPEG")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "fault"),
    [
        ("{}", {"folder": "photos", "suffix": ".JPG"}, "set data.folder={photos} data.suffix=.jpg"),
        ("{}.JPG", {"folder": "photos"}, "there is {photos}/0.JPG: set data.folder={photos}"),
        ("photos/{}", {"suffix": ".JPG"}, "there is {photos}/0.JPG: set data.suffix=.jpg"),
        ("photos\\{}.JPG", {}, None),
        ("C:\\data\\{}.JPG", None, "set data.folder={photos} and leave the folders out of the names"),
        ("train/{}.JPG", None, "set data.folder={photos} and leave the folders out of the names"),
        ("https://h.example/{}.JPG", None, "names addresses (https://h.example/0.JPG): download the images"),
        ("img{}.JPG", None, "set data.folder to the folder that the names are relative to"),
    ],
)
def test_names_of_files(images, monkeypatch, name, options, fault):
    monkeypatch.chdir(images)
    rows = [["image", "label"], *([name.format(i), row[0]] for i, row in enumerate(ROWS))]
    path = written(images, rows)
    more = {"size": 16, "cache_dir": images / "cache", "image": "image"}
    if fault:
        with pytest.raises(InputError) as error:
            csv_file.load(path, **more)
        assert fault.format(photos=images / "photos") in str(error.value)
        assert "\n" not in str(error.value)
    if options is not None:
        data = csv_file.load(path, **more, **options)
        assert len(data.pool) + len(data.test) == 12


def test_ids_may_be_the_names_of_files(images):
    rows = [["id", "breed"], *([str(i), row[0]] for i, row in enumerate(ROWS))]
    path = written(images, rows)
    more = {"label": "breed", "size": 16, "cache_dir": images / "cache"}
    with pytest.raises(InputError, match=r"is 'id' a file name\? Set data.image=id, and data.suffix=.jpg"):
        csv_file.load(path, **more)
    data = csv_file.load(path, image="id", folder=images / "photos", suffix=".JPG", **more)
    assert {*data.pool.names, *data.test.names} == {f"{i}.JPG" for i in range(12)}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"suffix": "jpg"}, r"data.suffix=jpg must be one of \.avif, "),
        ({"suffix": 3}, r"data.suffix=3 must be one of \.avif, "),
        ({"folder": 3}, r"data.folder=3 must be the path of a folder"),
        ({"folder": "nowhere"}, r"there is no folder nowhere \(relative to .*\): data.folder names it"),
    ],
)
def test_options_of_files(images, options, says):
    path = written(images, [["image", "label"], *([f"photos/{i}.JPG", row[0]] for i, row in enumerate(ROWS))])
    with pytest.raises(InputError, match=says):
        csv_file.load(path, size=16, cache_dir=images / "cache", **options)


def test_a_pixel_of_its_own_is_an_image_if_asked_for(tmp_path):
    path = written(tmp_path, [["p", "label"], *([row[1], row[0]] for row in ROWS)])
    assert csv_file.load(path, height=1, width=1).pool.images.shape[1:] == (1, 1, 1)


def test_a_layout_without_a_label(tmp_path):
    table = layout(
        written(tmp_path, [["id", *HEADER[1:]], *([str(i), *row[1:]] for i, row in enumerate(ROWS))]), None, True
    )
    assert (table.label, table.id, table.pixels) == ((), 0, (1, 2, 3, 4))
