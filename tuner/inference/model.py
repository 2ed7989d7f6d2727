"""A trained model from its run folder: images in, calibrated probabilities out. The data set is not needed."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tuner import InputError, artifacts
from tuner.config import PRECISION, of_run
from tuner.data.files import image_file
from tuner.device import Batches, choose_device, choose_precision, exact_float32, send
from tuner.runs.model_file import State, read
from tuner.training.setup import backbone_of


class Layers(nn.Module):
    """A trained head as plain layers: features [B, F] -> logits [B, classes]. What `heads.Stack` computes for one head.

    state: weight and bias of each layer, as `head.0.weight`, `head.0.bias`, ...   precision: of matrix products.
    """

    def __init__(self, state: State, precision: torch.dtype):
        super().__init__()
        self.precision = precision
        self.linear = nn.ModuleList()
        for i in range(len(state) // 2):
            weight, bias = state[f"head.{i}.weight"], state[f"head.{i}.bias"]
            layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
            self.linear.append(layer.to(precision))
        self.normal = nn.LayerNorm(state["head.0.weight"].shape[1], elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, F] -> logits [B, classes], in `precision`."""
        x = self.normal(x).to(self.precision)
        for layer in self.linear[:-1]:
            x = F.relu(layer(x))
        logits: torch.Tensor = self.linear[-1](x)
        return logits


class Model(nn.Module):
    """uint8 images [B, *input_shape] -> float32 probabilities [B, classes], calibrated; eval mode, no gradients.

    classes: their names, in the order of the probabilities.
    input_shape: [C, H, W] of an image.   fit: how a file gets that shape, one of `image_file.FITS`.
    range: the value of a 16-bit file that is white.
    columns: the names of the pixels' columns, if it was trained on a table that names them.
    temperature: divides the logits.   mirrors: whether to average over each image and its mirror image.
    batch_size: images per batch, unless `predict` is given another number.
    max_pixels: of an image file; larger ones are refused. May be changed.
    """

    max_pixels = image_file.MAX_PIXELS

    def __init__(
        self,
        frozen: nn.Module | None,
        trunk: nn.Module | None,
        head: Layers,
        about: dict[str, Any],
        *,
        mirrors: bool,
        device: torch.device,
        batch_size: int,
    ):
        super().__init__()
        self.frozen, self.trunk, self.head, self.mirrors = frozen, trunk, head, mirrors
        self.classes, self.input_shape = tuple(about["class_names"]), tuple(about["input_shape"])
        self.fit: str = about["fit"]
        self.range: int = about["range"]
        self.columns: list[str] | None = about["columns"]
        self.temperature = float(about["temperature"])
        self.device, self.batch_size = device, batch_size
        self.to(device).eval().requires_grad_(False)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, *input_shape] on the model's device -> float32 [B, classes], before the temperature."""
        x = images if self.frozen is None else self.frozen(images)
        if self.trunk is not None:
            half = self.head.precision != torch.float32
            with torch.autocast(self.device.type, dtype=self.head.precision) if half else nullcontext():
                x = self.trunk(x)
        out: torch.Tensor = self.head(x).float()
        return out

    def log_p(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, *input_shape] on the model's device -> log-probabilities [B, classes], before the temperature."""
        with exact_float32(self.device):
            log_p = F.log_softmax(self.logits(images), dim=1)
            if not self.mirrors:
                return log_p
            mirrored = F.log_softmax(self.logits(images.flip(-1)), dim=1)
            return torch.logaddexp(log_p, mirrored) - math.log(2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, *input_shape] on the model's device -> calibrated probabilities, float32 [B, classes]."""
        return F.softmax(self.log_p(images) / self.temperature, dim=1)

    def read(self, path: str | Path) -> torch.Tensor:
        """An image file as uint8 [*input_shape]. Raises image_file.BrokenImageError."""
        return image_file.read(Path(path), self.input_shape, self.fit, self.max_pixels, self.range)

    @torch.inference_mode()
    def predict(
        self, images: torch.Tensor | np.ndarray | str | Path | Sequence[str | Path], *, batch_size: int | None = None
    ) -> torch.Tensor:
        """Probabilities float32 [N, classes], on the CPU.

        images: uint8 [N, *input_shape], a tensor on any device or an array; or the paths of image files, of any
            size and mode.
        Raises InputError for another shape or type, image_file.BrokenImageError for a file that can't be read.
        """
        if isinstance(images, str | Path):
            images = [images]
        if isinstance(images, np.ndarray) and images.dtype == np.uint8:
            images = torch.from_numpy(images)
        if not isinstance(images, torch.Tensor | Sequence):
            raise InputError(f"the model takes a tensor, or paths of files, not {type(images).__name__}")
        if isinstance(images, torch.Tensor) and (images.dtype, images.shape[1:]) != (torch.uint8, self.input_shape):
            raise InputError(
                f"the model takes uint8 images [N, {', '.join(map(str, self.input_shape))}], not "
                f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}; for files, pass their paths"
            )

        def probabilities(batch: torch.Tensor | Sequence[str | Path]) -> torch.Tensor:
            if not isinstance(batch, torch.Tensor):
                batch = torch.stack([self.read(path) for path in batch])
            return cast(torch.Tensor, self(send(batch, self.device))).cpu()

        in_batches = Batches(batch_size or self.batch_size, self.device)
        return torch.cat([torch.empty(0, len(self.classes)), *in_batches(probabilities, images)])


def load(run: str | Path, *, device: str = "auto", precision: str = "auto") -> Model:
    """Load the model of a finished run.

    run: a run folder, a search's best/, or a .safetensors file in one: best/ has one a seed. Or the URL of a copy that
        `artifacts` has made: it is brought into the cache.
    device: auto, cpu, cuda, cuda:N or mps.   precision: bf16, fp32, or auto, which is as the run's own config has it.
    Raises InputError if the run is missing, unfinished, damaged or from a version before calibration, or if its
    pretrained weights are missing or have changed.
    """
    PRECISION.check("precision", precision)
    path = file_of(run)
    about, state = read(path)
    config = of_run(path.parent)
    try:
        backbone = backbone_of(config)
        chosen = choose_device(device)
        dtype = choose_precision(config.precision if precision == "auto" else precision, chosen)
        if backbone.weights.key != about["weights"]:
            raise InputError(
                f"model.weights={config.model.weights} are not the weights that it was trained on: restore those"
            )
        head = {name: tensor for name, tensor in state.items() if name.startswith("head.")}
        trunk = backbone.trained_part()
        if trunk is not None:
            below = {name.removeprefix("trunk."): tensor for name, tensor in state.items() if name not in head}
            places = trunk.tensors()
            if below.keys() != places.keys():
                raise KeyError("its blocks are not those above model.frozen")
            for name, tensor in places.items():
                tensor.copy_(below[name])
        layers = Layers(head, dtype)
        sizes = backbone.feature_size, len(about["class_names"])
        if (layers.linear[0].in_features, layers.linear[-1].out_features) != sizes:
            raise InputError(f"{path.name} has no head from {sizes[0]} features to {sizes[1]} classes")
        frozen = None if backbone.frozen is None else backbone.frozen_part(dtype)
    except InputError as error:
        raise InputError(f"the model of {path} cannot be loaded: {error}") from error
    except (KeyError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} does not match the config beside it ({reason}): train it again") from error
    size = backbone.batch_size(chosen)
    return Model(frozen, trunk, layers, about, mirrors=config.data.test_views > 1, device=chosen, batch_size=size)


def file_of(run: str | Path) -> Path:
    """The .safetensors file of a run, from that path, its folder or the URL of a copy. Raises InputError without it."""
    path = artifacts.run_folder(run)
    if path.is_file():
        if path.suffix == ".safetensors":
            return path
        raise InputError(f"{path} is not a run: name a run's folder, or a .safetensors file in it")
    if not path.is_dir():
        raise InputError(f"{path} does not exist; runs are in outputs/ and multirun/, where they were started")
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    if (path / "best" / "model.safetensors").is_file():
        raise InputError(f"{path} is a sweep, not a run; its retrained best is {path / 'best'}")
    if not (path / ".hydra").is_dir() and not (path / "metrics.csv").exists():
        raise InputError(f"{path} is not a run folder: it has no model.safetensors; python -m tuner.compare lists runs")
    raise InputError(f"{path} has no model.safetensors: the run is still going, or was killed, pruned or failed")
