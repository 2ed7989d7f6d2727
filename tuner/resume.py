"""Resume a single run that was killed: `python -m tuner.resume FOLDER [device=DEVICE]`."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tuner import InputError, earlier, output, yaml_file
from tuner.config import config_options
from tuner.runs.run import CHECKPOINT
from tuner.safe_text import printable


def command(folder: Path, more: Sequence[str] = ()) -> tuple[list[str], Path]:
    """The command that resumes the run in `folder`, and the folder to start it in.

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
    try:
        hydra = yaml_file.mapping(folder / ".hydra" / "hydra.yaml")["hydra"]
        overrides, runtime = hydra["overrides"], hydra["runtime"]
        given = [
            o for o in (*overrides["hydra"], *overrides["task"]) if not o.startswith(("hydra.run.dir=", "hydra.mode="))
        ]
        options, cwd = config_options(hydra), Path(runtime["cwd"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}/.hydra/hydra.yaml does not say how the run was started ({error})") from error
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    overrides = [*map(earlier.override, given), *more, f"hydra.run.dir='{quoted}'"]
    return [sys.executable, "-m", "tuner.train", *options, *overrides], cwd


def main() -> None:
    """Print the command that resumes a killed run, then run it in place of this process."""
    parser = argparse.ArgumentParser("python -m tuner.resume", description=__doc__)
    parser.add_argument("folder", type=Path, help="the run's folder, as in outputs/2026-11-24/12-00-00-000000")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as device=cpu, on another machine")
    args = parser.parse_args()
    words, cwd = command(args.folder.resolve(), args.overrides)
    try:
        os.chdir(cwd)
    except OSError as error:
        raise InputError(f"the run was started in {cwd}, which can't be entered: {error.strerror}") from error
    print(printable(shlex.join(words)), flush=True)
    os.execv(words[0], words)


if __name__ == "__main__":
    output.command(main)
