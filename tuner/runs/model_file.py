"""model.safetensors of a run: the trained tensors, and the metadata that a model needs, with a checksum."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tuner import InputError
from tuner.data.files.image_file import FITS
from tuner.data.files.pixels import RANGE
from tuner.files import replacing
from tuner.rules import POSITIVE, Rule, one_of, or_null, whole

ABOUT = ("class_names", "input_shape", "fit", "range", "columns", "temperature", "weights")  # keys of the metadata
DEFAULTS = {"range": RANGE, "columns": None}  # of keys that earlier versions did not write
CHECKSUM = "sha256"  # key of the metadata: the sha256 of the file in which the checksum is UNSET
UNSET = b"0" * 64
ENTRY = rb'"sha256":"\"%s\""'  # in the file's header: the values of the metadata are JSON
MOST_PIXELS = 1 << 26  # of an image that a model takes
State = dict[str, torch.Tensor]
log = logging.getLogger(__name__)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and 0 < len(value) == len({*value})


def _is_shape(value: Any) -> bool:
    is_whole = isinstance(value, list) and len(value) == 3 and all(type(size) is int and size > 0 for size in value)
    return is_whole and value[0] in (1, 3) and math.prod(value[1:]) <= MOST_PIXELS


RULES = {
    "class_names": Rule(_is_names, "a list of different names"),
    "input_shape": Rule(_is_shape, f"[C, H, W]: 1 or 3 channels, and at most {MOST_PIXELS:,} pixels"),
    "fit": one_of(*FITS),
    "range": whole(1, RANGE),
    "temperature": POSITIVE,
    "weights": Rule(lambda value: isinstance(value, str), "text"),
    "columns": or_null(Rule(_is_names, "a list of different names")),
}


def write(path: Path, state: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors, with `about` in the file's metadata, each value as JSON, and with a checksum."""
    metadata = {key: json.dumps(value) for key, value in about.items()} | {CHECKSUM: json.dumps(UNSET.decode())}
    content = save({name: tensor.cpu().contiguous() for name, tensor in state.items()}, metadata)
    checksum = hashlib.sha256(content).hexdigest().encode()
    with replacing(path) as file:
        file.write(content.replace(ENTRY % UNSET, ENTRY % checksum, 1))


def read(path: Path) -> tuple[dict[str, Any], State]:
    """The metadata and the tensors, by name, of a model.safetensors.

    Raises InputError if it is damaged or too old, or if its values can't be those of a model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check(path, metadata)
            about = DEFAULTS | {key: json.loads(value) for key, value in metadata.items() if key in ABOUT}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())}): train it again") from error
    if missing := [key for key in ABOUT if key not in about]:
        raise InputError(
            f"{path} was written by an older version of tuner, without {', '.join(missing)}: train it again, with the "
            f"overrides in {path.parent / '.hydra' / 'overrides.yaml'}"
        )
    try:
        for key, value in about.items():
            RULES[key].check(key, value)
    except InputError as error:
        raise InputError(f"{path} is not a model: {error}") from error
    if wrong := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise InputError(f"{path} is not a model: {wrong[0]} must be finite numbers; train it again")
    return about, state


def _check(path: Path, metadata: Mapping[str, str]) -> None:
    """Raises ValueError if the checksum is wrong. Earlier versions wrote none, and no key beside those of ABOUT."""
    if metadata.keys() <= {*ABOUT}:
        log.info("%s has no checksum: written by an earlier version", path)
        return
    checksum = json.loads(metadata.get(CHECKSUM, "null"))
    if not isinstance(checksum, str) or _digest(path, checksum) != checksum:
        raise ValueError("its checksum is wrong")


def _digest(path: Path, checksum: str) -> str:
    """The sha256 of the file in which its checksum is UNSET."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        digest = hashlib.sha256(length + header.replace(checksum.encode(), UNSET, 1))
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
