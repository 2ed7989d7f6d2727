"""Tables on the terminal, and pages in a real browser."""

import io
import re
import signal
import sys
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from test_runs import EPOCHS, HEADER, RESULT, make

from tuner import compare
from tuner import output as present


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def page(monkeypatch):
    """Writes the page of `python -m tuner.compare ARGUMENTS --html`; gives its path."""

    def write(*arguments, out="comparison"):
        monkeypatch.setattr(sys, "argv", ["tuner.compare", *arguments, "--html", "--out", out])
        compare.main()
        return Path(out).absolute() / "compare.html"

    return write


def test_a_command_leaves_the_signals_of_the_process_as_they_were(call):
    before = signal.getsignal(signal.SIGPIPE)  # its default action would end the process at any pipe or socket
    assert call("compare", "nowhere")[0] == 1
    assert signal.getsignal(signal.SIGPIPE) is before


# Values


@pytest.mark.parametrize(
    ("value", "column", "text"),
    [
        (0.91234567, "val_accuracy", "0.9123"),
        (0.5, "test_accuracy_std", "0.5000"),
        (1.0, "train_loss", "1.0000"),
        (1.23456e-7, "val_loss", "0.0000"),
        (1.23456e-7, "lr", "1.235e-07"),
        (25.0, "epochs", "25"),
        (25.04, "seconds", "25.0"),
        (1e20, "", "1e+20"),
        (123456.7, "", "123457"),
        (100000.5, "value", "100000"),
        (100100.5, "value", "100100"),
        (1234.56, "", "1234.56"),
        (12345678.9, "", "1.23457e+07"),
        (123.456, "", "123.5"),
        (0.52, "fANOVA, validation accuracy", "0.52"),
        (float("inf"), "", "inf"),
        (float("inf"), "val_loss", "inf"),
        (float("nan"), "val_loss", "-"),
        (None, "", "-"),
        (pd.NaT, "started", "-"),
        (pd.Timestamp(2026, 1, 31, 12, 0, 5, 999), "started", "2026-01-31 12:00:05"),
        (True, "", "True"),
        (10**30, "", "1" + "0" * 30),
        ("  two\nlines\t", "", "two lines"),
        ("", "", ""),
        (np.float64(0.25), "lr", "0.25"),
        (np.int64(7), "", "7"),
    ],
)
def test_shown(value, column, text):
    assert present.shown(value, column) == text


def test_near():
    assert present.near(Path.cwd() / "outputs/1") == "outputs/1"
    assert present.near("outputs/1") == "outputs/1"
    assert present.near("/elsewhere/1") == "/elsewhere/1"
    assert present.near("../1") == "../1"


def test_records_are_plain():
    times = [pd.Timestamp(datetime(2026, 1, 31, 12)), pd.NaT]
    frame = pd.DataFrame({"x": [float("inf"), 0.1], "s": ["a", None], "t": times, "b": [True, None], "n": [1, 2]})
    assert present.records(frame) == [
        {"x": None, "s": "a", "t": "2026-01-31T12:00:00", "b": True, "n": 1},
        {"x": 0.1, "s": None, "t": None, "b": None, "n": 2},
    ]
    assert present.records(frame[:0]) == []


# The terminal


def wide(columns):
    """A table of so many columns, the first a path."""
    values = {"folder": ["outputs/2026-11-23/12-00-00-123456"] * 2}
    return pd.DataFrame(values | {f"optimizer.setting{number}": [0.125, None] for number in range(columns)})


def lines(capfd):
    return [line.rstrip() for line in capfd.readouterr().out.splitlines()]


def test_where_the_output_is_no_terminal_a_row_is_a_line(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    present.terminal(wide(30), "Title")
    title, header, *rows = lines(capfd)
    assert title == "Title"
    assert len(header.split()) == 31
    assert [row.split() for row in rows] == [[wide(0).folder[0], *[text] * 30] for text in ("0.125", "-")]


@pytest.fixture
def narrow(monkeypatch, capfd):
    """Prints a table on a terminal of so many characters; gives its lines, without colours."""

    def show(frame, width, **options):
        for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", str(width))):
            monkeypatch.setenv(name, value)
        present.terminal(frame, **options)
        return [re.sub(r"\x1b\[\d*m", "", line) for line in lines(capfd)]

    return show


def test_a_narrow_terminal_gets_stacked_headers_then_shorter_text_then_fewer_columns(narrow):
    folder = wide(0).folder[0]
    assert narrow(wide(2), 90)[0].split() == ["folder", "optimizer.setting0", "optimizer.setting1"]
    stacked = narrow(wide(2), 60)
    assert [line.split() for line in stacked[:2]] == [["optimizer.", "optimizer."], ["folder", "setting0", "setting1"]]
    assert stacked[2].split() == [folder, "0.125", "0.125"]
    short = narrow(wide(2), 50)
    assert short[2].split() == [f"{folder[:11]}...{folder[-12:]}", "0.125", "0.125"]
    fewer = narrow(wide(4), 50)
    assert fewer[2].split() == [short[2].split()[0], "0.125", "0.125"]
    assert " ".join(fewer[4:]) == "not shown, the terminal is too narrow: optimizer.setting2, optimizer.setting3"
    for printed, width in ((stacked, 60), (short, 50), (fewer, 50)):
        assert max(map(len, printed)) <= width


def test_a_column_that_was_asked_for_is_shown_on_any_terminal(narrow):
    assert narrow(wide(9), 50, whole=True)[1].split() == [wide(0).folder[0], *["0.125"] * 9]


def test_long_values_side_by_side_are_folded_and_lose_nothing(narrow):
    printed = narrow(pd.DataFrame({"key": ["weights"], "a": ["/u" * 40], "b": ["/v" * 40]}), 60, fold=True)
    assert max(map(len, printed)) <= 60
    assert [sum(line.count(text) for line in printed) for text in "uv"] == [40, 40]
    assert printed[1].startswith("weights  /u")


def test_in_a_place_of_so_many_characters_no_line_is_broken():
    console = Console(width=60, file=io.StringIO())
    console.print(present.within(wide(15), console.width))
    printed = console.file.getvalue().splitlines()
    assert max(map(len, printed)) <= 60
    assert printed[-2].split()[1:] == ["0.125"] * 3


def test_markup_in_a_value_is_text(capfd):
    present.terminal(pd.DataFrame({"[red]": ["[bold]x[/bold]", "[/]"], ":smile:": [":smile:", "\\[x]"]}), "[link=x]t")
    assert [line.split() for line in lines(capfd)] == [
        ["[link=x]t"],
        ["[red]", ":smile:"],
        ["[bold]x[/bold]", ":smile:"],
        ["[/]", "\\[x]"],
    ]


def test_numbers_are_to_the_right_and_text_to_the_left(capfd):
    present.terminal(pd.DataFrame({"number": [1.5, None, 10], "text": ["a", None, 3], "none": [None] * 3}))
    assert lines(capfd) == [
        "number  text  none",
        "   1.5  a        -",
        "     -  -        -",
        "    10  3        -",
    ]


def test_a_table_without_rows_is_its_header(capfd):
    present.terminal(pd.DataFrame(columns=["folder", "status"]))
    assert lines(capfd) == ["folder  status"]


# The page

NAMES = [
    "a b",
    "é 日本",
    "#1",
    "50%",
    "q?x=1",
    "<b>bold</b",
    "</script><script>x",
    '"it\'s"',
    "a&amp;b",
    "C:",
    "-m",
    "new\nline",
]


class Parsed(HTMLParser):
    """The links, and what would be loaded."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.tags, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        at = dict(attributes)
        self.tags.append(tag)
        if tag == "a":
            self.links.append(at["href"])
        self.loaded += [value for name, value in at.items() if name in ("src", "href", "srcset", "data") and tag != "a"]

    def handle_data(self, data):
        self.text.append(data)


def odd_names(folder="outputs"):
    for number, name in enumerate(NAMES):
        result = RESULT | {"val_accuracy": number / 100}
        make(f"{folder}/{name}", {"who": name, "lr": number}, result, HEADER + EPOCHS)


@pytest.mark.parametrize("out", ["comparison", ".", "a b/#c", "../beside", "outputs"])
def test_links_are_relative_and_arrive(page, out):
    odd_names()
    path = page(out=out)
    parsed = Parsed(path.read_text())
    assert parsed.loaded == ["data:,"]
    assert parsed.tags.count("tr") == len(NAMES) + 1
    assert parsed.tags.count("b") == 0
    assert len(parsed.links) == len(NAMES)
    for address in parsed.links:
        parts = urlsplit(address)
        assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "")
        assert not parts.path.startswith("/")
        assert (path.parent / unquote(parts.path) / "result.json").is_file()


def column(tab, place):
    return tab.eval_on_selector_all(f"tbody tr td:nth-child({place + 1})", "cells => cells.map(cell => cell.innerText)")


def test_in_a_browser_all_names_are_text(page, opened):
    odd_names()
    tab = opened(page())
    shown = [" ".join(f"outputs/{name}".split()) for name in reversed(NAMES)]
    assert column(tab, 0) == shown
    assert tab.title() == "Runs compared"
    legend = tab.eval_on_selector_all(".legendtext", "texts => texts.map(text => text.textContent)")
    assert sorted(" ".join(text.split()) for text in legend) == sorted(shown)


def test_a_click_on_a_header_sorts_and_missing_values_come_last(page, opened):
    values = [10, 9.5, None, "b", "A", -1, 1e-5, "10b", [1], True]
    for number, value in enumerate(values):
        result = RESULT | {"val_accuracy": [0.5, None, 0.25][number % 3], "status": "complete"}
        make(f"outputs/{number}", {"key": value}, result)
    make("outputs/10", {"key": 2}, metrics=HEADER + "1,1,0.5,inf,0.9,0.1,1\n")
    tab = opened(page("--columns", "val_accuracy,key,val_loss,started"))
    headers = tab.eval_on_selector_all("th", "cells => cells.map(cell => cell.innerText)")

    def click(name):
        tab.click(f"th button >> text={name}")
        place = headers.index(name)
        sorts = tab.eval_on_selector_all("th", "cells => cells.map(cell => cell.getAttribute('aria-sort'))")
        assert [sort for at, sort in enumerate(sorts) if at != place] == [None] * (len(headers) - 1)
        return sorts[place], column(tab, place)

    upward = ["0.2500"] * 3 + ["0.5000"] * 4 + ["0.9000"]
    assert click("val_accuracy") == ("ascending", upward + ["-"] * 3)
    assert click("val_accuracy") == ("descending", upward[::-1] + ["-"] * 3)
    assert click("val_accuracy") == ("ascending", upward + ["-"] * 3)
    found = ["-1", "1e-05", "2", "9.5", "10"], ["[1]", "10b", "A", "b", "True"]
    assert click("key") == ("ascending", [*found[0], *found[1], "-"])
    assert click("key") == ("descending", [*found[0][::-1], *found[1][::-1], "-"])
    assert click("val_loss") == ("ascending", ["0.5000"] * 10 + ["inf"])
    assert click("val_loss") == ("descending", ["inf"] + ["0.5000"] * 10)
    _, times = click("started")
    assert times == sorted(times)
    tab.focus("th button")
    tab.keyboard.press("Enter")
    assert tab.get_attribute("th", "aria-sort") == "ascending"


@pytest.mark.parametrize("name", ["a b", "é 日本 #1", "50%?x", "<b>&\"'"])
def test_a_click_on_a_folder_arrives_there(page, opened, name):
    make(f"outputs/{name}", {}, RESULT)
    tab = opened(page(out="pages/mine"))
    tab.click("td a")
    tab.wait_for_url("**/outputs/**")
    assert Path(unquote(urlsplit(tab.url).path)) == Path.cwd() / "outputs" / name
    assert "result.json" in tab.content()


@pytest.mark.parametrize("options", [("--group-by", "who"), ("--over", "lr"), ("--where", "lr<0.5")])
def test_pages_of_groups_and_of_one_run(page, opened, options):
    odd_names()
    tab = opened(page(*options))
    assert len(column(tab, 0)) == (1 if "--where" in options else len(NAMES))


def test_a_page_of_two_runs(page, opened):
    for name in ("a", "</script>"):
        make(name, {"lr": name}, RESULT, HEADER + EPOCHS)
    tab = opened(page("a", "</script>".rstrip("/")))
    first = tab.locator("table").first.locator("tbody tr td:first-child")
    assert sorted(first.all_inner_texts()) == ["</script>", "a"]
    assert tab.locator("h2").all_inner_texts()[:3] == ["Runs", "Config, where they differ", "Results"]
    assert "McNemar's test is not possible" in tab.inner_text("pre")


def test_folders_are_sorted_by_their_numbers(page, opened):
    for number in (10, 9, 1, 100):
        make(f"multirun/s/{number}", {}, RESULT)
    tab = opened(page())
    tab.click("th button >> text=folder")
    assert column(tab, 0) == [f"multirun/s/{number}" for number in (1, 9, 10, 100)]


def test_an_unfinished_write_leaves_the_page_as_it_was(page, monkeypatch):
    make("outputs/1", {}, RESULT)
    path = page()
    before = path.read_text()
    monkeypatch.setattr(present, "html", None)
    with pytest.raises(AttributeError):
        present.page(path, "x", [])
    assert path.read_text() == before
    assert [file.name for file in path.parent.iterdir()] == ["compare.html"]
