"""Where a single run may begin, and how it ends: a line about a mistake or a full disk, two after Ctrl-C."""

import csv
import logging
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuner import DivergedError, InputError
from tuner.files import disk_error
from tuner.runs.layout import CHECKPOINT, OUTPUTS, STUDY_FILE
from tuner.runs.result import read_result
from tuner.terminal import INTERRUPTED

log = logging.getLogger("tuner.train")


class TakenError(InputError):
    """A folder that a run can't have: another run's or a study's. Nothing may be written into it."""


def check_free(folder: Path) -> None:
    """Raises TakenError if a folder holds a finished run, or is that of a study."""
    if (folder / STUDY_FILE).exists():
        raise TakenError(f"{folder} is the folder of a study; choose another hydra.run.dir")
    if (folder / "result.json").exists() and read_result(folder)["status"] == "complete":
        raise TakenError(f"{folder} holds a finished run; choose another name or hydra.run.dir, or move that run")


@contextmanager
def one_line_errors(folder: Path, *, again: str) -> Iterator[None]:
    """Exit after a line about a user's mistake, a diverged run, a disk or Ctrl-C, instead of with a traceback.

    again: the command that starts the run again.
    """
    try:
        yield
    except (InputError, DivergedError) as error:
        log.error("%s", error)
        log.debug("where it came from, for hydra.verbose=true", exc_info=error)
        sys.exit(1)
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        log.error("a disk is full or cannot be written (%s): change that, then %s", reason, _go_on(folder, again))
        sys.exit(1)
    except KeyboardInterrupt:
        log.error("interrupted %s: %s", _stands(folder), folder)
        log.error("%s", _go_on(folder, again))
        sys.exit(INTERRUPTED)


def _go_on(folder: Path, again: str) -> str:
    if (folder / CHECKPOINT).exists():
        return f"resume with: python -m tuner.resume {shlex.quote(str(folder))}"
    return f"start it again with: {again}"


def _stands(folder: Path) -> str:
    """How far a run has come, from its metrics.csv."""
    try:
        with (folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        rows = []
    if not rows:
        return "before the first epoch ended"
    accuracy = rows[-1].get("val_accuracy")
    return f"after epoch {rows[-1]['epoch']}" + (f", val accuracy {float(accuracy):.4f}" if accuracy else "")


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Remove the folder that Hydra has made for a run if a mistake of the user ends it before it has trained.

    One that had files before is kept, and so is everything outside of outputs/.
    """
    outputs = Path.cwd() / OUTPUTS
    is_new = all(path.suffix == ".log" and path.stat().st_size == 0 for path in folder.iterdir())
    is_new = is_new and outputs in folder.parents
    try:
        yield
    except InputError:
        if is_new and not has_trained(folder):
            close_log_files()
            shutil.rmtree(folder)
            for parent in folder.parents:  # outputs/DATE, outputs
                if outputs in (parent, *parent.parents) and not any(parent.iterdir()):
                    parent.rmdir()
        raise


def has_trained(folder: Path) -> bool:
    """Whether a run has ended an epoch."""
    return (folder / "metrics.csv").exists() and (folder / "metrics.csv").read_bytes().count(b"\n") > 1


def close_log_files() -> None:
    """What follows is not logged to the files that Hydra has opened for this job."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]:
        root.removeHandler(handler)
        handler.close()
