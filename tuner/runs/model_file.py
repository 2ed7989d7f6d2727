"""model.safetensors of a run, read: the trained tensors, and the metadata that a model needs."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tuner import InputError

ABOUT = ("class_names", "input_shape", "fit", "temperature", "weights")  # keys of the metadata
State = dict[str, torch.Tensor]


def read(path: Path) -> tuple[dict[str, Any], State]:
    """The metadata and the tensors, by name, of a model.safetensors. Raises InputError if it is damaged or too old."""
    try:
        with safe_open(path, framework="pt") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key in ABOUT}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())}): train it again") from error
    if missing := [key for key in ABOUT if key not in about]:
        raise InputError(
            f"{path} was written by an older version of tuner, without {', '.join(missing)}: train it again, with the "
            f"overrides in {path.parent / '.hydra' / 'overrides.yaml'}"
        )
    return about, state
