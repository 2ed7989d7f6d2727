"""Tables for people and for programs: on the terminal, as CSV and JSON, and on a self-contained web page."""

import html
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pandas as pd
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuner.files import replacing
from tuner.safe_text import HARMFUL, cell, printable, printable_lines
from tuner.terminal import wrapped

if TYPE_CHECKING:
    from plotly.basedatatypes import BaseFigure

LEGIBLE = 20  # characters; longer text may be shortened to this width
WHOLE = 100_000  # characters; no row is longer
TO_FOUR_PLACES = ("accuracy", "loss", "probability", "precision", "f1")  # columns whose names end so have four decimals
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 1200px; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } pre { white-space: pre-wrap }
.scroll { overflow: auto; max-height: 80vh } table { border-collapse: collapse; font-size: 13px }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e6e6e6; text-align: left; white-space: nowrap }
td.number { text-align: right; font-variant-numeric: tabular-nums }
th { position: sticky; top: 0; background: #fff } th button { all: unset; cursor: pointer; font-weight: bold }
th button:focus-visible { outline: 2px solid #0068a8 }
th[aria-sort=ascending] button::after { content: " ▲" } th[aria-sort=descending] button::after { content: " ▼" }
"""
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const th = button.closest("th"), body = th.closest("table").tBodies[0]
  const sign = th.ariaSort === "ascending" ? -1 : 1
  const value = row => row.cells[th.cellIndex].dataset.value
  const kind = value => value === "" ? 2 : isNaN(value) ? 1 : 0  // numbers, text, missing: always last
  const text = new Intl.Collator(undefined, {numeric: true})  // s/9, s/10
  const order = (a, b) => kind(a) - kind(b) || sign * (isNaN(a) ? text.compare(a, b) : a - b)
  body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))))
  for (const other of th.parentNode.cells) other.removeAttribute("aria-sort")
  th.ariaSort = sign > 0 ? "ascending" : "descending"
}
"""


class Terminal(Console):
    """rich's console on standard output. `terminal.command` handles a reader that has gone."""

    def on_broken_pipe(self) -> None:
        """Called in the handler of a BrokenPipeError. rich's own would exit."""
        raise


def shown(value: Any, column: str = "") -> str:
    """A value as text, `-` if missing. Accuracies and losses have 4 decimals, seconds 1, others 4 or 6 digits."""
    if value is None or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        if column.removesuffix("_std").endswith(TO_FOUR_PLACES) and "," not in column:  # "fANOVA, accuracy" is a share
            return f"{value:.4f}"
        if column == "seconds":
            return f"{value:.1f}"
        digits = ".6g" if abs(value) >= 1000 else ".4g"
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else format(value, digits)
    if isinstance(value, pd.Timestamp):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return printable(" ".join(str(value).split()))


def near(path: str | Path) -> str:
    """The path relative to the working folder, if it is below it."""
    return printable(os.path.relpath(path) if Path.cwd() in Path(path).absolute().parents else str(path))


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, including NaN and infinity; bools are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def print_text(text: str) -> None:
    """Print lines of text, without what a terminal may obey. On a terminal long lines are broken between words."""
    text = printable_lines(text)
    print(wrapped(text) if sys.stdout.isatty() else text, flush=True)


def width() -> int:
    """Characters of a line of standard output: the terminal's, or COLUMNS; 80 if neither is known."""
    return Terminal().width


def print_wrapped(text: str) -> None:
    """Print a paragraph in lines of `width()`, broken between words."""
    print_text(textwrap.fill(text, width(), break_long_words=False, break_on_hyphens=False))


def terminal(
    frame: pd.DataFrame, title: str = "", *, width: int | None = None, fold: bool = False, whole: bool = False
) -> list[str]:
    """Print a table without its index. Returns the names of the columns that did not fit.

    Headers are stacked and long text is shortened in its middle before a column is left out, the last one first.
    Numbers are never broken. The columns left out are named, unless `width` is given: then the caller names them.
    width: of the table; default: the terminal's, and no limit if the output is not a terminal.
    fold: break long text over several lines instead of shortening it.
    whole: print rows of any length rather than leave out a column.
    """
    console = Terminal()
    console.width = width or (console.width if console.is_terminal else WHOLE)
    fitted, left_out = _fitted(frame, console.width, fold)
    if left_out and whole:
        console.width = WHOLE
        fitted, left_out = _fitted(frame, WHOLE, fold)
    if title:
        console.print(Text(title, "bold"))
    console.print(fitted)
    if left_out and width is None:
        console.print(Text(f"not shown, the terminal is too narrow: {', '.join(left_out)}"))
    return left_out


def within(frame: pd.DataFrame, width: int) -> Table:
    """A table as `terminal` prints it, for a place of `width` characters."""
    return _fitted(frame, width, fold=False)[0]


def _fitted(frame: pd.DataFrame, limit: int, fold: bool) -> tuple[Table, list[str]]:
    """A table of at most `limit` characters a line, and the columns left out."""
    headers = [printable(str(name)) for name in frame]
    cells = [[shown(value, str(name)) for value in frame.iloc[:, i]] for i, name in enumerate(frame)]
    numbers = [_is_numeric(column, texts) for (_, column), texts in zip(frame.items(), cells, strict=True)]
    needed = [max(map(cell_len, texts), default=0) for texts in cells]
    stacked = [_stacked(header, size) for header, size in zip(headers, needed, strict=True)]
    least = [
        max(_size(h), n if number else min(n, LEGIBLE)) for h, n, number in zip(stacked, needed, numbers, strict=True)
    ]
    count = max([1, *(n for n in range(1, len(least) + 1) if _total(least[:n]) <= limit)]) if least else 0
    for names in (headers, stacked):
        sizes = [max(_size(name), size) for name, size in zip(names[:count], needed, strict=False)]
        if _total(sizes) <= limit:
            break
    while _total(sizes) > limit and (wide := [i for i in range(count) if sizes[i] > least[i]]):
        sizes[max(wide, key=lambda i: sizes[i])] -= 1
    printed = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, number, size in zip(names, numbers, sizes, strict=False):
        printed.add_column(
            Text(name),
            justify="right" if number else "left",
            overflow="fold",
            max_width=size,
            vertical="top" if fold else "bottom",
        )
    for row in zip(*cells[:count], strict=True):
        texts = row if fold else [_shortened(text, size) for text, size in zip(row, sizes, strict=True)]
        printed.add_row(*map(Text, texts))
    return printed, [str(name) for name in frame.columns[count:]]


def _is_numeric(column: pd.Series, texts: Sequence[str]) -> bool:
    return all(is_number(value) or text == "-" for value, text in zip(column, texts, strict=True))


def _total(sizes: Sequence[int]) -> int:
    return sum(sizes) + 2 * (len(sizes) - 1)


def _size(header: str) -> int:
    return max(map(cell_len, header.split("\n")))


def _stacked(header: str, size: int) -> str:
    """A header over several lines, broken after its dots, spaces and underscores, for a column of this size."""
    parts = re.findall(r".+?(?:[. _](?![. _])|$)", header) or [header]
    size = max(size, *(cell_len(part) for part in parts))
    lines = [""]
    for part in parts:
        if lines[-1] and cell_len(lines[-1] + part) > size:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _shortened(text: str, size: int) -> str:
    """The text without its middle, if it is longer: long names often share their beginnings."""
    if cell_len(text) <= size:
        return text
    head = (size - 3) // 2
    return set_cell_size(text, head) + "..." + set_cell_size(text[::-1], size - 3 - head)[::-1]


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON: None for missing and non-finite values, times as ISO 8601."""
    return [{str(key): _plain(value) for key, value in row.items()} for row in frame.to_dict("records")]


def _plain(value: Any) -> Any:
    if isinstance(value, pd.Timestamp):
        return value.isoformat()
    return None if value is pd.NaT or (isinstance(value, float) and not math.isfinite(value)) else value


def print_json(value: Any) -> None:
    """Print a value as indented JSON. Raises ValueError for NaN and infinity, which `records` turns into None."""
    lines = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).split("\n")
    print("\n".join(HARMFUL.sub(lambda found: f"\\u{ord(found[0]):04x}", line) for line in lines))


def print_csv(frame: pd.DataFrame) -> None:
    """Print a table as CSV, without its index."""
    cells(frame).to_csv(sys.stdout, index=False)


def cells(frame: pd.DataFrame) -> pd.DataFrame:
    """A table for a CSV file: see `tuner.safe_text.cell`."""
    frame = frame.copy()
    for name in [name for name in frame if frame[name].dtype.kind == "O"]:
        frame[name] = frame[name].map(cell)
    return frame.rename(columns=cell)


def page(path: Path, title: str, sections: Sequence[tuple[str, str]], *, with_figures: bool = True) -> None:
    """Write a web page of sections, (heading, HTML) each. It contains its scripts: it opens without a network.

    with_figures: whether it has figures of plotly, whose script is 5 MB.
    """
    plotly = ""
    if with_figures:
        from plotly.offline import get_plotlyjs  # slow to import, and predict and evaluate write no page

        plotly = f"<script>{get_plotlyjs()}</script>"
    parts = [f"<h2>{html.escape(heading)}</h2>\n{body}" for heading, body in sections]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    head += '<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width">'
    text = "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head>{head}{plotly}</head>',
            f"<body><h1>{html.escape(title)}</h1>",
            *parts,
            f"<script>{SCRIPT}</script></body></html>\n",
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


def html_text(text: str) -> str:
    """Preformatted text, escaped, as a part of a web page."""
    return f"<pre>{html.escape(printable_lines(text))}</pre>"


def html_figure(figure: "BaseFigure") -> str:
    """A plotly figure as a part of a web page."""
    figure.update_layout(title=None, template="plotly_white", margin={"t": 30})  # the section has a heading
    options = {"displaylogo": False, "responsive": True}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=options))


def html_table(frame: pd.DataFrame, folder: Path) -> str:
    """A table that can be sorted by clicking. Values in its column `folder` are links, for a page in `folder`."""
    head = "".join(f'<th scope="col"><button>{html.escape(printable(str(name)))}</button></th>' for name in frame)
    body = "\n".join(
        "<tr>" + "".join(_cell(value, str(name), folder) for name, value in zip(frame, row, strict=True)) + "</tr>"
        for row in frame.itertuples(index=False)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _cell(value: Any, column: str, folder: Path) -> str:
    text = html.escape(shown(value, column))
    if column == "folder" and text != "-":
        text = f'<a href="{html.escape(link(value, folder))}">{text}</a>'
    if is_number(value):
        number = "" if text == "-" else str(value).replace("inf", "Infinity")  # as JavaScript spells it
        return f'<td class="number" data-value="{number}">{text}</td>'
    return f'<td data-value="{"" if text == "-" else html.escape(printable(str(value)))}">{text}</td>'


def link(path: str | Path, folder: Path) -> str:
    """The relative URL of a file or folder, for a page in `folder`."""
    return quote(Path(os.path.relpath(path, folder)).as_posix())
