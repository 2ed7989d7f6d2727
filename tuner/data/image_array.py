"""Image files, decoded once into an array in the cache, CACHE/images/KEY.safetensors, that is memory-mapped.

KEY is a hash of all that decides its content: the folder, the files' names, sizes and times of change, the shape, the
fit, the versions. It holds `images` uint8 [N, C, H, W], without the broken ones; `digests` uint8 [N, 8], int64 in
bytes; and `broken`, JSON of [number of the file, reason] each. It is never checked as a whole: that would take long
each time.
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
from tuner.data.image_file import BrokenImageError, check_fit, read

log = logging.getLogger(__name__)

FORMAT = 3  # raise it when the same key would come to mean other pixels
IMAGES = cache_files.Kind("the array of images", "the images", "decoding", "decoded", "choose smaller images")
CHUNK = 2**22  # bytes that a thread decodes at a time, about: memory is this, times WINDOW, times the threads
WINDOW = 3  # chunks a thread, under way or waiting to be written
LEGIBLE = 200  # characters of a name: a wrong column of a table may hold anything
Broken = list[tuple[int, str]]


@dataclass(frozen=True)
class Files:
    """Labelled image files. root: a folder.   names: paths seen from it.   labels: int64 [N]."""

    root: Path
    names: Sequence[str]
    labels: torch.Tensor

    def rows(self, rows: torch.Tensor) -> "Files":
        """Some of them, in this order."""
        return Files(self.root, [self.names[row] for row in rows.tolist()], self.labels[rows])


def load(
    parts: Sequence[Files], *, size: int | Sequence[int], fit: str, cache_dir: str | Path, skip_broken: bool
) -> list[tuple[Samples, torch.Tensor]]:
    """Of each part the images, memory-mapped from the cache, and the numbers of their files, int64 [N].

    All are decoded, by a thread a processor core, and what is broken noted, before anything is said of it.
    size: of RGB squares, in pixels; or [C, H, W] of an image.
    skip_broken: broken files are left out, with a warning.
    Raises InputError where files are broken and must not be, or the cache can't be written or has no room.
    """
    check_fit(fit)
    shape = _shape(size)
    arrays = [_array(part, shape, fit, Path(cache_dir).expanduser()) for part in parts]
    broken = [(part.names[i], why) for part, array in zip(parts, arrays, strict=True) for i, why in array[2]]
    if broken:
        _tell([f"{name[:LEGIBLE]} ({why})" for name, why in broken], skip_broken)
    loaded = []
    for part, (images, known, bad) in zip(parts, arrays, strict=True):
        whole = torch.ones(len(part.names), dtype=torch.bool)
        whole[[i for i, _ in bad]] = False
        rows = whole.nonzero().flatten()
        names = [name for name, fine in zip(part.names, whole.tolist(), strict=True) if fine]
        loaded.append((Samples(images, part.labels[rows], known, names), rows))
    return loaded


def _shape(size: int | Sequence[int]) -> tuple[int, int, int]:
    c, h, w = size if isinstance(size, Sequence) and len(size) == 3 else (3, size, size)
    if not (type(c) is type(h) is type(w) is int and c in (1, 3) and min(h, w) > 0):
        raise InputError(
            f"data.size={size} must be a whole number of pixels, at least 1, or [channels, height, width], of which "
            "channels is 1 (gray) or 3 (RGB)"
        )
    return c, h, w


def _tell(broken: Sequence[str], skip: bool) -> None:
    listed = "; ".join(broken[:10]) + (f"; ... and {len(broken) - 10:,} more" if len(broken) > 10 else "")
    count = f"{len(broken):,}"
    files = "1 file cannot be used as an image" if count == "1" else f"{count} files cannot be used as images"
    if not skip:
        raise InputError(f"{files}: repair or remove them, or leave them out with data.skip_broken=true: {listed}")
    log.warning("%s, left out (data.skip_broken=true): %s", files, listed)


def _array(
    files: Files, shape: tuple[int, int, int], fit: str, cache_dir: Path
) -> tuple[torch.Tensor, torch.Tensor, Broken]:
    """The images, their digests, and the broken files."""
    count = len(files.names)
    key = {
        "format": FORMAT,
        "files": _fingerprint(files),
        "count": count,
        "shape": " x ".join(map(str, shape)),
        "fit": fit,
        "pillow": PIL.__version__,
        "root": str(files.root.resolve()),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    size = count * (shape[0] * shape[1] * shape[2] + 8)
    return cache_files.obtain(
        cache_dir / "images" / f"{name}.safetensors",
        IMAGES,
        partial(_read, count=count, shape=shape),
        lambda file: _write(file, files, shape, fit, {"key": json.dumps(key)}),
        what=f"{count:,} images of {files.root}",
        count=count,
        size=size,
    )


def _fingerprint(files: Files) -> str:
    """A hash of the files' names, sizes and times, in their order: of content, and of who may read them, too."""
    digest = hashlib.sha256()
    for name in files.names:
        try:
            status = (files.root / name).stat()
            seen = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except OSError:
            seen = None  # such as a link to nowhere: broken, until there is something
        digest.update(f"{name}\0{seen}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _read(path: Path, count: int, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, Broken]:
    """Raises ValueError, among others, where the file is damaged; the pixels are not looked at."""
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


def _write(file: BinaryIO, files: Files, shape: tuple[int, int, int], fit: str, metadata: dict[str, str]) -> None:
    def header(n: int, length: int, checksum: str, at_least: int | None = None) -> bytes:
        tensors = {"images": ("U8", (n, *shape)), "digests": ("U8", (n, 8)), "broken": ("U8", (length,))}
        return cache_files.header(metadata | {"sha256": checksum}, tensors, at_least)

    longest = header(len(files.names), 10**12, "0" * 64)
    file.write(longest)
    coded, broken = bytearray(), Broken()
    for images, bad in decode(files, shape, fit):
        file.write(images.numpy().data)
        coded += digests(images).numpy().tobytes()
        broken += bad
    listed = json.dumps(broken).encode()
    file.write(coded + listed)
    file.seek(0)
    file.write(header(len(coded) // 8, len(listed), _checksum(coded, listed), len(longest)))


def decode(
    files: Files, shape: tuple[int, int, int], fit: str, threads: int | None = None
) -> Iterator[tuple[torch.Tensor, Broken]]:
    """The files in their order, some at a time: those that are whole as uint8 [n, C, H, W], and the broken ones.

    threads: as many as torch has, where not given. Pillow decodes and resizes without Python's lock.
    """
    threads = threads or torch.get_num_threads()
    step = max(1, min(64, CHUNK // (shape[0] * shape[1] * shape[2])))
    count = len(files.names)
    under_way: deque[tuple[int, Future[tuple[torch.Tensor, Broken]]]] = deque()
    pool = ThreadPoolExecutor(threads, "decode")
    try:
        with tqdm(total=count, desc="decoding images", unit="image", disable=None) as bar:
            for start in [*range(0, count, step), *[count] * WINDOW * threads]:  # the last are but to empty the window
                if start < count:
                    under_way.append(
                        (start, pool.submit(_some, files, range(start, min(start + step, count)), shape, fit))
                    )
                if under_way and (start == count or len(under_way) == WINDOW * threads):
                    first, future = under_way.popleft()
                    yield future.result()
                    bar.update(min(step, count - first))
    finally:
        pool.shutdown(cancel_futures=True)


def _some(files: Files, rows: range, shape: tuple[int, int, int], fit: str) -> tuple[torch.Tensor, Broken]:
    images, broken = [], Broken()
    for row in rows:
        try:
            images.append(read(files.root / files.names[row], shape, fit))
        except BrokenImageError as error:
            broken.append((row, error.reason))
    return torch.stack(images) if images else torch.empty((0, *shape), dtype=torch.uint8), broken
