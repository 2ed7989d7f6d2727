"""The run folder: what a run leaves behind, written so that a killed run leaves whole files."""

import csv
import io
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save

from tuner import InputError, __version__, plots
from tuner.files import replacing

METRICS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds")
VERSIONS = ("torch", "torchvision", "hydra-core", "hydra-optuna-sweeper", "omegaconf", "optuna")


class Run:
    """A run folder that is being written.

    metrics.csv grows by a row an epoch; everything else is written once, whole. result.json comes last: where it is
    missing, the run is going on or was killed.
    """

    def __init__(self, folder: Path):
        """Raises InputError where `folder` holds a finished run, which would be overwritten."""
        if (folder / "result.json").exists() and read_result(folder)["status"] == "complete":
            raise InputError(f"{folder} holds a finished run; choose another hydra.run.dir, or move that one away")
        self.folder = folder
        self.result: dict[str, Any] = {}
        for left in ("result.json", "model.safetensors"):  # by a run that failed here, not by this one
            (folder / left).unlink(missing_ok=True)
        with replacing(folder / "metrics.csv") as file:
            file.write((",".join(METRICS) + "\n").encode())

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Append an epoch's row to metrics.csv; what there is no metric for stays empty."""
        with (self.folder / "metrics.csv").open("a", newline="") as file:
            values = (f"{metrics[name]:.6g}" if name in metrics else "" for name in METRICS[1:])
            csv.writer(file, lineterminator="\n").writerow([epoch, *values])

    def metrics(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "metrics.csv")

    def save_model(
        self, state: Mapping[str, torch.Tensor], classes: Sequence[str], name: str = "model.safetensors"
    ) -> None:
        """What was trained, with the class names in its metadata."""
        tensors = {key: tensor.cpu().contiguous() for key, tensor in state.items()}
        with replacing(self.folder / name) as file:
            file.write(save(tensors, metadata={"class_names": json.dumps(list(classes))}))

    def save_table(self, name: str, rows: Sequence[Sequence[Any]]) -> None:
        """A CSV file of the given rows, the first of which is the header."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        with replacing(self.folder / name) as file:
            file.write(text.getvalue().encode())

    def save_config(self, config: DictConfig) -> None:
        """config.yaml, with interpolations as they are."""
        with replacing(self.folder / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(config).encode())

    def save_plot(self, name: str, figure: Figure) -> None:
        """plots/NAME.png"""
        (self.folder / "plots").mkdir(exist_ok=True)
        plots.save(figure, self.folder / "plots" / f"{name}.png")

    def finish(self, status: str, **more: Any) -> None:
        """result.json: `status` is complete, pruned or failed."""
        result = {"status": status, **self.result, **more, "versions": versions()}
        with replacing(self.folder / "result.json") as file:
            file.write(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def read_result(folder: Path) -> dict[str, Any]:
    """A folder's result.json."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def versions() -> dict[str, str]:
    return {"tuner": __version__, "python": platform.python_version()} | {name: version(name) for name in VERSIONS}
