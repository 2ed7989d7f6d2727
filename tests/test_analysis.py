"""A study that is read: where it is found, its trials as a table, what mattered."""

import json
import math
import shutil
import warnings
from pathlib import Path

import optuna
import pandas as pd
import pytest
import yaml
from conftest import Toy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from tuner import InputError
from tuner.analysis import loaded_study
from tuner.analysis.loaded_study import LoadedStudy
from tuner.sweep import storage

UNIT = FloatDistribution(0, 1)
INF, NAN = float("inf"), float("nan")


def made(trials, **options) -> LoadedStudy:
    """A study in memory. trials: of each its value(s), or a state without, and its parameters."""
    study = optuna.create_study(**options)
    for told, params in trials:
        search = {name: found if isinstance(found, tuple) else (found, UNIT) for name, found in params.items()}
        parts = {
            "params": {n: v for n, (v, _) in search.items()},
            "distributions": {n: d for n, (_, d) in search.items()},
        }
        if isinstance(told, TrialState):
            study.add_trial(create_trial(state=told, **parts))
        else:
            study.add_trial(create_trial(values=told if isinstance(told, list) else [told], **parts))
    return LoadedStudy(study, "memory", None)


# Where it is


def sweep_two(run):
    """Studies `toy` and `other one ü`, of which the first was made last."""
    for name in ("other one ü", "toy"):
        names = (f"hydra.sweep.dir='multirun/{name}'", f"hydra.sweeper.study_name='{name}'")
        done = run("hydra.sweeper.n_trials=2", *names)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with two studies, for reading."""
    with pytest.MonkeyPatch.context() as patch:
        toy = Toy(tmp_path_factory.mktemp("two"), patch, None)
        sweep_two(toy.command)
    Path(toy.folder / "multirun/other one ü/best").mkdir()
    return toy.folder


@pytest.fixture
def own(toy):
    """Two studies to change, with their storage at rest."""
    sweep_two(toy.run)
    storage.connect(storage.resolve(URL)).inner._backend.engine.dispose()
    return toy


URL = "sqlite:///multirun/optuna.db"


@pytest.mark.parametrize(
    ("here", "where", "url", "found"),
    [
        (".", None, None, "toy"),
        (".", None, URL, "toy"),
        (".", "multirun/other one ü", None, "other one ü"),
        (".", "multirun/other one ü/", None, "other one ü"),
        (".", "./multirun/../multirun/other one ü", None, "other one ü"),
        (".", "multirun/other one ü/1", None, "other one ü"),
        (".", "multirun/other one ü/best/", None, "other one ü"),
        (".", "multirun/other one ü/optimization_results.yaml", None, "other one ü"),
        (".", "{cwd}/multirun/other one ü", None, "other one ü"),
        (".", "other one ü", None, "other one ü"),
        (".", "other one ü", URL, "other one ü"),
        (".", "other one ü", "sqlite:///{cwd}/multirun/optuna.db", "other one ü"),
        ("multirun/other one ü", ".", None, "other one ü"),
        ("multirun/other one ü/1", ".", None, "other one ü"),
        ("multirun/other one ü/1", "..", None, "other one ü"),
        ("multirun/other one ü", "toy", "sqlite:///../optuna.db", "toy"),
        ("multirun", "toy", None, "toy"),
        ("/", "{cwd}/multirun/toy", None, "toy"),
    ],
)
def test_it_is_found_by_what_people_call_it(two, monkeypatch, here, where, url, found):
    monkeypatch.chdir(two / here)
    s = loaded_study.load(where and where.format(cwd=two), url and url.format(cwd=two))
    assert s.study.study_name == found
    assert s.folder.resolve() == two / "multirun" / found
    assert len(s.trials) == 2


@pytest.mark.parametrize(
    ("here", "where", "url", "message"),
    [
        (".", "gone", None, "no study gone in sqlite:///{cwd}/multirun/optuna.db; it has other one ü, toy"),
        (".", "gone", URL, "no study gone in sqlite:///{cwd}/multirun/optuna.db; it has other one ü, toy"),
        ("multirun/toy", "gone", "sqlite:///../optuna.db", "no study gone in .*; it has other one ü, toy"),
        (".", "conf", None, "conf belongs to no study; to compare its runs: python -m tuner.compare conf"),
        (".", "conf", URL, "no study conf in"),
        (".", "multirun", None, "multirun belongs to no study"),
        ("conf", None, None, "no study in multirun/; start one: python -m tuner.train -m hparams_search=optuna"),
        ("conf", "toy", None, "no study in multirun/"),
        (".", None, "sqlite:///gone/optuna.db", "there is no file gone/optuna.db, where .* would have the study"),
        (".", None, "sqlite:///gone.db", "no file .*/gone.db: give the storage that holds the study"),
        (".", None, "optuna.db", r"storage=optuna.db must be a URL \(sqlite:///FILE"),
    ],
)
def test_what_is_not_there_is_named_with_a_way_out(two, monkeypatch, here, where, url, message):
    monkeypatch.chdir(two / here)
    before = sorted(two.rglob("*"))
    with pytest.raises(InputError, match=message.format(cwd=two)):
        loaded_study.load(where, url)
    assert sorted(two.rglob("*")) == before


def test_a_folder_that_was_moved_with_its_storage_is_whole(own, monkeypatch):
    old, new = own.folder, own.folder.with_name(f"{own.folder.name} moved")
    monkeypatch.chdir("/")
    old.rename(new)
    monkeypatch.chdir(new)
    for where in ("multirun/toy", "toy", None, new / "multirun/toy/1"):
        s = loaded_study.load(where)
        assert s.study.study_name == "toy"
        assert [Path(folder).resolve() for folder in s.trials.folder] == [
            new / "multirun/toy/0",
            new / "multirun/toy/1",
        ]
    monkeypatch.chdir("/")
    (new / "multirun/optuna.db").unlink()
    with pytest.raises(InputError, match=f"no file {new}/multirun/optuna.db"):
        loaded_study.load(new / "multirun/toy")
    new.rename(old)


def test_a_copy_is_read_from_its_own_storage_once_the_first_is_gone(own):
    shutil.copytree("multirun", "copied/multirun")
    shutil.rmtree("multirun")
    s = loaded_study.load("copied/multirun/toy")
    assert s.spec == f"sqlite:///{own.folder}/copied/multirun/optuna.db"
    assert all(Path(folder).is_dir() for folder in s.trials.folder)


@pytest.mark.parametrize("kept", ["null", "postgresql://ann:secret@127.0.0.1:1/db"])
def test_a_study_that_is_out_of_reach_says_why(toy, kept):
    toy.run("hydra.sweeper.n_trials=2", "hydra.sweeper.storage=null")
    if kept != "null":  # as a sweep there writes it
        results = Path("multirun/toy/optimization_results.yaml")
        results.write_text(yaml.safe_dump(yaml.safe_load(results.read_text()) | {"storage": storage.redacted(kept)}))
    message = {
        "null": "study toy was kept in memory, and ended with its process",
        "postgresql": r"the study is in postgresql://ann:\*\*\*@127.0.0.1:1/db: give it with the password",
    }[kept.partition("+")[0].partition(":")[0]]
    with pytest.raises(InputError, match=message):
        loaded_study.load("multirun/toy")
    if kept != "null":
        pytest.importorskip("psycopg")
        with pytest.raises(InputError, match="refused") as error:
            loaded_study.load("multirun/toy", kept)
        assert "secret" not in str(error.value)


def test_a_sweep_in_a_journal(toy):
    url = "journal:///multirun/studies.log"
    toy.run("hydra.sweeper.n_trials=2", f"hydra.sweeper.storage={url}")
    before = Path("multirun/studies.log").read_bytes()
    for where, given in ((None, None), ("multirun/toy", None), ("toy", url), (None, url)):
        assert list(loaded_study.load(where, given).trials.state) == ["COMPLETE"] * 2
    assert Path("multirun/studies.log").read_bytes() == before


def test_the_newest_is_the_one_that_was_swept_last(own):
    own.run(
        "hydra.sweeper.n_trials=3", "hydra.sweep.dir='multirun/other one ü'", "hydra.sweeper.study_name='other one ü'"
    )
    assert loaded_study.load().study.study_name == "other one ü"


def test_a_study_of_optuna_alone(tmp_path):
    url = f"sqlite:///{tmp_path}/plain.db"
    for name in ("empty", "mine"):
        study = optuna.create_study(study_name=name, storage=url, directions=["maximize", "minimize"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(["F1", "cost"])
    study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 1), n_trials=3)
    study._storage._backend.engine.dispose()
    s = loaded_study.load(None, url)  # the newest that has a trial
    assert (s.study.study_name, s.folder, s.objectives, s.goals) == (
        "mine",
        None,
        ["F1", "cost"],
        ["maximize", "minimize"],
    )
    assert list(s.trials.columns) == ["number", "state", "value_0", "value_1", *loaded_study.COLUMNS, "x"]
    assert s.trials.folder.isna().all()
    assert s.overrides(s.frozen[0]) == [f"x={s.frozen[0].params['x']}"]
    assert list(tmp_path.iterdir()) == [tmp_path / "plain.db"]


# Its trials


def test_the_table_of_a_sweep(toy):
    toy.run("n=choice(1,2)", "does=1-raise 2-nan", "hydra.sweeper.max_failure_rate=1")
    s = loaded_study.load()
    t = s.trials
    assert list(t.columns) == ["number", "state", "value", *loaded_study.COLUMNS, "x", "n"]
    assert list(t.number) == list(range(6))
    assert list(t.state) == [trial.state.name for trial in toy.study().trials]
    assert (s.states["FAIL"], s.states["COMPLETE"]) == (2, 4)
    assert list(t.baseline) == [True] + [False] * 5
    assert t.error[1] == "RuntimeError: trial 1 raises"
    assert t.value.isna().tolist() == [False, True, True, False, False, False]
    for trial in s.complete.itertuples():
        assert trial.value == trial.x**2
        assert trial.folder == str(toy.folder / "multirun/toy" / str(trial.number))
        assert trial.start <= trial.end
        assert 0 < trial.seconds <= (trial.end - trial.start).total_seconds() + 0.001
    assert s.best.number == s.complete.sort_values("value").number.iloc[0]
    assert s.baseline.number == 0
    assert s.curves[0] == {1: 2.0}


def test_a_trial_that_was_lost_and_tried_again(toy):
    done = toy.command("does=1-kill", "hydra.sweeper.n_trials=3")
    assert done.returncode != 0
    toy.run("hydra.sweeper.n_trials=3", "does=")
    s = loaded_study.load()
    assert list(s.trials.state) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert "it is retried" in s.trials.error[1]
    assert (s.trials.x[1], s.trials.x[2]) == pytest.approx([s.trials.x[1]] * 2)


COMPLETE, FAIL, RUNNING, PRUNED = TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING, TrialState.PRUNED


@pytest.mark.parametrize(
    ("trials", "directions", "best", "front", "judged"),
    [
        ([], ["minimize"], None, [], False),
        ([], ["minimize", "maximize"], None, [], False),
        ([(RUNNING, {"x": 0.5})], ["minimize"], None, [], False),
        ([(FAIL, {"x": 0.5})] * 3, ["maximize"], None, [], False),
        ([(FAIL, {"x": 0.5}), (RUNNING, {"x": 0.5})], ["maximize", "minimize"], None, [], False),
        ([(0.3, {"x": 0.5})], ["maximize"], 0, [0], False),
        ([(0.3, {})] * 3, ["maximize"], 0, [0, 1, 2], False),
        ([(0.3, {"x": k / 12}) for k in range(12)], ["minimize"], 0, list(range(12)), False),
        ([(k / 12, {"x": k / 12}) for k in range(12)], ["minimize"], 0, [0], True),
        ([(k / 12, {"x": k / 12}) for k in range(12)], ["maximize"], 11, [11], True),
        ([(INF, {"x": k / 12}) for k in range(12)], ["minimize"], 0, list(range(12)), False),
        ([(INF if k else 1.0, {"x": k / 12}) for k in range(12)], ["minimize"], 0, [0], False),
        ([(1e308 if k % 2 else -1e308, {"x": k / 12}) for k in range(12)], ["minimize"], 0, [*range(0, 12, 2)], False),
        ([([k, 9 - k], {"x": k / 10}) for k in range(10)], ["maximize"] * 2, None, list(range(10)), True),
        ([([k, k, 1], {"x": k / 10}) for k in range(10)], ["maximize"] * 3, None, [9], True),
    ],
)
def test_the_best_and_the_front(trials, directions, best, front, judged):
    s = made(trials, directions=directions)
    assert (s.best and s.best.number) == best
    assert s.front == front
    assert bool(s.importances) == judged
    assert all(math.isfinite(share) for shares in s.importances.values() for share in shares.values())
    assert len(s.trials) == len(trials)
    assert s.trials.dtypes[s.values].eq(float).all()
    assert list(s.complete.number) == [k for k, (told, _) in enumerate(trials) if not isinstance(told, TrialState)]


def test_a_parameter_called_like_a_column():
    names = ["number", "trial", "state", "value", "value_0", "values.x", *loaded_study.COLUMNS]
    s = made([(k, dict.fromkeys(names, k / 20)) for k in range(20)])
    assert {p.name for p in s.parameters} == {*(f"params.{name}" for name in names if name != "values.x"), "values.x"}
    assert sorted(s.searched) == sorted(names)
    assert list(s.trials.value) == list(range(20))
    assert list(s.trials["params.value"]) == [k / 20 for k in range(20)]
    assert set(s.importances["fANOVA"]) == {p.name for p in s.parameters}


CHOICES = CategoricalDistribution([None, True, 2, "2", 0.5])


@pytest.mark.parametrize(
    ("searched", "expected"),
    [
        ([(0.2, UNIT)], (0, 1, False, None)),
        ([(1e-3, FloatDistribution(1e-4, 1e-2, log=True))], (1e-4, 1e-2, True, None)),
        ([(4, IntDistribution(2, 8, step=2))], (2, 8, False, None)),
        ([(0.2, UNIT), (3.0, FloatDistribution(0, 4))], (0, 4, False, None)),  # widened
        ([(0.2, FloatDistribution(0.1, 0.3)), (0.6, FloatDistribution(0.5, 0.7))], (0.1, 0.7, False, None)),  # moving
        ([("2", CHOICES), (None, CHOICES)], (None, None, False, (None, True, 2, "2", 0.5))),
    ],
)
def test_what_was_searched(searched, expected):
    s = made([(k, {"x": found}) for k, found in enumerate(searched)])
    [p] = s.parameters
    assert (p.low, p.high, p.log, p.choices) == expected


def test_conditional_parameters():
    kind = CategoricalDistribution(["a", "b", None])
    trials = [(k / 12, {"kind": ("a", kind), "a.x": k / 12}) for k in range(6)]
    trials += [(k, {"kind": ("b", kind), "b.n": (k, IntDistribution(0, 9))}) for k in range(6)]
    s = made([*trials, (3, {"kind": (None, kind)})])
    assert s.trials["a.x"].notna().tolist() == [True] * 6 + [False] * 7
    assert {p.name for p in s.parameters} == {"kind", "a.x", "b.n"}
    assert list(s.importances) == ["PED-ANOVA"]  # of which fANOVA knows one parameter
    assert s.searched[0] == max(s.importances["PED-ANOVA"], key=s.importances["PED-ANOVA"].get)


def test_importances_need_more_trials_than_parameters():
    trials = [(k, {"a": k / 9, "b": (k * 7 % 9) / 9}) for k in range(9)]
    assert made(trials[:3]).importances == {}
    assert made(trials[:4]).importances != {}


def test_the_most_important_parameter_comes_first():
    trials = [(k % 5, {"a": (k * 7 % 20) / 20, "b": (k % 5) / 5}) for k in range(20)]
    s = made(trials)
    assert s.searched == [p.name for p in s.parameters] == ["b", "a"]
    assert list(s.importances) == ["fANOVA", "PED-ANOVA"]
    for shares in s.importances.values():
        assert sum(shares.values()) == pytest.approx(1)
        assert max(shares, key=shares.get) == "b"
    two = made([([value, params["a"]], params) for value, params in trials], directions=["minimize"] * 2)
    assert list(two.importances) == ["fANOVA, value_0", "fANOVA, value_1"]
    assert max(two.importances["fANOVA, value_1"], key=two.importances["fANOVA, value_1"].get) == "a"


@pytest.mark.parametrize(
    ("result", "values", "objectives"),
    [
        (None, [0.9], ["value"]),
        ({}, [0.9], ["value"]),
        ({"val_accuracy": 0.9, "gmacs": 2.0}, [0.9], ["validation accuracy"]),
        ({"val_accuracy": 0.8, "gmacs": 2.0}, [0.9], ["value"]),
        ({"val_accuracy": 0.9, "gmacs": 2.0}, [0.9, 2.0], ["validation accuracy", "billions of multiply-adds"]),
        ({"val_accuracy": 0.9}, [0.5, 0.9], ["value_0", "validation accuracy"]),
    ],
)
def test_what_the_objectives_are_called(tmp_path, result, values, objectives):
    study = optuna.create_study(directions=["maximize"] * len(values))
    study.add_trial(create_trial(values=values, user_attrs={"output_dir": str(tmp_path)}))
    if result is not None:
        (tmp_path / "result.json").write_text(json.dumps(result))
    assert LoadedStudy(study, "memory", None).objectives == objectives


def test_strange_values_on_the_way():
    study = optuna.create_study()
    trial = study.ask()
    for step, value in enumerate([1.0, NAN, INF, -INF]):
        trial.report(value, step)
    study.tell(trial, 1.0)
    assert list(map(str, LoadedStudy(study, "memory", None).curves[0].values())) == ["1.0", "nan", "inf", "-inf"]


def test_times_are_times():
    t = made([(1.0, {}), (FAIL, {})]).trials
    assert pd.api.types.is_datetime64_dtype(t.start)
    assert pd.api.types.is_datetime64_dtype(made([]).trials.start)
