"""Fine-tune a pretrained image network: `python -m tuner.train`.

Hydra calls the task with a config; a launcher may call its three stages instead (see tuner.stages). They import torch
and pandas, which take seconds: the log says before that what is run.
"""

import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from tuner import (
    CallableModule,
    InputError,
    __version__,
    artifacts,
    config_reference,
    earlier,
    files,
    targets,
    terminal,
)
from tuner.config import CONF, applied_yaml, parse
from tuner.rules import FOLDER_NAME, or_null
from tuner.runs.ending import TakenError, check_free, close_log_files, nothing_left, one_line_errors
from tuner.runs.layout import LATEST, OUTPUTS
from tuner.sweep import hydra_private, passwords, plugin
from tuner.sweep.trial import RunningTrial, Stages

if TYPE_CHECKING:
    from tuner.stages import Prepared

plugin.register()
log = logging.getLogger("tuner.train")
RANGE = re.compile(r"^[\w./+@]+=(tag\(.*)?interval\(")


def prepare_job(cfg: DictConfig, trial: RunningTrial | None) -> "Prepared":
    """Open the run folder of a Hydra job, check its config, and prepare the run."""
    from tuner.runs.run import Run
    from tuner.stages import prepare, recorded

    hydra_cfg = HydraConfig.get()
    try:
        run = Run(Path(hydra_cfg.runtime.output_dir))
    except TakenError:
        close_log_files()  # they are another run's
        raise
    with recorded(run):
        # Hydra would write these before the folder is known to be free; train.yaml has hydra.output_subdir: null
        run.save_config(hydra_private.job_files(cfg))
        number = hydra_cfg.job.num if hydra_cfg.mode == RunMode.MULTIRUN else None
        config = parse(cfg)
        run.save_config({"conf/config.yaml": applied_yaml(cfg, config)})
        prepared = prepare(config, run, trial, number)
    if number is None:
        link_latest(run.folder, Path(hydra_cfg.runtime.cwd))
    return prepared


def fit_together(jobs: Sequence["Prepared"]) -> Iterator[tuple[int, Any]]:
    """See tuner.stages.fit_together."""
    from tuner import stages

    yield from stages.fit_together(jobs)


def finish(job: "Prepared", fitted: Any) -> float | tuple[float, float]:
    """See tuner.stages.finish."""
    from tuner import stages

    return stages.finish(job, fitted)


STAGES = Stages(prepare_job, fit_together, finish, check=parse)


def task(cfg: DictConfig) -> float | tuple[float, float]:
    """One run, from its Hydra config to its folder. A user's mistake ends it in one line."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    in_sweep = hydra_cfg.mode == RunMode.MULTIRUN
    if in_sweep:
        return _run(cfg, folder)
    if search := hydra_cfg.runtime.choices.get("hparams_search"):  # by the defaults of a config of the user
        raise SystemExit(f"hparams_search={search} needs -m")
    again = str(passwords.redacted(shlex.join(["python", "-m", "tuner.train", *sys.argv[1:]])))
    with one_line_errors(folder, again=again), nothing_left(folder):
        try:
            check_free(folder)
        except TakenError:
            close_log_files()  # they are another run's
            raise
        parse(cfg)
        if (place := cfg.get("artifacts")) is not None:
            artifacts.check(str(place))  # before anything is written: a password may be in it
        choices = hydra_cfg.runtime.choices
        log.info("%s on %s: %s", choices.get("model"), choices.get("data"), folder)
        return _run(cfg, folder)


def _run(cfg: DictConfig, folder: Path) -> float | tuple[float, float]:
    value = STAGES.run(cfg, None)
    artifacts.keep(folder, cfg.get("artifacts"))
    return value


task.stages = STAGES  # type: ignore[attr-defined]


def link_latest(folder: Path, start: Path) -> None:
    """Let outputs/latest be the last single run.   start: the folder in which it was started."""
    outputs = start / OUTPUTS
    if outputs in folder.parents:
        try:
            files.link(outputs / LATEST, folder.relative_to(outputs))
        except OSError as error:
            log.warning("%s cannot be a link to this run: %s", outputs / LATEST, error.strerror)


def searches_with_sampler(words: Sequence[str]) -> bool:
    """Whether the words choose a search, directly or by a config file of the user."""
    groups = ("hparams_search=", "hydra/sweeper=", "experiment=", "--config-dir", "-cd", "--config-name", "-cn")
    return any(word.startswith((*groups, *(f"+{group}" for group in groups))) for word in words)


def is_multirun(words: Sequence[str]) -> bool:
    """Whether a command line asks Hydra for several jobs."""
    return not {"-m", "--multirun"}.isdisjoint(words)


def names_search(words: Sequence[str]) -> bool:
    """Whether a command line has hparams_search=NAME."""
    values = [word.partition("=")[2] for word in words if word.startswith("hparams_search=")]
    return bool(values) and values[-1] not in ("null", "")


def check_words(words: Sequence[str]) -> None:
    """Raises InputError for a folder that Hydra could not make, or would make elsewhere, and for a search's `name`."""
    values = {key: value.strip("'\"") for key, _, value in (word.partition("=") for word in words)}
    for key in ("study", "name"):
        if "${" not in (text := values.get(key, "${")):
            or_null(FOLDER_NAME).check(key, None if text == "null" else text)
    if values.get("name") == LATEST:
        raise InputError(f"name={LATEST} must be another name: {OUTPUTS}/{LATEST} is a link to the last run")
    if (is_multirun(words) or names_search(words)) and "name" in values:
        raise InputError(f"name={values['name']} is for a single run; several have study={values['name']}")
    if not searches_with_sampler(words) and (ranges := [word for word in words if RANGE.search(word)]):
        raise InputError(f"{ranges[0]} is a range, which only a search draws from: add hparams_search=optuna")
    for key in ("hydra.run.dir", "hydra.sweep.dir"):
        if any(len(os.fsencode(part)) > 255 for part in values.get(key, "").split("/")):
            raise InputError(f"{key}={values[key]} has the name of a folder of more than 255 bytes: shorten it")


def main() -> None:
    """Train one run, or search, from a config that Hydra composes. Refuses names of earlier versions."""
    if config_reference.asks_for_help(sys.argv[1:]):
        config_reference.print_help(sys.argv[1:])
        return
    if "--version" in sys.argv[1:]:
        print(f"tuner {__version__}")
        return
    # Hydra refuses this spelling, with the password
    sys.argv[1:] = [re.sub(r"^\+hydra\.sweeper\.storage\b", "hydra.sweeper.storage", word) for word in sys.argv[1:]]
    terminal.end_with_caller()
    earlier.refuse_old_names(sys.argv[1:])
    check_words(sys.argv[1:])
    if names_search(sys.argv[1:]) and not is_multirun(sys.argv[1:]) and not {"--cfg", "-c"} & {*sys.argv[1:]}:
        sys.argv.append("-m")  # hydra.mode can only be set by the primary config
        sys.orig_argv.append("-m")  # which workers and messages repeat
    with hydra_private.files_in_one_line():
        hydra.main(config_path=str(CONF), config_name="train", execution_whitelist=targets.of_hydra())(task)()


sys.modules[__name__].__class__ = CallableModule  # tuner.train(...): see tuner.calls

if __name__ == "__main__":
    from tuner.train import main as importable  # so that worker processes import it, instead of being sent its code

    terminal.command(importable, log=False)  # Hydra sets up the log
