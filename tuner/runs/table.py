"""Run folders, read: the metrics and the config of a run, and a table of many runs."""

import io
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from tuner import InputError, earlier, yaml_file
from tuner.rules import as_number
from tuner.runs.layout import LATEST, PREDICTIONS
from tuner.runs.result import read_result
from tuner.safe_text import from_cell, printable

RESULTS = (  # columns of a table of runs that are in result.json; the keys of the config have columns, too
    *("status", "val_accuracy", "val_loss", "train_accuracy", "test_accuracy", "test_accuracy_std", "epochs"),
    *("saved_epoch", "seconds", "device", "trial", "n_train", "n_val", "n_test", "trained_parameters", "gmacs"),
    *("val_balanced_accuracy", "val_macro_f1", "test_balanced_accuracy", "test_macro_f1", "test_ece_calibrated"),
    "error",
)
NUMBERS = tuple(name for name in RESULTS if name not in ("status", "device", "error"))
SCORE = re.compile(r"(val|test)_(?!duplicates$)\w+")  # a result.json's other numbers, such as val_auroc
REFERENCE = re.compile(r"\$\{(\.*)([\w-]+(?:\.[\w-]+)*)\}")
log = logging.getLogger("tuner.runs")


def read_metrics(folder: str | Path) -> pd.DataFrame:
    """A run's metrics.csv, one row per epoch. A line that is still being written is left out."""
    return pd.read_csv(io.StringIO((Path(folder) / "metrics.csv").read_text("utf-8").rpartition("\n")[0]))


def read_predictions(folder: str | Path) -> pd.DataFrame | None:
    """The columns split, image, label, predicted and confidence of a run's predictions.csv, each image once.

    None if it has none. What is wrong with the file is logged.
    """
    path = Path(folder) / PREDICTIONS
    if not path.exists():
        log.info("%s has no %s: it is unfinished, or of an older version", folder, PREDICTIONS)
        return None
    texts = ["split", "image", "label", "predicted"]
    types: Any = dict.fromkeys(texts, str) | {"confidence": float}
    try:
        blank = {"confidence": ""}
        table = pd.read_csv(path, usecols=types.__contains__, dtype=types, na_values=blank, keep_default_na=False)
        if missing := [name for name in texts if name not in table]:
            raise ValueError(f"it has no column {missing[0]}")
        table = table.reindex(columns=list(types))  # earlier versions wrote no confidence
        table[texts] = table[texts].map(from_cell)
        table = table.drop_duplicates(["split", "image", "label"])  # a file that the data set lists twice
        if table.duplicated(["split", "image"]).any():
            raise ValueError("an image has two labels")
        return table
    except (OSError, ValueError) as error:
        log.warning("left out %s: %s", path, " ".join(str(error).split()))
        return None


def find(*folders: str | Path) -> Iterator[Path]:
    """The run folders in or below the given ones, at any depth, by name. Links are followed; each run comes once.

    Raises InputError if a folder is missing.
    """
    seen: set[tuple[int, int]] = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(
                f"there is no folder {folder}; runs are in outputs/ and multirun/ of the folder where they were started"
            )
        yield from _find(folder, seen)


def _find(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    try:
        str(folder).encode()
        stat = folder.stat()
        with os.scandir(folder) as entries:
            folders = {entry.name: _is_dir(entry) for entry in entries}
        is_run = not folders.keys().isdisjoint(("result.json", "metrics.csv"))
        is_run = is_run or earlier.config_file(folder) is not None
    except (OSError, UnicodeEncodeError) as error:  # unreadable, deleted meanwhile, or its name is not UTF-8
        log.warning("skipped %s: %s", printable(str(folder)), printable(str(error)))
        return
    if (stat.st_dev, stat.st_ino) in seen:
        return
    seen.add((stat.st_dev, stat.st_ino))
    if is_run:
        yield folder
    for name in sorted(folders, key=lambda name: (int(name) if name.isdecimal() else math.inf, name)):
        if folders[name] and name[0] != "." and name != LATEST and not (is_run and name == "plots"):
            yield from _find(folder / name, seen)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link, or one to an unreadable folder
        return False


def load(*folders: str | Path, resolve: bool = True) -> pd.DataFrame:
    """A table with one row per run in or below the given folders; by default, in outputs/ and multirun/.

    Columns: `folder`; RESULTS; `started`; `test_split`, the hash of the test split, if it was read; all other scores of
    these runs, such as val_auroc; and the keys of the config, such as optimizer.lr. A key with the name of a result is
    `config.KEY`. `status` is complete, pruned, failed, interrupted (by Ctrl-C), or unfinished (still running, or
    killed). For the last three, epochs, val_accuracy and val_loss are the last of metrics.csv. A damaged folder is
    logged and left out.
    resolve: a key that refers to another, such as data.seed: ${seed}, shows the resolved value.
    Raises InputError if a given folder is missing.
    """
    rows = []
    for folder in find(*(folders or filter(os.path.isdir, ("outputs", "multirun")))):
        try:
            rows.append(_row(folder))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).removeprefix(f"{folder}{os.sep}").split())
            log.warning("skipped %s: %s", folder, reason)
    frame = pd.DataFrame(rows, columns=None if rows else ["folder", *RESULTS, "started", "test_split"])
    frame = frame.astype(dict.fromkeys(NUMBERS, float))
    return resolved(frame) if resolve else frame


def _row(folder: Path) -> dict[str, Any]:
    config, started = read_config(folder)
    finished = (folder / "result.json").exists()
    result = read_result(folder) if finished else {"status": "unfinished"}
    if result["status"] in ("unfinished", "interrupted", "failed"):  # these have no epochs in result.json
        result = _last_epoch(folder / "metrics.csv") | result
    with _named("result.json"):
        for name in RESULTS:
            if not isinstance(result.get(name), (int | float if name in NUMBERS else str) | None):
                raise ValueError(f"{name} must be {'a number' if name in NUMBERS else 'text'}, not {result[name]!r}")
            if name in NUMBERS:
                float(result.get(name) or 0)  # OverflowError if it is too large
        others = {name: value for name, value in result.items() if SCORE.fullmatch(name) and name not in RESULTS}
        scores = {name: float(value) for name, value in others.items() if type(value) in (int, float)}
    row = {"folder": str(folder)} | {name: result.get(name) for name in RESULTS} | {"started": started} | scores
    hashes = result.get("split_hashes")
    split = hashes.get("test") if isinstance(hashes, dict) and row["test_accuracy"] is not None else None
    row["test_split"] = split if isinstance(split, str) else None  # the file may be damaged
    return row | {f"config.{key}" if key in row or is_result(key) else key: value for key, value in config.items()}


def is_result(key: str) -> bool:
    """Whether a column of load() is of result.json, and not of the config."""
    return key in RESULTS or bool(SCORE.fullmatch(key))


def read_config(folder: Path) -> tuple[dict[str, Any], datetime | None]:
    """A run's applied config by dotted keys, and when it was written. Without a config: {} and None."""
    path = earlier.config_file(folder)
    if path is None:
        return {}, None
    config = yaml_file.mapping(path)
    with _named(str(path.relative_to(folder))):
        earlier.rename_keys(config)
        config.pop("hydra", None)
        return dict(flat(config)), datetime.fromtimestamp(path.stat().st_mtime)


def resolved(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of runs with references replaced by their values: ${a.b}, and the relative ${.b} and ${..b}.

    Resolvers such as ${oc.env:HOME} stay as they are: the values they had are unknown.
    """
    return frame.assign(**{str(key): _followed(frame, str(key)) for key in frame if _references(frame[key])})


def _references(column: pd.Series) -> dict[str, tuple[str, str]]:
    """The references in a column: text -> its leading dots and the key after them."""
    texts = [text for text in column.unique() if isinstance(text, str)] if column.dtype.kind == "O" else []
    return {text: (match[1], match[2]) for text in texts if (match := REFERENCE.fullmatch(text))}


def _followed(frame: pd.DataFrame, key: str, before: tuple[str, ...] = ()) -> pd.Series:
    column = frame[key]
    for text, (dots, name) in _references(column).items():
        above = key.removeprefix("config.").split(".")[: -len(dots)] if dots else []
        target = ".".join([*above, name])
        target = f"config.{target}" if f"config.{target}" in frame else target
        if target in frame and target not in (*before, key):  # no circular reference
            value = _followed(frame, target, (*before, key)).astype(object)
            column = column.astype(object).mask(column == text, value).infer_objects()
    return column


def flat(config: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """A config's values by their dotted keys; lists and empty groups as JSON, other values as text."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{above}{key}.")
        elif isinstance(value, list | dict):
            yield f"{above}{key}", json.dumps(value, ensure_ascii=False, default=str)
        elif key == "_target_":
            yield f"{above}{key}", earlier.target(str(value))
        else:
            yield f"{above}{key}", value if isinstance(value, str | int | float | None) else str(value)


def _last_epoch(path: Path) -> dict[str, float | None]:
    """epochs, val_accuracy and val_loss from the last whole line of metrics.csv; 0 epochs without one."""
    with _named("metrics.csv"):
        lines = path.read_text("utf-8").rpartition("\n")[0].split("\n") if path.exists() else []
        if len(lines) < 2:
            return {"epochs": 0}
        names, fields = lines[0].split(","), lines[-1].split(",")
        if len(names) != len(fields) or "epoch" not in names:
            raise ValueError(f"its last line {lines[-1][:80]!r} does not have the columns of its first")
        last = dict(zip(names, fields, strict=True))
        values = {name: as_number(last[name]) if last.get(name) else None for name in ("val_accuracy", "val_loss")}
        return {"epochs": int(last["epoch"])} | values


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Turn errors in a file into ValueErrors that name it."""
    try:
        yield
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from error
