"""Small files that hold very large images."""

import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
from PIL import Image

from tuner import InputError
from tuner.data import image_folder
from tuner.data.files import image_file, pixels
from tuner.data.files.image_file import BrokenImageError, read

ROOT = Path(__file__).parents[2]


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(path, width, height, *more):
    """A PNG with this size in its header, without the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize(
    ("side", "size"),
    [
        (8_000, "8,000 x 8,000 = 64,000,000"),
        (10_000, "100[,_]?000[,_]?000|10,000 x 10,000 = 100,000,000"),  # above Pillow's own limit for a warning
        (30_000, "900000000|900,000,000"),  # ... and for an error
    ],
)
def test_a_large_image_is_refused_by_its_header(tmp_path, side, size):
    with pytest.raises(BrokenImageError) as error:
        read(png(tmp_path / "a.png", side, side), (3, 8, 8), "crop")
    rule = "pixels, 50,000,000 are allowed: raise data.max_pixels, or --max-pixels of tuner.predict"
    assert error.match(rf"^{tmp_path}/a.png cannot be used as an image: it has ({size}) {rule}$")


def test_the_limit_can_be_set(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    for name in "ab":
        for i in range(6):
            path = tmp_path / "data" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (10, 10 + i)).save(path)
    options = {"size": 4, "cache_dir": tmp_path / "cache"}
    with pytest.raises(
        InputError, match=r"^2 files cannot .*[ab]/5\.png \(it has 10 x 15 = 150 pixels, 140 are allowed"
    ):
        image_folder.load(tmp_path / "data", max_pixels=140, **options)
    for limit, images in ((140, 10), (10**9, 12)):
        data = image_folder.load(tmp_path / "data", max_pixels=limit, skip_broken=limit == 140, **options)
        assert len(data.pool) + len(data.test) == images
    assert Image.MAX_IMAGE_PIXELS == 10**9  # Pillow's own limit allows what the user allows
    for wrong in (0, -1, 1.5, None):
        with pytest.raises(InputError, match=r"^data\.max_pixels=\S+ must be a whole number of at least 1$"):
            image_folder.load(tmp_path / "data", max_pixels=wrong, **options)


def test_predict_has_the_limit(trained, call, tmp_path):
    small = tmp_path / "small.png"
    Image.new("L", (20, 20)).save(small)
    code, out, err = call("predict", trained(), png(tmp_path / "large.png", 9_000, 9_000), small, "--csv")
    assert code == 1
    assert "small.png" in out
    assert "large.png cannot be used as an image: it has 9,000 x 9,000 = 81,000,000 pixels, 50,000,000 are" in err
    code, out, err = call("predict", trained(), small, "--max-pixels", 399)
    assert (
        "it has 20 x 20 = 400 pixels, 399 are allowed: raise data.max_pixels, or --max-pixels of tuner.predict" in err
    )


def test_compressed_text_and_profiles_in_a_png_are_bounded(tmp_path):
    for kind, start in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0")):
        bomb = chunk(kind, start + zlib.compress(bytes(10**8), 9))
        with pytest.raises(BrokenImageError, match=r"too large|broken|truncated|error"):
            read(png(tmp_path / "a.png", 4, 4, bomb), (3, 8, 8), "crop")


def test_a_program_is_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(BrokenImageError, match="its content is not an image, despite its name"):
        read(tmp_path / "a.png", (3, 8, 8), "crop")


def test_threads_wait_for_the_pixels_of_others():
    budget, order = image_file._Budget(100), []
    entered, leave = threading.Event(), threading.Event()

    def large():
        with budget.take(1_000):  # more than there are: alone
            entered.set()
            leave.wait()
            order.append("large")

    def small():
        with budget.take(1):
            order.append("small")

    threads = [threading.Thread(target=large), threading.Thread(target=small)]
    threads[0].start()
    entered.wait()
    threads[1].start()
    leave.set()
    for thread in threads:
        thread.join()
    assert order == ["large", "small"]
    assert budget.free == 100


def test_strips_give_the_same_pixels(tmp_path, monkeypatch):
    image = Image.effect_noise((37, 29), 80).convert("RGB")
    images = {
        "LA": image.convert("LA"),
        "RGBA": image.convert("RGBA"),
        "P": image.quantize(9),
        "I;16": image.convert("L").convert("I;16"),
    }
    images["RGBA"].putalpha(image.convert("L"))
    for mode, content in images.items():
        content.save(tmp_path / "a.png")
        whole = read(tmp_path / "a.png", (3, 29, 37), "stretch")
        with monkeypatch.context() as patch:
            patch.setattr(pixels, "STRIP", 100)
            assert read(tmp_path / "a.png", (3, 29, 37), "stretch").equal(whole), mode


DECODE = """
import resource, sys, torch
from pathlib import Path
from tuner.data.files.image_array import Files, How, decode
paths = sorted(Path(sys.argv[1]).iterdir())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in decode(Files(Path(), [str(path) for path in paths], torch.zeros(len(paths))), How((3, 32, 32), "crop"), 8):
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_is_bounded_over_all_threads(tmp_path):
    """Eight threads, eight images of 49 million pixels: one at a time."""
    for mode in ("RGBA", "I;16"):
        Image.new(mode, (7_000, 7_000)).save(tmp_path / f"0{mode}.png", compress_level=1)
        for i in range(1, 4):
            (tmp_path / f"{i}{mode}.png").write_bytes((tmp_path / f"0{mode}.png").read_bytes())
    run = [sys.executable, "-c", DECODE, str(tmp_path)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert int(done.stdout) < 800_000  # kB
