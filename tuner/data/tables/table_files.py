"""Files of tables, .parquet and .arrow, in a folder: which of them are which split."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner import InputError
from tuner.data.files.layout import SPLITS, split_names
from tuner.data.tables.csv_columns import shortened
from tuner.rules import shown

log = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".arrow")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-\w+)?$")  # of a name without its suffix


def find(path: Path, splits: Any) -> dict[str, list[Path]]:
    """The files of each split, in order; "train" alone if they are not divided.

    path: a file, or a folder with files at any depth.
    splits: auto, by the names of files and folders; none, all files are one split; or split -> such a name.
    Raises InputError if there are no such files, or if it is not clear what they are.
    """
    files = _files(path)
    if not (isinstance(splits, Mapping) or splits in ("auto", "none")):
        raise InputError(f"data.splits={shown(splits)} must be auto, none, or names, as in {{train: A, test: B}}")
    names_of = {file: _names(path, file) for file in files}
    split_of = _given(path, splits, names_of) if isinstance(splits, Mapping) else {}
    if splits == "auto":
        split_of = split_names([*dict.fromkeys(name for names in names_of.values() for name in names)])
    groups: dict[str, list[Path]] = {}
    others = []
    for file, names in names_of.items():
        split = next((split_of[name] for name in names if name in split_of), None)
        groups.setdefault(split, []).append(file) if split else others.append(file)
    if not groups:
        groups = {"train": files}
    elif others and splits == "auto":
        raise InputError(
            f"{others[0]} is not named like a split, as {groups[min(groups)][0]} is: name the splits, as in "
            "'data.splits={train: A, test: B}', or set data.splits=none if all files are one split"
        )
    if "train" not in groups:
        raise InputError(
            f"{path} has no training split, but {', '.join(groups)}: name it, as in 'data.splits={{train: A}}'"
        )
    for split, of_split in groups.items() if splits != "none" else ():
        _check_whole(split, of_split)
    log.info(
        "%s: %s",
        path,
        ", ".join(f"{split} of {len(group):,} file{'s' * (len(group) > 1)}" for split, group in groups.items()),
    )
    return {split: groups[split] for split in SPLITS if split in groups}


def stamp(groups: Mapping[str, list[Path]]) -> str:
    """What changes when the files do."""
    lines = []
    for split, files in groups.items():
        for file in files:
            status = file.stat()
            lines.append(f"{split} {file.name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")
    return "\n".join(lines)


def is_table(path: Path) -> bool:
    """Whether a path is a file of a table, or a folder that `datasets` wrote or that has such files."""
    if not path.is_dir():
        return path.suffix.lower() in SUFFIXES
    try:
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
            return True
        return any(next(path.glob(f"{folder}*{suffix}"), None) for folder in ("", "data/") for suffix in SUFFIXES)
    except OSError:  # the folder is closed to us: reading it says so
        return False


def _files(path: Path) -> list[Path]:
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"data.path={shown(path)} cannot be read: {error}") from error
    if not exists:
        raise InputError(f"data.path={path} does not exist (relative to {Path.cwd()}); only local files are read")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.suffix.lower() in SUFFIXES and file.is_file()]
    files = [file for file in files if not file.name.startswith((".", "cache-", "tmp"))]  # intermediate ones
    if not files:
        raise InputError(f"data.path={path} has no {' or '.join(SUFFIXES)} file: see conf/data/huggingface.yaml")
    if len({file.suffix.lower() for file in files}) > 1:
        raise InputError(f"data.path={path} has .parquet and .arrow files: name one of its folders or files")
    return files


def _names(path: Path, file: Path) -> list[str]:
    """The name of a file without its number, and those of the folders above it, below path. path itself has none."""
    if file == path:
        return []
    return [SHARD.sub("", file.stem), *(folder.name for folder in file.relative_to(path).parents if folder.name)]


def _given(path: Path, splits: Mapping[Any, Any], names_of: Mapping[Path, list[str]]) -> dict[str, str]:
    """Name -> split, as data.splits has it."""
    known = sorted({name for names in names_of.values() for name in names})
    for split, name in splits.items():
        if split not in SPLITS:
            raise InputError(f"data.splits has the split {shown(split)}; the splits are train, val and test")
        if name not in known:
            raise InputError(f"data.splits.{split}={shown(name)} is not in {path}, which has {shortened(known, 10)}")
    if "train" not in splits or len({*splits.values()}) < len(splits):
        raise InputError("data.splits must have different names, and one for train, as in {train: A, test: B}")
    return {name: split for split, name in splits.items()}


def _check_whole(split: str, files: list[Path]) -> None:
    """Raises InputError if files of a split are missing, or if there are two versions of it."""
    shards = [SHARD.search(file.stem) for file in files]
    counts = {int(shard[2]) for shard in shards if shard}
    if len({file.parent for file in files}) > 1 or len(counts) > 1 or (counts and None in shards):
        raise InputError(
            f"there are several versions of the {split} split, such as {files[0]} and {files[-1]}: name the folder of "
            "one as data.path, or set data.splits=none if all files are one split"
        )
    if counts and len(files) != (count := counts.pop()):
        raise InputError(f"the {split} split in {files[0].parent} has {len(files)} of {count} files: get the others")
