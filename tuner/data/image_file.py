"""Image files of any size and mode, brought to one shape; and where they lie."""

import errno
import logging
import math
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from tuner import InputError

log = logging.getLogger(__name__)

FITS = ("crop", "pad", "stretch")
EXTENSIONS = {
    *(".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
}
NOT_OF_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
TURNS = {  # the camera's orientation -> what undoes it
    **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
    **{5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE},
    8: Image.Transpose.ROTATE_90,
}
GAP = 2.0  # a photo is brought near twice the size by cheaper means than the filter: Pillow's reducing_gap


class BrokenImageError(InputError):
    """A file that is no image which can be used: its path and the reason."""

    def __init__(self, path: Path, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} cannot be used as an image: {self.reason}"


def read(path: Path, shape: tuple[int, int, int], fit: str) -> torch.Tensor:
    """An image file as uint8 [C, H, W].

    shape: (C, H, W), C = 1 (gray) or 3 (RGB).
    fit: crop: the shorter side is brought to the size and the middle cut out; pad: the longer side is, and the rest
        stays black; stretch: both are. By bilinear interpolation with antialiasing; an image that has the shape already
        stays as it is.
    The camera's orientation is applied, what is transparent lies over white, and 16 bits a value are scaled to 8.
    Raises BrokenImageError for what is no whole, still image of 8 or 16 bits a value, and InputError where the machine
    can't read a file now that may be whole.
    """
    channels, *size = shape
    try:
        image = _decoded(path, size)
    except BrokenImageError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # decoders of forty formats raise whatever a damaged file leads them to
        if isinstance(error, OSError) and error.errno in NOT_OF_THE_FILE:
            raise InputError(f"{path} cannot be read now ({error.strerror}): try again") from error
        raise BrokenImageError(path, _reason(path, error)) from error
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(path, image)
    elif image.mode == "F":
        raise BrokenImageError(path, "its pixels are floating-point numbers; save it with 8 or 16 bits a value")
    pixels = np.asarray(_fitted(_opaque(image, "L" if channels == 1 else "RGB"), size, fit))
    return torch.from_numpy(pixels.reshape(*size, channels).transpose(2, 0, 1).copy())


def check_fit(fit: str) -> None:
    if fit not in FITS:
        raise InputError(f"data.fit={fit} must be one of {', '.join(FITS)}")


def check_name(path: str | Path) -> None:
    """Raises InputError for a name that is no text: no table could hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        told = os.fsencode(path).decode(errors="backslashreplace")
        raise InputError(f"the name {told} is not in UTF-8: rename that file or folder") from error


def find(folder: Path) -> list[Path]:
    """The image files below a folder, at any depth, sorted: those with the ending of an image, and not hidden."""
    return [folder / name for name in names(folder)]


def names(folder: Path) -> list[str]:
    """The same, as paths from `folder` with slashes; a million of them take a tenth of the memory."""
    found, others = [], Counter[str]()
    for name in _files(str(folder), "", ()):
        check_name(name)
        ending = PurePath(name).suffix.lower()
        if ending in EXTENSIONS:
            found.append(name)
        else:
            others[ending or "no ending"] += 1
    if others:
        kinds = ", ".join(f"{ending}: {n:,}" for ending, n in others.most_common(5))
        log.info("left out of %s, by their names no images: %s (%s)", folder, f"{others.total():,}", kinds)
    return sorted(found)


def _files(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """All files below, also through symbolic links, but not round in circles. above: the folders that it lies in.

    Raises InputError for a folder that can't be read.
    """
    try:
        status = Path(folder).stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(folder) as found:
            entries = [(entry, _is_folder(entry)) for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}") from error
    for entry, is_folder in entries:
        if is_folder:
            yield from _files(entry.path, f"{prefix}{entry.name}/", (*above, here))
        else:
            yield prefix + entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """False, too, for a link that leads round in a circle: reading it will tell."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _decoded(path: Path, size: list[int]) -> Image.Image:
    """The image, turned; a JPEG may be smaller than it was saved, though not below GAP times what is needed."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise BrokenImageError(path, "it is no regular file")  # a pipe would be waited for
    with Image.open(path) as image:
        if getattr(image, "is_animated", False) and image.format != "MPO":  # phones' photos with a preview in them
            n = getattr(image, "n_frames", "several")
            raise BrokenImageError(path, f"it has {n} frames or pages: save the one that is meant")
        scale = GAP * max(size) / min(image.size)
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        image.load()
        try:  # not by ImageOps.exif_transpose, which writes all entries anew and fails where any is odd
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        except (SyntaxError, ValueError, KeyError, TypeError, struct.error) as error:  # in a PNG or a WebP
            log.warning("%s is not turned: what it says of its orientation is damaged (%s)", path, error)
            return image
        return image if turn is None else image.transpose(turn)


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is empty" if path.stat().st_size == 0 else "its content is no image, whatever its name says"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _eight_bits(path: Path, image: Image.Image) -> Image.Image:
    """Of 16 bits a value, also where they came as 32; over white where they are transparent."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BrokenImageError(path, f"its values go from {values.min()} to {values.max()}: save it with 8 or 16 bits")
    if "transparency" in image.info:  # a gray, of which no alpha channel has been made
        values[values == image.info["transparency"]] = 65535
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _opaque(image: Image.Image, mode: str) -> Image.Image:
    """As mode L or RGB, over white where it is transparent."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image, image := Image.new("RGB", image.size))
    return image.convert(mode) if image.mode in ("1", "L", "RGB") else image.convert("RGB").convert(mode)


def _fitted(image: Image.Image, size: list[int], fit: str) -> Image.Image:
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
    framed = Image.new(image.mode, (w, h))
    framed.paste(image.resize(inner, Image.Resampling.BILINEAR, None, GAP), ((w - inner[0]) // 2, (h - inner[1]) // 2))
    return framed


def _within(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Without what rounding put outside of the image."""
    left, top, right, bottom = box
    return max(0.0, left), max(0.0, top), min(float(size[0]), right), min(float(size[1]), bottom)


def named(inputs: Sequence[Path]) -> list[Path]:
    """The files that are named, and the images in or below the folders that are. Raises InputError where one is not."""
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = find(path)
            if not inside:
                raise InputError(f"there is no image in {path}")
            found += inside
        elif path.exists():
            check_name(path)
            found.append(path)
        else:
            raise InputError(f"there is no file or folder {path}")
    return list(dict.fromkeys(found))
