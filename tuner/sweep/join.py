"""Finding or making a study, and the one folder that all the sweeps on it share."""

import logging
import time
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.study import Study, StudyDirection

from tuner import InputError
from tuner.sweep import storage

log = logging.getLogger("tuner.sweep")
METRICS = {"accuracy_and_cost": ["accuracy", "gmacs"]}  # of an objective of several values; others have one
PATIENCE = 10.0  # seconds that the sweep which made a study may take to choose its folder


def join(name: str | None, spec: str | None, directions: Sequence[str], wanted: Path) -> tuple[Study, Path]:
    """The study of that name, made if there is none, and its folder: `wanted`, unless it has one, or that is another's.

    Raises InputError where the study has other directions.
    """
    store = storage.connect(spec)
    wished: Any = list(directions)
    try:
        study = optuna.create_study(study_name=name, storage=store, directions=wished)
    except DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=store)
        if (before := names(study.directions)) != list(directions):
            raise InputError(
                f"study {name} was started with direction {before}, not {list(directions)}; "
                "give the old direction, or another study=NAME"
            ) from None
        deadline = time.monotonic() + PATIENCE
        while "folder" not in study.user_attrs and not study.get_trials(deepcopy=False):
            if time.monotonic() > deadline:  # it was killed
                break
            time.sleep(0.05)
    return study, _folder(study, wanted)


def name_objectives(study: Study, objective: Any) -> None:
    """Name the values of a study, unless they have names. objective: the key of that name in tuner.train's config.

    Other programs may have no such key, or something else under it: then the values stay without names.
    """
    names = METRICS.get(objective, [objective]) if isinstance(objective, str) else []
    if len(names) == len(study.directions) and study.metric_names is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(names)


def names(directions: Sequence[StudyDirection]) -> list[str]:
    return [direction.name.lower() for direction in directions]


def _folder(study: Study, wanted: Path) -> Path:
    known = study.user_attrs.get("folder")
    if known and Path(known).parent.is_dir():  # else it was moved away, or this machine does not share it
        if Path(known) != wanted:
            log.info("the folder is %s, not %s: the study has it already", known, wanted)
        Path(known).mkdir(exist_ok=True)
        return Path(known)
    identity = study.user_attrs.get("id") or uuid.uuid4().hex
    study.set_user_attr("id", identity)
    folder = claim(wanted, identity)
    if folder != wanted:
        log.info("the folder is %s: %s is another study's", folder, wanted)
    study.set_user_attr("folder", str(folder))
    return folder


def claim(wanted: Path, identity: str) -> Path:
    """The first of FOLDER, FOLDER-2, FOLDER-3 ... that no other study has; from then on it is this one's."""
    for number in range(1, 10_000):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        mine = folder / f".study.{identity}"
        mine.write_text(identity)
        try:
            (folder / ".study").hardlink_to(mine)  # fails where it is there, and is never half-written
        except FileExistsError:
            pass
        finally:
            mine.unlink()
        if (folder / ".study").read_text() == identity:
            return folder
    raise InputError(f"{wanted} and 10,000 folders after it are taken; choose another hydra.sweep.dir")
