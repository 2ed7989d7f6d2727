"""Finding image files, and reading files of any size and mode as tensors of one shape.

A small file may hold a very large image. Memory is bounded: an image has at most `max_pixels`, the images that all
threads decode at once have at most IN_FLIGHT together, and an image takes up to 12 bytes a pixel.
"""

import errno
import io
import logging
import math
import os
import re
import stat
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from tuner import InputError
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
MAX_PIXELS = 50_000_000  # of a file, by its header
RANGE = 65535  # the highest value of a file with 16 bits per value
IN_FLIGHT = 64_000_000  # pixels that the threads of a process decode at once
STRIP = 2**20  # pixels that are converted at once
NOT_THE_FILES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
TURNS = {  # EXIF orientation -> the transposition that undoes it
    **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
    **{5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE},
    8: Image.Transpose.ROTATE_90,
}
GAP = 2.0  # Pillow's reducing_gap: photos are first reduced cheaply to about twice the size, then filtered


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
        is_wide = _is_wide_colour(path, image, value_range)
        _draft(path, image, size)
        with _budget.take(image.width * image.height):
            image.load()
            to = "L" if channels == 1 else "RGB"
            highest: list[int] = [_highest_byte(image) * 256 + 255] if is_wide else []
            upright = _in_strips(
                _turned(path, image), to, lambda strip: _opaque(_eight_bits(path, strip, value_range, highest), to)
            )
            pixels = np.asarray(_resized(upright, size, fit))
            tensor = torch.from_numpy(pixels.reshape(*size, channels).transpose(2, 0, 1).copy())
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


def _draft(path: Path, image: Image.Image, size: list[int]) -> None:
    """Have a JPEG decoded smaller, but not below GAP times the size. Raises BrokenImageError for several frames."""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a photo with a preview
        n = getattr(image, "n_frames", "several")
        raise BrokenImageError(path, f"it has {n} frames or pages: save the right one as a file")
    scale = GAP * max(size) / min(image.size)
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def _turned(path: Path, image: Image.Image) -> Image.Image:
    """The image with its orientation applied."""
    try:  # not ImageOps.exif_transpose: it rewrites all EXIF entries and fails if one of them is malformed
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error) as error:  # in a PNG or a WebP
        log.warning("%s is used without its EXIF orientation, because that is damaged (%s)", path, error)
        return image
    return image if turn is None else image.transpose(turn)


def _in_strips(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The image converted to a mode, a few rows at a time, because a conversion makes several copies."""
    rows = max(1, STRIP // image.width)
    if image.mode == mode and "transparency" not in image.info:
        return image
    if rows >= image.height:
        return convert(image)
    whole_image = Image.new(mode, image.size)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        whole_image.paste(convert(strip), (0, top))
    return whole_image


def _reason(path: Path, content: bytes | None, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        size = path.stat().st_size if content is None else len(content)
        return "its content is not an image, despite its name" if size else "it is empty"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _eight_bits(path: Path, image: Image.Image, value_range: int, highest: list[int]) -> Image.Image:
    """A gray image of 16 bits per value, perhaps stored in 32, scaled to 8 bits. Transparent pixels become white.

    An image of 8 bits is returned unchanged.   highest: the highest value is appended.
    """
    if image.mode == "F":
        raise BrokenImageError(path, "its pixels are floating-point numbers; save it with 8 or 16 bits per value")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > RANGE:
        raise BrokenImageError(path, f"its values are {values.min()} to {values.max()}: save it with 8 or 16 bits")
    highest.append(int(values.max()))
    if "transparency" in image.info:  # the gray value that is transparent
        values[values == image.info["transparency"]] = value_range
    scaled = (np.minimum(values, value_range) * 255 + value_range // 2) // value_range
    return Image.fromarray(scaled.astype(np.uint8))


def _is_wide_colour(path: Path, image: Image.Image, value_range: int) -> bool:
    """Whether a colour image, not yet loaded, has 16 bits per value. Pillow reads the upper 8 of them.

    Raises BrokenImageError if that would lose the values below a smaller value_range.
    """
    is_wide = not image.mode.startswith("I") and any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))
    if is_wide and value_range < RANGE:
        raise BrokenImageError(
            path, f"data.range={value_range} is for gray files, and this has colours of 16 bits: save it with 8 bits"
        )
    return is_wide


def _highest_byte(image: Image.Image) -> int:
    """The highest value of a colour image, without its alpha."""
    return max(int(np.asarray(band).max()) for band in image.split()[:3])


def _opaque(image: Image.Image, mode: str) -> Image.Image:
    """The image in mode L or RGB, with transparency flattened onto white."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image, image := Image.new("RGB", image.size))
    return image.convert(mode) if image.mode in ("1", "L", "RGB") else image.convert("RGB").convert(mode)


def _resized(image: Image.Image, size: list[int], fit: str) -> Image.Image:
    """The image with this height and width."""
    (h, w), (width, height) = size, image.size
    if (height, width) == (h, w):
        return image
    box: tuple[float, float, float, float] = (0, 0, width, height)
    if fit == "crop":
        scale = min(width / w, height / h)
        left, top = (width - w * scale) / 2, (height - h * scale) / 2
        box = (left, top, left + w * scale, top + h * scale)
    if fit != "pad":
        return image.resize((w, h), Image.Resampling.BILINEAR, _within(box, image.size), GAP)
    scale = max(width / w, height / h)
    inner = max(1, round(width / scale)), max(1, round(height / scale))
    padded = Image.new(image.mode, (w, h))
    padded.paste(image.resize(inner, Image.Resampling.BILINEAR, None, GAP), ((w - inner[0]) // 2, (h - inner[1]) // 2))
    return padded


def _within(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box clipped to the image, because rounding can put an edge outside it."""
    left, top, right, bottom = box
    return max(0.0, left), max(0.0, top), min(float(size[0]), right), min(float(size[1]), bottom)


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
