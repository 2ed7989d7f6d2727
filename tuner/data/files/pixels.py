"""The pixels of a decoded image: turned upright, opaque, with 8 bits per value, and resized."""

import logging
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms

log = logging.getLogger(__name__)

RANGE = 65535  # the highest value of a file with 16 bits per value
STRIP = 2**20  # pixels that are converted at once
TURNS = {  # EXIF orientation -> the transposition that undoes it
    **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
    **{5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE},
    8: Image.Transpose.ROTATE_90,
}
GAP = 2.0  # Pillow's reducing_gap: photos are first reduced cheaply to about twice the size, then filtered


def draft(image: Image.Image, size: list[int]) -> None:
    """Have a JPEG decoded smaller, but not below GAP times the size. Raises ValueError for several frames."""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a photo with a preview
        n = getattr(image, "n_frames", "several")
        raise ValueError(f"it has {n} frames or pages: save the right one as a file")
    scale = GAP * max(size) / min(image.size)
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def turned(image: Image.Image, name: Path) -> Image.Image:
    """The image with its EXIF orientation applied. name: of the file, for a warning."""
    try:  # not ImageOps.exif_transpose: it rewrites all EXIF entries and fails if one of them is malformed
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error) as error:  # in a PNG or a WebP
        log.warning("%s is used without its EXIF orientation, because that is damaged (%s)", name, error)
        return image
    return image if turn is None else image.transpose(turn)


def in_strips(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
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


def eight_bits(image: Image.Image, value_range: int, highest: list[int]) -> Image.Image:
    """A gray image of 16 bits per value, perhaps stored in 32, scaled to 8 bits. Transparent pixels become white.

    An image of 8 bits is returned unchanged.   value_range: the value that is white; higher ones are white, too.
    highest: the highest value is appended.   Raises ValueError for values of more than 16 bits.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits per value")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > RANGE:
        raise ValueError(f"its values are {values.min()} to {values.max()}: save it with 8 or 16 bits")
    highest.append(int(values.max()))
    if "transparency" in image.info:  # the gray value that is transparent
        values[values == image.info["transparency"]] = value_range
    scaled = (np.minimum(values, value_range) * 255 + value_range // 2) // value_range
    return Image.fromarray(scaled.astype(np.uint8))


def is_wide_colour(image: Image.Image, value_range: int) -> bool:
    """Whether a colour image, not yet loaded, has 16 bits per value. Pillow reads the upper 8 of them.

    Raises ValueError if that would lose the values below a smaller value_range.
    """
    is_wide = not image.mode.startswith("I") and any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))
    if is_wide and value_range < RANGE:
        raise ValueError(
            f"data.range={value_range} is for gray files, and this has colours of 16 bits: save it with 8 bits"
        )
    return is_wide


def highest_byte(image: Image.Image) -> int:
    """The highest value of a colour image, without its alpha."""
    return max(int(np.asarray(band).max()) for band in image.split()[:3])


def opaque(image: Image.Image, mode: str) -> Image.Image:
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


def resized(image: Image.Image, size: list[int], fit: str) -> Image.Image:
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
