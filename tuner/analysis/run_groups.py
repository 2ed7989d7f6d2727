"""Runs in groups by data set, each with the columns in which it differs: what `tuner.compare` prints."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tuner import output

TARGET = "data._target_"
SAME_IMAGES = {  # keys of data that choose among the images of a data set, or how they are read and stored
    *("seed", "val_share", "folds", "views", "test_views", "exclude"),
    *("cache_dir", "cache_limit", "skip_broken", "max_pixels"),
}
FOLDER_WIDTH = 24  # characters; longer folders are given relative to what they have in common


@dataclass(frozen=True)
class Group:
    """Runs of one data set.

    heading: a line.   common: what all runs have, of what other groups have differently.   table: their rows, with
    columns by importance.   paths: the columns left out because they hold paths.
    """

    heading: str
    common: list[str]
    table: pd.DataFrame
    paths: list[str]


def several(values: pd.Series) -> bool:
    """Whether a column has more than one value; null counts as missing, and missing as a value."""
    return bool(values.nunique() + values.isna().any() > 1)


def by_data_set(frame: pd.DataFrame, written: pd.DataFrame, differ: Sequence[str]) -> list[Group]:
    """The groups, in the order of their first rows.

    frame: runs, references resolved.   written: the same rows with references, which say what follows from what.
    differ: the keys in which the runs differ.
    """
    if frame.empty:
        return []
    keys = [str(key) for key in written if _is_of_images(str(key))]
    naming = [key for key in keys if several(written[key])]
    parts = written.groupby(naming, dropna=False, sort=False) if naming else [((), written)]
    groups = []
    for _, rows in parts:
        alike = written[written[TARGET] == rows[TARGET].iloc[0]] if TARGET in written else rows  # of the same loader
        name = _data_set(frame.loc[rows.index[0]], [key for key in naming if key != TARGET and several(alike[key])])
        groups.append(_group(name, frame.loc[rows.index], [key for key in differ if key not in keys]))
    return groups


def _is_of_images(key: str) -> bool:
    group, _, name = key.partition(".")
    return group == "data" and name not in SAME_IMAGES


def _data_set(run: pd.Series, keys: Sequence[str]) -> str:
    """`synthetic, n=400, size=16`: the loader, and the keys in which its data sets differ."""
    target = run.get(TARGET)
    if not isinstance(target, str):
        return "no config" if pd.isna(run.started) else "no data set in the config"
    module, _, function = target.rpartition(".")
    name = module.rpartition(".")[2] if function == "load" else target
    values = {key.removeprefix("data."): run[key] for key in keys if pd.notna(run[key])}
    return ", ".join(
        [name, *(f"{key}={output.near(x) if _is_path(x) else output.shown(x)}" for key, x in values.items())]
    )


def _group(name: str, runs: pd.DataFrame, keys: Sequence[str]) -> Group:
    """name: of the data set.   keys: those in which runs of all groups differ."""
    varied = [key for key in keys if several(runs[key])]
    paths = [key for key in varied if runs[key].map(_is_path).any()]
    results = ["val_accuracy", "test_accuracy"]
    results = [key for key in results if runs[key].notna().any()] or results[:1]
    status = ["status"] if several(runs.status) else []
    ranked = ranked_by_variety(runs[[key for key in varied if key not in paths]])
    chosen = ["folder", *status, *results, *ranked, "epochs", "seconds"]
    common = [
        f"{key}={_value(key, runs[key].iloc[0])}" for key in keys if key not in varied and runs[key].notna().all()
    ]
    table = runs[chosen].copy()
    for key in [key for key in ranked if key.endswith("_target_")]:
        table[key] = [_value(key, value) for value in table[key]]
    table["folder"], parent = _near(runs.folder)
    count = f"{len(runs):,} {'' if status else f'{runs.status.iloc[0]} '}run{'s' * (len(runs) != 1)}"
    facts = [count + (f" in {parent}" if parent else "")]
    if images := _images(runs):
        facts.append(f"{images:,} images")
    return Group(": ".join(filter(None, [name, ", ".join(facts)])), common, table, paths)


def ranked_by_variety(frame: pd.DataFrame) -> list[str]:
    """The columns, those with the most values first. Text that divides the rows as earlier text does comes last."""
    seen: set[bytes] = set()
    ranks = {}
    for key, column in frame.items():
        codes = pd.factorize(column.astype(str).where(column.notna()))[0]
        follows = column.map(lambda value: isinstance(value, str)).any() and codes.tobytes() in seen
        seen |= {codes.tobytes()} if column.dtype == object else set()
        ranks[str(key)] = follows, -codes.max(initial=0)
    return sorted(ranks, key=lambda key: ranks[key])


def _images(runs: pd.DataFrame) -> int:
    """The number of images of the data set, from the counts of its runs; of folds, the parts overlap."""
    n_train, n_val = runs.n_train.fillna(0), runs.n_val.fillna(0)
    folds = runs["data.folds"].notna() if "data.folds" in runs else pd.Series(False, runs.index)
    fitted = (n_train + n_val).where(~folds, pd.concat([n_train, n_val], axis=1).max(axis=1))
    return int((fitted + runs.n_test.fillna(0)).max())


def _near(folders: pd.Series) -> tuple[list[str], str]:
    """The folders as short as they can be told apart, and the folder that they are then relative to, or none."""
    near = [output.near(folder) if Path(folder).is_absolute() else folder for folder in folders]
    if max(map(len, near)) <= FOLDER_WIDTH:
        return near, ""
    parent = os.path.commonpath([Path(folder).absolute().parent for folder in folders])
    if Path(parent) == Path.cwd():
        return near, ""
    return [os.path.relpath(folder, parent) for folder in folders], output.near(parent)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("./", "../", "~")))


def _value(key: str, value: object) -> str:
    text = output.shown(value, key)
    return text.rpartition(".")[2] if key.endswith("_target_") else text
