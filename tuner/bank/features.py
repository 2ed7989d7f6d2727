"""The feature bank: the output of a network's frozen part for each image, computed once and cached in a file.

A bank is one safetensors file, CACHE/banks/KEY.safetensors, with a tensor `features` [N, ...]. KEY is a hash of
everything that determines the content: weights, cut, pooling, preprocessing, precision, device type, library versions
and images. One process writes the file, with a checksum and under a temporary name. Readers memory-map it.
"""

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

import torch
from safetensors import safe_open

from tuner import cache_files
from tuner.bank.extraction import extract
from tuner.cache_files import Cache, format_bytes
from tuner.data import Samples
from tuner.data import digests as digests_of
from tuner.data.augmentation import Augment
from tuner.data.augmentation import views as views_of
from tuner.device import free_memory, has_cudnn
from tuner.networks.backbone import Backbone

log = logging.getLogger(__name__)

FORMAT = 2  # increase it when the same key would otherwise stand for different features
_open: WeakValueDictionary[tuple[Path, torch.device], torch.Tensor] = WeakValueDictionary()
BANK = cache_files.Kind("the feature bank", "the features", "computing", "computed", "set model.pool")
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # safetensors' names


def bank(
    images: torch.Tensor,
    backbone: Backbone,
    *,
    cache: Cache,
    device: torch.device,
    dtype: torch.dtype,
    digests: torch.Tensor | None = None,
) -> torch.Tensor:
    """The frozen features of `images`, read from the cache, or computed and cached.

    images: uint8 [N, C, H, W].   digests: of the images (Samples.digests); None computes them.
    returns: `dtype` [N, *backbone.cached_shape], memory-mapped from the cache file.
    If an intact file exists, the network does not run, its weights are not read, and the folder may be read-only. A
    damaged file is replaced with a warning. Only one process computes a bank; others wait for it.
    Raises InputError if the folder cannot be written or has not enough free space.
    """
    path, key = _key(images, digests, backbone, cache, device, dtype)
    return _bank(cache, path, key, images, backbone, device, dtype)


def is_cached(samples: Samples, backbone: Backbone, *, cache: Cache, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a file with the features of these images exists. It may be damaged."""
    return _key(samples.images, samples.digests, backbone, cache, device, dtype)[0].exists()


def bank_on_device(
    images: torch.Tensor,
    backbone: Backbone,
    *,
    cache: Cache,
    device: torch.device,
    dtype: torch.dtype,
    augment: Augment | None = None,
    views: int = 1,
    digests: torch.Tensor | None = None,
) -> torch.Tensor:
    """bank(), moved to the device if it fits. Callers that ask for the same bank share one tensor.

    views: views per image, in adjacent rows, see tuner.data.augmentation.views. 1 ignores `augment`.
    returns: `dtype` [N * views, *backbone.cached_shape].
    """
    path, key = _key(images, digests, backbone, cache, device, dtype)
    if augment and views > 1:
        path, key = _with_path(cache, key | {"views": views, "augment": repr(augment), "count": len(images) * views})
    else:
        augment = None
    features = _open.get((path, device))
    if features is None:
        features = to_device_if_it_fits(_bank(cache, path, key, images, backbone, device, dtype, augment), device)
        _open[path, device] = features
    return features


def to_device_if_it_fits(features: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Features or images on the device; unchanged if they need more than half of its free memory, or on the CPU."""
    free = free_memory(device)
    if free is None:
        return features
    if features.nbytes > free / 2:
        sizes = format_bytes(features.nbytes), format_bytes(free), device
        log.info("the features or images need %s, more than half of the %s free on %s: sent in batches", *sizes)
        return features
    return features.to(device)  # not through pinned memory: torch would keep the buffer, which is up to twice as large


def _key(
    images: torch.Tensor,
    digests: torch.Tensor | None,
    backbone: Backbone,
    cache: Cache,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Path, dict[str, Any]]:
    """A bank's file and its key: everything that determines its content."""
    key = {
        "format": FORMAT,
        **backbone.key,
        "dtype": DTYPES[dtype],
        "device": "cuda, fused" if has_cudnn(device) else device.type,  # see tuner.networks.fusion
        "torch": torch.__version__.split("+")[0],
        "images": _hash_images(images, digests_of(images) if digests is None else digests),
        "count": len(images),
    }
    return _with_path(cache, key)


def _with_path(cache: Cache, key: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache.folder / "banks" / f"{name}.safetensors", key


def _bank(
    cache: Cache,
    path: Path,
    key: dict[str, Any],
    images: torch.Tensor,
    backbone: Backbone,
    device: torch.device,
    dtype: torch.dtype,
    augment: Augment | None = None,
) -> torch.Tensor:
    shape = (key["count"], *backbone.cached_shape)

    def write(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        file.write(_header(key, shape, dtype, "0" * 64))
        n = key.get("views", 1)
        views = views_of(images, augment, n, seed=0) if augment else None
        for batch in extract(images, backbone, device=device, dtype=dtype, views=views, n=n):
            content = batch.flatten().view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
        file.seek(0)
        file.write(_header(key, shape, dtype, digest.hexdigest()))

    return cache_files.obtain(
        cache,
        path,
        BANK,
        lambda path: _read(path, shape, dtype),
        write,
        what=f"features of {shape[0]:,} images",
        count=shape[0],
        size=math.prod(shape) * dtype.itemsize,
    )


def _hash_images(images: torch.Tensor, digests: torch.Tensor) -> str:
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(digests.numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A bank's features, memory-mapped. Raises one of cache_files.UNREADABLE if the file is damaged."""
    with safe_open(path, framework="pt") as file:
        features = file.get_tensor("features")
        checksum = file.metadata()["sha256"]
    if tuple(features.shape) != shape or features.dtype != dtype or _checksum(features) != checksum:
        raise ValueError("its checksum is wrong")
    return features


def _checksum(features: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for chunk in features.flatten().view(torch.uint8).split(1 << 24):
        digest.update(chunk.numpy())
    return digest.hexdigest()


def _header(key: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, checksum: str) -> bytes:
    return cache_files.header({"sha256": checksum, "key": json.dumps(key)}, {"features": (DTYPES[dtype], shape)})
