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
MD5 = {  # of the unzipped contents, because Debian's .gz files differ from the original ones
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist installs them
TORCHVISION = Path("FashionMNIST/raw")  # below the root folder of torchvision's data set


def load(root: str | Path, *, val_share: float = 1 / 12, seed: int = 0) -> Data:
    """Fashion-MNIST with its official test split: images uint8 [N, 1, 28, 28].

    root: a folder with the four IDX files, plain or .gz, directly or in FashionMNIST/raw. If it has none, the files of
        Debian's package dataset-fashion-mnist are used. If these are missing too, torchvision downloads them to root.
    val_share: the share of the 60,000 training images that `seed` draws for validation; 1/12 is 5,000.
    Raises InputError if a file is not the original or cannot be downloaded.
    """
    root = Path(root).expanduser()
    folder = _find(root) or _download(root)
    log.info("reading Fashion-MNIST from %s", folder)
    return split(read(folder, "train"), read(folder, "t10k"), CLASSES, val_share=val_share, seed=seed)


def read(folder: Path, part: str) -> Samples:
    """One official split: "train" (60,000 images) or "t10k" (10,000, the test split).

    Raises InputError if a file cannot be read or its checksum is wrong.
    """
    images = _idx(folder, f"{part}-images-idx3-ubyte")
    return Samples(images[:, None], _idx(folder, f"{part}-labels-idx1-ubyte").long())


def _idx(folder: Path, name: str) -> torch.Tensor:
    path = _file(folder, name)
    if path is None:
        raise InputError(f"{folder} has no file {name} or {name}.gz: put the original there")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it or replace it with the original") from error
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != MD5[name]:
        raise InputError(
            f"{path} is not the original file (md5 of its contents {md5}, expected {MD5[name]}): delete it or replace "
            "it with the original"
        )
    # IDX: two zero bytes, the type (8 is uint8), the number of dimensions, their sizes as big-endian uint32, the values
    sizes = np.frombuffer(content, ">u4", count=content[3], offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes))
    return torch.from_numpy(values.reshape(*sizes.tolist()).copy())  # frombuffer returns a read-only array


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _find(root: Path) -> Path | None:
    folders = (root, root / TORCHVISION, DEBIAN)
    return next((folder for folder in folders if all(_file(folder, name) for name in MD5)), None)


def _download(root: Path) -> Path:
    from torchvision.datasets import FashionMNIST  # slow to import and seldom needed

    log.info("downloading Fashion-MNIST to %s", root / TORCHVISION)
    try:
        (root / TORCHVISION).mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".download.lock"):  # trials of a sweep may start at the same time
            FashionMNIST(root, download=True)
    except (OSError, RuntimeError, EOFError, zlib.error, HTTPException) as error:
        names = ", ".join(name for name, _ in FashionMNIST.resources)
        raise InputError(
            f"Fashion-MNIST cannot be downloaded to {root} ({' '.join(str(error).split())}): tried to get {names} from "
            f"{', '.join(FashionMNIST.mirrors)}; apt install dataset-fashion-mnist, or put the four files into "
            "data.root, or use data=fmnist_small"
        ) from error
    return root / TORCHVISION
