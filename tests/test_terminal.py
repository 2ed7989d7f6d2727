"""What a terminal shows while a command works: progress bars, and log lines above them that break between words."""

import io
import logging

import pytest
from tqdm import tqdm

from tuner import terminal


class Tty(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def forty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")


def logged(stream, text):
    handler = terminal.Console(stream)
    handler.emit(logging.LogRecord("tuner", logging.INFO, "", 0, text, (), None))
    return stream.getvalue()


PATH = "/a/folder/with-a-long-name/that-is-longer-than-a-line"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("short", ["short"]),
        ("one two three four five six seven eight nine", ["one two three four five six seven eight", "  nine"]),
        (f"the run is in {PATH}", ["the run is in", f"  {PATH}"]),
        ("best:\n  " + 12 * "four ", ["best:", "  " + " ".join(7 * ["four"]), "    " + " ".join(5 * ["four"])]),
        (f"go on with: python -m tuner.resume {PATH}", [f"go on with: python -m tuner.resume {PATH}"]),  # to be copied
    ],
)
def test_a_terminal_breaks_log_lines_between_words(text, lines):
    assert logged(Tty(), text).splitlines() == lines
    assert logged(io.StringIO(), text) == f"{text}\n"  # a file has it as it is


def test_log_lines_stand_above_the_bar():
    screen = Tty()
    with tqdm(total=2, file=screen, bar_format="{desc} |{bar}|", ncols=40) as bar:
        bar.set_description_str("epoch 1/2")
        before = len(screen.getvalue())
        logged(screen, "a line")
        shown = screen.getvalue()[before:]
    cleared, line, again = shown.partition("a line\n")
    assert line
    assert cleared.strip("\r ") == ""  # the bar was cleared
    assert "epoch 1/2" in again
