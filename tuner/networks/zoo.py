"""Image classification networks by name: torchvision's, and as timm/NAME those of timm (the extra `timm`)."""

import difflib
from importlib.metadata import version
from types import ModuleType

import torchvision
from torch import nn
from torchvision.models import get_model, list_models

from tuner import InputError

TIMM = "timm/"


def check(name: str) -> None:
    """Raises InputError for a name that is no network's, or is one of timm's where timm is not installed."""
    if str(name).startswith(TIMM):
        known = timm().list_models()
        if name.removeprefix(TIMM) not in known:
            near = difflib.get_close_matches(name.removeprefix(TIMM), known, n=5, cutoff=0.3)
            raise InputError(
                f"model.name={name} is none of the {len(known):,} networks of timm {version('timm')}; near it are "
                f"{', '.join(TIMM + other for other in near)}; python -c 'import timm; print(timm.list_models())' "
                "lists all"
            )
    elif name not in list_models(module=torchvision.models):
        known = list_models(module=torchvision.models)
        raise InputError(
            f"model.name={name} is no classification network of torchvision (timm's are called timm/NAME); "
            f"known: {', '.join(known)}"
        )


def make(name: str, *, init: bool = True) -> nn.Module:
    """The network, its weights drawn from torch's generator. Two are slow at it, which `init` false spares."""
    if name.startswith(TIMM):
        network: nn.Module = timm().create_model(name.removeprefix(TIMM), pretrained=False)
        return network
    # These two were trained on pixels scaled in another way, and undo ImageNet's normalisation themselves.
    options = {"init_weights": init, "transform_input": True} if name in ("googlenet", "inception_v3") else {}
    return get_model(name, weights=None, **options)


def release(name: str) -> dict[str, str]:
    """The library that the network comes from, and its version."""
    if name.startswith(TIMM):
        return {"timm": version("timm")}
    return {"torchvision": torchvision.__version__.split("+")[0]}


def timm() -> ModuleType:
    """Imported when it is used: it takes seconds, and is an extra. Raises InputError where it is not installed."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise InputError("a model.name that begins with timm/ needs timm: pip install 'tuner[timm]'") from error
    return timm
