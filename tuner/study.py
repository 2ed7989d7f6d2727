"""Inspect a study: `python -m tuner.study [STUDY]`."""

import argparse
import importlib.util
import logging
import shlex
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from matplotlib.figure import Figure
from optuna import visualization
from optuna.trial import TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from tuner import InputError, arguments, artifacts, output, plots, terminal
from tuner.analysis import loaded_study
from tuner.analysis.advice import advice, cannot_be_told_apart, certainty
from tuner.analysis.loaded_study import LoadedStudy
from tuner.files import subfolder
from tuner.safe_text import printable
from tuner.sweep import budget, storage
from tuner.sweep.optuna_private import study_id
from tuner.sweep.progress import training
from tuner.sweep.settings import MIXED
from tuner.sweep.stopping import duration

log = logging.getLogger("tuner.study")
WATCHED_EVERY = 2.0  # seconds
MAPPED = 200  # largest number of trials for contours on the page: they grow with its square; browsers can't open 1,000
PAIRED = 4  # parameters drawn against each other on the page


def main() -> None:
    """Print a study as tables, CSV or JSON, write its figures, or follow its running sweep."""
    parser = arguments.study()
    args = parser.parse_args()
    if (args.plots or args.html) and (args.best or args.watch or args.dashboard):
        parser.error("--plots and --html can't be combined with --best, --watch or --dashboard")
    if args.top < 0:
        raise InputError(f"--top {args.top} must be a number of trials, or 0 for all")
    if args.dashboard:
        dashboard(args)
        return
    if args.watch:
        watch(args)
        return
    s = loaded_study.load(args.study, args.storage)
    if args.fetch:
        s = loaded_study.fetched(s)
    if args.best:
        print(as_command(s.overrides(_the_best(s))))
        return
    if args.plots or args.html:
        write(s, args.out or s.folder, args.plots, args.html)
    if args.csv:
        output.print_csv(s.trials)
    elif args.json:
        output.print_json(as_json(s))
    else:
        show(s, args.top, output.Terminal())


def _the_best(s: LoadedStudy) -> optuna.trial.FrozenTrial:
    if s.best is None:
        several = f"it has {len(s.goals)} objectives, and trials {s.front} are on its Pareto front"
        raise InputError(f"the study has no single best trial: {several if s.front else 'none is complete'}")
    return s.best


def as_command(words: list[str]) -> str:
    """Words for a shell. Raises InputError for characters that a terminal might obey."""
    text = shlex.join(words)
    if text != printable(text):
        raise InputError(f"the trial's overrides contain control characters: {text}")
    return text


# On the terminal


def show(s: LoadedStudy, top: int, console: Console) -> None:
    """Print the headline, tables, advice, and the command that repeats the best trial.   top: trials listed; 0: all."""
    console.print(Text(printable(headline(s)), "bold"), soft_wrap=True)
    print()
    for title, table in tables(s, top).items():
        output.terminal(table, title)
        print()
    for title, lines in texts(s).items():
        print(title)
        for line in lines:
            output.print_text(f"  - {line}")
    if s.best is not None and "fixed" in s.study.user_attrs:  # it is of a sweep
        which = [str(s.folder)] if s.folder else [s.study.study_name, "--storage", str(storage.redacted(s.spec))]
        again = f"python -m tuner.study {shlex.join(which)} --best | xargs -r python -m tuner.train"
        output.print_text(f"\nrun it again: {again}")
    away = [name for name in artifacts.of_study(s.study) if not (s.folder and (s.folder / name).exists())]
    if away:
        output.print_text(f"run folders that are not here: {', '.join(away)}; --fetch brings them")


def headline(s: LoadedStudy) -> str:
    """One line: the study's name and folder, the number of trials by state, and the time they took."""
    counts = ", ".join(f"{count} {state.lower()}" for state, count in s.states.most_common())
    took = s.trials.end.max() - s.trials.start.min()
    time_taken = f", {duration(took.total_seconds())}" if pd.notna(took) else ""
    where = f" in {output.near(s.folder)}" if s.folder else ""
    trials = f"{len(s.frozen)} trial{'s' * (len(s.frozen) != 1)}"
    return f"study {s.study.study_name}{where}: {trials} ({counts or 'none yet'}){time_taken}"


def tables(s: LoadedStudy, top: int) -> dict[str, pd.DataFrame]:
    """The best trials, and the importance of each parameter, by title."""
    by_title = best_trials(s, top)
    if s.importances:
        shares = pd.DataFrame(s.importances).round(2).rename_axis("parameter").reset_index()
        title = f"Importance: share of the variation of the values of {len(s.complete)} complete trials"
        if cannot_be_told_apart(s):
            title += "; they do not differ by more than chance explains, so it says little"
        by_title[title] = shares
    return by_title


def best_trials(s: LoadedStudy, top: int) -> dict[str, pd.DataFrame]:
    """The best complete trials by title; with several objectives, those on the front."""
    if len(s.goals) > 1:
        title, best = "Trials that no other one is better than", s.complete[s.complete.number.isin(s.front)]
        best = best.sort_values("value_0", ascending=s.goals[0] == "minimize", kind="stable")
    else:
        title, best = "Best trials", s.complete.sort_values("value", ascending=s.goals == ["minimize"], kind="stable")
    if 0 < top < len(best):
        title += f" ({top} of {len(best)})"
    return {title: listed(s, best.head(top or len(best)))} if len(best) else {}


def listed(s: LoadedStudy, trials: pd.DataFrame) -> pd.DataFrame:
    """Trials with the main columns; values have the objectives' names."""
    searched = [p.name for p in s.parameters]
    number = trials.number.astype(str) + trials.baseline.map({True: " (default)", False: ""})
    folders: list[Any] = [output.near(folder) if pd.notna(folder) else None for folder in trials.folder]
    table = trials.assign(trial=number, folder=folders)
    return table[["trial", *s.values, *searched, "epochs", "seconds", "folder"]].rename(
        columns=dict(zip(s.values, s.objectives, strict=True))
    )


def texts(s: LoadedStudy) -> dict[str, list[str]]:
    """How certain the results are and what to try next: lines by title, without empty sections."""
    reasons: dict[str, list[str]] = {}
    for trial in s.frozen:
        if MIXED in trial.user_attrs:
            reasons.setdefault(str(trial.user_attrs[MIXED]), []).append(str(trial.number))
    lines_by_title = {
        "How sure that is": certainty(s),
        "What to try next": advice(s),
        "Left out, as they differ from the study": [f"trials {', '.join(n)}: {why}" for why, n in reasons.items()],
    }
    return {title: lines for title, lines in lines_by_title.items() if lines}


def as_json(s: LoadedStudy) -> dict[str, Any]:
    """The study as values for JSON. The password of the storage is masked; missing values are None."""
    best, rows = s.best, output.records(s.trials)
    params = output.records(pd.DataFrame([best.params]))[0] if best else {}
    return {
        "study": s.study.study_name,
        "storage": storage.redacted(s.spec),
        "folder": s.folder and str(s.folder),
        "objectives": dict(zip(s.objectives, s.goals, strict=True)),
        "states": {state.lower(): count for state, count in s.states.items()},
        "best": best and {"trial": best.number, "value": rows[best.number]["value"], "params": params},
        "front": s.front,
        "importances": s.importances,
        "certainty": certainty(s),
        "advice": advice(s),
        "tested": s.tested,
        "trials": rows,
    }


# Pictures and the page


def write(s: LoadedStudy, folder: Path | None, pictures: bool, page: bool) -> None:
    """Write plots/*.png, study.html, or both, into a folder."""
    if folder is None:
        raise InputError(f"study {s.study.study_name} has no folder on this machine; give --out FOLDER")
    if pictures:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = subfolder(folder, "plots")
        for name, figure in figures(s):
            plots.save(figure, drawn / f"{name}.png")
        log.info("pictures: %s", drawn)
    if page:
        write_page(s, folder / "study.html")
        log.info("page: %s", folder / "study.html")


def figures(s: LoadedStudy) -> Iterator[tuple[str, Figure]]:
    """The figures of the study with their names."""
    yield "timeline", plots.timeline(s.trials)
    if s.importances:
        yield "importances", plots.importances(s.importances)
    if len(s.goals) > 1:
        yield "pareto_front", plots.pareto_front(s.trials, s.goals, s.objectives)
        return
    goal, objective = s.goals[0], s.objectives[0]
    yield "history", plots.history(s.trials, goal, objective)
    yield "edf", plots.edf(s.trials, goal, objective)
    yield "intermediate_values", plots.intermediate_values(s.trials, s.curves, goal, objective)
    for draw in (plots.parallel_coordinates, plots.slices, plots.contours):
        yield draw.__name__, draw(s.trials, s.parameters, goal, objective)


def write_page(s: LoadedStudy, path: Path) -> None:
    """Write a web page: summary, tables, interactive figures, and all trials."""
    sections = [("Summary", output.html_text(headline(s)))]
    sections += [(title, output.html_table(table, path.parent)) for title, table in tables(s, 10).items()]
    sections += [(title, output.html_text("\n".join(lines))) for title, lines in texts(s).items()]
    sections += [(title, output.html_figure(figure)) for title, figure in interactive(s)]
    named = {"number": "trial"} | dict(zip(s.values, s.objectives, strict=True))
    everything = s.trials.drop(columns="baseline").dropna(axis=1, how="all").rename(columns=named)
    everything["folder"] = [output.near(folder) if pd.notna(folder) else None for folder in s.trials.folder]
    sections.append(("All trials", output.html_table(everything, path.parent)))
    output.page(path, f"Study {s.study.study_name}", sections)


def interactive(s: LoadedStudy) -> Iterator[tuple[str, Any]]:
    """Optuna's plotly figures with their titles, as far as the study has the data."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it warns of missing data for each figure
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if s.trials.start.notna().any():
            yield "Timeline", visualization.plot_timeline(s.study)
        values = s.complete[s.values].abs().replace(np.inf, np.nan).dropna()
        if values.empty or values.to_numpy().max() >= plots.HUGE:  # Optuna can't draw them
            return
        if len(s.goals) > 1:
            if len(s.goals) < 4:
                yield "Pareto front", visualization.plot_pareto_front(s.study, target_names=s.objectives)
            return
        options: dict[str, Any] = {"target_name": s.objectives[0]}
        there = {name for k in values.index for name in s.frozen[k].params}
        searched = [name for name in s.searched if name in there]  # Optuna refuses others
        yield "History", visualization.plot_optimization_history(s.study, **options)
        if s.curves:
            yield "Intermediate values", visualization.plot_intermediate_values(s.study)
        if searched:
            yield "Parallel coordinates", visualization.plot_parallel_coordinate(s.study, searched, **options)
            yield "Slices", visualization.plot_slice(s.study, searched, **options)
        if len(searched) > 1 and len(values) <= MAPPED:
            contours = visualization.plot_contour(s.study, searched[:PAIRED], **options)
            yield "Contours", contours.update_layout(height=700)
        yield "Empirical distribution", visualization.plot_edf(s.study, **options)


# A study that runs


def watch(args: argparse.Namespace) -> None:
    """Show the study until its sweep ends: in place on a terminal, elsewhere as a line per change."""
    console, last, which = output.Terminal(), "", args.study
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            s = loaded_study.load(which, args.storage)
            which = s.folder or s.study.study_name  # the same study, even if a newer one starts
            if console.is_terminal:
                live.update(glance(s, args.top, console.width), refresh=True)
            elif (line := state(s)) != last:
                output.print_text(line)
                last = line
            if not (budget.sweep_is_running(s.folder) if s.folder else s.states["RUNNING"]):
                break
            time.sleep(WATCHED_EVERY)


def state(s: LoadedStudy) -> str:
    """The headline, and how far the running trials are."""
    running = [trial for trial in s.frozen if trial.state == TrialState.RUNNING]
    return "; ".join(filter(None, [headline(s), training(running, s.study.directions)]))


def glance(s: LoadedStudy, top: int, width: int) -> Group:
    """The headline and the best trials, for a terminal of `width` characters."""
    tables = best_trials(s, top).values()
    return Group(Text(printable(state(s)), "bold"), *(output.within(table, width) for table in tables))


def dashboard(args: argparse.Namespace) -> None:
    """Run optuna-dashboard, reachable from this machine only, with the study's storage opened read-only."""
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise InputError("--dashboard needs the package optuna-dashboard: pip install 'tuner[dashboard]'")
    import optuna_dashboard

    s = loaded_study.load(args.study, args.storage)
    if not storage.enforces_read_only(s.spec):
        raise InputError(
            "--dashboard needs a storage that can be opened read-only; for one that may be changed: "
            f"optuna-dashboard {storage.redacted(s.spec)}"
        )
    address = f"http://127.0.0.1:{args.port}/dashboard/studies/{study_id(s.study)}"
    log.info("%s, read-only, until Ctrl-C", address)
    try:
        optuna_dashboard.run_server(storage.open_read_only(s.spec, live=True), host="127.0.0.1", port=args.port)
    except (OSError, OverflowError) as error:
        raise InputError(f"the dashboard can't use port {args.port}: {error}; give another --port") from error


if __name__ == "__main__":
    terminal.command(main)
