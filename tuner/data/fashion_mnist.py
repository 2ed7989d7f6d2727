"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): 60,000 + 10,000 gray 28 x 28 images of ten kinds of clothing."""

import gzip
import hashlib
import logging
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from tuner import InputError
from tuner.data import Data, Samples, split

log = logging.getLogger(__name__)

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
MD5 = {  # of the files' contents, unzipped: Debian's .gz files and the original ones differ, what is in them does not
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
TORCHVISION = Path("FashionMNIST/raw")  # below the root of torchvision's data set


def load(root: str | Path, *, val_share: float = 1 / 12, seed: int = 0) -> Data:
    """Fashion-MNIST with its official test split: images uint8 [N, 1, 28, 28].

    root: a folder with the four IDX files, as .gz or not, in it or in FashionMNIST/raw below it. Where it has none,
        those of Debian's package dataset-fashion-mnist serve and, failing that, torchvision downloads them into it.
    val_share: the share of the 60,000 which `seed` draws for validation; 1/12 is 5,000.
    Raises InputError where a file is not the original, or cannot be had.
    """
    root = Path(root).expanduser()
    folder = _find(root) or _download(root)
    log.info("Fashion-MNIST is read from %s", folder)
    return split(read(folder, "train"), read(folder, "t10k"), CLASSES, val_share=val_share, seed=seed)


def read(folder: Path, part: str) -> Samples:
    """One official split, checked. part: "train" (60,000 images) or "t10k" (10,000, the test split)."""
    images = _idx(folder, f"{part}-images-idx3-ubyte")
    return Samples(images[:, None], _idx(folder, f"{part}-labels-idx1-ubyte").long())


def _idx(folder: Path, name: str) -> torch.Tensor:
    path = _file(folder, name) or folder / name
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it, or put the original there") from error
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != MD5[name]:
        raise InputError(
            f"{path} is not the original file (md5 of its contents {md5}, {MD5[name]} expected): delete it, or put the "
            "original there"
        )
    # IDX: two zeros, the type (8 is uint8), the number of dimensions, their sizes as big-endian uint32, the values
    sizes = np.frombuffer(content, ">u4", count=content[3], offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes))
    return torch.from_numpy(values.reshape(*sizes.tolist()).copy())  # frombuffer's own array is read-only


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _find(root: Path) -> Path | None:
    folders = (root, root / TORCHVISION, DEBIAN)
    return next((folder for folder in folders if all(_file(folder, name) for name in MD5)), None)


def _download(root: Path) -> Path:
    from torchvision.datasets import FashionMNIST  # slow to import, and seldom needed

    log.info("Fashion-MNIST is downloaded to %s", root / TORCHVISION)
    try:
        (root / TORCHVISION).mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".download.lock"):  # the trials of a sweep may start together
            FashionMNIST(root, download=True)
    except (OSError, RuntimeError, EOFError, zlib.error, HTTPException) as error:
        names = ", ".join(name for name, _ in FashionMNIST.resources)
        raise InputError(
            f"Fashion-MNIST cannot be downloaded to {root} ({' '.join(str(error).split())}): {names} were asked of "
            f"{', '.join(FashionMNIST.mirrors)}: apt install dataset-fashion-mnist, or put the four files into "
            "data.root, or use data=fmnist_small"
        ) from error
    return root / TORCHVISION
