"""Resume a single run that was killed: `python -m tuner.resume FOLDER [KEY=VALUE...]`.

The run's applied config is data: of the folder, nothing but that, the checkpoint and metrics.csv is read.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tuner import InputError, output
from tuner.config import RunConfig, parse, start_folder, with_values, written
from tuner.runs.run import CHECKPOINT, Run
from tuner.safe_text import Formatter
from tuner.stages import one_line_errors, train

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
    parser = argparse.ArgumentParser("python -m tuner.resume", description=__doc__)
    parser.add_argument("folder", type=Path, help="the run's folder, as in outputs/2026-11-24/12-00-00-000000")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as device=cpu, on another machine")
    args = parser.parse_args()
    folder = args.folder.resolve()
    config = killed_run(folder, args.overrides)
    if (started := start_folder(folder)) and started.is_dir():  # a logger's store may be a relative path
        os.chdir(started)
    _log_to(folder / "train.log")
    with one_line_errors(folder, raises=False):
        train(config, Run(folder))


def _log_to(path: Path) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout), logging.FileHandler(path, encoding="utf-8")]
    for handler in handlers:
        handler.setFormatter(Formatter(FORMAT, "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)


if __name__ == "__main__":
    output.command(main)
