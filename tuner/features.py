"""The feature bank: what the frozen part of a network says about each image, computed once and kept in a file.

A bank is one safetensors file, CACHE/banks/KEY.safetensors, with a tensor `features` [N, ...]. KEY is a hash of all
that decides its content: weights, cut, pooling, preprocessing, precision, device type, library version, and the images.
It is written under a temporary name, with a checksum, by one process at a time, and is memory-mapped to be read.

    python -m tuner.features                      # list them, and decoded images: size, last use, what they hold
    python -m tuner.features --prune --days 30    # delete those that no run has used for 30 days
"""

import argparse
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

import torch
from safetensors import safe_open
from tqdm import tqdm

from tuner import stored
from tuner.augment import Augment
from tuner.augment import views as views_of
from tuner.backbones import Backbone
from tuner.data import digests as digests_of
from tuner.device import Batches, fetch, free_memory, is_cpu, repeatable, send
from tuner.stored import text

log = logging.getLogger(__name__)

FORMAT = 2  # raise it when the same key would come to mean other numbers
_open: WeakValueDictionary[tuple[Path, torch.device], torch.Tensor] = WeakValueDictionary()
BANK = stored.Kind("the feature bank", "the features", "computing", "computed", "set model.pool")
CONTENT = {  # folder of the cache -> what a file in it holds, by its key
    "banks": "{network} {block} pool={pool} {image_size} px {dtype}, {count:,} images",
    "images": "{shape} {fit}, {count:,} files of {root}",
}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # safetensors' names


def bank(
    images: torch.Tensor,
    backbone: Backbone,
    *,
    cache_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    digests: torch.Tensor | None = None,
) -> torch.Tensor:
    """The frozen features of `images`, from the cache, or computed and cached now.

    images: uint8 [N, C, H, W].   digests: theirs, where they are known (Samples.digests).
    returns: `dtype` [N, *backbone.cached_shape], memory-mapped from the cache file.
    Where the file is there and whole, the network doesn't run, its weights are not read, and `cache_dir` may be
    read-only. A damaged file is replaced, with a warning. Of several processes that want the same bank, one computes it
    and the others wait. Raises InputError where `cache_dir` must be written and can't be, or has no room.
    """
    return _bank(*_key(images, digests, backbone, cache_dir, device, dtype), images, backbone, device, dtype)


def resident(
    images: torch.Tensor,
    backbone: Backbone,
    *,
    cache_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    augment: Augment | None = None,
    views: int = 1,
    digests: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same as bank(), on the device where it has room; one tensor for all who ask while any of them holds it.

    views: of each image, in neighbouring rows, see tuner.augment.views.
    """
    path, key = _key(images, digests, backbone, cache_dir, device, dtype)
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
    free = free_memory(device)
    if free is None:
        return features
    if features.nbytes > free / 2:
        sizes = text(features.nbytes), text(free), device
        log.info(
            "the features or images, %s, take more than half of the %s free on %s: sent there by the batch", *sizes
        )
        return features
    return send(features, device)


def _key(
    images: torch.Tensor,
    digests: torch.Tensor | None,
    backbone: Backbone,
    cache_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Path, dict[str, Any]]:
    """A bank's file, and all that decides its content."""
    key = {
        "format": FORMAT,
        **backbone.key,
        "dtype": DTYPES[dtype],
        "device": device.type,
        "torch": torch.__version__.split("+")[0],
        "images": _hash_images(images, digests_of(images) if digests is None else digests),
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

    def write(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        file.write(_header(key, shape, dtype, "0" * 64))
        n = key.get("views", 1)
        seen = views_of(images, augment, n, seed=0) if augment else None
        for batch in extract(images, backbone, device=device, dtype=dtype, views=seen, n=n):
            content = batch.flatten().view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
        file.seek(0)
        file.write(_header(key, shape, dtype, digest.hexdigest()))

    return stored.obtain(
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
    """A bank's features, memory-mapped. Raises ValueError, among others, where it is damaged."""
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
    return stored.header({"sha256": checksum, "key": json.dumps(key)}, {"features": (DTYPES[dtype], shape)})


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
    in_batches = Batches(backbone.batch_size(device), device)

    @torch.inference_mode()  # not around the yield: it would stay on in a caller that stops midway
    def start(batch: torch.Tensor) -> tuple[int, Callable[[], torch.Tensor]]:
        with repeatable(device):
            return len(batch), fetch(network(send(batch, device)))

    bar = tqdm(total=len(images) * n, desc=f"{backbone.name} features", unit="image", disable=None)
    under_way: list[Callable[[], torch.Tensor]] = []
    with bar:
        for count, features in (batch for some in views or [images] for batch in in_batches(start, some)):
            under_way.append(features)
            if is_cpu(device) or len(under_way) == 2:  # a GPU is at the next batch while one is written
                yield under_way.pop(0)()
            bar.update(count)
        for features in under_way:
            yield features()


def banks(cache_dir: Path) -> Iterator[tuple[Path, str]]:
    """The stored features and images of a cache, and what each file holds, the longest unused first."""
    paths = [(path, what) for folder, what in CONTENT.items() for path in stored.files(cache_dir, folder)]
    for path, what in sorted(paths, key=lambda pair: pair[0].stat().st_mtime):
        try:
            with safe_open(path, framework="pt") as file:
                what = what.format(**json.loads(file.metadata()["key"]))
        except stored.UNREADABLE:
            what = "damaged"
        yield path, "unfinished" if path.suffix == ".partial" else what


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m tuner.features", description="List the cached features and images, or delete some."
    )
    parser.add_argument(
        "--cache-dir", default=os.environ.get("TUNER_CACHE", "~/.cache/tuner"), help="default %(default)s"
    )
    parser.add_argument("--prune", action="store_true", help="delete files instead of listing them")
    parser.add_argument("--days", type=float, default=0, help="only those not used for so many days")
    args = parser.parse_args()
    cache_dir, total = Path(args.cache_dir).expanduser(), 0
    for path, what in banks(cache_dir):
        size, unused = path.stat().st_size, (time.time() - path.stat().st_mtime) / 86400
        if unused < (max(args.days, 1) if args.prune and what == "unfinished" else args.days):
            continue  # an unfinished file that is younger than a day may be at work
        if args.prune:
            path.unlink(missing_ok=True)
        print(f"{'deleted ' if args.prune else ''}{path.name}  {text(size):>7}  used {unused:.1f} days ago  {what}")
        total += size
    print(f"{text(total)} {'freed' if args.prune else 'used'} in {cache_dir}")


if __name__ == "__main__":
    main()
