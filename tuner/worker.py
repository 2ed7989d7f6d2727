"""Run trials of a study that was started elsewhere: `python -m tuner.worker --storage URL study=NAME`."""

import logging
import os
import re
import shlex
import sys

import optuna

from tuner import InputError, arguments, terminal
from tuner.sweep import WORKER, passwords, storage
from tuner.sweep.settings import COMMAND

log = logging.getLogger("tuner.worker")
OVERRIDE = re.compile(r"\+{0,2}[\w./@]+=.*|~[\w./@]+(=.*)?", re.DOTALL)
# Keys that are this machine's own matter, or the sweep's that ends the study.
OWN = re.compile(r"[+~]*(hydra[./](launcher|run|sweep|job|callbacks|searchpath|help|mode|verbose)\b|final\b|study=).*")
STORAGE = "hydra.sweeper.storage"
PATIENCE = 600.0  # seconds to wait for a server that is being restarted, as searches do


def main() -> None:
    """Join a study with the config that it was started with, until no trials are left. Replaces this process."""
    args = arguments.worker().parse_args()
    names = [word.removeprefix("study=") for word in args.overrides if word.startswith("study=")]
    if len(names) != 1:
        raise InputError("give the study once, as study=NAME")
    words = [*recorded(args.storage, names[0].strip("'\"")), *args.overrides]
    words += [f"{STORAGE}={args.storage}", "final.seeds=0"]
    log.info("running: %s", passwords.redacted(shlex.join(["python", "-m", "tuner.train", "-m", *words])))
    sys.stderr.flush()
    os.environ[WORKER] = "1"
    os.execv(sys.executable, [sys.executable, "-m", "tuner.train", "-m", *words])  # signals reach the search itself


def recorded(url: str, name: str) -> list[str]:
    """The overrides that a study was started with, less those of OWN. Raises InputError if it has none."""
    store = storage.open_read_only(str(storage.resolve(url)), patience=PATIENCE)
    with storage.damage_named(url):
        names = optuna.get_all_study_names(store)
        if name not in names:
            raise InputError(f"no study {name} in {passwords.redacted(url)}; known: {', '.join(names) or 'none'}")
        words = optuna.load_study(study_name=name, storage=store).user_attrs.get(COMMAND)
    if not isinstance(words, list):
        raise InputError(f"study {name} does not say how it was started: join it with that command and study={name}")
    of_config = [word for word in map(str, words) if OVERRIDE.fullmatch(word) and not word.startswith(f"{STORAGE}=")]
    return [word for word in of_config if not OWN.fullmatch(word)]


if __name__ == "__main__":
    terminal.command(main)
