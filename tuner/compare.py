"""Compare run folders: `python -m tuner.compare [FOLDER...]`."""

import argparse
import html
import logging
import operator
import os
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tuner import InputError, arguments, artifacts, output, terminal
from tuner.analysis import paired, run_groups
from tuner.analysis.run_groups import several
from tuner.rules import as_number
from tuner.runs import readings
from tuner.runs import table as runs

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

log = logging.getLogger("tuner.compare")
FEWEST = 5  # of a data set
NAMED = 12  # columns that are not shown
NOT_OF_THE_MODEL = (  # keys that do not affect the model
    *("name", "study", "study_mixed", "cache_dir", "cache_limit", "data.cache_limit", "test", "plots"),
    *("model.budget", "model.screen"),
    *("objective", "config.device"),
    *("final.seeds", "final.ensemble", "final.epochs", "final.temperature"),
)
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    **{"<=": operator.le, ">=": operator.ge, "!=": operator.ne, "==": operator.eq},
    **{"<": operator.lt, ">": operator.gt, "=": operator.eq},
}
CONDITION = re.compile(rf"\s*(.+?)\s*({'|'.join(OPERATORS)})\s*(.*?)\s*")
QUOTES = re.compile(r"[\s\"']")
SMALLER_IS_BETTER = ("loss", "ece", "ece_calibrated", "std")  # ends of the names of such scores


def differing(frame: pd.DataFrame) -> list[str]:
    """The config keys in which the runs of a table differ, except those that do not affect the model.

    A reference that all runs have, such as data.seed: ${seed}, is not listed separately.
    """
    keys = [str(key) for key in frame if key not in ("folder", "started", *NOT_OF_THE_MODEL)]
    keys = [key for key in keys if not runs.is_result(key) and not f"{key}.".startswith("logger.")]
    written = frame.loc[frame.started.notna()]  # a run without a config differs in nothing
    resolved = runs.resolved(written)
    return [key for key in keys if several(written[key]) and several(resolved[key])]


def where(frame: pd.DataFrame, condition: str) -> pd.DataFrame:
    """The rows that meet a condition, such as `optimizer.lr<1e-3`, `status=complete` or `grad_clip=null`.

    Numbers are compared as numbers, times as times, and everything else as text, by = and != only.
    Raises InputError for an invalid condition.
    """
    if not (match := CONDITION.fullmatch(condition)):
        raise InputError(f"--where {condition!r} must be KEY, one of {' '.join(OPERATORS)}, and a value")
    key, sign, text = match.groups()
    column, compare, equality = frame[known(frame, key)], OPERATORS[sign], sign in ("=", "==", "!=")
    if equality and text.lower() in ("", "~", "null", "nan"):
        rows = column.isna() == (sign != "!=")
    elif column.dtype.kind == "M":
        try:
            rows = compare(column, pd.Timestamp(text))
        except (ValueError, TypeError) as error:
            raise InputError(f"--where {condition!r}: {text!r} is not a time; write it as 2026-01-31T12:00") from error
    elif (number := _number(text)) is not None:
        rows = compare(pd.to_numeric(column, errors="coerce"), number)
    elif equality:
        words = column.astype(str).str.lower()  # true, True
        if text[0] in "[{":  # lists are JSON: ignore its spaces and quotes
            words, text = words.str.replace(QUOTES, "", regex=True), QUOTES.sub("", text)
        rows = compare(words, text.lower())
    else:
        raise InputError(f"--where {condition!r}: {sign} compares numbers, and {text!r} is not a number; use = or !=")
    return frame[rows.astype(bool)]


def known(frame: pd.DataFrame, key: str) -> str:
    """The key, if the table has it. If not, raises InputError with the most similar ones."""
    if key not in frame:
        names = [str(name) for name in frame]
        near = [name for name in names if name.endswith(f".{key}")] or get_close_matches(key, names, n=3)
        near = near or [name for name in names if name != "folder"]
        raise InputError(f"no run has {key}; known keys: {', '.join(near)}")
    return key


def _number(text: str) -> float | None:
    try:
        return as_number(text)
    except ValueError:
        return None


def ordered(frame: pd.DataFrame, key: str, reverse: bool = False) -> pd.DataFrame:
    """The rows sorted by a column: the best score, the latest start, or else the lowest value first, missing ones last.

    Numbers come before text.
    """
    column, ascending = frame[known(frame, key)], highest_first(key) == reverse
    if column.dtype != object:
        return frame.loc[column.sort_values(ascending=ascending, kind="stable").index]
    number = pd.to_numeric(column, errors="coerce").astype(float)
    by = pd.DataFrame({"missing": column.isna(), "number": number, "text": column.astype(str)})
    return frame.loc[by.sort_values(["missing", "number", "text"], ascending=[True, ascending, ascending]).index]


def highest_first(key: str) -> bool:
    """Whether a column is a score that is better when larger, or the time of the start."""
    score = key.startswith(("train_", "val_", "test_")) and runs.is_result(key)
    return key == "started" or (score and not key.endswith(SMALLER_IS_BETTER))


def grouped(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """A row for each group of complete runs with equal `keys`, the best first.

    `runs` is their number. Each accuracy has its mean, under its own name, and its standard deviation, NAME_std. A
    search's retrained best is left out: it has no validation accuracy.
    """
    complete = frame[(frame.status == "complete") & frame.val_accuracy.notna()]
    measured = [key for key in ("val_accuracy", "test_accuracy") if complete[key].notna().any()]
    parts = complete.groupby([known(frame, key) for key in keys], dropna=False) if keys else None
    rows = []
    for values, part in parts if parts is not None else [((), complete)]:
        row = dict(zip(keys, values, strict=True)) | {"runs": len(part)}
        for key in measured:
            row |= {key: part[key].mean(), f"{key}_std": part[key].std()}
        rows.append(row)
    table = pd.DataFrame(rows, columns=None if rows else [*keys, "runs"])
    return table.sort_values(measured[:1], ascending=False, kind="stable", ignore_index=True) if measured else table


def columns(frame: pd.DataFrame, wanted: Sequence[str] | None, differ: Sequence[str]) -> list[str]:
    """The columns to show: the wanted ones, or the main results and the keys that differ."""
    if wanted:
        return list(dict.fromkeys(["folder", *(known(frame, key) for key in wanted)]))
    results = ["status", "val_accuracy", *(["test_accuracy"] if frame.test_accuracy.notna().any() else [])]
    return ["folder", *results, "epochs", "seconds", *differ]


# Two runs


def pair(a: Path, b: Path) -> dict[str, Any]:
    """Two runs side by side: configs, results, accuracies by class, and whether they differ by more than chance.

    Keys: `a` and `b`, the folders; `config`, `results` and `classes`, tables with columns a and b; `split`, `images`
    and `p_value` of McNemar's test on the images that both have predictions for, None if there are none;
    `test_readings`, lines.
    """
    written = pd.concat([runs.load(folder, resolve=False).head(1) for folder in (a, b)], ignore_index=True)
    if len(written) < 2:
        raise InputError(f"{a} and {b} must both be run folders that can be read")
    frame = runs.resolved(written)
    keys = [str(key) for key in frame if key not in ("folder", "started", "name", "study")]
    keys = [key for key in keys if not runs.is_result(key)]
    config = _side_by_side(frame, [key for key in keys if _differ(written[key]) and _differ(frame[key])])
    results = _side_by_side(frame, [key for key in runs.RESULTS if key != "trial" and frame[key].notna().any()])
    results["difference"] = [_difference(x, y) for x, y in zip(results.a, results.b, strict=True)]
    sides = {"a": str(a), "b": str(b), "config": config, "results": results, "test_readings": test_readings(written)}
    return sides | paired.on_the_same_images(a, b)


def test_readings(frame: pd.DataFrame) -> list[str]:
    """A line for each test split that runs of a table have read: how often it was read on this machine."""
    runs_by_split = frame.test_split.value_counts()
    read = {split: readings.of_split(split) for split in runs_by_split.index}
    named = {split: f"the test split {split} ({n} run{'s' * (n != 1)})" for split, n in runs_by_split.items()}
    return [f"{named[split]} {found}" for split, found in read.items() if found]


def _differ(two: pd.Series) -> bool:
    a, b = (str(None if pd.isna(value) else value) for value in two)  # null counts as missing
    return a != b


def _side_by_side(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    return frame[keys].T.set_axis(["a", "b"], axis=1).rename_axis("key").reset_index().astype(object)


def _difference(a: Any, b: Any) -> float | None:
    return b - a if output.is_number(a) and output.is_number(b) else None


# The command


def main() -> None:
    """Print a table of runs; for exactly two run folders, print their differences instead."""
    args = arguments.compare().parse_intermixed_args()  # options may come anywhere
    if args.top is not None and args.top < 0:
        raise InputError(f"--top {args.top} must be a number of rows, or 0 for all")
    asked = (
        args.where,
        args.columns,
        args.group_by,
        args.over,
        args.sort,
        args.reverse,
        args.wide,
        args.top is not None,
    )
    table_of_runs = any(asked)  # even if there are only two
    args.folders = [str(artifacts.run_folder(folder)) for folder in args.folders]
    two = len(args.folders) == 2 and all(list(runs.find(folder)) == [Path(folder)] for folder in args.folders)
    show = show_pair if two and not table_of_runs else show_runs
    show(args)


def show_runs(args: argparse.Namespace) -> None:
    """Print the runs, or groups of runs, that the options select; write plots and a page on request.

    Raises InputError if there are no runs, and for an unknown key or a malformed condition.
    """
    written = runs.load(*args.folders, resolve=False)
    frame = runs.resolved(written)
    if frame.empty:
        raise InputError(
            "no runs found; python -m tuner.train writes runs to outputs/, and searches with -m to multirun/"
        )
    summary = _summary(frame)
    for condition in args.where:
        frame = where(frame, condition)
    if args.where:
        summary += f"; {len(frame):,} with {' and '.join(args.where)}"
    written = written.loc[frame.index]
    if args.group_by or args.over:
        over = [known(frame, key) for key in args.over or []]
        # By the keys as written: one that refers to one of `over` does not differ.
        rest = [key for key in differing(written) if key not in over]
        table = grouped(frame, args.group_by) if args.group_by else grouped(written, rest)
        chosen = [known(table, str(key)) for key in args.columns or table]
        if args.sort:
            table = ordered(table, args.sort, args.reverse)
        elif args.reverse:
            table = table[::-1]
    else:
        table = ordered(frame, args.sort or "val_accuracy", args.reverse)
        chosen = columns(table, args.columns, differing(written))
    if args.plots or args.html:
        write(args, table.head(args.top or len(table)), chosen, summary)
    if args.csv or args.json:
        top = table.head(args.top or len(table))[chosen]
        output.print_csv(top) if args.csv else output.print_json(output.records(top))
        return
    shown = print_rows(args, table, written, chosen)
    more = f"; {len(table) - shown:,} more with --top 0" if shown < len(table) else ""
    print()
    for line in (f"{summary}{more}", *test_readings(written)):
        output.print_wrapped(line)


def print_rows(args: argparse.Namespace, table: pd.DataFrame, written: pd.DataFrame, chosen: list[str]) -> int:
    """Print the rows of a table as the options say. The number of rows printed.

    written: the runs, with references.   chosen: the columns that were asked for, or all.
    """
    top = table.head((arguments.ROWS if args.top is None else args.top) or len(table))
    if args.columns or args.group_by or args.wide:
        rows = top.assign(folder=top.folder.map(output.near)) if "folder" in top else top
        output.terminal(rows[chosen], whole=True)
        return len(rows)
    return print_over(top) if args.over else print_by_data_set(table, written.loc[table.index], args.top)


def print_over(table: pd.DataFrame) -> int:
    """Print groups of runs, as wide as the terminal, and which columns are not shown. The number of groups."""
    place = list(table).index("runs")
    keys = run_groups.ranked_by_variety(table.iloc[:, :place])
    _print_hidden(output.terminal(table[[*table.columns[place:], *keys]], width=output.width()))
    return len(table)


def print_by_data_set(frame: pd.DataFrame, written: pd.DataFrame, top: int | None) -> int:
    """Print a table for each data set, as wide as the terminal, and which columns are not shown. The number of rows.

    frame: runs in order, references resolved.   written: the same with references.   top: rows; 0: all.
    """
    listed = frame.head(top) if top else frame
    groups = run_groups.by_data_set(listed, written.loc[listed.index], differing(written))
    each = max(FEWEST, arguments.ROWS // max(len(groups), 1)) if top is None else len(listed)
    hidden, shown = [], 0
    for group in groups:
        if shown:
            print()
        if len(groups) > 1:
            output.print_wrapped(group.heading)
        if group.common:
            output.print_wrapped(", ".join(group.common))
        rows = group.table.head(each).dropna(axis=1, how="all")
        hidden += [*output.terminal(rows, width=output.width()), *group.paths]
        shown += len(rows)
    _print_hidden(hidden)
    return shown


def _print_hidden(columns: Sequence[str]) -> None:
    names = list(dict.fromkeys(columns))
    if names:
        more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
        print()
        listed = f"{', '.join(names[:NAMED])}{more}"
        output.print_wrapped(f"not shown: {listed}; --wide shows all columns, --columns KEY,... the ones you name")


def show_pair(args: argparse.Namespace) -> None:
    """Print how two runs differ in config, results and accuracy by class, and how significant that is."""
    both = pair(*map(Path, args.folders))
    tables = {name: both[name] for name in ("config", "results", "classes") if both[name] is not None}
    titles = {
        "config": "Config, where they differ" if len(both["config"]) else "Their configs are the same",
        "results": "Results",
        "classes": f"Accuracy by class, on the same {both['images']:,} {both['split']} images",
    }
    if args.plots or args.html:
        written = runs.load(*args.folders, resolve=False)
        frame = runs.resolved(written)
        more = [(titles[name], output.html_table(table, args.out)) for name, table in tables.items()]
        write(args, frame, columns(frame, None, differing(written)), paired.verdict(both), more)
    if args.json:
        output.print_json(both | {name: output.records(table) for name, table in tables.items()})
        return
    if args.csv:
        output.print_csv(pd.concat(tables, names=["table"]).reset_index("table"))
        return
    output.print_text(f"a  {both['a']}\nb  {both['b']}\n")
    for name, frame in tables.items():
        output.terminal(frame, titles[name], fold=True) if len(frame) else print(titles[name])
        print()
    print(paired.verdict(both))
    for line in both["test_readings"]:
        output.print_text(line)


def write(
    args: argparse.Namespace, table: pd.DataFrame, chosen: list[str], summary: str, more: Sequence[tuple[str, str]] = ()
) -> None:
    """Write the plots and the page for the rows of a table.   more: sections of the page, (heading, HTML) each."""
    if table.empty:
        raise InputError("--plots and --html need a run, and no run meets the conditions")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out} can't be a folder: {error.strerror}") from error
    from tuner import plots  # slow to import

    names = _labels(table)
    curves = _curves(table, names) if "folder" in table else {}
    if args.plots:
        if curves:
            accuracy = table.val_accuracy.set_axis(names)
            best = str(accuracy.idxmax()) if accuracy.notna().any() else None
            plots.save(plots.curves(curves, best), args.out / "curves.png")
        measured = [f"{split}_accuracy{what}" for split in ("val", "test") for what in ("", "_std")]
        bars = table.set_axis(names)[[key for key in measured if key in table]].dropna(how="all")
        if "folder" not in table:
            bars["count"] = table.runs.set_axis(names)
        plots.save(plots.bars(bars), args.out / "bars.png")
        log.info("pictures: %s", args.out)
    if args.html:
        path = args.out / "compare.html"
        sections = [("Runs", output.html_text(summary) + output.html_table(table[chosen], args.out)), *more]
        if curves:
            sections.append(("Validation accuracy by epoch", output.html_figure(_interactive(curves))))
        output.page(path, "Runs compared", sections)
        log.info("page: %s", path)


def _labels(table: pd.DataFrame) -> list[str]:
    """The names of rows in plots: the values that a group has in common, or the end of the folder's path."""
    if "folder" in table:
        folders = [Path(folder).absolute() for folder in table.folder]
        common = Path(os.path.commonpath([folder.parent for folder in folders]))
        above = common if common == Path.cwd() else common.parent
        return [str(folder.relative_to(above)) for folder in folders]
    keys = [str(key) for key in table][: list(table).index("runs")]
    rows = table[keys].itertuples(index=False)
    return [", ".join(map("{} {}".format, keys, map(output.shown, row))) or "all runs" for row in rows]


def _curves(table: pd.DataFrame, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    curves = {}
    for name, folder in zip(names, map(Path, table.folder), strict=True):
        try:
            if (folder / "metrics.csv").exists():
                curves[name] = runs.read_metrics(folder)[["epoch", "val_accuracy", "val_loss"]].astype(float)
        except (OSError, ValueError, KeyError) as error:
            log.warning("no curve for %s: metrics.csv: %s", folder, error)
    return {name: curve for name, curve in curves.items() if curve.val_accuracy.notna().any()}


def _interactive(curves: dict[str, pd.DataFrame]) -> "Figure":
    import plotly.graph_objects as go  # slow to import, and only the page needs it

    names = {name: html.escape(name, quote=False) for name in curves}  # plotly reads tags
    lines = [go.Scatter(x=curve.epoch, y=curve.val_accuracy, name=names[name]) for name, curve in curves.items()]
    return go.Figure(lines, go.Layout(xaxis_title="epoch", yaxis_title="validation accuracy", template="plotly_white"))


def _summary(frame: pd.DataFrame) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in frame.status.value_counts().items())
    retrained = ((frame.status == "complete") & frame.val_accuracy.isna()).sum()
    if retrained:
        counts += f" ({retrained} retrained and tested, without validation: --where val_accuracy=null)"
    return f"{len(frame):,} run{'s' * (len(frame) != 1)}: {counts}"


if __name__ == "__main__":
    terminal.command(main)
