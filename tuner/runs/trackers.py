"""Experiment trackers: they receive what the run folder gets. A package is imported only when it is chosen."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from tuner import InputError
from tuner.config import RunConfig, argument_errors
from tuner.runs.table import flat

log = logging.getLogger("tuner.runs.trackers")
# Numbers in a result.json that are not results:
GIVEN = ("seed", "trial", "n_train", "n_val", "n_test", "test_duplicates", "split_hashes", "data")


class UnreachableError(InputError):
    """A tracker's store or server is unreachable."""


class Tracker:
    """A run's tracker. The run does not depend on it: if the tracker fails, a warning says what it did not receive."""

    def __init__(self, to: "TensorBoard | MLflow | WandB", folder: Path):
        self.to, self.folder = to, folder
        self.failed = False

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Send an epoch's metrics, unless an earlier call failed."""
        if not self.failed:
            self._send(f"epoch {epoch} and later ones", lambda: self.to.log_epoch(epoch, metrics))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Send the result, even after a failure: the server may be back, and still show the run as running."""
        self._send("the result", lambda: self.to.finish(result))

    def _send(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except self.to.errors as error:
            self.failed = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            name = type(self.to).__name__
            log.warning("%s did not receive %s; metrics.csv in %s is complete: %s", name, what, self.folder, reason)


def open_tracker(config: RunConfig, folder: Path, study: str | None, number: int | None) -> Tracker | None:
    """The experiment tracker of the config, or None for logger=csv. number: of the job in a sweep.

    Raises InputError if it cannot be used. In a sweep, an unreachable server is a warning, and the run has no tracker.
    """
    if not config.logger.keywords:
        return None
    in_sweep = number is not None
    name = "best" if config.final.epochs else str(number) if in_sweep else folder.name
    plain = {key: value for key, value in config.plain.items() if key != "logger"}
    try:
        with argument_errors("logger"):
            return Tracker(config.logger.build()(folder, study, name, plain), folder)
    except UnreachableError as error:
        if not in_sweep:
            raise
        log.warning("%s; trial %s continues without it", error, name)  # an outage must not cost a night
        return None


class TensorBoard:
    """Event files in the run folder."""

    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, folder: Path, _study: str | None, _name: str, config: Mapping[str, Any]):
        with starting("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams
        self.writer: Any = SummaryWriter(str(folder), flush_secs=10)
        columns = ("val_accuracy", "val_loss", "final/val_accuracy", "final/test_accuracy")  # in the table of trials
        experiment, begin, self.end = hparams(dict(flat(config)), dict.fromkeys(columns, 0.0))
        self._write(experiment, begin)

    def _write(self, *summaries: Any) -> None:
        for summary in summaries:
            self.writer.file_writer.add_summary(summary)

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Write each metric as a scalar at step `epoch`."""
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, epoch)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the results and the status, and close the file. A run that has not failed is marked as ended."""
        for key, value in final(result).items():
            self.writer.add_scalar(key, value)
        self.writer.add_text("status", status(result))
        if result["status"] != "failed":
            self._write(self.end)
        self.writer.close()


class MLflow:
    """A run in the study's experiment, or in `experiment` for single runs.   uri: a server or a store."""

    def __init__(
        self,
        folder: Path,
        study: str | None,
        name: str,
        config: Mapping[str, Any],
        *,
        uri: str | None = None,
        experiment: str = "tuner",
    ):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")  # half a minute; MLflow's default of 7 takes four
        if study:
            os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines for each trial
        with starting("mlflow"):
            import mlflow
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError
        self.errors = (MlflowException, SQLAlchemyError, OSError)
        self.of = mlflow.entities
        uri = uri or mlflow.get_tracking_uri()
        with starting("mlflow", *self.errors):
            with alone(uri):
                self.client: Any = mlflow.MlflowClient(uri)
                number = self._experiment(study or experiment)
            self.run = self.client.create_run(number, tags={"folder": str(folder)}, run_name=name).info.run_id
            params = [self.of.Param(key, str(value)) for key, value in flat(config)]
            for i in range(0, len(params), 100):  # MLflow's limit for one call
                self.client.log_batch(self.run, params=params[i : i + 100])

    def _experiment(self, name: str) -> str:
        """The experiment's number. Another trial may be creating it now: create it, or look it up if it exists."""
        try:
            return self.client.create_experiment(name)
        except self.errors[0] as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self.client.get_experiment_by_name(name).experiment_id

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Send all metrics in one request, at step `epoch`. Raises one of `errors`."""
        now = round(time.time() * 1000)
        self.client.log_batch(self.run, [self.of.Metric(key, value, now, epoch) for key, value in metrics.items()])

    def finish(self, result: Mapping[str, Any]) -> None:
        """Send the results and the status, and end the run; MLflow shows a pruned run as KILLED."""
        self.log_epoch(result.get("epochs", 0), final(result))
        self.client.set_tag(self.run, "status", status(result))
        ends = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
        self.client.set_terminated(self.run, ends[result["status"]])


class WandB:
    """A run in a project, grouped by study. Account and server are taken from the environment."""

    def __init__(
        self,
        folder: Path,
        study: str | None,
        name: str,
        config: Mapping[str, Any],
        *,
        project: str = "tuner",
        mode: Literal["online", "offline"] | None = None,
    ):
        with starting("wandb"):
            import wandb
        self.errors = (Exception,)  # errors of its service are not wandb.Errors
        with starting("wandb", wandb.Error, OSError, ValueError):
            self.run = wandb.init(
                project=project,
                group=study,
                name=name,
                config={"folder": str(folder), **config},
                mode=mode,
                reinit="create_new",  # several runs may share a process
                settings=wandb.Settings(console="off", silent=study is not None),  # the console is in train.log
            )

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log all metrics at step `epoch`."""
        self.run.log(dict(metrics), step=epoch)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the results and the status to the summary, and end the run; exit code 1 marks a failed one."""
        self.run.summary.update({"status": status(result), **final(result)})
        self.run.finish(exit_code=int(result["status"] == "failed"))


@contextmanager
def starting(option: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn a missing package into an InputError, and `errors` at the start into an UnreachableError."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != option:
            raise
        hint = f"pip install 'tuner[{option}]'"
        raise InputError(f"logger={option} needs the package {option}: {hint}") from error
    except errors as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnreachableError(f"logger={option} cannot start: {reason}") from error


def alone(uri: str) -> AbstractContextManager[Any]:
    """A lock: processes that open a new SQLite file at once would each create MLflow's tables in it."""
    return FileLock(uri.removeprefix("sqlite:///") + ".lock") if uri.startswith("sqlite:///") else nullcontext()


def final(result: Mapping[str, Any]) -> dict[str, float]:
    """The results in a result.json, each as final/KEY to tell it from the values of epochs."""
    return {f"final/{key}": v for key, v in result.items() if isinstance(v, int | float) and key not in GIVEN}


def status(result: Mapping[str, Any]) -> str:
    """complete, pruned, or failed with its error."""
    return ": ".join([result["status"], *filter(None, [result.get("error")])])
