"""Every file that a run, a killed run or a search leaves, damaged in seeded ways, and read as the commands read it.

A reader may succeed, or raise InputError, and nothing else; it changes no file. Where a file has a checksum, what it
reads is what was written. A search may also be started on a damaged study.
"""

import contextlib
import json
import logging
import math
import random
import shutil
import sqlite3
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fuzz import mutations, outcome
from helpers import TINY
from safetensors import safe_open

from tuner import cache, cache_files, compare, evaluate, output, resume, stages, study, train
from tuner.analysis import finished_run, loaded_study, model_card
from tuner.bank import features
from tuner.config import of_run
from tuner.data import synthetic
from tuner.runs import model_file
from tuner.runs.run import Run
from tuner.training import checkpoint

LITTLE = (*TINY, "cache_dir=cache")
SEARCH = ("-m", *LITTLE, "hparams_search=optuna", "hydra.sweeper.n_trials=4", "final.seeds=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with runs, a killed one, and searches in SQLite and in a journal. Tests restore what they damage."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)

        def command(*arguments):
            patch.setattr(sys, "argv", ["tuner.train", *arguments])
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                train.main()

        command(*LITTLE, "hydra.run.dir=runs/a")
        command(*LITTLE, "seed=1", "hydra.run.dir=runs/b")
        command(*SEARCH, "study=sqlite")
        command(*SEARCH, "study=journal", "hydra.sweeper.storage=journal:///multirun/journal.log")
        real = stages.Prepared.on_epoch

        def interrupt(job, epoch, metrics):
            if epoch == 3:
                raise KeyboardInterrupt
            real(job, epoch, metrics)

        patch.setattr(stages.Prepared, "on_epoch", interrupt)
        command(*LITTLE, "hydra.run.dir=killed")
        (folder / "killed" / "result.json").unlink()
    shutil.copytree(folder / "runs" / "a", folder / "old")  # as an earlier version left it
    shutil.rmtree(folder / "old" / "conf")
    at_rest(folder / "multirun" / "optuna.db")
    assert (folder / "killed" / "checkpoint.pt").exists()
    for path in (folder / "cache" / "banks").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor("features")
            SHAPES[path.name] = tuple(tensor.shape), tensor.dtype
    return folder


def at_rest(path: Path) -> None:
    """An SQLite file as a sweep leaves it when its process ends: without a write-ahead log beside it."""
    with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(f"{path}.new")) as new:
        source.backup(new)
    for beside in path.parent.glob(f"{path.name}-*"):
        beside.unlink()
    path.with_name(f"{path.name}.new").replace(path)


@dataclass(frozen=True)
class Reader:
    """file: relative to the folder, maybe with a *.   read: as a command does.   has_checksum: of its whole content."""

    file: str
    read: Callable[[Path], Any]
    has_checksum: bool = False


def run_command(module: Any, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tuner", *arguments])
        module.main()


def bank(path: Path) -> torch.Tensor | None:
    """The features, or None if the file is damaged: then they are computed again."""
    shape, dtype = SHAPES[path.name]
    try:
        return features._read(path, shape, dtype)
    except cache_files.UNREADABLE:
        return None


SHAPES: dict[str, Any] = {}
DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]
ODD = (
    *(None, True, 0, -1, 10**400, 0.5, -1e300, math.nan, math.inf, "", "x", "nan", "${seed}", "${x", "???", "\x1b[31m"),
    *([], {}, [1], {"a": 1}, ["x", None], DEEP, "9" * 5000),
)
RUN = "runs/a"
READERS = {
    "the model": Reader(f"{RUN}/model.safetensors", model_file.read, has_checksum=True),
    "a model of best": Reader("multirun/sqlite/best/model-1.safetensors", model_file.read, has_checksum=True),
    "the checkpoint": Reader("killed/checkpoint.pt", checkpoint.read, has_checksum=True),
    "the feature bank": Reader("cache/banks/*.safetensors", bank, has_checksum=True),
    "the cache's list": Reader(
        "cache/banks/*.safetensors", lambda path: list(map(cache.content, cache_files.entries(path.parents[1])))
    ),
    "compare: result.json": Reader(f"{RUN}/result.json", lambda _: run_command(compare, "runs")),
    "compare: metrics.csv": Reader(f"{RUN}/metrics.csv", lambda _: run_command(compare, "runs")),
    "compare: config.yaml": Reader(f"{RUN}/conf/config.yaml", lambda _: run_command(compare, "runs")),
    "compare: two runs": Reader(f"{RUN}/predictions.csv", lambda _: compare.pair(Path("runs/a"), Path("runs/b"))),
    "compare: curves": Reader(
        f"{RUN}/metrics.csv", lambda path: compare._curves(compare.runs.load("runs"), ["a", "b"])
    ),
    "report: result.json": Reader(f"{RUN}/result.json", lambda path: reported(path.parent)),
    "report: predictions.csv": Reader(f"{RUN}/predictions.csv", lambda path: reported(path.parent)),
    "report: per_class.csv": Reader(f"{RUN}/per_class.csv", lambda path: reported(path.parent)),
    "report: metrics.csv": Reader(f"{RUN}/metrics.csv", lambda path: reported(path.parent)),
    "report: config.yaml": Reader(f"{RUN}/conf/config.yaml", lambda path: reported(path.parents[1])),
    "evaluate: result.json": Reader(
        f"{RUN}/result.json", lambda path: evaluate.check_unchanged(synthetic.load(noise=60.0), "test", path.parent)
    ),
    "start: result.json": Reader(f"{RUN}/result.json", lambda path: start(path.parent)),
    "a model's config": Reader(f"{RUN}/conf/config.yaml", lambda path: of_run(path.parents[1], "data")),
    "an earlier model's config": Reader("old/.hydra/config.yaml", lambda path: of_run(path.parents[1], "data")),
    "an earlier model's hydra.yaml": Reader("old/.hydra/hydra.yaml", lambda path: of_run(path.parents[1], "data")),
    "resume: config.yaml": Reader("killed/conf/config.yaml", lambda path: resume.killed_run(path.parents[1])),
    "resume: metrics.csv": Reader("killed/metrics.csv", lambda path: cut(path.parent)),
    "study: results": Reader("multirun/sqlite/optimization_results.yaml", lambda path: shown(path.parent)),
    "study: SQLite": Reader("multirun/optuna.db", lambda path: shown(path.with_name("sqlite"))),
    "study: journal": Reader("multirun/journal.log", lambda path: shown(path.with_name("journal"))),
    "study: result.json": Reader("multirun/sqlite/best/result.json", lambda path: shown(path.parents[1])),
    "study: overrides.yaml": Reader("multirun/sqlite/*/.hydra/overrides.yaml", lambda path: best(path.parents[2])),
    "study: hydra.yaml": Reader("multirun/sqlite/*/.hydra/hydra.yaml", lambda path: best(path.parents[2])),
}


def reported(folder: Path) -> None:
    """What a report says, without its pictures, which take seconds."""
    run = finished_run.read(folder, "run")
    yaml.safe_load(model_card.card(run).split("---\n")[1])
    assert run.metrics is None or len(run.metrics)


def shown(folder: Path) -> None:
    s = loaded_study.load(folder)
    study.show(s, 10, output.Terminal())
    study.as_json(s)


def best(folder: Path) -> list[str]:
    s = loaded_study.load(folder)
    return [line for trial in s.frozen for line in s.overrides(trial)]


def start(folder: Path) -> None:
    """A run that starts in a folder that holds a result."""
    copy = shutil.copytree(folder, folder.parents[1] / "copy", dirs_exist_ok=True)
    Run(copy).close()


def cut(folder: Path) -> None:
    copy = shutil.copytree(folder, folder.with_name("copy of killed"), dirs_exist_ok=True)
    run = Run(copy)
    run.cut_metrics(2)
    run.close()
    assert len(run.metrics()) == 2


MORE = pytest.param(100, 1, marks=pytest.mark.slow)  # 1,000 of each were run when the readers were written


@pytest.mark.parametrize(("most", "seed"), [(40, 0), MORE])
@pytest.mark.parametrize("name", READERS)
def test_damage_is_read_or_refused_in_one_line(folder, monkeypatch, name, most, seed):
    reader, n = READERS[name], most // 4 if name.startswith("study") else most  # a study takes longer
    path = sorted(folder.glob(reader.file))[0]
    monkeypatch.chdir(folder)
    content, before = path.read_bytes(), files(folder, path)
    counts, faults = Counter(), []
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a user sees them, and goes on
            whole = None if name.startswith("start") else reader.read(path)
            for i, damaged in enumerate(mutated(path, content, n, seed)):
                path.write_bytes(damaged)
                result, got = "fault", []
                try:
                    result = outcome(lambda got=got: got.append(reader.read(path)), f"{name}, mutation {i}")
                except AssertionError as error:
                    faults.append(str(error))
                if reader.has_checksum and result == "success" and got[0] is not None and not same(got[0], whole):
                    faults.append(f"{name}, mutation {i}: accepted silently")
                counts[result] += 1
    finally:
        path.write_bytes(content)
        logging.disable(logging.NOTSET)
    print(f"\nREADER {name}: {n} mutations, {dict(counts)}")
    assert not faults, f"{len(faults)} of {n}: {faults[:20]}"
    assert files(folder, path) == before, "a reader has changed files"


def mutated(path: Path, content: bytes, n: int, seed: int) -> Iterator[bytes]:
    """n damaged contents of a file. In JSON and YAML, every second one has an odd value in the place of another."""
    damaged = mutations(content, seed, n)
    if path.suffix not in (".json", ".yaml"):
        yield from damaged
        return
    for i, some in enumerate(damaged):
        draw = random.Random(f"{seed} {i}")
        if i % 2:
            yield some
        elif path.suffix == ".json":
            yield json.dumps(odd(json.loads(content), draw)).encode()
        else:
            yield yaml.safe_dump(odd(yaml.safe_load(content), draw)).encode()


def odd(value: Any, draw: random.Random) -> Any:
    """A value of JSON in which one that is drawn is replaced, or a key is missing."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return draw.choice(ODD)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw.choice(keys)
    if draw.random() < 0.1:
        del value[key]
    else:
        value[key] = odd(value[key], draw)
    return value


def files(folder: Path, but: Path) -> dict[Path, int]:
    """Each file below a folder, but one, and the time of its last change."""
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
        and path != but
        and not path.relative_to(folder).parts[0].startswith("copy")
        and path.suffix not in (".lock", ".safetensors")
    }


def same(a: Any, b: Any) -> bool:
    """Whether two values are the same, tensors in them included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(("n", "seed"), [(6, 0), pytest.param(40, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_a_sweep_on_a_damaged_study_goes_on_or_ends_in_a_line(toy, scheme, n, seed):
    """Each damaged copy is a file of its own, which a sweep of three more trials joins."""
    few = ("hydra.sweeper.max_failure_rate=1", "hydra.sweeper.n_trials")
    whole = Path(f"whole.{scheme}").absolute()
    assert toy.run(f"hydra.sweeper.storage={scheme}:///{whole}", f"{few[1]}=3").returncode == 0
    if scheme == "sqlite":
        at_rest(whole)
    counts, faults = Counter(), []
    for i, damaged in enumerate(mutations(whole.read_bytes(), seed, n)):
        shutil.rmtree("multirun", ignore_errors=True)  # what the last one left
        path = Path(f"{i}.{scheme}").absolute()
        path.write_bytes(damaged)
        done = toy.run(
            f"hydra.sweeper.storage={scheme}:///{path}", f"hydra.sweep.dir=multirun/{i}", f"{few[1]}=4", few[0]
        )
        if done.returncode == 1 and path.read_bytes() == damaged:
            counts["refused, unchanged"] += 1
        else:
            counts[f"exit code {done.returncode}"] += 1
        if done.returncode not in (0, 1) or "Traceback" in done.stdout + done.stderr:
            faults.append(f"mutation {i}: {done.returncode}, {(done.stdout + done.stderr)[-300:]}")
    print(f"\nREADER joining {scheme}: {n} mutations, {dict(counts)}")
    assert not faults, f"{len(faults)} of {n}: {faults[:20]}"
