"""Network architectures by name: torchvision's, our own efficientnet_lite0, timm's as timm/NAME (extra `timm`).

The user's own are named by their module, as in mine.networks.Net; TUNER_TRUST must name them.
"""

import difflib
import hashlib
import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torchvision
from torch import nn
from torchvision.models import get_model, list_models

from tuner import InputError, targets
from tuner.networks.efficientnet_lite import EfficientNetLite0

TIMM = "timm/"
OWN = {"efficientnet_lite0": EfficientNetLite0}
OWN_VERSION = "1"  # raise it if one of them computes something else


def check_name(name: str) -> None:
    """Raises InputError for an unknown name, code that is not trusted, and for a network of timm without timm."""
    if is_of_user(str(name)):
        _of_user(str(name))
    elif str(name).startswith(TIMM):
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
    if is_of_user(name):
        made = _of_user(name)()
        if not isinstance(made, nn.Module):
            raise InputError(f"model.name={name} must return a torch.nn.Module, not {type(made).__name__}")
        return made
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
    if is_of_user(name):
        return {name.partition(".")[0]: _checksum(_of_user(name))}
    return {"torchvision": torchvision.__version__.split("+")[0]}


def is_of_user(name: str) -> bool:
    """Whether a name is that of a class or function of the user, such as mine.networks.Net."""
    return "." in name and not name.startswith(TIMM)


def _of_user(name: str) -> Callable[[], nn.Module]:
    package = name.partition(".")[0]
    if not targets.is_trusted(name):
        raise InputError(
            f"model.name={name} is code that a config may not call: if you trust it, set TUNER_TRUST='{package}.*'"
        )
    module, _, attribute = name.rpartition(".")
    try:
        made: Callable[[], nn.Module] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"model.name={name} cannot be imported: {error}") from error
    return made


def _checksum(made: Callable[[], nn.Module]) -> str:
    """Of the source of the package that a network comes from: features of other code are not used."""
    module = inspect.getmodule(made)
    source = Path(str(inspect.getsourcefile(module)))  # type: ignore[arg-type]
    package = source.parents[module.__name__.count(".") - 1] if module and "." in module.__name__ else source
    files = sorted(package.rglob("*.py")) if package.is_dir() else [package]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def timm() -> ModuleType:
    """The timm package, imported on first use because that takes seconds. Raises InputError if it is not installed."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise InputError("a model.name that begins with timm/ needs timm: pip install 'tuner[timm]'") from error
    return timm
