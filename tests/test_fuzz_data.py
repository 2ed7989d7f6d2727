"""Damaged files for every reader of data: read in full, or refused in one line that names the file."""

import bz2
import gzip
import io
import lzma
import os
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import mutations, outcome
from PIL import Image
from safetensors.torch import save

from tuner.data import csv_file, fashion_mnist, image_folder
from tuner.data.files.image_file import read
from tuner.data.tables.csv_text import UTF_16
from tuner.networks import weights

DRAW = random.Random(0)
PIXELS = DRAW.randbytes(3 * 24 * 24)
RGB = Image.frombytes("RGB", (24, 24), PIXELS)
GRAY = Image.frombytes("L", (24, 24), PIXELS[: 24 * 24])
TABLE = "label,a,b,c,d\n" + "".join(
    f"{('cat', 'dog', 'süß')[i % 3]},{','.join(str(DRAW.randrange(256)) for _ in range(4))}\n" for i in range(12)
)
FILES = "image,label\n" + "".join(f"{i}.png,{('cat', 'dog')[i % 2]}\n" for i in range(8))
STATE = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.ones(3), "n": torch.tensor(7)}
IDX = struct.pack(">HBBIII", 0, 8, 3, 4, 5, 5) + bytes(range(100))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pickled(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6
WIDE = Image.fromarray(np.frombuffer(PIXELS[: 2 * 24 * 24], np.uint16).reshape(24, 24))
SEVERAL = {"save_all": True, "append_images": [GRAY.rotate(90)], "duration": 9}
IMAGES = {
    "gray.png": saved(GRAY, "PNG"),
    "wide.png": saved(WIDE, "PNG"),
    "palette.png": saved(RGB.quantize(9), "PNG", transparency=3),
    "rgba.png": saved(RGB.convert("RGBA"), "PNG", exif=EXIF),
    "a.jpg": saved(RGB, "JPEG", exif=EXIF),
    "progressive.jpg": saved(RGB, "JPEG", progressive=True),
    "a.gif": saved(GRAY, "GIF"),
    "several.gif": saved(GRAY, "GIF", **SEVERAL),
    "a.tif": saved(WIDE, "TIFF"),
    "packed.tif": saved(RGB, "TIFF", compression="tiff_lzw"),
    "pages.tif": saved(RGB, "TIFF", save_all=True, append_images=[RGB]),
    "a.bmp": saved(RGB, "BMP"),
    "a.tga": saved(RGB, "TGA", compression="tga_rle"),
    "a.ppm": saved(RGB, "PPM"),
    "a.webp": saved(RGB, "WEBP", lossless=True),
    "a.jp2": saved(RGB, "JPEG2000"),
}
SPECIAL = ("folder", "pipe", "empty", "link to itself", "device", "no permission")


def place(path: Path, what: bytes | str) -> Path:
    """Put a file with this content at the path, or one of SPECIAL."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    if isinstance(what, bytes):
        path.write_bytes(what)
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "empty":
        path.touch()
    elif what == "link to itself":
        path.symlink_to(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch(mode=0)
    return path


def csv_pixels(path: Path) -> None:
    data = csv_file.load(path)
    assert data.pool.images.dtype == torch.uint8
    content = path.read_bytes() if path.suffix == ".csv" else b""
    for text in content.decode("utf-16" if content[:2] in UTF_16 else "utf-8-sig").splitlines()[1:]:
        assert text.isascii() or text.split(",")[0] in data.classes  # of pixels only ASCII was read


def csv_images(path: Path) -> None:
    folder = path.parent
    for i in range(8):
        if not (folder / f"{i}.png").exists():
            Image.new("L", (4, 4), i).save(folder / f"{i}.png")
    csv_file.load(path, image="image", size=4, cache_dir=folder / "cache")


def folder_of_images(path: Path) -> None:
    """The damaged file is one of eight."""
    folder = path.parent / "classes"
    for i in range(8):
        other = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        if not other.exists():
            other.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), i).save(other)
    damaged = folder / "cat" / path.name
    damaged.unlink(missing_ok=True)
    path.rename(damaged)
    try:
        data = image_folder.load(folder, size=4, cache_dir=path.parent / "cache", skip_broken=True)
        assert len(data.pool) + len(data.test) in (8, 9)
    finally:
        damaged.unlink()
        for cached in (path.parent / "cache" / "images").glob("*"):
            cached.unlink()


def image(path: Path) -> None:
    assert read(path, (3, 8, 8), "crop").shape == (3, 8, 8)


def idx(path: Path) -> None:
    fashion_mnist._idx(path.parent, path.name.removesuffix(".gz"))


def pretrained(path: Path) -> None:
    weights.resolve("vgg11", str(path), 0).load()


NAME = "t10k-images-idx3-ubyte"
READERS: dict[str, tuple[Callable[[Path], None], dict[str, bytes]]] = {
    "CSV of pixels": (
        csv_pixels,
        {
            "a.csv": TABLE.encode(),
            "a.csv.gz": gzip.compress(TABLE.encode(), mtime=0),
            "a.csv.xz": lzma.compress(TABLE.encode()),
            "a.csv.bz2": bz2.compress(TABLE.encode()),
        },
    ),
    "CSV of files": (csv_images, {"a.csv": FILES.encode()}),
    "image folder": (folder_of_images, {name: IMAGES[name] for name in ("gray.png", "a.jpg", "several.gif")}),
    "image file": (image, IMAGES),
    "IDX": (idx, {NAME: IDX, f"{NAME}.gz": gzip.compress(IDX, mtime=0)}),
    "weights": (pretrained, {"a.pth": pickled(STATE), "a.safetensors": save(STATE)}),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("n", [200, pytest.param(1500, marks=pytest.mark.slow)])
def test_damaged_files(reader, n, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "MD5", dict.fromkeys([NAME], fashion_mnist.hashlib.md5(IDX).hexdigest()))
    call, files = READERS[reader]
    counts = Counter[str]()
    for name, content in files.items():
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        path = place(folder / name, content)
        assert outcome(lambda path=path: call(path), name) == "success" or name in ("several.gif", "pages.tif")
        each = -(-n // len(files))
        for i, damaged in enumerate(mutations(content, seed=zlib.crc32(name.encode()), n=each)):
            path = place(folder / name, damaged)
            counts[outcome(lambda path=path: call(path), f"{reader}: {name}, mutation {i}")] += 1
    print(reader, dict(counts))
    assert sum(counts.values()) >= n


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader != "image folder"])
@pytest.mark.parametrize("special", SPECIAL)
def test_special_files(reader, special, tmp_path):
    call, files = READERS[reader]
    for name in files:
        path = place(tmp_path / name, special)
        outcome(lambda path=path: call(path), f"{reader}: {name} is {special}")


CUT = ("a.csv.gz", "a.csv.xz", "a.csv.bz2", "gray.png", "a.gif", "a.jpg", "a.pth", "a.safetensors")


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_was_cut_is_not_read(name, tmp_path):
    readers = {name: call for call, files in READERS.values() for name in files}
    content = next(files[name] for _, files in READERS.values() if name in files)
    for length in random.Random(name).sample(range(len(content) - 1), 20):
        path = place(tmp_path / name, content[:length])
        assert outcome(lambda path=path: readers[name](path), f"{name}, cut to {length} bytes") == "InputError"


@pytest.mark.parametrize(
    "state",
    [
        {1: torch.zeros(1)},
        {"a": {"b": torch.zeros(1)}},
        {"a": 3},
        [torch.zeros(1)],
        torch.zeros(1),
        {},
        {"a": torch.zeros(1).to_sparse()},
        {"a": torch.zeros(2, dtype=torch.complex64)},
        {"a" * 10_000: torch.zeros(1)},
        {"\x1b[31m": torch.zeros(1)},
        {"a": torch.nn.Parameter(torch.zeros(1))},
    ],
)
def test_odd_states(state, tmp_path):
    outcome(lambda: pretrained(place(tmp_path / "a.pth", pickled(state))), list(state)[:1])
