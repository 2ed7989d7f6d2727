"""Image files decoded once into a memory-mapped array in the cache, CACHE/images/KEY.safetensors.

KEY is a hash of everything that determines the content: the folder, the names, sizes and modification times of the
files, the shape, the fit, the range of 16-bit values, and versions. The file holds three tensors:

    images   uint8 [N, C, H, W], without broken files
    digests  uint8 [N, 8], the bytes of int64 digests
    report   JSON in bytes: the broken files, a list of [number of the file, reason]; and the statistics of the others

A checksum covers `digests` and `report`, but not the pixels: reading them all for each run would take too long.
"""

import hashlib
import json
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import PIL
import torch
from safetensors import safe_open
from tqdm import tqdm

from tuner import InputError, cache_files
from tuner.cache_files import Cache
from tuner.data import FileStatistics, Samples, digests
from tuner.data.files import image_file
from tuner.data.files.image_file import MAX_PIXELS, BrokenImageError, Decoded, check_fit, check_max_pixels, check_range
from tuner.data.files.pixels import RANGE

log = logging.getLogger(__name__)

FORMAT = 4  # increase it when the same key would otherwise stand for different pixels
IMAGES = cache_files.Kind("the array of images", "the images", "decoding", "decoded", "choose smaller images")
CHUNK = 2**22  # bytes per chunk, roughly; memory use is CHUNK * WINDOW * threads
WINDOW = 3  # chunks per thread that are being decoded or wait to be written
LEGIBLE = 200  # characters of a name in a message: the wrong column of a table may hold long texts
NO_PIXELS = torch.empty(0, dtype=torch.uint8)
Broken = list[tuple[int, str]]
Array = tuple[torch.Tensor, torch.Tensor, Broken, FileStatistics]


@dataclass(frozen=True)
class Content:
    """Image files that are in a table. read: the bytes of a name.   stamp: changes when they do."""

    read: Callable[[str], bytes]
    stamp: str


@dataclass(frozen=True)
class Files:
    """Labelled image files.

    root: a folder.   names: paths relative to root; or, with content, names that it knows.   labels: int64 [N].
    """

    root: Path
    names: Sequence[str]
    labels: torch.Tensor
    content: Content | None = None

    def rows(self, rows: torch.Tensor) -> "Files":
        """The files with these row numbers, in this order. rows: int64."""
        return Files(self.root, [self.names[row] for row in rows.tolist()], self.labels[rows], self.content)


@dataclass(frozen=True)
class How:
    """How files are decoded: arguments of tuner.data.files.image_file.decode."""

    shape: tuple[int, int, int]
    fit: str
    max_pixels: int = MAX_PIXELS
    value_range: int = RANGE


class Chunk(NamedTuple):
    """Files that were decoded.

    images: uint8 [n, C, H, W].   broken: files that cannot be used.   files: the n others, without their pixels.
    """

    images: torch.Tensor
    broken: Broken
    files: list[Decoded]


def load(
    parts: Sequence[Files],
    *,
    size: int | Sequence[int],
    fit: str,
    cache: Cache,
    skip_broken: bool,
    max_pixels: int = MAX_PIXELS,
    value_range: int | None = None,
) -> list[tuple[Samples, torch.Tensor]]:
    """For each part, the images (memory-mapped from the cache) and the row numbers of their files, int64 [N].

    All files are decoded, with one thread per processor core, before broken files are reported together.
    size: side of RGB squares in pixels, or [C, H, W].   fit: see tuner.data.files.image_file.decode.
    skip_broken: leave broken files out with a warning.   max_pixels: see tuner.data.files.image_file.decode.
    value_range: likewise; None is that of the type, 65535. Warns if the files have no value near it, or higher ones.
    Raises InputError for broken files unless skip_broken is set, and if the cache cannot be written or is full.
    """
    check_fit(fit)
    check_max_pixels(max_pixels)
    how = How(_shape(size), fit, max_pixels, check_range(value_range))
    arrays = [_array(part, how, cache) for part in parts]
    broken = [(part.names[i], why) for part, array in zip(parts, arrays, strict=True) for i, why in array[2]]
    if broken:
        _report_broken([f"{name[:LEGIBLE]} ({why})" for name, why in broken], skip_broken)
    _check_values([array[3].highest_16 for array in arrays], how.value_range)
    loaded = []
    for part, (images, stored_digests, unreadable, statistics) in zip(parts, arrays, strict=True):
        readable = torch.ones(len(part.names), dtype=torch.bool)
        readable[[i for i, _ in unreadable]] = False
        rows = readable.nonzero().flatten()
        names = [part.names[row] for row in rows.tolist()]
        again = partial(_read_at, part, how)
        loaded.append((Samples(images, part.labels[rows], stored_digests, names, statistics, again), rows))
    return loaded


def _read_at(files: Files, how: How, names: Sequence[str], side: int) -> torch.Tensor:
    """Some of the files, as uint8 [n, C, side, side]. Raises InputError if one can't be read any more."""
    some = Files(files.root, names, torch.zeros(len(names)), files.content)
    chunks = list(decode(some, replace(how, shape=(how.shape[0], side, side))))
    if broken := [names[i] for chunk in chunks for i, _ in chunk.broken]:
        raise InputError(f"{broken[0][:LEGIBLE]} cannot be read any more: leave the files as they are during a run")
    return torch.cat([chunk.images for chunk in chunks])


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
    log.warning("%s, skipped (data.skip_broken=true): %s", files, listed)


def _check_values(highest: Sequence[int | None], value_range: int) -> None:
    """Warn if 16-bit files are almost black, or have values above the range. highest: of each part."""
    values = [value for value in highest if value is not None]
    if not values:
        return
    most = max(values)
    if most <= value_range / 16:
        fitting = next(usual for usual in (1, 255, 1023, 4095, RANGE) if usual >= most)
        log.warning(
            "the 16-bit files have no value above %d, of %d: they are almost black; set data.range=%d, the value that "
            "is white",
            most,
            value_range,
            fitting,
        )
    elif most > value_range:
        log.warning("the 16-bit files have values up to %d: those above data.range=%d are white", most, value_range)


def _array(files: Files, how: How, cache: Cache) -> Array:
    """The images, their digests, the broken files, and what the others hold."""
    count = len(files.names)
    key = {
        "format": FORMAT,
        "files": _fingerprint(files),
        "count": count,
        "shape": " x ".join(map(str, how.shape)),
        "fit": how.fit,
        "max_pixels": how.max_pixels,
        "range": how.value_range,
        "pillow": PIL.__version__,
        "root": str(files.root.resolve()),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    size = count * (math.prod(how.shape) + 8)
    return cache_files.obtain(
        cache,
        cache.folder / "images" / f"{name}.safetensors",
        IMAGES,
        partial(_read, count=count, how=how),
        lambda file: _write(file, decode(files, how), count, how, {"key": json.dumps(key)}),
        what=f"{count:,} images of {files.root}",
        count=count,
        size=size,
    )


def _fingerprint(files: Files) -> str:
    """A hash of the files' names, sizes, and times of change of content and permissions, in order."""
    digest = hashlib.sha256()
    if files.content:
        digest.update(f"{files.content.stamp}\0".encode())
        digest.update("\0".join(files.names).encode())
        return digest.hexdigest()
    for name in files.names:
        try:
            status = (files.root / name).stat()
            stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except (OSError, ValueError):  # a null byte in the name of a table
            stamp = None  # a broken link, for example; the key changes once its target exists
        digest.update(f"{name}\0{stamp}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _read(path: Path, count: int, how: How) -> Array:
    """Raises ValueError, or another error in cache_files.UNREADABLE, for a damaged file. Pixels are not checked."""
    with safe_open(path, framework="pt") as file:
        images, coded = file.get_tensor("images"), file.get_tensor("digests").clone()
        written = file.get_tensor("report").numpy().tobytes()
        checksum = file.metadata()["sha256"]
    if _checksum(coded.numpy().tobytes(), written) != checksum:
        raise ValueError("its checksum is wrong")
    report = json.loads(written)
    broken = [(int(i), str(why)) for i, why in report.pop("broken")]
    if images.shape != (count - len(broken), *how.shape) or coded.shape != (len(images), 8):
        raise ValueError("its shapes are wrong")
    (w0, w1, w2), (h0, h1, h2) = report.pop("widths"), report.pop("heights")
    statistics = FileStatistics(
        **report, widths=(w0, w1, w2), heights=(h0, h1, h2), skipped=len(broken), value_range=how.value_range
    )
    return images, coded.view(torch.int64).flatten(), broken, statistics


def _checksum(coded: bytes | bytearray, report: bytes) -> str:
    return hashlib.sha256(coded + report).hexdigest()


def _write(file: BinaryIO, chunks: Iterator[Chunk], count: int, how: How, metadata: dict[str, str]) -> None:
    def header(n: int, length: int, checksum: str, at_least: int | None = None) -> bytes:
        tensors = {"images": ("U8", (n, *how.shape)), "digests": ("U8", (n, 8)), "report": ("U8", (length,))}
        return cache_files.header(metadata | {"sha256": checksum}, tensors, at_least)

    longest = header(count, 10**12, "0" * 64)
    file.write(longest)
    coded, broken = bytearray(), Broken()
    modes, widths, heights, highest = Counter[str](), Counter[int](), Counter[int](), set[int]()
    for chunk in chunks:
        file.write(chunk.images.numpy().data)
        coded += digests(chunk.images).numpy().tobytes()
        broken += chunk.broken
        modes.update(decoded.mode for decoded in chunk.files)
        widths.update(decoded.width for decoded in chunk.files)
        heights.update(decoded.height for decoded in chunk.files)
        highest |= {decoded.highest for decoded in chunk.files if decoded.highest is not None}
    report = {"broken": broken, "modes": modes, "widths": _middle(widths), "heights": _middle(heights)}
    written = json.dumps(report | {"highest_16": max(highest, default=None)}).encode()
    file.write(coded + written)
    file.seek(0)
    file.write(header(len(coded) // 8, len(written), _checksum(coded, written), len(longest)))


def _middle(sizes: Counter[int]) -> tuple[int, int, int]:
    """The least, the median and the most; zeros if there are none."""
    ordered = sorted(sizes.elements()) or [0]
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def decode(files: Files, how: How, threads: int | None = None) -> Iterator[Chunk]:
    """Decode the files in order, chunk by chunk.

    threads: None uses as many as torch. They run in parallel, because Pillow releases the interpreter lock.
    """
    threads = threads or torch.get_num_threads()
    step = max(1, min(64, CHUNK // math.prod(how.shape)))
    count = len(files.names)
    under_way: deque[tuple[int, Future[Chunk]]] = deque()
    pool = ThreadPoolExecutor(threads, "decode")
    try:
        with tqdm(total=count, desc="decoding images", unit="image", disable=None) as bar:
            for start in [*range(0, count, step), *[count] * WINDOW * threads]:  # the last ones only empty the window
                if start < count:
                    rows = range(start, min(start + step, count))
                    under_way.append((start, pool.submit(_decode_rows, files, rows, how)))
                if under_way and (start == count or len(under_way) == WINDOW * threads):
                    first, future = under_way.popleft()
                    yield future.result()
                    bar.update(min(step, count - first))
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_rows(files: Files, rows: range, how: How) -> Chunk:
    images, decoded, broken = torch.empty((len(rows), *how.shape), dtype=torch.uint8), list[Decoded](), Broken()
    for row in rows:
        try:
            name = files.names[row]
            content = files.content.read(name) if files.content else None
            file = image_file.decode(
                files.root / name, how.shape, how.fit, how.max_pixels, how.value_range, content=content
            )
        except BrokenImageError as error:
            broken.append((row, error.reason))
        else:
            images[len(decoded)] = file.pixels
            decoded.append(replace(file, pixels=NO_PIXELS))
    return Chunk(images[: len(decoded)], broken, decoded)
