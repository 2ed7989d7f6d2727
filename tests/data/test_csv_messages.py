"""Errors of CSV files: one case per kind of mistake. Each message is one line: the rule, the value got, the way out."""

import gzip
import re

import pytest

from tuner import InputError
from tuner.data import csv_file

GOOD = ["label,p1,p2,p3,p4", *(f"{label},1,2,3,4" for label in (0, 1, 2) * 4)]
NO_ROWS = "it needs one line per image"
PIXEL = "every column but the label is a pixel, a whole number from 0 to 255"
CLASSES = "set data.classes to the names of all classes"
NOT_SQUARE = (
    "not a square image of 1 or 3 channels: set data.height and data.width, remove columns that are not pixels, or set "
    "data.image to the column of image files; the columns are"
)


def changed(line, text):
    """The good file with another text in one line (the header is line 1)."""
    return "\n".join([*GOOD[: line - 1], text, *GOOD[line:]])


CONTENTS = {  # name of the mistake -> content of the file, message
    "blank": ("\n \n", f"data.csv is empty: {NO_ROWS}, with a label and pixels"),
    "header only": (GOOD[0] + "\n", f"data.csv has a header and no rows: {NO_ROWS}"),
    "spaces": (
        "\n".join(GOOD).replace(",", " "),
        "data.csv has no column 'label', only 'label p1 p2 p3 p4': the cells of a row must be separated by commas, "
        "semicolons or tabs",
    ),
    "UTF-16 without a mark": (
        "\n".join(GOOD).encode("utf-16-le"),
        "data.csv has no column 'label', only 'l\\x00a\\x00b\\x00e\\x00l\\x00', '\\x00p\\x001\\x00', '\\x00p\\x002\\x00"
        "', '\\x00p\\x003\\x00', '\\x00p\\x004\\x00': it looks like UTF-16 without a byte order mark; save it as UTF-8",
    ),
    "half of a UTF-16 file": (
        "\n".join(GOOD).encode("utf-16")[:-1],
        "data.csv is not UTF-16 text (byte 0x34): save it as UTF-8 or, if it is compressed, let its name end in .gz, "
        ".xz or .bz2",
    ),
    "no label": (
        "\n".join(GOOD).replace("label", "Kind"),
        "data.csv has no column 'label', only 'Kind', 'p1', 'p2', 'p3', 'p4': set data.label to the name of the "
        "label's column",
    ),
    "another label": (
        "\n".join(GOOD).replace("label", "Class"),
        "data.csv has no column 'label', only 'Class', 'p1', 'p2', 'p3', 'p4': set data.label=Class",
    ),
    "one-hot": (
        "p1,p2,p3,p4,cat,dog\n" + "1,2,3,4,0,1\n5,6,7,8,1.0,0.0\n" * 6,
        "data.csv has no column 'label', only 'p1', 'p2', 'p3', 'p4', 'cat', ... (6): one of these is 1 in each row, "
        "so set data.label=[cat,dog]",
    ),
    "one pixel": (
        "id,label\n1,b\n2,a\n",
        "data.csv has one pixel column at most: is 'id' a file name? Set data.image=id, and data.suffix=.jpg if the "
        "names lack it; for images of one pixel set data.height=1 data.width=1",
    ),
    "no header": (
        "\n".join(GOOD[1:]),
        "data.csv has no column 'label', only '0', '1', '2', '3', '4': if it has no header, set data.header=false "
        "and data.label=0 (the number of the label's column)",
    ),
    "row length, after blank lines": (
        changed(7, "\n\n0,1,2,3,4,5"),
        "line 9 of data.csv has 6 values; 5 expected (label and 4 pixels)",
    ),
    "an empty label": (changed(7, "NaN,1,2,3,4"), "line 7 of data.csv has no label: fill it in or remove the line"),
    "fractional label": (
        changed(7, "1.5,1,2,3,4"),
        "label 1.5 in line 7 of data.csv is fractional; labels are text or whole numbers: is data.label the right "
        "column?",
    ),
    "empty pixel": (changed(7, "0,1,2,3,"), f"line 7 of data.csv, column 'p4': '' is empty; {PIXEL}"),
    "text as pixel": (
        changed(7, "0,1,x,3,4"),
        f"line 7 of data.csv, column 'p2': 'x' is not a number; {PIXEL}; if it names an image file, set data.image to "
        "that column",
    ),
    "nan": (changed(7, "0,nan,2,3,4"), f"line 7 of data.csv, column 'p1': 'nan' is not finite; {PIXEL}"),
    "negative": (changed(7, "0,1,2,-1,4"), f"line 7 of data.csv, column 'p3': '-1' is outside 0 to 255; {PIXEL}"),
    "too large": (changed(7, "0,1,2,256,4"), f"line 7 of data.csv, column 'p3': '256' is outside 0 to 255; {PIXEL}"),
    "fractional": (changed(7, "0,1,2,2.5,4"), f"line 7 of data.csv, column 'p3': '2.5' is fractional; {PIXEL}"),
    "scaled": (
        changed(7, "0,1,0.0,0.25,0"),
        f"line 7 of data.csv, column 'p3': '0.25' is fractional; {PIXEL}; the line looks scaled to 0..1: multiply the "
        "pixels by 255",
    ),
    "no square": ("label,p1,p2\n0,1,2\n", f"data.csv has 2 pixel columns, {NOT_SQUARE} 'label', 'p1', 'p2'"),
    "no pixels": ("label\n0\n", f"data.csv has 0 pixel columns, {NOT_SQUARE} 'label'"),
    "latin-1": (
        "label,p1,p2,p3,p4\nhibou à,1,2,3,4\n".encode("latin-1"),
        "data.csv is not UTF-8 text (byte 0xe0): save it as UTF-8 or, if it is compressed, let its name end in .gz, "
        ".xz or .bz2",
    ),
}
OPTIONS = {  # name of the mistake -> options for the good file, message
    "no such column": (
        {"label": "kind"},
        "data.csv has no column 'kind', only 'label', 'p1', 'p2', 'p3', 'p4': set data.label=label",
    ),
    "a name without a header": (
        {"header": False},
        "data.header=false, so data.label must be a column number from 0 to 4, got 'label'",
    ),
    "column number": (
        {"header": False, "label": 5},
        "data.header=false, so data.label must be a column number from 0 to 4, got 5",
    ),
    "a header after all": (
        {"header": False, "label": 0},
        f"line 1 of data.csv, column '1': 'p1' is not a number; {PIXEL}; if line 1 names the columns, set "
        "data.header=true",
    ),
    "classes in one text": (
        {"classes": "cat,dog,owl"},
        "data.classes must be a list of different names, such as [cat,dog], got 'cat,dog,owl'",
    ),
    "a label twice": (
        {"label": ["p1", "p1"]},
        "data.label=['p1', 'p1'] must be a column, or a list of different columns, one for each class",
    ),
    "no one-hot label": (
        {"label": ["p1", "p2"]},
        "line 2 of data.csv has 1, 2 in the columns of the labels: one must be 1 and the others 0",
    ),
    "the label as id": ({"id": "label"}, "data.id=label is the column of the label: name another column of data.csv"),
    "no such id": (
        {"id": "name"},
        "data.csv has no column 'name', only 'label', 'p1', 'p2', 'p3', 'p4': set data.id to the name of the id's "
        "column",
    ),
    "a class twice": (
        {"classes": ["cat", "dog", "cat"]},
        "data.classes must be a list of different names, such as [cat,dog], got ['cat', 'dog', 'cat']",
    ),
    "unknown label": (
        {"classes": ["cat", "dog"]},
        "label 2 in line 4 of data.csv is not a class; it must be a number from 0 to 1 or one of 'cat', 'dog': correct "
        f"it, or {CLASSES}",
    ),
    "unknown number": (
        {"classes": [str(i) for i in range(1, 12)]},
        "label 0 in line 2 of data.csv is not a class; it must be one of '1', '2', '3', '4', '5', '6', '7', '8', '9', "
        f"'10', ... (11): correct it, or {CLASSES}",
    ),
    "wrong size": (
        {"height": 3, "width": 2},
        "data.csv has 4 pixel columns; data.height=3 x data.width=2 needs 6 (gray) or 18 (RGB)",
    ),
    "two channels": ({"channels": 2}, "data.channels must be 1 (gray) or 3 (RGB), got 2"),
    "height alone": (
        {"height": 2},
        "got data.height=2 and data.width=None: give both or, for square images, neither",
    ),
    "no height": ({"height": 0, "width": 2}, "data.height=0 must be a whole number of at least 1, or null"),
}
CASES = {name: (content, {}, text) for name, (content, text) in CONTENTS.items()}
CASES |= {name: ("\n".join(GOOD), options, text) for name, (options, text) in OPTIONS.items()}


@pytest.mark.parametrize("name", CASES)
def test_messages(tmp_path, name):
    content, options, message = CASES[name]
    (tmp_path / "data.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        csv_file.load(tmp_path / "data.csv", **options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("data.csv.gz", b"label,p1\n", r"Not a gzipped file \(b'la'\)"),
        ("data.csv.gz", gzip.compress("\n".join(GOOD).encode(), mtime=0)[:-9], "Compressed file ended before .*"),
        ("data.csv.xz", b"label,p1\n", "Input format not supported by decoder"),
    ],
)
def test_a_broken_compressed_file(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    rule = "it must be a whole CSV file, plain or compressed as its name says"
    with pytest.raises(InputError, match=rf"^{name} cannot be read \({reason}\): {rule}$"):
        csv_file.load(tmp_path / name)


def test_paths_that_are_not_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, message in {
        "": "data.path is empty: set it to your CSV file",
        "data.csv": f"there is no file data.csv (relative to {tmp_path}): set data.path to your CSV file",
        str(tmp_path): f"{tmp_path} is a folder: name a CSV file in it",
    }.items():
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            csv_file.load(path)


def test_the_test_file_needs_the_same_columns(tmp_path):
    (tmp_path / "data.csv").write_text("\n".join(GOOD))
    (tmp_path / "test.csv").write_text("label,p1\n0,1\n")
    message = (
        "test.csv has no column 'p2', a pixel of data.csv: it must have the pixel columns of data.csv, in any order"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        csv_file.load(tmp_path / "data.csv", test_path=tmp_path / "test.csv")


def test_a_label_can_be_an_index_only_if_names_are_given(tmp_path):
    (tmp_path / "data.csv").write_text("\n".join(GOOD[:1] + ["cat,1,2,3,4", "dog,1,2,3,4"] * 3))
    (tmp_path / "test.csv").write_text("\n".join(GOOD[:2]))
    message = r"^label 0 in line 2 of test.csv is not a class; it must be one of 'cat', 'dog':"
    with pytest.raises(InputError, match=message):
        csv_file.load(tmp_path / "data.csv", test_path=tmp_path / "test.csv")
    assert len(csv_file.load(tmp_path / "data.csv", test_path=tmp_path / "test.csv", classes=["cat", "dog"]).test) == 1


@pytest.mark.parametrize(
    "cell", ["1_2", "23\u7714", "23\U0001f4a9", "23\U00080000", "\u0663", "\uff11", "\xb2", "1\xa0"]
)
@pytest.mark.parametrize("label", ["cat", "süß", '"su, \u0663"'])
def test_only_ascii_digits_are_pixels(tmp_path, cell, label):
    """numpy's reader takes other characters for digits, or reads outside of its table of digits."""
    for k in (1, 3):  # before and after the label
        row = ["1", "2", "3"]
        row[k - 1 : k] = [label, cell] if k == 1 else [cell, label]
        header = ["a", "b", "c"]
        header.insert(row.index(label), "label")
        (tmp_path / "data.csv").write_text("\n".join([",".join(header), *[",".join(row)] * 9]))
        message = rf"^line 2 of data.csv, column '[abc]': {re.escape(repr(cell))} is not a number; "
        with pytest.raises(InputError, match=message):
            csv_file.load(tmp_path / "data.csv")
