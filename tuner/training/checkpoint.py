"""What a single run writes after an epoch, so that it can go on from there when it was killed."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import Any

import torch

from tuner import InputError, earlier
from tuner.files import replacing
from tuner.runs.run import CHECKPOINT, Run
from tuner.runs.table import flat

log = logging.getLogger(__name__)
MOST = 1 / 20  # of a run's time that goes into writing
LONG = 60  # seconds of a run after which its log says how to go on with it


class Checkpoint:
    """checkpoint.pt of a run: its config, its seconds until then, and what its training goes on from."""

    def __init__(self, run: Run, config: Mapping[str, Any]):
        self.run, self.config, self.path = run, config, run.folder / CHECKPOINT
        self.seconds = 0.0  # that writing took
        self.told = False

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write it anew, unless too much of the time has gone into that. state: tensors, numbers, dicts and lists."""
        if self.seconds > MOST * self.run.seconds():
            return
        start = time.perf_counter()
        with replacing(self.path) as file:
            torch.save({"config": json.dumps(self.config), "seconds": self.run.seconds(), "state": state()}, file)
        if not self.told and self.run.seconds() > LONG:
            self.told = True
            log.info("if it is killed, go on with: python -m tuner.resume %s", self.run.folder)
        self.seconds += time.perf_counter() - start

    def load(self) -> dict[str, Any] | None:
        """What the run was killed after, or None; metrics.csv is cut to the epochs until then.

        Raises InputError where it was a run of another config, or of other images, or is damaged.
        """
        if not self.path.exists():
            return None
        try:
            kept = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{self.path} is damaged ({reason}): delete it to begin anew") from error
        written = json.loads(kept["config"])
        earlier.rename_keys(written)
        before, now = dict(flat(written)), dict(flat(self.config))
        keys = [key for key in {**before, **now} if key != "device"]  # another device may go on, with a warning
        differ = [f"{key}={before.get(key)}" for key in keys if before.get(key) != now.get(key)]
        if differ and all(line.startswith("split_hashes.") for line in differ):
            raise InputError(
                f"{self.path} is of a run on other images, which have changed since: put them back, or delete that "
                "file to begin anew"
            )
        if differ:
            raise InputError(
                f"{self.path} is of a run with {', '.join(differ[:3])}: give the same, or another hydra.run.dir, or "
                "delete that file to begin anew"
            )
        state: dict[str, Any] = kept["state"]
        epochs = state["fitted"]["epochs"]
        self.run.cut_metrics(epochs)
        self.run.start -= kept["seconds"]
        log.info("going on after epoch %d, from %s", epochs, self.path)
        return state
