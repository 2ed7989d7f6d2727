"""Image files of all modes, shapes and formats become uint8 [C, H, W]; errors for other files; finding image files."""

import errno
import logging
import os
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

from tuner import InputError
from tuner.data.files import image_file
from tuner.data.files.image_file import BrokenImageError, find, names, read

ORIENTATION = 0x0112  # the EXIF tag
WHITE = (255, 255, 255)


def noise(h, w, channels=3):
    shape = (h, w) if channels == 1 else (h, w, channels)
    return np.random.default_rng(h * w).integers(0, 256, shape, dtype=np.uint8)


def image(mode, *colours):
    """One row of these colours."""
    row = Image.new(mode, (len(colours), 1))
    for x, colour in enumerate(colours):
        row.putpixel((x, 0), colour)
    return row


def palette(*colours):
    """One row with each colour of the palette."""
    row = image("P", *range(len(colours)))
    row.putpalette([value for colour in colours for value in colour])
    return row


def wide(values, dtype=np.uint16):
    return Image.fromarray(np.array([values], dtype))


def gray(*values):
    return [(value,) * 3 for value in values]


RGB = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
MODES = {  # the image saved, the extension, options of save(), the RGB values expected
    "L": (image("L", 0, 7, 255), "png", {}, gray(0, 7, 255)),
    "L, one gray transparent": (image("L", 0, 7, 255), "png", {"transparency": 7}, gray(0, 255, 255)),
    "RGB": (image("RGB", *RGB), "png", {}, RGB),
    "RGB, one colour transparent": (image("RGB", *RGB), "png", {"transparency": RGB[1]}, [RGB[0], WHITE, RGB[2]]),
    "P": (palette(*RGB), "png", {}, RGB),
    "P, one colour transparent": (palette(*RGB), "png", {"transparency": 1}, [RGB[0], WHITE, RGB[2]]),
    "P, partly transparent": (
        palette(*RGB),
        "png",
        {"transparency": b"\xff\x00\x33"},
        [RGB[0], WHITE, (204, 204, 255)],
    ),
    "P, of a GIF": (palette(*RGB), "gif", {"transparency": 1}, [RGB[0], WHITE, RGB[2]]),
    "RGBA": (
        image("RGBA", (200, 0, 0, 255), (1, 2, 3, 0), (200, 0, 0, 51)),
        "png",
        {},
        [(200, 0, 0), WHITE, (244, 204, 204)],
    ),
    "LA": (image("LA", (100, 255), (100, 0), (100, 51)), "png", {}, gray(100, 255, 224)),
    "CMYK": (image("CMYK", (0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)), "tif", {}, [RGB[0], (0, 0, 0), WHITE]),
    "1": (image("1", 0, 1, 0), "png", {}, gray(0, 255, 0)),
    "1, one value transparent": (image("1", 0, 1, 0), "png", {"transparency": 0}, gray(255, 255, 255)),
    "I;16": (wide([0, 128, 129, 257 * 77, 65535]), "png", {}, gray(0, 0, 1, 77, 255)),
    "I;16, one gray transparent": (wide([0, 129, 257 * 77]), "png", {"transparency": 129}, gray(0, 255, 77)),
    "I;16, of a TIFF": (wide([0, 257 * 77, 65535]), "tif", {}, gray(0, 77, 255)),
    "I": (wide([0, 257 * 77, 65535], np.int32), "tif", {}, gray(0, 77, 255)),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(tmp_path, mode):
    saved, ending, options, expected = MODES[mode]
    path = tmp_path / f"image.{ending}"
    saved.save(path, **options)
    got = read(path, (3, 1, saved.width), "crop")
    assert got.dtype == torch.uint8
    assert got.is_contiguous()
    assert [tuple(pixel) for pixel in got[:, 0].T.tolist()] == list(expected)
    luma = np.array(expected) @ [0.299, 0.587, 0.114]
    assert read(path, (1, 1, saved.width), "crop")[0, 0].numpy() == pytest.approx(luma, abs=0.6)


def test_lab_colours(tmp_path):
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    colours = [(200, 60, 40), (30, 150, 90), (128, 128, 128)]
    ImageCms.profileToProfile(image("RGB", *colours), srgb, lab, outputMode="LAB").save(tmp_path / "lab.tif")
    got = read(tmp_path / "lab.tif", (3, 1, 3), "crop")[:, 0].T
    assert got.numpy() == pytest.approx(np.array(colours), abs=3)


@pytest.mark.parametrize("ending", sorted(image_file.EXTENSIONS))
def test_formats(tmp_path, ending):
    if not features.check({".avif": "avif", ".webp": "webp"}.get(ending, "jpg_2000" if ending[:2] == ".j" else "pil")):
        pytest.skip("this Pillow can't")
    path = tmp_path / f"a{ending}"
    gray_only = ending in (".pbm", ".pgm")
    Image.new("1" if ending == ".pbm" else "L" if gray_only else "RGB", (12, 12), 255 if gray_only else "red").save(
        path
    )
    colour = torch.tensor(WHITE if gray_only else RGB[0])[:, None, None]
    assert names(tmp_path) == [path.name]
    for size in (12, 5):  # unchanged and resized
        assert (read(path, (3, size, size), "crop") - colour).abs().max() <= 3


TURNED = {  # EXIF orientation -> from the saved pixels to the upright image
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
    9: lambda x: x,  # not a valid orientation
}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(tmp_path, orientation):
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(noise(6, 9)).save(path, exif=exif)
    with Image.open(path) as saved:
        expected = TURNED[orientation](np.asarray(saved))
    assert np.array_equal(read(path, (3, *expected.shape[:2]), "crop").permute(1, 2, 0), expected)


def exif(*entries):
    """Big-endian EXIF data of entries of 12 bytes each, which no library would write."""
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(sorted(entries)) + bytes(4)


TO_TURN = struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "malformed",
    [
        pytest.param(struct.pack(">HHI4s", 0x100, 2, 4, b"abc\0"), id="a width that is text"),
        pytest.param(struct.pack(">HHI4s", 0x11A, 1, 4, b"abcd"), id="a resolution of bytes"),
        pytest.param(struct.pack(">HHIi", 0x100, 9, 1, -6), id="a negative width"),
        pytest.param(struct.pack(">HHIf", 0x10F, 11, 1, 1.5), id="a maker that is a number"),
        pytest.param(struct.pack(">HHII", 0x10F, 99, 1, 1), id="an unknown type"),
    ],
)
def test_other_exif_entries_may_be_malformed(tmp_path, malformed, ending):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(noise(6, 9)).save(path, exif=exif(TO_TURN, malformed))
    with Image.open(path) as saved:
        expected = np.rot90(np.asarray(saved), -1)
    assert np.array_equal(read(path, (3, 9, 6), "crop").permute(1, 2, 0), expected)


@pytest.mark.parametrize("content", [b"garbage", b"Exif\0\0garbage!", exif(TO_TURN)[:12]])
def test_a_damaged_orientation_is_ignored_with_a_warning(tmp_path, caplog, content):
    path = tmp_path / "a.png"
    Image.fromarray(noise(6, 9)).save(path, exif=content)
    assert np.array_equal(read(path, (3, 6, 9), "crop").permute(1, 2, 0), noise(6, 9))
    [warning] = caplog.messages
    assert warning.startswith(f"{path} is used without its EXIF orientation, because that is damaged (")


FITTED = [  # rows of gray values, the fit, the rows expected
    ([[10, 20, 30, 40, 50]] * 3, "crop", [[20, 30, 40]] * 3),
    ([[10] * 3, [20] * 3, [30] * 3, [40] * 3, [50] * 3], "crop", [[20] * 3, [30] * 3, [40] * 3]),
    ([[7, 7, 7, 9, 9, 9]] * 2, "crop", [[7, 9]] * 2),
    ([[10, 20, 30]], "pad", [[0] * 3, [10, 20, 30], [0] * 3]),
    ([[10], [20], [30], [40]], "pad", [[0, 10, 0, 0], [0, 20, 0, 0], [0, 30, 0, 0], [0, 40, 0, 0]]),
    ([[80] * 8] * 4, "pad", [[0] * 4, [80] * 4, [80] * 4, [0] * 4]),
    ([[0, 255]], "stretch", [[0, 64, 191, 255]]),
    ([[0, 0, 200, 200]], "stretch", [[29, 171]]),  # the filter's triangle is four pixels wide: weights 3, 3, 1 of 7
    ([[0, 0, 200, 200]], "stretch", [[29, 171]] * 3),
]


@pytest.mark.parametrize(("rows", "fit", "expected"), FITTED)
def test_fits_by_hand(tmp_path, rows, fit, expected):
    path, shape = tmp_path / "a.png", (1, len(expected), len(expected[0]))
    Image.fromarray(np.array(rows, np.uint8)).save(path)
    assert read(path, shape, fit)[0].tolist() == expected


def resized(pixels, size, start, step):
    """Resize with a triangle filter two of the larger pixels wide: [H, W, C] -> float [*size, C].

    start, step: in source pixels (down, across), the edge of the first new pixel and the distance to the next.
    """
    for axis in (0, 1):
        centers = start[axis] + (np.arange(size[axis]) + 0.5) * step[axis]
        away = np.abs(np.arange(pixels.shape[axis]) + 0.5 - centers[:, None]) / max(1, step[axis])
        weights = np.maximum(0, 1 - away)
        weights /= weights.sum(1, keepdims=True)
        pixels = np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis)
    return pixels


@pytest.mark.parametrize("size", [(16, 16), (16, 20), (40, 33)])
@pytest.mark.parametrize("saved", [(31, 45), (45, 31), (13, 17), (60, 40)])
def test_fits_against_a_reference(tmp_path, saved, size):
    path, pixels = tmp_path / "a.png", noise(*saved)
    Image.fromarray(pixels).save(path)
    steps = np.array(saved) / size
    step = steps.min()  # of crop
    left_out = np.array(saved) - step * np.array(size)
    inner = np.round(np.array(saved) / steps.max()).astype(int)  # of pad
    expected = {
        "stretch": resized(pixels, size, (0, 0), steps),
        "crop": resized(pixels, size, left_out / 2, (step, step)),
        "pad": np.zeros((*size, 3)),
    }
    top, left = (size - inner) // 2
    expected["pad"][top : top + inner[0], left : left + inner[1]] = resized(pixels, inner, (0, 0), saved / inner)
    assert set(expected) == set(image_file.FITS)
    for fit, values in expected.items():
        got = read(path, (3, *size), fit).permute(1, 2, 0).numpy()
        assert np.abs(got - values).max() < 1.1, fit  # it rounds twice


@pytest.mark.parametrize("fit", image_file.FITS)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_right_size_keeps_its_pixels(tmp_path, fit, channels):
    pixels = noise(20, 30, channels)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = read(tmp_path / "a.png", (channels, 20, 30), fit)
    assert np.array_equal(got.permute(1, 2, 0).squeeze(), pixels)


@pytest.mark.parametrize("fit", image_file.FITS)
@pytest.mark.parametrize("ending", ["png", "jpg"])  # JPEGs may be decoded at a smaller scale
@pytest.mark.parametrize("side", [1, 4, 3000])
def test_resizing_keeps_a_uniform_colour(tmp_path, fit, ending, side):
    Image.new("RGB", (side, side), (200, 100, 50)).save(tmp_path / f"a.{ending}")
    got = read(tmp_path / f"a.{ending}", (3, 16, 16), fit)
    assert (got - torch.tensor([200, 100, 50])[:, None, None]).abs().max() <= 2


@pytest.mark.parametrize("fit", image_file.FITS)
@pytest.mark.parametrize("shape", [(1, 120, 120), (1, 60, 120), (1, 120, 60)])
def test_a_large_jpeg_is_as_sharp_as_when_decoded_in_full(tmp_path, fit, shape):
    stripes = (np.indices((960, 960)) // 20).sum(0) % 2 * 200  # squares of 2.5 pixels of 120
    Image.fromarray(stripes.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as saved:
        saved.save(tmp_path / "a.png")
    jpg, png = (read(tmp_path / f"a.{ending}", shape, fit).float() for ending in ("jpg", "png"))
    assert (jpg - png).abs().mean() < 1


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("fit", image_file.FITS)
def test_an_image_of_one_row(tmp_path, fit, upright):
    row = np.repeat(np.array([[10, 20, 30, 40, 50]], np.uint8), 1000, axis=1)  # 5000 x 1
    row[0, 2500] = 99
    Image.fromarray(row.T if upright else row).save(tmp_path / "a.png")
    got = read(tmp_path / "a.png", (1, 15, 15), fit)[0]
    got = got.T if upright else got
    if fit == "crop":  # a square of one pixel in the middle
        assert 30 <= got.min() <= got.max() <= 99
    else:
        assert got[7, 1::3].tolist() == [10, 20, 30, 40, 50]
        assert torch.equal(got, got[7].expand(15, 15)) == (fit == "stretch")
        assert got[[*range(7), *range(8, 15)]].any() == (fit == "stretch")


def truncated(path):
    Image.fromarray(noise(60, 60)).save(path)
    path.write_bytes(path.read_bytes()[:-900])


def frames(path):
    Image.new("L", (4, 4), 1).save(path, save_all=True, append_images=[Image.new("L", (4, 4), 9)])


BROKEN = {  # name -> (function that writes the file, the reason given)
    "truncated.jpg": (truncated, r"image file is truncated \(.* bytes not processed\)"),
    "truncated.png": (truncated, "image file is truncated"),
    "empty.png": (lambda path: path.touch(), "^it is empty$"),
    "text.jpg": (lambda path: path.write_text("no image"), "^its content is not an image, despite its name$"),
    "moves.gif": (frames, "^it has 2 frames or pages: save the right one as a file$"),
    "pages.tif": (frames, "^it has 2 frames or pages: save the right one as a file$"),
    "float.tif": (lambda path: wide([0, 1], np.float32).save(path), "^its pixels are floating-point numbers; save it"),
    "deep.tif": (lambda path: wide([0, 65536], np.int32).save(path), "^its values are 0 to 65536: save it with 8"),
    "negative.tif": (lambda path: wide([-1, 5], np.int32).save(path), "^its values are -1 to 5: save it with 8"),
    "folder.png": (lambda path: path.mkdir(), "^it is not a regular file$"),
    "pipe.png": (os.mkfifo, "^it is not a regular file$"),
    "missing.png": (lambda path: None, "^No such file or directory$"),
    "circle.png": (lambda path: path.symlink_to(path), "^Too many levels of symbolic links$"),
    f"{'long' * 100}.png": (lambda path: None, "^File name too long$"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_reasons_for_broken_files(tmp_path, name):
    path, (write, reason) = tmp_path / name, BROKEN[name]
    write(path)
    with pytest.raises(BrokenImageError) as error:
        read(path, (3, 4, 4), "crop")
    assert re.search(reason, error.value.reason)
    assert error.value.path == path
    assert isinstance(error.value, InputError)
    assert str(error.value) == f"{path} cannot be used as an image: {error.value.reason}"


@pytest.fixture
def opening(tmp_path, monkeypatch):
    """Read an image while Image.open raises an error."""

    def read_it(error):
        def fail(path, **_options):
            raise error

        Image.new("L", (4, 4)).save(tmp_path / "a.png")
        monkeypatch.setattr(Image, "open", fail)
        return read(tmp_path / "a.png", (3, 4, 4), "crop")

    return read_it


@pytest.mark.parametrize("code", ["EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE", "ETIMEDOUT"])
def test_a_temporary_read_error_does_not_mean_broken(tmp_path, opening, code):
    reason = os.strerror(getattr(errno, code))
    with pytest.raises(InputError) as error:
        opening(OSError(getattr(errno, code), reason))
    assert not isinstance(error.value, BrokenImageError)
    assert str(error.value) == f"{tmp_path}/a.png cannot be read now ({reason}): try again"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "a.png cannot be used as an image: Permission denied$"),
        (KeyError("of a decoder"), "a.png cannot be used as an image: 'of a decoder'$"),
        (IndexError(), "a.png cannot be used as an image: IndexError$"),
    ],
)
def test_any_error_of_a_decoder_means_broken(opening, error, raised):
    with pytest.raises(BrokenImageError, match=raised):
        opening(error)


def test_a_memory_error_does_not_mean_broken(opening):
    with pytest.raises(MemoryError):
        opening(MemoryError())


def test_fits_are_listed():
    with pytest.raises(InputError, match=r"^data\.fit=zoom must be one of crop, pad, stretch$"):
        image_file.check_fit("zoom")


def make(folder, *files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_images_are_found_at_any_depth_and_sorted(tmp_path, caplog):
    make(tmp_path, "b/2.png", "b/10.jpg", "c.JPG", "a b/é/x.TIFF", "b.jpeg", "e.txt/d.webp", ".png/f.png")
    make(tmp_path, ".hidden.png", ".git/a.png", "b/.a.png", "b/notes.txt", "Thumbs.db", "c.png.txt", "jpg", "B.TXT")
    with caplog.at_level(logging.INFO):
        image_names = names(tmp_path)
    assert image_names == ["a b/é/x.TIFF", "b.jpeg", "b/10.jpg", "b/2.png", "c.JPG", "e.txt/d.webp"]
    assert find(tmp_path) == [tmp_path / name for name in image_names]
    assert caplog.messages[:1] == [
        f"{tmp_path}: skipped 5 files without an image's extension (.txt: 3, .db: 1, no extension: 1)"
    ]


def test_nothing_is_logged_if_all_files_are_images(tmp_path, caplog):
    make(tmp_path, "a.png", ".hidden")
    with caplog.at_level(logging.INFO):
        assert names(tmp_path) == ["a.png"]
    assert not caplog.messages


def test_links_are_followed_but_not_in_circles(tmp_path):
    make(tmp_path, "here/a/1.png", "there/2.png", "there/deep/3.png")
    for link, target in {
        "here/there": "../there",
        "here/a/up": "..",
        "here/self": ".",
        "there/deep/back": "../../here",
        "here/one.png": "a/1.png",
        "here/circle.png": "circle.png",
        "here/nowhere.png": "nothing",
    }.items():
        (tmp_path / link).symlink_to(target)
    assert names(tmp_path / "here") == [  # read() reports the broken links
        *("a/1.png", "circle.png", "nowhere.png", "one.png", "there/2.png", "there/deep/3.png")
    ]


def test_a_folder_that_cannot_be_read(closed):
    folder, close = closed
    make(folder, "a/b/1.png", "c/2.png")
    close(folder / "a" / "b")
    with pytest.raises(InputError, match=f"^the folder {folder}/a/b cannot be read: Permission denied$"):
        names(folder)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(InputError, match=f"^the folder {tmp_path}/no cannot be read: No such file or directory$"):
        names(tmp_path / "no")


@pytest.mark.parametrize("name", [b"caf\xe9/a.png", b"a/caf\xe9.png", b"caf\xe9.txt"])
def test_names_that_are_not_utf8_are_refused(tmp_path, name):
    make(tmp_path, os.fsdecode(name))
    escaped = re.escape(name.decode(errors="backslashreplace"))
    with pytest.raises(InputError, match=rf"^the name {escaped} is not valid UTF-8: rename the file or folder$"):
        names(tmp_path)
