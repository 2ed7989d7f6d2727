"""Image files decoded once into a memory-mapped array in the cache, CACHE/images/KEY.safetensors.

KEY is a hash of everything that determines the content: the folder, the names, sizes and modification times of the
files, the shape, the fit, and versions. The file holds three tensors:

    images   uint8 [N, C, H, W], without broken files
    digests  uint8 [N, 8], the bytes of int64 digests
    broken   JSON in bytes: a list of [number of the file, reason]

A checksum covers `digests` and `broken`, but not the pixels: reading them all for each run would take too long.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import PIL
import torch
from safetensors import safe_open
from tqdm import tqdm

from tuner import InputError, cache_files
from tuner.data import Samples, digests
from tuner.data.image_file import MAX_PIXELS, BrokenImageError, check_fit, check_max_pixels, read

log = logging.getLogger(__name__)

FORMAT = 3  # increase it when the same key would otherwise stand for different pixels
IMAGES = cache_files.Kind("the array of images", "the images", "decoding", "decoded", "choose smaller images")
CHUNK = 2**22  # bytes per chunk, roughly; memory use is CHUNK * WINDOW * threads
WINDOW = 3  # chunks per thread that are being decoded or wait to be written
LEGIBLE = 200  # characters of a name in a message: the wrong column of a table may hold long texts
Broken = list[tuple[int, str]]


@dataclass(frozen=True)
class Files:
    """Labelled image files. root: a folder.   names: paths relative to root.   labels: int64 [N]."""

    root: Path
    names: Sequence[str]
    labels: torch.Tensor

    def rows(self, rows: torch.Tensor) -> "Files":
        """The files with these row numbers, in this order. rows: int64."""
        return Files(self.root, [self.names[row] for row in rows.tolist()], self.labels[rows])


def load(
    parts: Sequence[Files],
    *,
    size: int | Sequence[int],
    fit: str,
    cache_dir: str | Path,
    skip_broken: bool,
    max_pixels: int = MAX_PIXELS,
) -> list[tuple[Samples, torch.Tensor]]:
    """For each part, the images (memory-mapped from the cache) and the row numbers of their files, int64 [N].

    All files are decoded, with one thread per processor core, before broken files are reported together.
    size: side of RGB squares in pixels, or [C, H, W].   fit: see tuner.data.image_file.read.
    skip_broken: leave broken files out with a warning.   max_pixels: see tuner.data.image_file.read.
    Raises InputError for broken files unless skip_broken is set, and if the cache cannot be written or is full.
    """
    check_fit(fit)
    check_max_pixels(max_pixels)
    shape = _shape(size)
    arrays = [_array(part, shape, fit, max_pixels, Path(cache_dir).expanduser()) for part in parts]
    broken = [(part.names[i], why) for part, array in zip(parts, arrays, strict=True) for i, why in array[2]]
    if broken:
        _report_broken([f"{name[:LEGIBLE]} ({why})" for name, why in broken], skip_broken)
    loaded = []
    for part, (images, stored_digests, unreadable) in zip(parts, arrays, strict=True):
        readable = torch.ones(len(part.names), dtype=torch.bool)
        readable[[i for i, _ in unreadable]] = False
        rows = readable.nonzero().flatten()
        names = [part.names[row] for row in rows.tolist()]
        loaded.append((Samples(images, part.labels[rows], stored_digests, names), rows))
    return loaded


def _shape(size: int | Sequence[int]) -> tuple[int, int, int]:
    c, h, w = size if isinstance(size, Sequence) and len(size) == 3 else (3, size, size)
    if not (type(c) is type(h) is type(w) is int and c in (1, 3) and min(h, w) > 0):
        raise InputError(
            f"data.size={size} must be a whole number of pixels, at least 1, or [channels, height, width] with 1 "
            "(gray) or 3 (RGB) channels"
        )
    return c, h, w


def _report_broken(broken: Sequence[str], skip: bool) -> None:
    listed = "; ".join(broken[:10]) + (f"; ... and {len(broken) - 10:,} more" if len(broken) > 10 else "")
    count = f"{len(broken):,}"
    files = "1 file cannot be used as an image" if count == "1" else f"{count} files cannot be used as images"
    if not skip:
        raise InputError(f"{files}: repair or remove them, or skip them with data.skip_broken=true: {listed}")
    log.warning("%s and are skipped (data.skip_broken=true): %s", files, listed)


def _array(
    files: Files, shape: tuple[int, int, int], fit: str, max_pixels: int, cache_dir: Path
) -> tuple[torch.Tensor, torch.Tensor, Broken]:
    """The images, their digests, and the broken files."""
    count = len(files.names)
    key = {
        "format": FORMAT,
        "files": _fingerprint(files),
        "count": count,
        "shape": " x ".join(map(str, shape)),
        "fit": fit,
        "max_pixels": max_pixels,
        "pillow": PIL.__version__,
        "root": str(files.root.resolve()),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    size = count * (shape[0] * shape[1] * shape[2] + 8)
    return cache_files.obtain(
        cache_dir / "images" / f"{name}.safetensors",
        IMAGES,
        partial(_read, count=count, shape=shape),
        lambda file: _write(file, decode(files, shape, fit, max_pixels), count, shape, {"key": json.dumps(key)}),
        what=f"{count:,} images of {files.root}",
        count=count,
        size=size,
    )


def _fingerprint(files: Files) -> str:
    """A hash of the files' names, sizes, and times of change of content and permissions, in order."""
    digest = hashlib.sha256()
    for name in files.names:
        try:
            status = (files.root / name).stat()
            stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except (OSError, ValueError):  # a null byte in the name of a table
            stamp = None  # a broken link, for example; the key changes once its target exists
        digest.update(f"{name}\0{stamp}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _read(path: Path, count: int, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, Broken]:
    """Raises ValueError, or another error in cache_files.UNREADABLE, for a damaged file. Pixels are not checked."""
    with safe_open(path, framework="pt") as file:
        images, coded = file.get_tensor("images"), file.get_tensor("digests").clone()
        listed = file.get_tensor("broken").numpy().tobytes()
        checksum = file.metadata()["sha256"]
    broken = [(int(i), str(why)) for i, why in json.loads(listed)]
    if images.shape != (count - len(broken), *shape) or coded.shape != (len(images), 8):
        raise ValueError("its shapes are wrong")
    if _checksum(coded.numpy().tobytes(), listed) != checksum:
        raise ValueError("its checksum is wrong")
    return images, coded.view(torch.int64).flatten(), broken


def _checksum(coded: bytes | bytearray, listed: bytes) -> str:
    return hashlib.sha256(coded + listed).hexdigest()


def _write(
    file: BinaryIO,
    chunks: Iterator[tuple[torch.Tensor, Broken]],
    count: int,
    shape: tuple[int, int, int],
    metadata: dict[str, str],
) -> None:
    def header(n: int, length: int, checksum: str, at_least: int | None = None) -> bytes:
        tensors = {"images": ("U8", (n, *shape)), "digests": ("U8", (n, 8)), "broken": ("U8", (length,))}
        return cache_files.header(metadata | {"sha256": checksum}, tensors, at_least)

    longest = header(count, 10**12, "0" * 64)
    file.write(longest)
    coded, broken = bytearray(), Broken()
    for images, unreadable in chunks:
        file.write(images.numpy().data)
        coded += digests(images).numpy().tobytes()
        broken += unreadable
    listed = json.dumps(broken).encode()
    file.write(coded + listed)
    file.seek(0)
    file.write(header(len(coded) // 8, len(listed), _checksum(coded, listed), len(longest)))


def decode(
    files: Files, shape: tuple[int, int, int], fit: str, max_pixels: int = MAX_PIXELS, threads: int | None = None
) -> Iterator[tuple[torch.Tensor, Broken]]:
    """Decode the files in order, chunk by chunk: yields (images uint8 [n, C, H, W], broken files).

    threads: None uses as many as torch. They run in parallel, because Pillow releases the interpreter lock.
    """
    threads = threads or torch.get_num_threads()
    step = max(1, min(64, CHUNK // (shape[0] * shape[1] * shape[2])))
    count = len(files.names)
    under_way: deque[tuple[int, Future[tuple[torch.Tensor, Broken]]]] = deque()
    pool = ThreadPoolExecutor(threads, "decode")
    try:
        with tqdm(total=count, desc="decoding images", unit="image", disable=None) as bar:
            for start in [*range(0, count, step), *[count] * WINDOW * threads]:  # the last ones only empty the window
                if start < count:
                    rows = range(start, min(start + step, count))
                    under_way.append((start, pool.submit(_decode_rows, files, rows, shape, fit, max_pixels)))
                if under_way and (start == count or len(under_way) == WINDOW * threads):
                    first, future = under_way.popleft()
                    yield future.result()
                    bar.update(min(step, count - first))
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_rows(
    files: Files, rows: range, shape: tuple[int, int, int], fit: str, max_pixels: int
) -> tuple[torch.Tensor, Broken]:
    images, broken = [], Broken()
    for row in rows:
        try:
            images.append(read(files.root / files.names[row], shape, fit, max_pixels))
        except BrokenImageError as error:
            broken.append((row, error.reason))
    return torch.stack(images) if images else torch.empty((0, *shape), dtype=torch.uint8), broken
