"""How often each test split was read on this machine, and by how many studies.

A test split says less about new images with each model that is chosen after a look at it. So each reading appends a
line to CACHE/readings/HASH.jsonl: the time, the folder of the run, its study, and the study's storage. HASH is that of
the split's images and labels. CACHE is the machine's cache folder, whatever `cache_dir` a run has: all readings are
counted together. Nothing removes these files.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tuner.cache_files import machine_cache
from tuner.files import appending

FOLDER = "readings"
HASH = re.compile(r"[0-9a-f]{16}")
log = logging.getLogger("tuner.runs")


@dataclass(frozen=True)
class Readings:
    """times: how often a test split was read.   studies: how many studies did so."""

    times: int
    studies: int

    def __str__(self) -> str:
        times = "once" if self.times == 1 else f"{self.times:,} times"
        studies = "1 study" if self.studies == 1 else f"{self.studies:,} studies"
        return f"was read {times} on this machine" + (f", by {studies}" if self.studies else "")


def record(split_hash: str, folder: Path, study: str | None = None, storage: str | None = None) -> Readings | None:
    """Record that a run reads a test split. Returns all readings so far, with this one.

    folder: of the run.   study, storage: of the search that it belongs to.
    If the cache folder can't be written, a warning says so, and the answer is None.
    """
    path = _path(machine_cache(), split_hash)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    line = json.dumps({"time": now, "run": str(folder.absolute()), "study": study, "storage": storage})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appending(path) as file:  # one write, so that lines of several processes do not mix
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())
        return _read(path)
    except OSError as error:
        log.warning("this reading of the test split is not counted: %s (TUNER_CACHE names another folder)", error)
        return None


def of_result(result: Mapping[str, Any]) -> Readings | None:
    """The readings of the test split of a run so far; None if it is not known, or was not read on this machine.

    result: its result.json.
    """
    hashes = result.get("split_hashes")
    return of_split(hashes.get("test")) if isinstance(hashes, dict) else None


def of_split(split_hash: object) -> Readings | None:
    """The readings of a test split so far; None if it is not known, or was not read on this machine."""
    if not isinstance(split_hash, str) or not HASH.fullmatch(split_hash):
        return None
    try:
        return _read(_path(machine_cache(), split_hash))
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("it is not known how often the test split was read: %s", error)
        return None


def of_cache(folder: Path) -> dict[str, Readings]:
    """The readings of each test split that a cache folder has a record of, by its hash."""
    return {path.stem: _read(path) for path in sorted((folder / FOLDER).glob("*.jsonl")) if HASH.fullmatch(path.stem)}


def _path(cache: Path, split_hash: str) -> Path:
    return cache / FOLDER / f"{split_hash}.jsonl"


def _read(path: Path) -> Readings:
    """A line that is damaged counts as a reading by no study."""
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    return Readings(len(lines), len({study for line in lines if (study := _study(line))}))


def _study(line: bytes) -> tuple[str, str] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.get("study") is None:
        return None
    return str(entry["study"]), str(entry.get("storage"))
