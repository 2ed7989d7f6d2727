"""A study by its name, created if it does not exist, and the folder that all sweeps on it share."""

import logging
import re
import time
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection

from tuner import InputError
from tuner.runs.layout import STUDY_FILE

log = logging.getLogger("tuner.sweep")
METRICS = {"accuracy_and_cost": ["accuracy", "gmacs"]}  # an `objective` with several values; others have one, their own
PATIENCE = 10.0  # seconds that another sweep may take between creating the study and choosing its folder


def open_study(
    name: str | None, store: BaseStorage, directions: Sequence[str], default_folder: Path
) -> tuple[Study, Path]:
    """The study of that name in a storage, created if it does not exist, and its folder.

    The folder is `default_folder`, unless the study has one already or that folder belongs to another study.
    Raises InputError if the study has other directions.
    """
    literals: Any = list(directions)
    try:
        study = optuna.create_study(study_name=name, storage=store, directions=literals)
    except DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=store)
        if (before := direction_names(study.directions)) != list(directions):
            raise InputError(
                f"study {name} was started with direction {before}, not {list(directions)}; "
                "give the old direction, or another study=NAME"
            ) from None
        deadline = time.monotonic() + PATIENCE
        while "folder" not in study.user_attrs and not study.get_trials(deepcopy=False):
            if time.monotonic() > deadline:  # the sweep that created the study was killed
                break
            time.sleep(0.05)
    return study, _folder(study, default_folder)


def name_objectives(study: Study, objective: Any) -> None:
    """Name the values of a study, unless they have names. objective: the key `objective` of the config.

    A program without that key, or with something else under it, gets no names.
    """
    names = METRICS.get(objective, [objective]) if isinstance(objective, str) else []
    if len(names) == len(study.directions) and study.metric_names is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(names)


def direction_names(directions: Sequence[StudyDirection]) -> list[str]:
    """minimize or maximize for each direction."""
    return [direction.name.lower() for direction in directions]


def _folder(study: Study, default: Path) -> Path:
    path = study.user_attrs.get("folder")
    if path and Path(path).parent.is_dir():  # otherwise it was moved, or this machine does not share it
        if Path(path) != default:
            log.info("using the folder of the study, %s, not %s", path, default)
        Path(path).mkdir(exist_ok=True)
        return Path(path)
    identity = str(study.user_attrs.get("id", ""))
    if not re.fullmatch("[0-9a-f]{32}", identity):  # it becomes part of a file's name
        identity = uuid.uuid4().hex
    study.set_user_attr("id", identity)
    folder = claim_folder(default, identity)
    if folder != default:
        log.info("using the folder %s: %s is another study's", folder, default)
    study.set_user_attr("folder", str(folder))
    return folder


def claim_folder(default: Path, identity: str) -> Path:
    """Take the first of FOLDER, FOLDER-2, FOLDER-3 ... that no other study has."""
    for number in range(1, 10_000):
        folder = default if number == 1 else default.with_name(f"{default.name}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        own_file = folder / f".study.{identity}"
        own_file.write_text(identity)
        try:
            (folder / STUDY_FILE).hardlink_to(own_file)  # fails if the file exists, and is never half-written
        except FileExistsError:
            pass
        finally:
            own_file.unlink()
        if (folder / STUDY_FILE).read_text() == identity:
            return folder
    raise InputError(f"{default} and 10,000 folders after it are taken; choose another hydra.sweep.dir")
