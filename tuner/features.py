"""The feature bank: what the frozen part of a network says about each image, computed once and kept in a file.

A bank is one safetensors file, CACHE/banks/KEY.safetensors, with a tensor `features` [N, ...]. KEY is a hash of all
that decides its content: weights, cut, pooling, preprocessing, precision, device type, library version, and the images.
It is written under a temporary name, with a checksum, by one process at a time, and is memory-mapped to be read.

    python -m tuner.features                      # list the banks: where they lie, how big they are, what they hold
    python -m tuner.features --prune --days 30    # delete those that no run has used for 30 days
"""

import argparse
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from tuner import InputError
from tuner.augment import Augment
from tuner.augment import views as views_of
from tuner.backbones import Backbone
from tuner.files import replacing

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same key would come to mean other numbers
_open: WeakValueDictionary[tuple[Path, torch.device], torch.Tensor] = WeakValueDictionary()
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # safetensors' names


def bank(
    images: torch.Tensor, backbone: Backbone, *, cache_dir: Path, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """The frozen features of `images`, from the cache, or computed and cached now.

    images: uint8 [N, C, H, W].   returns: `dtype` [N, *backbone.cached_shape], memory-mapped from the cache file.
    Where the file is there and whole, the network doesn't run, its weights are not read, and `cache_dir` may be
    read-only. A damaged file is replaced, with a warning. Of several processes that want the same bank, one computes it
    and the others wait. Raises InputError where `cache_dir` must be written and can't be, or has no room.
    """
    return _bank(*_key(images, backbone, cache_dir, device, dtype), images, backbone, device, dtype)


def resident(
    images: torch.Tensor,
    backbone: Backbone,
    *,
    cache_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    augment: Augment | None = None,
    views: int = 1,
) -> torch.Tensor:
    """The same as bank(), on the device where it has room; one tensor for all who ask while any of them holds it.

    views: of each image, in neighbouring rows, see tuner.augment.views.
    """
    path, key = _key(images, backbone, cache_dir, device, dtype)
    if augment and views > 1:
        path, key = _named(cache_dir, key | {"views": views, "augment": repr(augment), "count": len(images) * views})
    else:
        augment = None
    features = _open.get((path, device))
    if features is None:
        features = on_device(_bank(path, key, images, backbone, device, dtype, augment), device)
        _open[path, device] = features
    return features


def on_device(features: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Features, or images, on the device, unless that takes more than half of the memory that is free there."""
    if device.type == "cpu":
        return features
    free, _ = torch.cuda.mem_get_info(device)
    if features.nbytes > free / 2:
        sizes = _size(features.nbytes), _size(free)
        log.info(
            "the features or images, %s, take more than half of the %s free on the GPU: sent there by the batch", *sizes
        )
        return features
    return features.to(device)


def _key(
    images: torch.Tensor, backbone: Backbone, cache_dir: Path, device: torch.device, dtype: torch.dtype
) -> tuple[Path, dict[str, Any]]:
    """A bank's file, and all that decides its content."""
    key = {
        "format": FORMAT,
        **backbone.key,
        "dtype": DTYPES[dtype],
        "device": device.type,
        "torch": torch.__version__.split("+")[0],
        "images": _hash_images(images),
        "count": len(images),
    }
    return _named(cache_dir, key)


def _named(cache_dir: Path, key: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir / "banks" / f"{name}.safetensors", key


def _bank(
    path: Path,
    key: dict[str, Any],
    images: torch.Tensor,
    backbone: Backbone,
    device: torch.device,
    dtype: torch.dtype,
    augment: Augment | None = None,
) -> torch.Tensor:
    shape = (key["count"], *backbone.cached_shape)
    features = _read(path, shape, dtype, logging.DEBUG)  # without the lock: a bank comes into being whole
    if features is None:
        with _locked(path):
            features = _read(path, shape, dtype, logging.WARNING)  # another process may have been first
            if features is None:
                _build(path, key, images, backbone, shape, device, dtype, augment)
                features = _read(path, shape, dtype, logging.WARNING)
    else:
        log.info("features of %s images: cached in %s (%s)", f"{shape[0]:,}", path, _size(features.nbytes))
        with suppress(OSError):
            os.utime(path)  # the time of last use, for --prune
    if features is None:
        raise OSError(f"{path} is damaged though it was just written: check the disk, or set cache_dir to another one")
    return features


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a bank's lock, so that one process builds it while the others wait. The system frees it should we die."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process is computing %s: waiting for it", path)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # older versions of filelock: no locks on this file system
        raise _unwritable(path.parent, error) from error
    try:
        yield
    finally:
        lock.release()


def _unwritable(folder: Path, error: OSError | NotImplementedError) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"the cache folder {folder} cannot be written ({reason}); set cache_dir=FOLDER")


def _hash_images(images: torch.Tensor) -> str:
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for chunk in images.split(4096):
        digest.update(chunk.contiguous().numpy())
    return digest.hexdigest()


def _read(path: Path, shape: tuple[int, ...], dtype: torch.dtype, level: int) -> torch.Tensor | None:
    """A bank's features, memory-mapped; None where there is no such file, or it is damaged, which is logged."""
    try:
        with safe_open(path, framework="pt") as file:
            features = file.get_tensor("features")
            checksum = file.metadata()["sha256"]
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        log.log(level, "the feature bank %s is damaged (%s): computing it again", path, error)
        return None
    if tuple(features.shape) != shape or features.dtype != dtype or _checksum(features) != checksum:
        log.log(level, "the feature bank %s is damaged (its checksum is wrong): computing it again", path)
        return None
    return features


def _checksum(features: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for chunk in features.flatten().view(torch.uint8).split(1 << 24):
        digest.update(chunk.numpy())
    return digest.hexdigest()


def _build(
    path: Path,
    key: dict[str, Any],
    images: torch.Tensor,
    backbone: Backbone,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    augment: Augment | None,
) -> None:
    size = math.prod(shape) * dtype.itemsize
    start = time.perf_counter()
    digest = hashlib.sha256()
    try:
        for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed: we hold the lock, none works
            left.unlink()
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise InputError(
                f"the features need {_size(size)} and {path.parent} has {_size(free)} free; set cache_dir to a larger "
                "disk, set model.pool, or free some with `python -m tuner.features --prune`"
            )
        log.info("features of %s images: computing them into %s (%s)", f"{shape[0]:,}", path, _size(size))
        with replacing(path) as file:
            file.write(_header(key, shape, dtype, "0" * 64))
            n = key.get("views", 1)
            seen = views_of(images, augment, n, seed=0) if augment else None
            for batch in extract(images, backbone, device=device, dtype=dtype, views=seen, n=n):
                content = batch.flatten().view(torch.uint8).numpy().data
                digest.update(content)
                file.write(content)
            file.seek(0)
            file.write(_header(key, shape, dtype, digest.hexdigest()))
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    seconds = time.perf_counter() - start
    log.info("features computed in %.0f s (%.0f images/s)", seconds, shape[0] / seconds)


def _header(key: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, checksum: str) -> bytes:
    """https://github.com/huggingface/safetensors#format: the length of a JSON text, 8 bytes, and that text."""
    header = {
        "__metadata__": {"sha256": checksum, "key": json.dumps(key)},
        "features": {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [0, math.prod(shape) * dtype.itemsize]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def extract(
    images: torch.Tensor,
    backbone: Backbone,
    *,
    device: torch.device,
    dtype: torch.dtype,
    views: Iterator[torch.Tensor] | None = None,
    n: int = 1,
) -> Iterator[torch.Tensor]:
    """Run the frozen part over uint8 [N, C, H, W], with a progress bar; yields `dtype` [B, ...] on the CPU.

    views: n of each image, to take instead.
    """
    network = backbone.frozen_part(dtype).to(device)
    bar = tqdm(total=len(images) * n, desc=f"{backbone.name} features", unit="image", disable=None)
    under_way: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []
    with bar:
        size = batch_size(backbone.image_size, device)
        for batch in (batch for some in views or [images] for batch in some.split(size)):
            with torch.inference_mode():  # not around the yield: it would stay on in a caller that stops midway
                under_way.append(_fetch(network(_send(batch, device))))
            if device.type == "cpu" or len(under_way) == 2:  # a GPU is at the next batch while one is written
                yield _arrived(*under_way.pop(0))
            bar.update(len(batch))
        for features, event in under_way:
            yield _arrived(features, event)


def _send(batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    return batch if device.type == "cpu" else batch.pin_memory().to(device, non_blocking=True)


def _fetch(features: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Have features copied to the CPU, and what tells when they are there."""
    if features.device.type == "cpu":
        return features.contiguous(), None
    copy = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    copy.copy_(features, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event


def _arrived(features: torch.Tensor, event: torch.cuda.Event | None) -> torch.Tensor:
    if event is not None:
        event.synchronize()
    return features


def batch_size(image_size: int, device: torch.device) -> int:
    """Images a batch, so that memory stays the same at every image size; by measurement, benchmarks/README.md."""
    at_64 = 64 if device.type == "cpu" else 2048
    return max(1, at_64 * 64**2 // image_size**2)


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def banks(cache_dir: Path) -> Iterator[tuple[Path, str]]:
    """The bank files of a cache and what each holds, the longest unused first."""
    paths = [*(cache_dir / "banks").glob("*.safetensors"), *(cache_dir / "banks").glob(".*.partial")]
    for path in sorted(paths, key=lambda p: p.stat().st_mtime):
        try:
            with safe_open(path, framework="pt") as file:
                key = json.loads(file.metadata()["key"])
            what = "{network} {block} pool={pool} {image_size} px {dtype}, {count:,} images".format(**key)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            what = "damaged"
        yield path, "unfinished" if path.suffix == ".partial" else what


def main() -> None:
    parser = argparse.ArgumentParser("python -m tuner.features", description="List the feature banks, or delete some.")
    parser.add_argument(
        "--cache-dir", default=os.environ.get("TUNER_CACHE", "~/.cache/tuner"), help="default %(default)s"
    )
    parser.add_argument("--prune", action="store_true", help="delete banks instead of listing them")
    parser.add_argument("--days", type=float, default=0, help="only those not used for so many days")
    args = parser.parse_args()
    cache_dir, total = Path(args.cache_dir).expanduser(), 0
    for path, what in banks(cache_dir):
        size, unused = path.stat().st_size, (time.time() - path.stat().st_mtime) / 86400
        if unused < (max(args.days, 1) if args.prune and what == "unfinished" else args.days):
            continue  # an unfinished file that is younger than a day may be at work
        if args.prune:
            path.unlink(missing_ok=True)
        print(f"{'deleted ' if args.prune else ''}{path.name}  {_size(size):>7}  used {unused:.1f} days ago  {what}")
        total += size
    print(f"{_size(total)} {'freed' if args.prune else 'used'} in {cache_dir / 'banks'}")


if __name__ == "__main__":
    main()
