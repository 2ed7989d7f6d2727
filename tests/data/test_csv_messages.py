"""What is wrong with a CSV file is said in one line: the rule, the value got, the way out."""

import gzip
import re

import pytest

from tuner import InputError
from tuner.data import csv_file

GOOD = ["label,p1,p2,p3,p4", *(f"{label},1,2,3,4" for label in (0, 1, 2) * 4)]
PIXEL = "every column but the label is a pixel, a whole number from 0 to 255"


def changed(line, text):
    """The good file with another text in one line (the header is line 1)."""
    return "\n".join([*GOOD[: line - 1], text, *GOOD[line:]])


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        pytest.param("", {}, "data.csv is empty: it needs a line an image, with a label and pixels", id="empty"),
        pytest.param("\n \n", {}, "data.csv is empty: it needs a line an image, with a label and pixels", id="blank"),
        pytest.param(
            GOOD[0] + "\n", {}, "data.csv has a header and no rows: it needs a line an image", id="header only"
        ),
        pytest.param(
            changed(7, "0,1,2,3"),
            {},
            "line 7 of data.csv has 4 values; 5 expected (label and 4 pixels)",
            id="short row",
        ),
        pytest.param(
            changed(7, "\n\n0,1,2,3,4,5"),
            {},
            "line 9 of data.csv has 6 values; 5 expected (label and 4 pixels)",
            id="long row, after blank lines",
        ),
        pytest.param(
            changed(7, "0,1,x,3,4"),
            {},
            f"line 7 of data.csv, column 'p2': 'x' is no number; {PIXEL}; if it names an image file, set data.image to "
            "that column",
            id="text",
        ),
        pytest.param(
            changed(7, "0,1,2,3,"), {}, f"line 7 of data.csv, column 'p4': '' is empty; {PIXEL}", id="empty cell"
        ),
        pytest.param(
            changed(7, "0,nan,2,3,4"), {}, f"line 7 of data.csv, column 'p1': 'nan' is not finite; {PIXEL}", id="nan"
        ),
        pytest.param(
            changed(7, "0,1,2,-inf,4"), {}, f"line 7 of data.csv, column 'p3': '-inf' is not finite; {PIXEL}", id="inf"
        ),
        pytest.param(
            changed(7, "0,1,2,256,4"),
            {},
            f"line 7 of data.csv, column 'p3': '256' is outside 0 to 255; {PIXEL}",
            id="too large",
        ),
        pytest.param(
            changed(7, "0,1,2,-1,4"),
            {},
            f"line 7 of data.csv, column 'p3': '-1' is outside 0 to 255; {PIXEL}",
            id="negative",
        ),
        pytest.param(
            changed(7, "0,1,2,2.5,4"),
            {},
            f"line 7 of data.csv, column 'p3': '2.5' is fractional; {PIXEL}",
            id="fractional",
        ),
        pytest.param(
            changed(7, "0,1,0.0,0.25,0"),
            {},
            f"line 7 of data.csv, column 'p3': '0.25' is fractional; {PIXEL}; this line lies in 0 to 1 and looks "
            "scaled: multiply the pixels by 255",
            id="scaled",
        ),
        pytest.param(
            "\n".join(GOOD),
            {"header": False, "label": 0},
            f"line 1 of data.csv, column '1': 'p1' is no number; {PIXEL}; if line 1 names the columns, set "
            "data.header=true",
            id="a header after all",
        ),
        pytest.param(
            changed(7, " ,1,2,3,4"),
            {},
            "line 7 of data.csv has no label: fill it in or remove the line",
            id="no label",
        ),
        pytest.param(
            changed(7, "NaN,1,2,3,4"),
            {},
            "line 7 of data.csv has no label: fill it in or remove the line",
            id="no label, as numpy writes it",
        ),
        pytest.param(
            changed(7, "1.5,1,2,3,4"),
            {},
            "label 1.5 in line 7 of data.csv is fractional; labels are text or whole numbers: is data.label the right "
            "column?",
            id="fractional label",
        ),
        pytest.param(
            changed(7, "12,1,2,3,4"),
            {"classes": ["cat", "dog", "owl"]},
            "label 12 in line 7 of data.csv is no class; it must be a number from 0 to 2 or one of 'cat', 'dog', 'owl'"
            ": correct it, or set data.classes to the names of all classes",
            id="label out of range",
        ),
        pytest.param(
            changed(7, "-1,1,2,3,4"),
            {"classes": ["0", "1", "2"]},
            "label -1 in line 7 of data.csv is no class; it must be one of '0', '1', '2': correct it, or set "
            "data.classes to the names of all classes",
            id="label among no numbers",
        ),
        pytest.param(
            changed(7, "cow,1,2,3,4"),
            {"classes": [f"c{i}" for i in range(11)]},
            "label cow in line 7 of data.csv is no class; it must be a number from 0 to 10 or one of 'c0', 'c1', 'c2', "
            "'c3', 'c4', 'c5', 'c6', 'c7', 'c8', 'c9', ... (11): correct it, or set data.classes to the names of all "
            "classes",
            id="unknown name",
        ),
        pytest.param(
            "\n".join(GOOD),
            {"label": "kind"},
            "data.csv has no column 'kind', only 'label', 'p1', 'p2', 'p3', 'p4': set data.label to the name of the "
            "label's column",
            id="no such column",
        ),
        pytest.param(
            "\n".join(GOOD[1:]),
            {},
            "data.csv has no column 'label', only '0', '1', '2', '3', '4': if it has no header, set data.header=false "
            "and data.label=0 (the number of the label's column)",
            id="no header",
        ),
        pytest.param(
            "\n".join(GOOD).replace(",", ";"),
            {},
            "data.csv has no column 'label', only 'label;p1;p2;p3;p4': the cells of a row must be separated by commas",
            id="semicolons",
        ),
        pytest.param(
            "\n".join(GOOD[1:]),
            {"header": False},
            "data.header=false, so data.label must be a column number from 0 to 4, got 'label'",
            id="no header, and a name",
        ),
        pytest.param(
            "\n".join(GOOD[1:]),
            {"header": False, "label": 5},
            "data.header=false, so data.label must be a column number from 0 to 4, got 5",
            id="column number too large",
        ),
        pytest.param(
            "\n".join([GOOD[0], *["0,1,2,3,4"] * 9]),
            {},
            "one class only (0): give images of at least two classes",
            id="one class",
        ),
        pytest.param(
            changed(7, "9,1,2,3,4"),
            {},
            "class '9' has 1 image; at least 3 are needed, one each for training, validation and test: add images of "
            "it or leave the class out",
            id="a class of one",
        ),
        pytest.param(
            "\n".join(GOOD),
            {"classes": "cat,dog,owl"},
            "data.classes must be a list of different names, such as [cat,dog], got 'cat,dog,owl'",
            id="names in one text",
        ),
        pytest.param(
            "\n".join(GOOD),
            {"classes": ["cat", "dog", "cat"]},
            "data.classes must be a list of different names, such as [cat,dog], got ['cat', 'dog', 'cat']",
            id="a name twice",
        ),
        pytest.param(
            "\n".join(GOOD),
            {"height": 3, "width": 2},
            "data.csv has 4 pixel columns; data.height=3 x data.width=2 needs 6 (gray) or 18 (RGB)",
            id="wrong size",
        ),
        pytest.param(
            "\n".join(GOOD),
            {"height": 2, "width": 2, "channels": 3},
            "data.csv has 4 pixel columns; data.height=2 x data.width=2 needs 12 (RGB)",
            id="wrong size, RGB",
        ),
        pytest.param(
            "label,p1,p2\n0,1,2\n",
            {},
            "data.csv has 2 pixel columns, no square image of 1 or 3 channels: set data.height and data.width, "
            "remove a column that is no pixel, or set data.image to the column of image files; the columns are "
            "'label', 'p1', 'p2'",
            id="no square",
        ),
        pytest.param(
            "label\n0\n",
            {},
            "data.csv has 0 pixel columns, no square image of 1 or 3 channels: set data.height and data.width, "
            "remove a column that is no pixel, or set data.image to the column of image files; the columns are 'label'",
            id="no pixels",
        ),
        pytest.param(
            "\n".join(GOOD), {"channels": 2}, "data.channels must be 1 (gray) or 3 (RGB), got 2", id="two channels"
        ),
        pytest.param(
            "\n".join(GOOD),
            {"height": 2},
            "got data.height=2 and data.width=None: give both or, for square images, neither",
            id="height alone",
        ),
        pytest.param(
            "\n".join(GOOD),
            {"height": 0, "width": 2},
            "data.height must be a whole number above 0, got 0",
            id="no height",
        ),
        pytest.param(
            "\n".join(GOOD),
            {"val_share": 1},
            "data.val_share must lie above 0 and below 1, got 1: 0.2 is usual",
            id="val",
        ),
        pytest.param(
            "label,p1,p2,p3,p4\nhibou à,1,2,3,4\n".encode("latin-1"),
            {},
            "data.csv is not UTF-8 text (byte 0xe0): save it as UTF-8 or, if it is compressed, let its name end in "
            ".gz, .xz or .bz2",
            id="latin-1",
        ),
        pytest.param(
            gzip.compress("\n".join(GOOD).encode()),
            {},
            "data.csv is not UTF-8 text (byte 0x8b): save it as UTF-8 or, if it is compressed, let its name end in "
            ".gz, .xz or .bz2",
            id="gzip unsaid",
        ),
    ],
)
def test_one_line_says_what_is_wrong(tmp_path, content, options, message):
    (tmp_path / "data.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        csv_file.load(tmp_path / "data.csv", **options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("data.csv.gz", b"label,p1\n", r"Not a gzipped file \(b'la'\)"),
        ("data.csv.gz", gzip.compress("\n".join(GOOD).encode())[:-9], "Compressed file ended before .*"),
        ("data.csv.xz", b"label,p1\n", "Input format not supported by decoder"),
        ("data.csv.bz2", b"label,p1\n", "Invalid data stream"),
    ],
)
def test_a_broken_compressed_file(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        InputError,
        match=rf"^{name} cannot be read \({reason}\): it must be a whole CSV file, compressed as its name says",
    ):
        csv_file.load(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        csv_file.load("data.csv")
    assert str(error.value) == f"there is no file data.csv (seen from {tmp_path}): set data.path to your CSV file"


def test_a_folder(tmp_path):
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))} is a folder: name a CSV file in it$"):
        csv_file.load(tmp_path)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (
            "label,p1\n0,1\n",
            "test.csv has 1 pixel columns and data.csv has 4: data.test_path must have the columns of data.path",
        ),
        (
            changed(3, "7,1,2,3,4"),
            "label 7 in line 3 of test.csv is no class; it must be one of '0', '1', '2': correct it, or set "
            "data.classes to the names of all classes",
        ),
        (changed(3, "0,1,2,3,300"), f"line 3 of test.csv, column 'p4': '300' is outside 0 to 255; {PIXEL}"),
    ],
)
def test_the_test_file(tmp_path, test, message):
    (tmp_path / "data.csv").write_text("\n".join(GOOD))
    (tmp_path / "test.csv").write_text(test)
    with pytest.raises(InputError) as error:
        csv_file.load(tmp_path / "data.csv", test_path=tmp_path / "test.csv")
    assert str(error.value) == message


def test_a_place_is_a_label_only_where_the_names_were_given(tmp_path):
    (tmp_path / "data.csv").write_text("\n".join(GOOD[:1] + ["cat,1,2,3,4", "dog,1,2,3,4"] * 3))
    (tmp_path / "test.csv").write_text("\n".join(GOOD[:2]))
    with pytest.raises(
        InputError, match=r"^label 0 in line 2 of test.csv is no class; it must be one of 'cat', 'dog':"
    ):
        csv_file.load(tmp_path / "data.csv", test_path=tmp_path / "test.csv")
    assert len(csv_file.load(tmp_path / "data.csv", test_path=tmp_path / "test.csv", classes=["cat", "dog"]).test) == 1
