"""Fine-tune a pretrained image network: `python -m tuner.train`.

Hydra calls the task with a config; a launcher may call its three stages instead (see tuner.stages).
"""

import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from tuner import InputError, artifacts, earlier, output, targets
from tuner.config import CONF, applied_yaml, parse
from tuner.rules import FOLDER_NAME, or_null
from tuner.runs.run import Run, TakenError
from tuner.stages import Prepared, finish, fit_together, one_line_errors, prepare, recorded
from tuner.sweep import hydra_private, plugin
from tuner.sweep.trial import RunningTrial, Stages

plugin.register()
log = logging.getLogger("tuner.train")


def prepare_job(cfg: DictConfig, trial: RunningTrial | None) -> Prepared:
    """Open the run folder of a Hydra job, check its config, and prepare the run."""
    hydra_cfg = HydraConfig.get()
    try:
        run = Run(Path(hydra_cfg.runtime.output_dir))
    except TakenError:
        close_log_files()
        raise
    with recorded(run):
        # Hydra would write these before the folder is known to be free; train.yaml has hydra.output_subdir: null
        run.save_config(hydra_private.job_files(cfg))
        number = hydra_cfg.job.num if hydra_cfg.mode == RunMode.MULTIRUN else None
        config = parse(cfg)
        run.save_config({"conf/config.yaml": applied_yaml(cfg, config)})
        return prepare(config, run, trial, number)


def close_log_files() -> None:
    """What follows is not logged to the files that Hydra has opened for this job: they are another run's."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]:
        root.removeHandler(handler)
        handler.close()


STAGES = Stages(prepare_job, fit_together, finish, check=parse)


def task(cfg: DictConfig) -> float | tuple[float, float]:
    """One run, from its Hydra config to its folder. A user's mistake ends it in one line."""
    hydra_cfg = HydraConfig.get()
    in_sweep = hydra_cfg.mode == RunMode.MULTIRUN
    if not in_sweep and (search := hydra_cfg.runtime.choices.get("hparams_search")):
        log.warning("hparams_search=%s needs -m to search: this is a single run", search)
    folder = Path(hydra_cfg.runtime.output_dir)
    with one_line_errors(folder, raises=in_sweep):
        if not in_sweep and (place := cfg.get("artifacts")) is not None:
            artifacts.check(str(place))  # before anything is written: a password may be in it
        value = STAGES.run(cfg, None)
        artifacts.keep(folder, cfg.get("artifacts"))
        return value


task.stages = STAGES  # type: ignore[attr-defined]


def check_folders(arguments: Sequence[str]) -> None:
    """Raises InputError for a folder that Hydra could not make, or would make outside of multirun/."""
    for key, _, value in (argument.partition("=") for argument in arguments):
        text = value.strip("'\"")
        if key == "study" and "${" not in text:
            or_null(FOLDER_NAME).check(key, None if text == "null" else text)
        if (
            key in ("hydra.run.dir", "hydra.sweep.dir")
            and max(len(os.fsencode(part)) for part in text.split("/")) > 255
        ):
            raise InputError(f"{key}={text} has the name of a folder of more than 255 bytes: shorten it")


def main() -> None:
    """Train one run, or search with -m, from a config that Hydra composes. Refuses names of earlier versions."""
    # Hydra refuses this spelling, with the password
    sys.argv[1:] = [re.sub(r"^\+hydra\.sweeper\.storage\b", "hydra.sweeper.storage", word) for word in sys.argv[1:]]
    earlier.refuse_old_names(sys.argv[1:])
    check_folders(sys.argv[1:])
    with hydra_private.files_in_one_line():
        hydra.main(config_path=str(CONF), config_name="train", execution_whitelist=targets.of_hydra())(task)()


if __name__ == "__main__":
    from tuner.train import main as importable  # so that worker processes import it, instead of being sent its code

    output.command(importable, log=False)  # Hydra sets up the log
