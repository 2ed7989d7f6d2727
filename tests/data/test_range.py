"""16-bit image files whose values do not reach 65535, and what is recorded of the files of a data set."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_folder import message

import tuner
from tuner import InputError
from tuner.cache_files import Cache
from tuner.data import FileStatistics, csv_file, image_folder
from tuner.data.files import image_array
from tuner.data.files.image_array import Files
from tuner.data.files.image_file import BrokenImageError, decode, read
from tuner.export import metadata


def gray(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint16)).save(path)


def colour(path, values):
    """Write a PNG with colours of 16 bits per value, which Pillow cannot. values: [H, W, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.asarray(values)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)


def folder(root, write=gray, most=200):
    """Two classes, of eight files each, with values up to `most`."""
    draw = np.random.default_rng(0)
    for name in "ab":
        for i in range(8):
            values = draw.integers(0, most, (6, 6) if write is gray else (6, 6, 3))
            values[i % 6, i // 6] = most
            write(root / name / f"{i}.png", values)
    return root


def load(root, **options):
    return image_folder.load(root, **{"size": [1, 6, 6], "cache_dir": root.parent / "cache"} | options)


@pytest.mark.parametrize(
    ("most", "proposed"), [(1, 1), (200, 255), (255, 255), (256, 1023), (4095, 4095), (4096, None)]
)
def test_a_warning_names_the_highest_value_and_the_range(tmp_path, caplog, most, proposed):
    root = folder(tmp_path / "root", most=most)
    for _ in range(2):  # freshly decoded, and cached
        caplog.clear()
        assert load(root, divide=False).pool.images.max() <= 16
        says = (
            f"the 16-bit files have no value above {most}, of 65535: they are almost black; set data.range={proposed}"
        )
        found = [line for line in caplog.messages if "16-bit" in line]
        assert found == [f"{says}, the value that is white"] * (proposed is not None)
    if proposed:
        caplog.clear()
        data = load(root, range=proposed)
        assert "16-bit" not in caplog.text
        assert data.pool.images.max() > 60
        assert data.pool.files.value_range == data.test.files.value_range == proposed


@pytest.mark.parametrize("value_range", [1, 255, 1000, 4095, 65535])
def test_values_are_scaled_by_the_range(tmp_path, value_range):
    values = np.linspace(0, value_range, 64).round().astype(int).reshape(8, 8)
    gray(tmp_path / "a.png", values)
    got = read(tmp_path / "a.png", (1, 8, 8), "crop", value_range=value_range)[0]
    assert np.abs(got.numpy() - values * 255 / value_range).max() <= 0.5
    decoded = decode(tmp_path / "a.png", (1, 8, 8), "crop")
    assert (decoded.mode, decoded.width, decoded.height, decoded.highest) == ("I;16", 8, 8, value_range)


def test_higher_values_are_white_with_a_warning(tmp_path, caplog):
    root = folder(tmp_path / "root", most=300)
    images = load(root, range=255).pool.images
    assert caplog.messages == ["the 16-bit files have values up to 300: those above data.range=255 are white"]
    assert images.max() == 255


def test_a_transparent_value_is_white(tmp_path):
    Image.fromarray(np.array([[0, 100, 255]], np.uint16)).save(tmp_path / "a.png", transparency=100)
    assert read(tmp_path / "a.png", (1, 1, 3), "crop", value_range=255).flatten().tolist() == [0, 255, 255]


def test_a_file_that_names_its_range_is_scaled_by_it(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 4095\n" + np.array([0, 2048, 4095], ">u2").tobytes())
    assert read(tmp_path / "a.pgm", (1, 1, 3), "crop", value_range=4095).flatten().tolist() == [0, 128, 255]


def test_dark_files_of_8_bits_are_not_warned_of(tmp_path, caplog):
    for name in "ab":
        for i in range(8):
            (tmp_path / "root" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((6, 6), i, np.uint8)).save(tmp_path / "root" / name / f"{i}.png")
    assert load(tmp_path / "root", divide=False).pool.files.highest_16 is None
    assert "16-bit" not in caplog.text


def test_colours_of_16_bits_are_warned_of_and_have_no_range(tmp_path, caplog):
    root = folder(tmp_path / "root", colour, most=255)
    load(root, size=6)
    assert "the 16-bit files have no value above 255, of 65535" in caplog.text
    says = "data.range=255 is for gray files, and this has colours of 16 bits: save it with 8 bits"
    assert f"a/0.png ({says})" in message(root, range=255)
    with pytest.raises(BrokenImageError, match=says):
        read(root / "a/0.png", (3, 6, 6), "crop", value_range=255)
    caplog.clear()
    folder(tmp_path / "bright", colour, most=60000)
    assert load(tmp_path / "bright", size=6).pool.images.max() > 230
    assert not caplog.messages


@pytest.mark.parametrize("value", [0, -1, 65536, 2.5, "255", True])
def test_wrong_ranges(tmp_path, value):
    with pytest.raises(
        InputError, match=f"^data.range={value} must be a whole number of at least 1 and at most 65,535"
    ):
        load(folder(tmp_path / "root"), range=value)


def test_image_files_of_a_table_have_a_range(tmp_path):
    root = folder(tmp_path / "root")
    rows = [f"{path.relative_to(root)},{path.parent.name}" for path in sorted(root.glob("*/*.png"))]
    (root / "table.csv").write_text("\n".join(["image,label", *rows]))
    options = {"size": [1, 6, 6], "cache_dir": tmp_path / "cache", "divide": False}
    expected = load(root, range=255, divide=False).pool.images
    assert torch.equal(csv_file.load(root / "table.csv", range=255, **options).pool.images, expected)


def test_what_the_files_hold_is_recorded(tmp_path):
    for name, size, mode in (("a", (3, 5), "RGB"), ("b", (7, 5), "RGB"), ("c", (8, 1), "L"), ("d", (4, 9), "P")):
        Image.new(mode, size).save(tmp_path / f"{name}.png")
    gray(tmp_path / "e.png", [[7, 300]])
    (tmp_path / "f.png").write_text("no image")
    files = Files(tmp_path, [f"{name}.png" for name in "abcdef"], torch.zeros(6, dtype=torch.int64))
    for _ in range(2):  # freshly decoded, and cached
        cache = Cache(tmp_path / "cache")
        [(samples, _)] = image_array.load([files], size=4, fit="crop", cache=cache, skip_broken=True)
        assert samples.files == FileStatistics(
            modes={"RGB": 2, "L": 1, "P": 1, "I;16": 1},
            widths=(2, 4, 8),
            heights=(1, 5, 9),
            skipped=1,
            highest_16=300,
            value_range=65535,
        )


def test_a_model_keeps_the_range(command, call, tmp_path):
    """Reading, evaluation and export use it."""
    root = folder(tmp_path / "images")
    arguments = ("data=image_folder", "data.root=images", "data.size=[1,16,16]", "model=tiny", "epochs=1")
    code, said = command(*arguments, "data.range=255", "plots=false", "hydra.run.dir=run")
    assert code == 0, said
    assert "almost black" not in said
    model = tuner.load("run")
    assert model.range == 255
    image = model.read(root / "a/0.png")
    assert image.max() > 150
    assert metadata(model)["range"] == "255"
    assert torch.equal(image, read(root / "a/0.png", (1, 16, 16), "crop", value_range=255))
    code, _, said = call("evaluate", "run", "data=image_folder", "data.root=images")
    assert code == 0, said
    assert "almost black" not in said
