"""The checkpoint of a single run, written after an epoch; a killed run resumes from it."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch

from tuner import InputError, earlier
from tuner.config import RunConfig, with_absolute_paths
from tuner.files import replacing
from tuner.runs.layout import CHECKPOINT
from tuner.runs.run import Run
from tuner.runs.table import flat
from tuner.training.spec import Spec

log = logging.getLogger(__name__)
MOST = 1 / 20  # largest share of a run's time to spend on writing
IRRELEVANT = ("name", "study", "cache_dir", "cache_limit")  # keys that do not affect the training
LONG = 60  # seconds after which a run's log says how to resume it


class Checkpoint:
    """checkpoint.pt of a run: its config, the seconds that it took so far, and the state of its training.

    Also what model=auto chose from, which is not chosen again.
    """

    def __init__(self, run: Run, config: RunConfig, split_hashes: Mapping[str, str]):
        self.run, self.path = run, run.folder / CHECKPOINT
        self.config = _relevant(config.plain) | {"split_hashes": split_hashes}
        self.seconds = 0.0  # spent on writing
        self.has_said_how = False

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write the file, unless writing has taken too large a share of the run so far."""
        if self.seconds > MOST * self.run.seconds():
            return
        start = time.perf_counter()
        with replacing(self.path) as file:
            kept = {"config": json.dumps(self.config), "choice": json.dumps(self.run.result.get("model_choice"))}
            torch.save({**kept, "seconds": self.run.seconds(), "state": state()}, file)
        if not self.has_said_how and self.run.seconds() > LONG:
            self.has_said_how = True
            log.info("if it is killed, resume with: python -m tuner.resume %s", self.run.folder)
        self.seconds += time.perf_counter() - start

    def load(self) -> dict[str, Any] | None:
        """The state to continue from, or None without a file. metrics.csv loses the rows of later epochs.

        Raises InputError if the file belongs to another config or other images, or is damaged.
        """
        if not self.path.exists():
            return None
        kept = read(self.path)
        written = kept["config"]
        earlier.rename_keys(written)
        written = _relevant(written)
        before, now = dict(flat(written)), dict(flat(self.config))
        keys = [key for key in {**before, **now} if key != "device"]  # another device may resume it, with a warning
        differ = [f"{key}={before.get(key)}" for key in keys if before.get(key) != now.get(key)]
        if differ and all(line.startswith("split_hashes.") for line in differ):
            raise InputError(
                f"{self.path} is of a run on other images: restore the images, or delete that file to start again"
            )
        if differ:
            raise InputError(
                f"{self.path} is of a run with {', '.join(differ[:3])}: use the same values, or another "
                "hydra.run.dir, or delete that file to start again"
            )
        state: dict[str, Any] = kept["state"]
        epochs = state["fitted"]["epochs"]
        self.run.cut_metrics(epochs)
        self.run.start -= kept["seconds"]
        if kept["choice"]:
            self.run.result["model_choice"] = kept["choice"]
        log.info("resuming after epoch %d, from %s", epochs, self.path)
        return state


def read(path: Path) -> dict[str, Any]:
    """A checkpoint: `config`, `choice` (or None), `seconds` and `state`. Raises InputError if it is damaged.

    The file is a zip archive. torch.save writes a CRC-32 of each of its records, and torch.load does not check them.
    """
    try:
        with ZipFile(path) as archive:
            if record := archive.testzip():
                raise BadZipFile(f"the checksum of {record} is wrong")
        kept = torch.load(path, map_location="cpu", weights_only=True)
        config, seconds, state = json.loads(kept["config"]), float(kept["seconds"]), kept["state"]
        choice = json.loads(kept.get("choice", "null"))
        if not isinstance(config, dict) or type(state["fitted"]["epochs"]) is not int:
            raise TypeError("it has no config, or no epochs")
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path} is damaged ({reason[:200]}): delete it to start again") from error
    return {"config": config, "choice": choice, "seconds": seconds, "state": state}


def with_checkpoints(spec: Spec, run: Run, config: RunConfig, split_hashes: Mapping[str, str]) -> Spec:
    """The spec of a single run, which writes checkpoints and resumes from the one in its folder, if there is one."""
    checkpoint = Checkpoint(run, config, split_hashes)
    return replace(spec, resume=checkpoint.load(), checkpoint=checkpoint.save)


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys that do not affect the training, its paths absolute."""
    config = with_absolute_paths(config, Path.cwd())
    kept = {key: value for key, value in config.items() if key not in IRRELEVANT}
    return kept | {"data": {key: value for key, value in config["data"].items() if key not in IRRELEVANT}}
