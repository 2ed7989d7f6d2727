"""Network architectures by name: torchvision's, our own efficientnet_lite0, and timm's as timm/NAME (extra `timm`)."""

import difflib
from importlib.metadata import version
from types import ModuleType

import torchvision
from torch import nn
from torchvision.models import get_model, list_models

from tuner import InputError
from tuner.networks.efficientnet_lite import EfficientNetLite0

TIMM = "timm/"
OWN = {"efficientnet_lite0": EfficientNetLite0}
OWN_VERSION = "1"  # raise it if one of them computes something else


def check_name(name: str) -> None:
    """Raises InputError for an unknown name, and for a network of timm if timm is not installed."""
    if str(name).startswith(TIMM):
        names = timm().list_models()
        if name.removeprefix(TIMM) not in names:
            similar = difflib.get_close_matches(name.removeprefix(TIMM), names, n=5, cutoff=0.3)
            raise InputError(
                f"model.name={name} is none of the {len(names):,} networks of timm {version('timm')}; similar names: "
                f"{', '.join(TIMM + other for other in similar)}; python -c 'import timm; print(timm.list_models())' "
                "lists all"
            )
    elif name not in OWN and name not in list_models(module=torchvision.models):
        names = sorted([*OWN, *list_models(module=torchvision.models)])
        raise InputError(
            f"model.name={name} is not a classification network of torchvision (those of timm are called timm/NAME); "
            f"known: {', '.join(names)}"
        )


def create(name: str, *, init: bool = True) -> nn.Module:
    """The network, with weights drawn from torch's generator.

    init: False skips the slow initialisation of googlenet and inception_v3; their weights are then arbitrary.
    """
    if name.startswith(TIMM):
        network: nn.Module = timm().create_model(name.removeprefix(TIMM), pretrained=False)
        return network
    if name in OWN:
        return OWN[name]()
    # These two were trained with another normalisation; transform_input converts from ImageNet's.
    options = {"init_weights": init, "transform_input": True} if name in ("googlenet", "inception_v3") else {}
    return get_model(name, weights=None, **options)


def library_version(name: str) -> dict[str, str]:
    """The library that defines the network, and its version: {library: version}."""
    if name.startswith(TIMM):
        return {"timm": version("timm")}
    if name in OWN:
        return {"tuner.networks": OWN_VERSION}
    return {"torchvision": torchvision.__version__.split("+")[0]}


def timm() -> ModuleType:
    """The timm package, imported on first use because that takes seconds. Raises InputError if it is not installed."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise InputError("a model.name that begins with timm/ needs timm: pip install 'tuner[timm]'") from error
    return timm
