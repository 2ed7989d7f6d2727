"""Image files: finding them in a folder, and reading one as a tensor of the shape that a model takes."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from tuner import InputError

FITS = ("crop", "pad", "stretch")
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


class BrokenImageError(InputError):
    """A file is no image that can be read."""


def read(path: Path, shape: Sequence[int], fit: str) -> torch.Tensor:
    """An image as uint8 [C, H, W] of `shape`: turned as its EXIF says, over white where it is transparent.

    fit: how it gets the shape: "crop" cuts its longer sides off, "pad" fills up with white, "stretch" distorts it.
    Raises BrokenImageError, which names the file and the reason.
    """
    channels, height, width = shape
    try:
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("ignore")
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except Exception as error:  # anything at all can come out of reading a damaged file
        raise BrokenImageError(f"{path} is no image that can be read: {' '.join(str(error).split())}") from error
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("L" if channels == 1 else "RGB")
    size = (width, height)
    if fit == "crop":
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    elif fit == "pad":
        image = ImageOps.pad(image, size, Image.Resampling.BILINEAR, color="white")
    elif image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image).reshape(height, width, channels)).permute(2, 0, 1).contiguous()


def find(folder: Path) -> list[Path]:
    """The files in or below a folder whose names are those of images, in order."""
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
