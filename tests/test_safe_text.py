import csv
import io
import json
import logging

import pandas as pd
import pytest
from helpers import TINY

from tuner import InputError, output
from tuner.analysis import paired
from tuner.runs.run import write_table
from tuner.safe_text import Formatter, cell, from_cell, printable

EVIL = "\x1b[2J\x9b31m\u202egpj.\x07\n"
ESCAPED = r"\x1b[2J\x9b31m\u202egpj.\x07\n"


@pytest.mark.parametrize("text", ["cat", "süß", "猫", "👩‍🔬", "a b", "قط", "it's", "C:\\x"])
def test_names_stay_as_they_are(text):
    assert printable(text) == cell(text) == from_cell(cell(text)) == text


def test_what_a_terminal_may_obey_is_escaped():
    assert printable(EVIL) == ESCAPED
    assert str(InputError(f"class {EVIL!s} is not known")) == f"class {ESCAPED} is not known"
    record = logging.LogRecord("x", logging.INFO, "", 0, "class %s\nnext", (EVIL.strip(),), None)
    assert Formatter("%(message)s").format(record) == f"class {ESCAPED[:-2]}\nnext"


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@SUM(A1)", " =1", "-1+1", "=cmd|' /C calc'!A0", "'tis", "''"])
def test_a_formula_begins_with_an_apostrophe_and_is_read_back(text):
    assert cell(text) == f"'{text}"
    assert from_cell(cell(text)) == text


@pytest.mark.parametrize("value", ["-1", "+3", "1e-3", "-.5", "-1.5E+10", -1, -1.5, None, True])
def test_numbers_stay_numbers(value):
    assert cell(value) is value


def test_tables_for_spreadsheets(tmp_path, capsys):
    rows = [["label", "=head"], ["=1+1", -1.5], [EVIL, "-2"], ["\tx", 3]]
    write_table(tmp_path / "x.csv", rows)
    written = [["label", "'=head"], ["'=1+1", "-1.5"], [ESCAPED[:-2] + "\n", "-2"], [r"\tx", "3"]]
    assert list(csv.reader(io.StringIO((tmp_path / "x.csv").read_text()))) == written
    frame = pd.DataFrame({"a": ["=1+1", EVIL], "=b": [-1.0, 2.0]})
    output.print_csv(frame)
    assert list(csv.reader(io.StringIO(capsys.readouterr().out))) == [
        ["a", "'=b"],
        ["'=1+1", "-1.0"],
        [ESCAPED[:-2] + "\n", "2.0"],
    ]


def test_json_is_read_back_exactly_and_harmless(capsys):
    output.print_json({"class": EVIL})
    out = capsys.readouterr().out
    assert out.isascii()
    assert printable(out.replace("\n", "")) == out.replace("\n", "")
    assert json.loads(out) == {"class": EVIL}


def test_on_a_terminal_and_a_page(tmp_path, capsys):
    frame = pd.DataFrame({f"k{EVIL}": [f"<b>{EVIL}</b>"]})
    output.terminal(frame)
    output.print_text(f"a {EVIL}")
    page = output.html_table(frame, tmp_path) + output.html_text(EVIL)
    for text in (capsys.readouterr().out, page):
        assert not set("\x1b\x9b\x07\u202e") & set(text)
        assert r"\x1b[2J" in text
    assert "<b>" not in page


def test_a_run_with_such_classes(command, call, tmp_path):
    """Class names of a file that somebody else made: in the log, on the terminal, in tables, in plots."""
    names = ["=1+1", "\x1b[31mred", "'tis $\\frac{", "x" * 300, "-1", "\u202egpj"]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerow(["label", *range(64)])
        csv.writer(file).writerows([name, *[40 * k + i] * 64] for k, name in enumerate(names) for i in range(8))
    code, said = command(*TINY, "data=csv", "data.path=data.csv", "hydra.run.dir=a", "epochs=1", "class_weights=null")
    assert code == 0, said
    for path in (tmp_path / "a").glob("*.csv"):
        assert printable(path.read_text().replace("\n", "")) == path.read_text().replace("\n", "")
    rows = list(csv.DictReader((tmp_path / "a" / "predictions.csv").read_text().splitlines()))
    assert {from_cell(row["label"]) for row in rows} == {printable(name) for name in names}
    code, table, log = call("evaluate", "a")
    assert code == 0
    for text in (said, table, log, (tmp_path / "a" / "train.log").read_text()):
        assert printable(text.replace("\n", "").replace("\r", "")) == text.replace("\n", "").replace("\r", "")
    assert r"\x1b[31mred" in table
    both = paired.on_the_same_images("a", "a")
    assert "=1+1" in set(both["classes"]["class"])
