"""Pretrained weights: resolving a name, identifying the content, and reading a file without running its code."""

import hashlib
import logging
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torchvision.models import WeightsEnum, get_model_weights, list_models

from tuner import InputError
from tuner.networks import efficientnet_lite
from tuner.networks.architectures import OWN, TIMM, create, is_of_user, timm

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = ASSETS / "vgg16_imagenet_features.safetensors"  # float16, torchvision's names
BUNDLED_AS = "IMAGENET1K_FEATURES"  # torchvision's name of the same weights, for their preprocessing
BUNDLES = {"vgg16": BUNDLED, "efficientnet_lite0": ASSETS / "efficientnet_lite0_imagenet.safetensors"}
LICENCES = {  # of BUNDLES, as in NOTICE
    "vgg16": "trained on ImageNet by the Visual Geometry Group, University of Oxford (Simonyan and Zisserman, "
    "arXiv:1409.1556), Creative Commons Attribution 4.0",
    "efficientnet_lite0": "trained on ImageNet by Google (Tan and Le, arXiv:1905.11946), Apache License 2.0",
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Layer names in torchvision's older files of DenseNet and ViT -> today's names
RENAMED = {
    r"(denselayer\d+\.(?:norm|conv))\.([12])\.": r"\1\2.",
    r"\.mlp\.linear_1\.": ".mlp.0.",
    r"\.mlp\.linear_2\.": ".mlp.3.",
}
State = dict[str, torch.Tensor]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Weights that are identified but not read yet.

    name: for messages.   key: identifies the content.   load: reads the weights.
    mean, std: the normalisation used in training, per channel, for pixels in 0..1.
    """

    name: str
    key: str
    mean: Sequence[float]
    std: Sequence[float]
    load: Callable[[], State]


def resolve(network: str, spec: str | None, seed: int) -> Weights:
    """The weights that `spec` names for a network. A file is read for its checksum; nothing else is read yet.

    spec: "bundled"; a member of torchvision's weights enum; a tag of timm, or "DEFAULT"; the path of a .safetensors or
        PyTorch file; None for random weights drawn with `seed`.
    Raises InputError for anything else.
    """
    if spec is None:
        return Weights("random weights", f"random-{seed}", IMAGENET_MEAN, IMAGENET_STD, lambda: _random(network, seed))
    if network.startswith(TIMM):
        return _of_timm(network, spec)
    if network in OWN:
        return _of_own(network, spec)
    if is_of_user(network):
        return _file(network, spec, [])
    published = get_model_weights(network)
    if spec == "bundled" and network == "vgg16":
        preset = published[BUNDLED_AS].transforms()
        return Weights("the bundled weights", _sha256(BUNDLED), preset.mean, preset.std, lambda: _read(BUNDLED))
    if spec in published.__members__:
        enum = published[spec]
        preset = enum.transforms()
        # torchvision's file names contain the start of the content's sha256
        return Weights(spec, enum.url.rsplit("/", 1)[-1], preset.mean, preset.std, lambda: _download(enum))
    return _file(network, spec, [*(["bundled"] if network == "vgg16" else []), *published.__members__])


def at_hand() -> list[tuple[str, str]]:
    """(network, weights) that need no download: the bundled ones, and torchvision's that were downloaded before."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = [(network, "bundled") for network in BUNDLES]
    for network in list_models(module=torchvision.models):
        for weights in reversed([*get_model_weights(network)]):  # the newest last
            if network not in BUNDLES and (folder / weights.url.rsplit("/", 1)[-1]).is_file():
                found.append((network, weights.name))
                break
    return found


def _of_own(network: str, spec: str) -> Weights:
    """Bundled weights or a file, of a network of tuner.networks.efficientnet_lite. The file may have timm's names."""
    if spec == "bundled":
        path, name = BUNDLES[network], "the bundled weights"
        key = _sha256(path)
    else:
        file = _file(network, spec, ["bundled"])
        path, name, key = Path(file.name), file.name, file.key
    mean, std = efficientnet_lite.MEAN, efficientnet_lite.STD
    return Weights(name, key, mean, std, lambda: {efficientnet_lite.our_name(k): v for k, v in _read(path).items()})


def _file(network: str, spec: str, published: Sequence[str]) -> Weights:
    try:
        path = Path(str(spec)).expanduser()
        if not stat.S_ISREG(path.stat().st_mode):  # a device has no end, and a pipe may have no content
            raise ValueError("it is not a regular file")
        checksum = _sha256(path)
    except (OSError, RuntimeError, ValueError) as error:  # no home directory, or a null byte in the name
        raise InputError(
            f"model.weights={spec} is neither a readable file ({getattr(error, 'strerror', error)}) nor weights of "
            f"{network}; use {', '.join([*published, 'a path'])}, or null (random)"
        ) from error
    return Weights(str(path), checksum, IMAGENET_MEAN, IMAGENET_STD, lambda: _read(path))


def _of_timm(network: str, spec: str) -> Weights:
    """Weights that timm publishes under a tag, or a file. DEFAULT is timm's default tag."""
    name = network.removeprefix(TIMM)
    configs = timm().models.get_arch_pretrained_cfgs(name)
    published = {cfg.tag: cfg for cfg in configs.values() if cfg.hf_hub_id and cfg.tag}
    default = timm().models.get_pretrained_cfg(name)
    if default is not None and default.hf_hub_id:
        published = {"DEFAULT": default, **published}
    if spec not in published:
        return _file(network, spec, list(published))
    cfg = published[spec]
    # The hub's names contain no checksum. A repository is named after network and tag, and its files do not change.
    return Weights(cfg.hf_hub_id, cfg.hf_hub_id, cfg.mean, cfg.std, lambda: _from_hub(name, cfg))


def _from_hub(name: str, cfg: Any) -> State:
    """timm's weights from the hub's cache, downloaded if necessary. Only .safetensors files, which contain no code.

    timm reads the file, because it converts files of other projects to its own layer names.
    """
    from huggingface_hub import hf_hub_download

    repository, _, revision = cfg.hf_hub_id.partition("@")
    file = str(Path(cfg.hf_hub_filename or "model").with_suffix(".safetensors"))
    try:
        path = hf_hub_download(repository, file, revision=revision or None)
        source = {"file": path, "url": None, "hf_hub_id": None, "source": None, "custom_load": False}
        with torch.random.fork_rng(devices=[]):  # create_model first draws random weights
            model = timm().create_model(name, pretrained=True, pretrained_cfg=cfg, pretrained_cfg_overlay=source)
    except (OSError, HTTPException, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{file} of {cfg.hf_hub_id} could not be downloaded from the Hugging Face hub ({reason}); set "
            "model.weights to a path, or to null (random)"
        ) from error
    return {key: value.float() if value.is_floating_point() else value for key, value in model.state_dict().items()}


def _read(path: Path) -> State:
    """A state dict in float32 from a .safetensors or PyTorch file. Code in the file is not run.

    Raises InputError if the file is damaged or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        # torch's message for an unsafe pickle suggests running its code: not repeated
        is_clear = isinstance(error, SafetensorError | RuntimeError | OSError)
        reason = str(error).partition("\n")[0] if is_clear else "not a PyTorch file of tensors alone"
        raise InputError(
            f"model.weights={path} cannot be read ({reason}); it must be a whole .safetensors or PyTorch state dict"
        ) from error
    are_tensors = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )
    if not are_tensors:
        raise InputError(
            f"model.weights={path} is not a state dict (names to tensors); save model.state_dict() as .safetensors"
        )
    return {_todays_name(name): value.float() if value.is_floating_point() else value for name, value in state.items()}


def _todays_name(name: str) -> str:
    for old, new in RENAMED.items():
        name = re.sub(old, new, name)
    return name


def _download(enum: WeightsEnum) -> State:
    """Weights from torch's cache of checkpoints, downloaded there first if they are missing."""
    folder, name = Path(torch.hub.get_dir()) / "checkpoints", enum.url.rsplit("/", 1)[-1]
    path, checksum = folder / name, Path(name).stem.rpartition("-")[-1]
    try:
        if not path.exists():
            log.info("downloading %s to %s", enum.url, folder)
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(enum.url, str(path), checksum)
        is_intact = _sha256(path).startswith(checksum)
    except (OSError, HTTPException, RuntimeError) as error:
        raise InputError(
            f"{name} could not be downloaded from {enum.url} ({error}); put the file into {folder}, "
            "or set model.weights to a path, to bundled (vgg16), or to null (random)"
        ) from error
    if not is_intact:
        raise InputError(f"{path} is damaged: its sha256 must begin with {checksum}; delete it to download it again")
    return _read(path)


def _random(network: str, seed: int) -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(create(network).state_dict())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
