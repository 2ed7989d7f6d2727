"""Tables for people and for programs: on the terminal, as CSV and JSON, and on a self-contained web page."""

import html
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuner.files import replacing
from tuner.safe_text import HARMFUL, cell, printable, printable_lines

if TYPE_CHECKING:
    from plotly.basedatatypes import BaseFigure

LEGIBLE = 10  # characters; longer text may be folded to this width
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
    """Print lines of text, without what a terminal may obey."""
    print(printable_lines(text), flush=True)


def terminal(frame: pd.DataFrame, title: str = "") -> None:
    """Print a table without its index.

    If the output is not a terminal, or too narrow for the columns, each row is one line of any length.
    """
    console = Terminal()
    if not console.is_terminal or _too_wide(frame, console.width):
        console = Terminal(width=WHOLE)
    if title:
        console.print(Text(title, "bold"))
    console.print(table(frame))


def within(frame: pd.DataFrame, width: int) -> Table | Text:
    """A table as `terminal` prints it, for a place of `width` characters; long lines are wrapped there."""
    if not _too_wide(frame, width):
        return table(frame)
    console = Console(width=WHOLE, file=io.StringIO(), record=True)
    console.print(table(frame))
    return Text("\n".join(line.rstrip() for line in console.export_text().splitlines()))


def _too_wide(frame: pd.DataFrame, width: int) -> bool:
    """Whether columns would be narrower than LEGIBLE."""
    longest = [max(len(str(name)), *(len(shown(x, str(name))) for x in column), 0) for name, column in frame.items()]
    return sum(min(length, LEGIBLE) + 2 for length in longest) > width


def table(frame: pd.DataFrame) -> Table:
    """A frame as rich prints it, without its index; numbers are aligned right."""
    printed = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, column in frame.items():
        numbers = all(is_number(value) or shown(value) == "-" for value in column)
        printed.add_column(Text(printable(str(name))), justify="right" if numbers else "left", overflow="fold")
    for row in frame.itertuples(index=False):
        printed.add_row(*(Text(shown(value, str(name))) for name, value in zip(frame, row, strict=True)))
    return printed


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
