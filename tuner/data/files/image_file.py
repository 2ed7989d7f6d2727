"""Finding image files, and reading files of any size and mode as tensors of one shape.

A small file may hold a very large image. Memory is bounded: an image has at most `max_pixels`, the images that all
threads decode at once have at most IN_FLIGHT together, and an image takes up to 12 bytes a pixel.
"""

import errno
import io
import logging
import os
import re
import stat
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from tuner import InputError
from tuner.data.files import pixels
from tuner.data.files.pixels import RANGE
from tuner.rules import MAX_PIXELS as MAX_PIXELS
from tuner.rules import or_null, whole
from tuner.safe_text import printable

log = logging.getLogger(__name__)

FITS = ("crop", "pad", "stretch")
EXTENSIONS = {
    *(".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
}
# Pillow's formats of these. Without a list it tries all, such as EPS, which is a program.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
IN_FLIGHT = 64_000_000  # pixels that the threads of a process decode at once
NOT_THE_FILES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


class BrokenImageError(InputError):
    """A file that cannot be used as an image. path: its path.   reason: why, for a message."""

    def __init__(self, path: Path, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return printable(f"{self.path} cannot be used as an image: {self.reason}")


class _Budget:
    """Pixels that threads may decode at once; others wait."""

    def __init__(self, most: int):
        self.most = self.free = most
        self.changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait for so many pixels, or for all if these are more."""
        pixels = min(pixels, self.most)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= pixels)
            self.free -= pixels
        try:
            yield
        finally:
            with self.changed:
                self.free += pixels
                self.changed.notify_all()


_budget = _Budget(IN_FLIGHT)


@dataclass(frozen=True)
class Decoded:
    """An image file as uint8 [C, H, W], and what the file holds.

    mode: Pillow's.   width, height: of the file, in pixels.   highest: its highest value, if it has 16 bits per value.
    """

    pixels: torch.Tensor
    mode: str
    width: int
    height: int
    highest: int | None


def read(
    path: Path, shape: tuple[int, int, int], fit: str, max_pixels: int = MAX_PIXELS, value_range: int = RANGE
) -> torch.Tensor:
    """An image file as uint8 [C, H, W]; arguments and errors as in `decode`."""
    return decode(path, shape, fit, max_pixels, value_range).pixels


def decode(
    path: Path,
    shape: tuple[int, int, int],
    fit: str,
    max_pixels: int = MAX_PIXELS,
    value_range: int = RANGE,
    *,
    content: bytes | None = None,
) -> Decoded:
    """Decode an image file.

    shape: (C, H, W), C = 1 (gray) or 3 (RGB).
    fit: how the image gets this height and width, by bilinear interpolation with antialiasing.
        crop: resize the shorter side and cut out the center.
        pad: resize the longer side and leave the rest black.
        stretch: resize both sides.
    max_pixels: of the file, by its header; nothing is decoded of a larger one.
    value_range: the value that is white in a gray file of 16 bits per value; higher ones are white, too.
    content: of the file, if it is not at `path`, which then is its name in messages.
    EXIF orientation is applied, transparency is flattened onto white, and 16-bit values are scaled to 8 bits.
    Raises BrokenImageError unless the file is a complete still image of 8 or 16 bits per value. Raises InputError if
    the system cannot read the file at the moment, which says nothing about the file.
    """
    try:
        return _decode(path, shape, fit, max_pixels, value_range, content)
    except BrokenImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's own limit
        found = re.search(r"\((\d+) pixels\)", str(error))
        raise BrokenImageError(path, _too_large(found[1] if found else "too many", max_pixels)) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything in a decoder
        if isinstance(error, OSError) and error.errno in NOT_THE_FILES_FAULT:
            raise InputError(f"{path} cannot be read now ({error.strerror}): try again") from error
        raise BrokenImageError(path, _reason(path, content, error)) from error


def _decode(
    path: Path, shape: tuple[int, int, int], fit: str, max_pixels: int, value_range: int, content: bytes | None
) -> Decoded:
    channels, *size = shape
    if content is None and not stat.S_ISREG(path.stat().st_mode):
        raise BrokenImageError(path, "it is not a regular file")  # reading a pipe would block
    with Image.open(path if content is None else io.BytesIO(content), formats=_formats()) as image:
        mode, (width, height) = image.mode, image.size
        if width * height > max_pixels:
            raise BrokenImageError(path, _too_large(f"{width:,} x {height:,} = {width * height:,}", max_pixels))
        if image.format == "PPM":  # such a file names its own range, and Pillow scales by it
            value_range = RANGE
        is_wide = pixels.is_wide_colour(image, value_range)
        pixels.draft(image, size)
        with _budget.take(image.width * image.height):
            image.load()
            to = "L" if channels == 1 else "RGB"
            highest: list[int] = [pixels.highest_byte(image) * 256 + 255] if is_wide else []
            upright = pixels.in_strips(
                pixels.turned(image, path),
                to,
                lambda strip: pixels.opaque(pixels.eight_bits(strip, value_range, highest), to),
            )
            values = np.asarray(pixels.resized(upright, size, fit))
            tensor = torch.from_numpy(values.reshape(*size, channels).transpose(2, 0, 1).copy())
            return Decoded(tensor, mode, width, height, max(highest, default=None))


@cache
def _formats() -> list[str]:
    """Those of FORMATS that this build of Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _too_large(size: str, max_pixels: int) -> str:
    return f"it has {size} pixels, {max_pixels:,} are allowed: raise data.max_pixels, or --max-pixels of tuner.predict"


def check_max_pixels(max_pixels: int) -> None:
    """Raises InputError unless it is a number of pixels. A larger one than Pillow's own limit becomes Pillow's, too."""
    whole(1).check("data.max_pixels", max_pixels)
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow has one limit for the process, and the user has asked for more


def check_range(value_range: int | None) -> int:
    """The highest value of a 16-bit file: RANGE for None. Raises InputError unless it is one."""
    or_null(whole(1, RANGE)).check("data.range", value_range)
    return RANGE if value_range is None else value_range


def check_fit(fit: str) -> None:
    """Raises InputError unless `fit` is one of FITS."""
    if fit not in FITS:
        raise InputError(f"data.fit={fit} must be one of {', '.join(FITS)}")


def check_name(path: str | Path) -> None:
    """Raises InputError for a name that is not valid text, because no table could hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        name = os.fsencode(path).decode(errors="backslashreplace")
        encoding = sys.getfilesystemencoding()
        fault = "is not valid UTF-8: rename the file or folder"
        if encoding != "utf-8":
            fault = f"is not {encoding}, the encoding of this environment: set PYTHONUTF8=1"
        raise InputError(f"the name {name} {fault}") from error


def find(folder: Path) -> list[Path]:
    """Paths of the image files in a folder, at any depth, sorted.

    A file counts if its extension is one of EXTENSIONS. Hidden files and folders are skipped.
    Raises InputError for a folder that cannot be read and for a name that is not valid UTF-8.
    """
    return [folder / name for name in names(folder)]


def names(folder: Path) -> list[str]:
    """The same as strings relative to `folder`, with slashes. They take a tenth of the memory of paths."""
    images, others = [], Counter[str]()
    for name in _files(str(folder), "", ()):
        check_name(name)
        if is_image(name):
            images.append(name)
        else:
            others[PurePath(name).suffix.lower() or "no extension"] += 1
    if others:
        kinds = ", ".join(f"{extension}: {n:,}" for extension, n in others.most_common(5))
        log.info("%s: skipped %s files without an image's extension (%s)", folder, f"{others.total():,}", kinds)
    return sorted(images)


def is_image(name: str) -> bool:
    """Whether a name has the extension of an image file."""
    return PurePath(name).suffix.lower() in EXTENSIONS


def has_image(folder: Path) -> bool:
    """Whether a folder has an image file, at any depth."""
    return any(is_image(name) for name in _files(str(folder), "", ()))


def _files(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """All files below a folder. Symbolic links are followed, except to a folder above.

    above: device and inode of the folders above.
    Raises InputError for a folder that cannot be read.
    """
    try:
        status = Path(folder).stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(folder) as scan:
            entries = [(entry, is_folder(entry)) for entry in scan if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}") from error
    for entry, has_files in entries:
        if has_files:
            yield from _files(entry.path, f"{prefix}{entry.name}/", (*above, here))
        else:
            yield prefix + entry.name


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one. False also for a link to itself: read() then reports it."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _reason(path: Path, content: bytes | None, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        size = path.stat().st_size if content is None else len(content)
        return "its content is not an image, despite its name" if size else "it is empty"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def expand(inputs: Sequence[Path]) -> list[Path]:
    """The given files, with each folder replaced by the image files in it; without duplicates.

    Raises InputError for a path that does not exist and for a folder without images.
    """
    paths: list[Path] = []
    for path in inputs:
        if path.is_dir():
            images = find(path)
            if not images:
                raise InputError(f"there is no image in {path}")
            paths += images
        elif path.exists():
            check_name(path)
            paths.append(path)
        else:
            raise InputError(f"there is no file or folder {path}")
    return list(dict.fromkeys(paths))
