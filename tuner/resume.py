"""Resume a single run that was killed: `python -m tuner.resume FOLDER [KEY=VALUE...]`.

The run's applied config is data. Of the folder, nothing else is read but the checkpoint, metrics.csv, result.json, and
where the run was started.
"""

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from tuner import InputError, arguments, artifacts, terminal
from tuner.config import RunConfig, parse, start_folder, with_values, written
from tuner.files import appending
from tuner.runs.ending import one_line_errors
from tuner.runs.layout import CHECKPOINT
from tuner.runs.run import Run
from tuner.safe_text import Formatter

FORMAT = "[%(asctime)s] %(levelname)s %(message)s"  # as in conf/train.yaml


def killed_run(folder: Path, more: Sequence[str] = ()) -> RunConfig:
    """The config of the run in `folder`.

    more: further overrides, such as device=cpu on a machine without the run's GPU.
    Raises InputError if there is no checkpoint to resume from.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    if not (folder / CHECKPOINT).exists():
        raise InputError(
            f"{folder} has no {CHECKPOINT}: it is not a run, has finished, belongs to a sweep, or was killed before "
            "its first epoch ended; start it again"
        )
    return parse(with_values(written(folder), more))


def main() -> None:
    """Train a killed run to its end, in its folder. Its log goes on in train.log."""
    args = arguments.resume().parse_args()
    folder = args.folder.resolve()
    config = killed_run(folder, args.overrides)
    if (started := start_folder(folder)) and started.is_dir():  # a logger's store may be a relative path
        os.chdir(started)
    logging.basicConfig(level=logging.INFO, handlers=[_handler(sys.stdout)], force=True)
    from tuner.stages import train  # imports torch, which takes seconds

    again = shlex.join(["python", "-m", "tuner.resume", str(folder), *args.overrides])
    run = Run(folder)
    with appending(folder / "train.log") as file, one_line_errors(folder, again=again):
        for logger in (logging.getLogger(), run.log):
            logger.addHandler(_handler(file))
        train(config, run)
        artifacts.keep(folder, config.artifacts)


def _handler(stream: TextIO) -> logging.Handler:
    handler = terminal.Console(stream)
    handler.setFormatter(Formatter(FORMAT, "%H:%M:%S"))
    return handler


if __name__ == "__main__":
    terminal.command(main)
