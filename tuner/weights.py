"""Pretrained weights: which ones a name stands for, what identifies their content, and reading them safely."""

import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torchvision.models import WeightsEnum, get_model, get_model_weights

from tuner import InputError

BUNDLED = Path(__file__).parent / "assets" / "vgg16_imagenet_features.safetensors"  # float16, torchvision's key names
BUNDLED_AS = "IMAGENET1K_FEATURES"  # torchvision's name of the same weights: it gives their preprocessing
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """Weights that have been found but not read.

    name: what to call them in a message.   key: identifies their content.
    mean, std: per channel, of pixels in 0..1, that they were trained with.   load: reads them.
    """

    name: str
    key: str
    mean: Sequence[float]
    std: Sequence[float]
    load: Callable[[], State]


def find(network: str, spec: str | None, seed: int) -> Weights:
    """The weights that `spec` names for a torchvision network; nothing is read but a file's checksum.

    spec: "bundled", a member of torchvision's weights enum, a .safetensors or .pth file, or None: random from `seed`.
    Raises InputError for a name that is none of these.
    """
    if spec is None:
        return Weights("random weights", f"random-{seed}", IMAGENET_MEAN, IMAGENET_STD, lambda: _random(network, seed))
    published = get_model_weights(network)
    if spec == "bundled" and network == "vgg16":
        preset = published[BUNDLED_AS].transforms()
        return Weights("the bundled weights", _sha256(BUNDLED), preset.mean, preset.std, lambda: _read(BUNDLED))
    if spec in published.__members__:
        enum = published[spec]
        preset = enum.transforms()
        # torchvision puts the start of the content's sha256 into the file's name, and checks it after a download
        return Weights(spec, enum.url.rsplit("/", 1)[-1], preset.mean, preset.std, lambda: _download(enum))
    path = Path(spec).expanduser()
    if not path.is_file():
        known = [*(["bundled"] if network == "vgg16" else []), *published.__members__]
        raise InputError(
            f"model.weights={spec} is no file and no weights of {network}; "
            f"use {', '.join(known)}, a path, or null (random)"
        )
    return Weights(str(path), _sha256(path), IMAGENET_MEAN, IMAGENET_STD, lambda: _read(path))


def _read(path: Path) -> State:
    """A state dict from a .safetensors file, or from a PyTorch file without running any code that is in it."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        # torch's own words for a pickle with code in it are an invitation to run that code
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "not a PyTorch file of tensors alone" if unsafe else str(error).splitlines()[0]
        raise InputError(
            f"model.weights={path} cannot be read ({reason}); it must be a whole .safetensors or PyTorch state dict"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(
            f"model.weights={path} holds no state dict (names to tensors); save model.state_dict() as .safetensors"
        )
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _download(enum: WeightsEnum) -> State:
    """From torch's cache of checkpoints, or through torchvision's download with its progress bar and hash check."""
    try:
        return dict(enum.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except (URLError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise InputError(
            f"{enum.url.rsplit('/', 1)[-1]} could not be had from {enum.url} ({error}); put the file into {folder}, "
            "or set model.weights to a path, to bundled (vgg16), or to null (random)"
        ) from error


def _random(network: str, seed: int) -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(get_model(network, weights=None).state_dict())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
