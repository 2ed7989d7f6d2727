"""Hostile values for every key of the config: a run takes them, or ends in one line; the rest of the run is real."""

import csv
import dataclasses
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz import outcome
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from tuner import DivergedError
from tuner.config import CONF, parse
from tuner.training.setup import setup_of
from tuner.training.spec import spec_of
from tuner.training.together import fit_all

NUMBERS = (math.nan, math.inf, -math.inf, -1, -0.5, 0, 0.0, 1, 2, 7, 1e-300, 1e300, 10**6, 2**31, 2**63, 10**30)
WORDS = ("", " ", "x", "auto", "1", "nan", "1e3", "0x10", "\u0663", "\U0001f4a9\u202e\x1b[31m\0\n", "a" * 300)
PATHS = ("../x", "/", "/dev/null", "/dev/zero", "~nobody/x", "a" * 100_000)
LISTS = ([], [1], [1, 2], [0, -1, math.nan], ["x"], [[1]], [None], [0.5] * 3, [10**9] * 3, [3, 8, 8])
DICTS = ({}, {"a": 1}, {"_target_": "os.system"}, {"_target_": 3}, {1: 2})
HOSTILE: tuple[Any, ...] = (*NUMBERS, 10**400, True, False, None, *WORDS, *PATHS, *LISTS, *DICTS, b"x")
GROUPS = {
    "frozen": (),
    "sgd": ("optimizer=sgd", "scheduler=cosine", "keep=best", "patience=2", "class_weights=balanced"),
    "trained": ("optimizer=adam", "scheduler=constant", "augment=mix", "model.frozen=null", "micro_batch=8"),
    "views": ("augment=light", "data.views=2", "data.test_views=2"),
    "csv": ("data=csv", "data.path=pixels.csv", "data.classes=[cat,dog]"),
    "csv of files": ("data=csv", "data.path=files.csv", "data.image=image", "data.size=8"),
    "image_folder": ("data=image_folder", "data.root=images", "data.size=8"),
}


@pytest.fixture
def composed(tmp_path, monkeypatch):
    """A function: the name of some groups -> their config, as a dict. Its data is in the working folder."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    with Path("pixels.csv").open("w") as pixels, Path("files.csv").open("w") as files:
        csv.writer(pixels).writerow(["label", *range(64)])
        csv.writer(files).writerow(["label", "image"])
        for i in range(24):
            name = ("cat", "dog")[i % 2]
            csv.writer(pixels).writerow([name, *draw.choices(range(256), k=64)])
            path = tmp_path / "images" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.frombytes("L", (9, 9), draw.randbytes(81)).save(path)
            csv.writer(files).writerow([name, path.relative_to(tmp_path)])

    def config(name: str) -> dict[str, Any]:
        common = ["data=synthetic"] * (name in ("frozen", "sgd", "trained", "views")) + ["model=tiny", "study=s"]
        with initialize_config_dir(str(CONF)):
            composed = compose("train", [*common, *GROUPS[name], "cache_dir=cache", "model.image_size=16"])
        plain: Any = OmegaConf.to_container(composed, resolve=True)
        if name in ("frozen", "sgd", "trained", "views"):
            plain["data"]["n"] = 24
        return plain

    return config


def keys(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key, of a group as well as of a value."""
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from keys(value, (*above, key))


def changed(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = path
    return values | {first: changed(values[first], tuple(rest), value) if rest else value}


def run(config: dict[str, Any]) -> None:
    """What a run does before and in its first epoch."""
    parsed = parse(config)
    setup = setup_of(parsed, shared=False)
    spec = spec_of(parsed, setup, parsed.seed, setup.data.train, setup.data.val)
    setup.cost(spec.head)
    [(_, fitted)] = fit_all([(setup, dataclasses.replace(spec, stop=1))], lambda _epoch, _metrics: ())
    if not isinstance(fitted.error, DivergedError):  # a learning rate of 1e300: one line, too
        fitted.raise_error()


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("n", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_every_key(composed, name, n):
    """n of the hostile values for each key. Keys that all groups share come with the first alone."""
    config = composed(name)
    counts = {"success": 0, "InputError": 0}
    assert outcome(lambda: run(config), "unchanged") == "success"
    shared = name != "frozen" and n == 1
    for path in keys(config):
        if shared and path[0] not in ("data", "optimizer", "scheduler", "augment"):
            continue
        for number in random.Random(f"{name} {path}").sample(range(len(HOSTILE)), n):
            note = f"{name}: {'.'.join(path)} = HOSTILE[{number}]"
            counts[outcome(lambda path=path, number=number: run(changed(config, path, HOSTILE[number])), note)] += 1
    print(name, counts)
    assert min(counts.values()) > 0
