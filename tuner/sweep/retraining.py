"""The end of a search: the best configuration, or an ensemble, is retrained on train + validation, and tested once.

The default config is retrained likewise, unless it is the best, to say what the search has gained on the test split.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tuner import InputError, artifacts, earlier, yaml_file
from tuner.files import disk_error
from tuner.runs.layout import BEST, DEFAULT
from tuner.sweep import hydra_private, ranking, report, slurm, storage
from tuner.sweep.budget import Budget
from tuner.sweep.config_cache import CachingConfigLoader
from tuner.sweep.job import LastRun
from tuner.sweep.search_space import SearchSpace, as_override
from tuner.sweep.settings import settings_of
from tuner.sweep.trial import RunningTrial, Shared

if TYPE_CHECKING:
    from tuner.runs.ensemble import Ensemble

log = logging.getLogger("tuner.sweep")


@dataclass
class Retraining:
    """Retrains the best trial into best/, and the default config into default/.

    For programs with `final` in their config, such as tuner.train.

    folder: the sweep's. spec: the study's storage. make_launcher: a launcher for a task function, which runs it in this
    process if the second argument says so. artifacts: where the run folders are copied to. here: in this process.
    """

    config: DictConfig
    loader: CachingConfigLoader
    shared: Shared
    budget: Budget
    space: SearchSpace
    folder: Path
    spec: str | None
    task_function: TaskFunction
    make_launcher: Callable[[TaskFunction, bool], Launcher]
    artifacts: str | None
    here: bool = False

    def left(self) -> dict[str, int]:
        """The folders whose runs are missing, with the number of the trial to retrain.

        Empty while trials are left, and with final.seeds=0.
        """
        if self.budget.has_room() or self.budget.running() or not OmegaConf.select(self.config, "final.seeds"):
            return {}
        trials = self.budget.trials()
        best, default = ranking.best(self.budget.study, trials), ranking.baseline(trials)
        if best is None:
            return {}
        tested, asked, left = report.final_result(self.folder, best.number), self._asked(), {}
        if not tested or tested.get("ensemble", {}).get("asked") != asked:
            left[BEST] = best.number
        compares = bool(OmegaConf.select(self.config, "final.default")) and (asked or default != best)
        if default and compares and not report.final_result(self.folder, default.number, DEFAULT):
            left[DEFAULT] = default.number
        return left

    def _asked(self) -> dict[str, int] | None:
        """What the ensemble depends on, beside the best trial; None if no ensemble is asked."""
        picks = OmegaConf.select(self.config, "final.ensemble")
        return {"picks": picks, "complete_trials": len(ranking.complete(self.budget.trials()))} if picks else None

    def run(self) -> None:
        """Retrain what is left, unless another sweep does. An earlier best/ is renamed."""
        try:
            with FileLock(self.budget.locks / "best.lock", timeout=0):
                for name, number in self.left().items():
                    with self._in_place_of_earlier(self.folder / name):
                        self._launch(name, number)
        except Timeout:
            log.info("another sweep on this study is retraining its best trial")

    @contextmanager
    def _in_place_of_earlier(self, folder: Path) -> Iterator[None]:
        """Rename an earlier folder of that name. If the new run fails, the earlier one comes back."""
        time_ = time.strftime("%Y-%m-%d_%H-%M-%S")
        earlier_ = folder.with_name(f"{folder.name}-until-{time_}")
        if not folder.exists():
            yield
            return
        folder.rename(earlier_)
        try:
            yield
        except Exception:
            if folder.exists():
                folder.rename(folder.with_name(f"{folder.name}-failed-{time_}"))
            earlier_.rename(folder)
            raise

    def _launch(self, name: str, number: int) -> None:
        trial = self.budget.trial(number)
        folder = ranking.folder_of(trial, self.folder) or self.folder / str(number)
        result = trial.user_attrs | report.read_result(folder)  # a machine that is out of reach may have the folder
        epochs, temperature = result.get("saved_epoch"), result.get("temperature")
        if type(epochs) is not int:
            raise InputError(
                f"cannot retrain trial {number}, the {name}: neither the study nor {folder}/result.json has saved_epoch"
            )
        last = RunningTrial(self.budget.study.study_name, number, storage.redacted(self.spec), self.shared)
        if name == BEST and (asked := self._asked()):
            last.ensemble = self._ensemble(asked)
            temperature = last.ensemble.temperature
            numbers = ", ".join(str(member.trial) for member in last.ensemble.members)
            log.info("retraining an ensemble on train + validation, then testing it; trials: %s", numbers)
        else:
            text = "retraining trial %d, the %s, on train + validation for %d epochs, then testing it"
            log.info(text, number, name, epochs)
        overrides = self._as_recorded(self.space.overrides(trial.params), folder)
        overrides += [f"final.epochs={epochs}", f"hydra.sweep.subdir={name}"]
        if name == DEFAULT and OmegaConf.select(self.config, "plots") == "auto":
            overrides.append("plots=false")
        if temperature is not None and "temperature" in self.config.final:
            overrides.append(f"final.temperature={temperature}")
        if self.here:
            log.info("it is retrained on this machine: the nodes of the cluster do not see %s", self.folder)
        launcher = self.make_launcher(LastRun(self.task_function, last, self.artifacts), self.here)
        url = self._result(launcher, name, number, overrides)
        copies = artifacts.of_study(self.budget.study)
        if url or name in copies:  # an earlier copy is not of this run
            others = {key: copies[key] for key in (BEST, DEFAULT) if key in copies and key != name}
            self.budget.study.set_user_attr(artifacts.ARTIFACTS, others | ({name: url} if url else {}))

    def _result(self, launcher: Launcher, name: str, number: int, overrides: list[str]) -> Any:
        """What the job returns. Raises InputError if it fails, and what a disk raises."""
        try:
            [job] = slurm.launch(launcher, [overrides], number)
        except Exception as error:
            if disk_error(error):
                raise
            raise InputError(f"retraining trial {number} failed: {type(error).__name__}: {error}") from error
        if job.status is JobStatus.FAILED:
            log_file = self.folder / name / f"{self.config.hydra.job.name}.log"
            reason = hydra_private.job_result(job)
            if disk_error(reason):
                raise reason
            raise InputError(f"retraining trial {number} failed: {reason}; see {log_file}, then sweep again")
        return hydra_private.job_result(job)

    def _ensemble(self, asked: dict[str, int]) -> "Ensemble":
        from tuner.sweep import ensembling  # imports torch, which other programs may not have

        best, *others = ranking.ranked(self.budget.study, self.budget.trials())
        ensemble = ensembling.chosen(best, others, self.folder, self.shared.irrelevant, asked["picks"])
        return replace(ensemble, record=ensemble.record | {"asked": asked})

    def _as_recorded(self, overrides: list[str], folder: Path) -> list[str]:
        """The overrides, and further ones that give the job exactly the config that the trial recorded.

        Keys that do not affect the objective are as in this sweep.
        """
        path = earlier.config_file(folder)
        if path is None and not folder.exists():
            log.info("%s is not on this machine: its config is taken from this sweep, which has the same", folder)
            return overrides
        if path is None:
            raise InputError(f"cannot retrain the best trial: {folder} has no conf/config.yaml")
        plain = yaml_file.mapping(path)
        earlier.rename_keys(plain)
        composed = self.loader.load_sweep_config(self.config, overrides)
        try:
            trials = settings_of(OmegaConf.create(plain), self.shared.irrelevant, resolve=True)
            sweeps = settings_of(composed, self.shared.irrelevant, resolve=True)
        except OmegaConfBaseException as error:
            raise InputError(f"cannot retrain the best trial from {path}: {str(error).splitlines()[0]}") from error
        changed = [key for key in trials if key not in sweeps or sweeps[key] != trials[key]]
        lines = [f"{'' if key in sweeps else '++'}{key}={as_override(trials[key])}" for key in changed]
        return [*overrides, *(f"~{key}" for key in sweeps if key not in trials), *lines]
