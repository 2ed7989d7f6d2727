"""`python -m tuner.study`, as people use it: what it prints and writes, and what it leaves alone."""

import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from itertools import pairwise
from pathlib import Path

import optuna
import pandas as pd
import pytest
import yaml
from rich.console import Console

from tuner import InputError, study
from tuner.analysis import loaded_study
from tuner.sweep import storage

PACKAGE = str(Path(study.__file__).parents[1])
URL = "sqlite:///multirun/optuna.db"
STORAGES = (URL, pytest.param("journal:///multirun/studies.log", marks=pytest.mark.slow))
EVERY_OPTION = ((), ("--plots", "--html"), ("--csv",), ("--json",), ("--best",), ("--watch",))


@pytest.fixture
def look(monkeypatch, capfd):
    """`python -m tuner.study ARGUMENTS` in this process; gives what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tuner.study", *map(str, arguments)])
        capfd.readouterr()
        study.main()
        return capfd.readouterr().out

    return run


def start(*arguments, module="tuner.study", **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": PACKAGE}
    return subprocess.Popen([sys.executable, "-m", module, *map(str, arguments)], env=environment, **pipes, **options)


def at_rest(spec):
    storage.connect(storage.resolve(spec)).inner._backend.engine.dispose()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# A real search


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder with a search of tuner's own: five trials, and the best retrained."""
    folder = tmp_path_factory.mktemp("searched")
    tiny = ("data=synthetic", "model=tiny", "epochs=2", "batch_size=32")
    search = (
        "-m",
        "hparams_search=optuna",
        "study=mine",
        "hydra.sweeper.n_trials=5",
        "final.seeds=1",
        "model.head.width=choice(32,64)",
        "+tags='a, \"b\"'",
    )
    with start(*search, *tiny, module="tuner.train", cwd=folder) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return folder


@pytest.fixture
def mine(searched, monkeypatch):
    monkeypatch.chdir(searched)
    return loaded_study.load("multirun/mine")


def test_what_it_says_of_a_search(look, mine):
    printed = look()
    assert printed.startswith("study mine in multirun/mine: 5 trials (5 complete), ")
    assert re.search(r"^trial +validation accuracy +.*optimizer.lr.* +epochs +seconds +folder", printed, re.MULTILINE)
    table = printed[printed.index("Best trials") : printed.index("Importance")].splitlines()[2:7]
    assert [int(line.split()[0]) for line in table] == list(mine.complete.sort_values("value", ascending=False).number)
    assert sum("(default)" in line for line in table) == 1
    assert "exact McNemar test" in printed or "the default config (trial 0) is the best" in printed
    assert "retrained on train + validation and tested, 1 seed: " in printed
    assert "run it again: python -m tuner.study multirun/mine --best | xargs -r python -m tuner.train" in printed
    assert look("mine", "--top", "1").count("multirun/mine/") == 1
    assert look("mine", "--top", "0").count("multirun/mine/") == 5


def test_the_best_runs_again_to_the_very_value(look, command, searched, tmp_path, monkeypatch):
    monkeypatch.chdir(searched)
    value = loaded_study.load().best.value
    words = shlex.split(look("--best"))
    assert "data=synthetic" in words
    assert not [word for word in words if word.startswith(("study", "hparams_search", "final"))]
    assert "+tags='a, \"b\"'" in words
    through_xargs = subprocess.run(["xargs", "printf", "%s\\n"], input=look("--best"), capture_output=True, text=True)
    assert through_xargs.stdout.splitlines() == words
    monkeypatch.chdir(tmp_path)
    code, output = command(*words)
    assert code == 0, output
    [result] = Path("outputs").rglob("result.json")
    assert json.loads(result.read_text())["val_accuracy"] == value


def test_the_best_of_a_sweep_whose_folders_are_gone(look, searched, tmp_path, monkeypatch):
    shutil.copytree(searched / "multirun", tmp_path / "multirun", ignore=shutil.ignore_patterns("[0-9]", "best"))
    monkeypatch.chdir(tmp_path)
    away = searched.rename(searched.with_name("away"))
    try:
        words = shlex.split(look("--best"))
    finally:
        away.rename(searched)
    assert {word.partition("=")[0] for word in words} >= {"optimizer.lr", "data", "epochs", "+tags"}


def test_json_says_everything(look, mine):
    said = json.loads(look("--json"), parse_constant=pytest.fail)
    assert said["study"] == "mine"
    assert said["objectives"] == {"validation accuracy": "maximize"}
    assert said["states"] == {"complete": 5}
    assert said["best"] == {"trial": mine.best.number, "value": mine.best.value, "params": mine.best.params}
    assert said["tested"]["seeds"] == [0]
    assert [t["number"] for t in said["trials"]] == [0, 1, 2, 3, 4]
    assert said["importances"] == mine.importances


def test_csv_is_the_table_of_trials(look, mine):
    found = pd.read_csv(io.StringIO(look("--csv")), parse_dates=["start", "end"])
    expected = mine.trials.fillna({"error": math.nan, "ended_by": math.nan})
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)


def test_a_reader_leaves_the_study_alone(look, mine):
    before = contents("multirun")
    for options in EVERY_OPTION:
        look(*options)
    after = contents("multirun")
    new = {path for path in after if path not in before}
    assert {path.parts[:2] for path in new} == {("mine", "plots"), ("mine", "study.html")}
    assert {path: after[path] for path in before} == before
    assert {path.name for path in new} >= {"history.png", "importances.png", "slices.png", "timeline.png", "study.html"}


def test_out_is_somewhere_else(look, mine, tmp_path):
    look("--plots", "--html", "--out", tmp_path / "deep" / "er")
    assert (tmp_path / "deep/er/study.html").exists()
    assert (tmp_path / "deep/er/plots/history.png").exists()


# Studies of every kind


def tell(made, count, space, value, on_the_way=()):
    for k in range(count):
        trial = made.ask()
        found = space(trial, k)
        for step, reported in enumerate(on_the_way):
            trial.report(reported, step)
        made.tell(trial, value(k, found))


def fail(made):
    trial = made.ask()
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr("error", "ValueError: </script>")
    made.tell(trial, state=optuna.trial.TrialState.FAIL)


def mixed(trial, k):
    return trial.suggest_categorical("[red]</script>&", [None, True, 2, "2", "</script><b>", "a 'b' \"c\""])


def conditional(trial, k):
    kind = trial.suggest_categorical("kind", ["a", "b", None])
    return trial.suggest_float("a.x", 0, 1) if kind == "a" else trial.suggest_int("b.n", 1, 9) if kind == "b" else 3


def x(trial, k):
    return trial.suggest_float("x", 0, 1)


def columns(trial, k):
    return [trial.suggest_float(n, 0, 1) for n in ("epochs", "value", "trial", "value_0", "values.x")].pop()


INF, NAN = float("inf"), float("nan")
KINDS = {  # directions, and what makes the trials
    "none": (1, lambda made: None),
    "none of two objectives": (2, lambda made: None),
    "running": (1, lambda made: made.ask().suggest_float("x", 0, 1)),
    "waiting": (1, lambda made: made.enqueue_trial({"x": 1})),
    "failed": (1, fail),
    "failed of two objectives": (2, fail),
    "one": (1, lambda made: tell(made, 1, x, lambda k, x: x)),
    "one and failed": (1, lambda made: [tell(made, 1, x, lambda k, x: x), fail(made)]),
    "all equal": (1, lambda made: tell(made, 12, x, lambda k, x: 0.5)),
    "no parameters": (1, lambda made: tell(made, 4, lambda trial, k: 0, lambda k, x: k)),
    "two objectives": (2, lambda made: tell(made, 12, x, lambda k, x: [x, x**2])),
    "three objectives": (3, lambda made: tell(made, 12, x, lambda k, x: [x, x**2, k])),
    "four objectives": (4, lambda made: tell(made, 12, x, lambda k, x: [x, x**2, k, 1])),
    "conditional": (1, lambda made: tell(made, 14, conditional, lambda k, x: x)),
    "mixed </script> & ü": (1, lambda made: tell(made, 14, mixed, lambda k, x: k)),
    "columns": (1, lambda made: tell(made, 12, columns, lambda k, x: x)),
    "columns of two objectives": (2, lambda made: tell(made, 12, columns, lambda k, x: [x, k])),
    "strange on the way": (1, lambda made: tell(made, 12, x, lambda k, x: x, (1.0, NAN, INF, -INF, 0.5))),
    "infinite": (1, lambda made: tell(made, 12, x, lambda k, x: INF)),
    "some infinite": (1, lambda made: tell(made, 12, x, lambda k, x: (INF, -INF)[k] if k < 2 else x)),
    "huge": (1, lambda made: tell(made, 12, x, lambda k, x: 1e308 if k % 2 else -1e308)),
}


FIRST = ("failed", "one and failed", "mixed </script> & ü", "conditional", "infinite", "two objectives")


def kept(folder, kind):
    """A study of that kind in an SQLite file that nobody has open; gives its URL."""
    directions, make = KINDS[kind]
    url = f"sqlite:///{folder}/plain.db"
    made = optuna.create_study(study_name=kind, storage=storage.connect(url), directions=["minimize"] * directions)
    make(made)
    at_rest(url)
    return url


SEVERAL = (
    "three objectives",
    "four objectives",
    "columns of two objectives",
    "none of two objectives",
    "some infinite",
)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SEVERAL)) for kind in KINDS])
def test_every_study_is_shown(look, tmp_path, kind):
    url, directions = kept(tmp_path, kind), KINDS[kind][0]
    s = loaded_study.load(kind, url)
    before, there = (tmp_path / "plain.db").read_bytes(), [kind, "--storage", url]

    printed = look(*there)
    assert re.match(rf"study {kind}: {len(s.trials)} trials? \(", printed)
    assert "run it again" not in printed  # it is no sweep of ours
    complete = s.states["COMPLETE"]
    assert ("Best trials" in printed) == (complete > 0 and directions == 1)
    assert len(pd.read_csv(io.StringIO(look(*there, "--csv")))) == len(s.trials)
    said = json.loads(look(*there, "--json"), parse_constant=pytest.fail)
    assert len(said["trials"]) == len(s.trials)
    assert (said["best"] is None) == (complete == 0 or directions > 1)
    if kind != "running":
        look(*there, "--watch")

    if complete and directions == 1:
        assert len(shlex.split(look(*there, "--best"))) == len(s.best.params)
    else:
        several = complete and f"it has {directions} objectives, and trials .* are on its Pareto front"
        with pytest.raises(InputError, match=f"the study has no single best trial: {several or 'none is complete'}"):
            look(*there, "--best")
    with pytest.raises(InputError, match=f"study {kind} has no folder on this machine; give --out FOLDER"):
        look(*there, "--html")
    assert (tmp_path / "plain.db").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "plain.db"]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in FIRST else pytest.mark.slow) for kind in KINDS]
)
def test_every_study_is_drawn(look, tmp_path, kind):
    url = kept(tmp_path, kind)
    before = (tmp_path / "plain.db").read_bytes()
    look(kind, "--storage", url, "--html", "--plots", "--out", tmp_path / "out")
    page = (tmp_path / "out/study.html").read_text()
    assert len(re.findall("<script", page)) == len(re.findall("</script>", page))
    assert (tmp_path / "out/plots/timeline.png").exists()
    assert (tmp_path / "plain.db").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"plain.db", "out"}


def test_overrides_with_quotes_and_spaces_come_back_whole(look, toy):
    strings = ("a b", "it's", 'say "x"', "k=v", "[1,2]", "1", "ü $HOME `ls`", "a,b")
    choices = ",".join(quoted(text) for text in strings)
    toy.run(f"y=choice({choices})", "hydra.output_subdir=.hydra", "hydra.sweeper.n_trials=12")
    made = toy.study()
    for trial in made.trials:
        written = yaml.safe_load(Path(f"multirun/toy/{trial.number}/.hydra/overrides.yaml").read_text())
        s = loaded_study.load()
        assert s.overrides(trial) == ["--config-name", "toy", *written]
    printed = look("--best")
    through_xargs = subprocess.run(["xargs", "printf", "%s\\n"], input=printed, capture_output=True, text=True)
    assert through_xargs.stdout.splitlines() == shlex.split(printed)
    y = made.best_trial.params["y"]
    again = ("hydra.sweeper.study_name=again", "hydra.sweeper.n_trials=1", "hydra.output_subdir=.hydra")
    done = toy.run(*shlex.split(printed), *again)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(Path("multirun/toy-2/0/.hydra/config.yaml").read_text())["y"] == y


def test_the_best_of_a_search_with_configs_of_ones_own(look, toy):
    own = toy.folder / "my conf" / "group"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("name: mine\n")
    options = ("--config-dir", str(own.parent), "group=mine")
    toy.run(*options, "hydra.output_subdir=.hydra", "hydra.sweeper.n_trials=2")
    words = shlex.split(look("--best"))
    assert words[:2] == list(options[:2])
    assert "group=mine" in words
    again = ("hydra.sweeper.study_name=again", "hydra.sweeper.n_trials=1", "hydra.output_subdir=.hydra")
    done = toy.run(*words, *again)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(Path("multirun/toy-2/0/.hydra/config.yaml").read_text())["group"] == {"name": "mine"}


def quoted(text):
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def test_of_several_objectives_everything_has_their_names(look, tmp_path):
    url = f"sqlite:///{tmp_path}/plain.db"
    made = optuna.create_study(study_name="two", storage=storage.connect(url), directions=["maximize", "minimize"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        made.set_metric_names(["validation accuracy", "cost"])
    tell(made, 12, x, lambda k, x: [x, x**2])
    at_rest(url)
    printed = look("two", "--storage", url, "--html", "--out", tmp_path / "out")
    assert re.search(r"^x +1 +1$", printed, re.MULTILINE)  # its shares, which are no accuracies
    heads = re.findall("<th .*?</th>", (tmp_path / "out/study.html").read_text())
    assert sum("validation accuracy" in head for head in heads) == 3
    assert not [head for head in heads if "value_" in head]


def test_a_glance_at_a_narrow_terminal_breaks_lines_and_not_words():
    names = [f"optimizer.setting{k}" for k in range(6)]
    made = optuna.create_study()
    tell(made, 3, lambda trial, k: [trial.suggest_float(name, 0, 1) for name in names].pop(), lambda k, x: x)
    console = Console(width=50, file=io.StringIO())
    console.print(study.glance(loaded_study.LoadedStudy(made, "memory", None), 10, console.width))
    printed = console.file.getvalue().splitlines()
    assert max(map(len, printed)) <= 50
    assert [line.split() for line in printed[-5:-3]] == [
        ["optimizer.", "optimizer.", "optimizer."],
        ["trial", "value", "setting0", "setting1", "setting2"],
    ]


# Beside a sweep that runs


@pytest.mark.parametrize("url", STORAGES)
def test_readers_beside_a_sweep(toy, look, url):
    """A sweep that writes as fast as it can, with a reader after the other: neither disturbs the other."""
    with toy.start("hydra.sweeper.n_trials=30", "steps=5", "seconds=0.02", f"hydra.sweeper.storage={url}") as sweep:
        while not Path("multirun/toy/optimization_results.yaml").exists():
            assert sweep.poll() is None, sweep.stderr.read()
            time.sleep(0.01)
        seen = []
        while sweep.poll() is None:
            seen.append(len(pd.read_csv(io.StringIO(look("--csv")))))
            json.loads(look("toy", "--json"))
        out, err = sweep.communicate()
    assert sweep.returncode == 0, err
    assert "locked" not in out + err
    assert seen == sorted(seen)
    assert len(set(seen)) > 2
    states = [trial.state.name for trial in toy.study(storage=url).trials]
    assert states == ["COMPLETE"] * 30
    if url == URL:
        at_rest(URL)
        assert {path.name for path in Path("multirun").iterdir()} == {"toy", "optuna.db"}


def test_watch_ends_with_the_sweep(toy):
    with toy.start("hydra.sweeper.n_trials=14", "seconds=0.4") as sweep:
        while not Path("multirun/toy/optimization_results.yaml").exists():
            time.sleep(0.01)
        with start("--watch") as watch:
            out, err = watch.communicate(timeout=60)
        ended = time.monotonic()
        sweep.communicate(timeout=60)
        assert time.monotonic() - ended < 5
    lines = out.splitlines()
    assert watch.returncode == 0, err
    assert len(lines) > 1
    assert lines[-1].startswith("study toy in multirun/toy: 14 trials (14 complete), ")
    assert all(a != b for a, b in pairwise(lines))


def test_watch_ends_at_once_where_no_sweep_is(toy, look):
    toy.run("hydra.sweeper.n_trials=2")
    before = time.monotonic()
    assert look("--watch").startswith("study toy in multirun/toy: 2 trials")
    assert time.monotonic() - before < study.WATCHED_EVERY


# The dashboard


def fetched(url, method="GET", wait=30.0):
    deadline = time.monotonic() + wait
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def listening(port):
    """The addresses that a port of this machine listens on, as Linux has them."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port]


@pytest.mark.parametrize("url", STORAGES)
def test_the_dashboard_reads_alone_and_for_this_machine_alone(toy, url):
    pytest.importorskip("optuna_dashboard")
    toy.run("hydra.sweeper.n_trials=2", f"hydra.sweeper.storage={url}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with start("--dashboard", "--port", port) as dashboard:
        try:
            here = f"http://127.0.0.1:{port}"
            code, studies = fetched(f"{here}/api/studies")
            [found] = json.loads(studies)["study_summaries"]
            assert (code, found["study_name"]) == (200, "toy")
            code, page = fetched(f"{here}/dashboard/studies/{found['study_id']}")
            assert (code, "optuna" in page.lower()) == (200, True)
            if Path("/proc/net/tcp").exists():
                assert listening(port) == ["0100007F"]  # 127.0.0.1
            code, _ = fetched(f"{here}/api/studies/{found['study_id']}", "DELETE")
            assert code >= 400
            assert len(json.loads(fetched(f"{here}/api/studies")[1])["study_summaries"]) == 1
            toy.run("hydra.sweeper.n_trials=4", f"hydra.sweeper.storage={url}")  # a sweep that goes on is seen
            trials = json.loads(fetched(f"{here}/api/studies/{found['study_id']}?after=0")[1])["trials"]
            assert len(trials) == 4
        finally:
            dashboard.terminate()
            dashboard.communicate()
    assert [trial.state.name for trial in toy.study(storage=url).trials] == ["COMPLETE"] * 4


def test_a_port_that_is_taken_is_named(toy, look):
    pytest.importorskip("optuna_dashboard")
    toy.run("hydra.sweeper.n_trials=1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"the dashboard can't use port {port}: .*give another --port"):
            look("--dashboard", "--port", port)


def test_no_dashboard_on_what_it_could_change(toy, look, monkeypatch):
    toy.run("hydra.sweeper.n_trials=1")
    config = json.dumps({"_target_": "optuna.storages.RDBStorage", "url": URL})
    results = Path("multirun/toy/optimization_results.yaml")
    results.write_text(yaml.safe_dump(yaml.safe_load(results.read_text()) | {"storage": config}))
    assert "1 trial (1 complete)" in look()
    monkeypatch.setattr(storage, "enforces_read_only", lambda _: False)  # as for MySQL
    with pytest.raises(InputError, match="--dashboard needs a storage that can be opened read-only"):
        look("--dashboard")


@pytest.mark.parametrize("option", ["--best", "--watch", "--dashboard"])
def test_pictures_go_with_the_table(look, option):
    with pytest.raises(SystemExit):
        look(option, "--html")


def test_without_the_package_of_the_dashboard(toy, look, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"--dashboard needs the package optuna-dashboard: pip install 'tuner\[dashboard\]'"
    ):
        look("--dashboard")


def test_mistakes_are_one_line(tmp_path):
    with start("gone", cwd=tmp_path) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err == "no study in multirun/; start one: python -m tuner.train -m hparams_search=optuna\n"


# The page, in a browser


def column(table, name):
    """What stands in a column of a table of the page, as its data has it."""
    place = table.locator("th").all_inner_texts().index(name) + 1
    return [cell.get_attribute("data-value") for cell in table.locator(f"tbody td:nth-child({place})").all()]


def test_the_page_works_without_a_network(look, mine, opened, tmp_path):
    look("--html")
    page = opened("multirun/mine/study.html")
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot svg').length > 0")
    assert page.locator("h1").inner_text() == "Study mine"
    for section in ("Timeline", "History", "Parallel coordinates", "Slices", "Contours", "All trials"):
        assert page.locator("h2", has_text=section).count() >= 1
    assert page.locator(".js-plotly-plot").count() == page.locator(".js-plotly-plot > .plot-container").count() > 4
    table = page.locator("table").last
    assert column(table, "trial") == ["0", "1", "2", "3", "4"]
    button = table.locator("th button", has_text="validation accuracy").first
    button.click()
    assert column(table, "validation accuracy") == [str(value) for value in sorted(mine.trials.value)]
    button.click()
    assert column(table, "validation accuracy") == [str(value) for value in sorted(mine.trials.value, reverse=True)]
    folder = table.locator("tbody a").first.get_attribute("href")
    assert folder in ("0", "1", "2", "3", "4")
    table.locator("tbody a").first.click()
    page.wait_for_url(f"**/multirun/mine/{folder}/")
    assert "result.json" in page.content()


def test_names_on_the_page_are_text(look, opened, tmp_path):
    name = "</script><b id=x> & 'ü'"
    url = f"sqlite:///{tmp_path}/plain.db"
    made = optuna.create_study(study_name=name, storage=url)
    tell(made, 14, mixed, lambda k, x: k, (0.5, NAN))
    fail(made)
    made._storage._backend.engine.dispose()
    look(name, "--storage", url, "--html", "--out", tmp_path)
    page = opened(tmp_path / "study.html")
    assert page.title() == page.locator("h1").inner_text() == f"Study {name}"
    assert page.locator("#x, b").count() == 0
    assert "[red]</script>&" in page.locator("table").last.locator("th").all_inner_texts()


@pytest.mark.slow
def test_a_thousand_trials(look, opened, tmp_path):
    url = f"sqlite:///{tmp_path}/plain.db"
    made = optuna.create_study(study_name="many", storage=url, sampler=optuna.samplers.RandomSampler(seed=0))
    template = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    template.optimize(
        lambda t: t.suggest_float("x", 0, 1) + t.suggest_int("n", 1, 9) + t.suggest_float("y", 0, 1), 1000
    )
    made.add_trials(template.trials)
    made._storage._backend.engine.dispose()
    assert "1000 trials" in look("many", "--storage", url)
    look("many", "--storage", url, "--plots", "--html", "--out", tmp_path)
    page = opened(tmp_path / "study.html")
    table = page.locator("table").last
    table.locator("th button", has_text="value").first.click()
    assert table.locator("tbody tr").count() == 1000
