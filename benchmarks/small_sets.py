"""Small image sets for recipes.py, drawn or taken from what the installed packages bring: nothing is downloaded.

    digits      10 digits, written by hand: 8 x 8 pixels, from scikit-learn
    letters     15 capital letters in matplotlib's fonts, turned, blurred and noisy; no font is in both splits
    fonts       8 fonts, each image with other letters
    symbols     10 kinds of symbols, such as arrows, playing cards and faces, in colours; no symbol is in both splits
    textures    10 drawn patterns, at any scale, angle and contrast, in colours
    photos      6 halves of three photographs, cut into tiles like a chessboard: the black ones are the test split

A set is the same whenever it is drawn.
"""

import string
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_digits, load_sample_image

Example = tuple[str, str, Image.Image]  # split (train or test), class, image
SPLITS = ("train", "test")
SIDE = 64  # of the drawn images, in pixels
MATPLOTLIB = Path(matplotlib.get_data_path())
FONTS = MATPLOTLIB / "fonts" / "ttf"


def digits() -> Iterator[Example]:
    """30 images of each digit for each split."""
    bunch = load_digits()
    for digit in range(10):
        for number, image in enumerate(bunch.images[bunch.target == digit][:60]):
            yield SPLITS[number % 2], str(digit), Image.fromarray((image * 15.9).astype(np.uint8))


TRAINING_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSansMono-Oblique",
    "STIXGeneralItalic",
    "cmss10",
)
TEST_FONTS = ("DejaVuSerif-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "STIXGeneral", "cmr10", "cmtt10")


def letters() -> Iterator[Example]:
    """18 images of each letter for each split, three in each font."""
    draw = np.random.default_rng(1)
    for split, fonts in zip(SPLITS, (TRAINING_FONTS, TEST_FONTS), strict=True):
        for letter, font, _ in product("ABCDEFGHKMNPRST", fonts, range(3)):
            yield split, letter, printed(letter, font, draw.integers(30, 54), draw, angle=20, noise=60)


FACES = ("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral", "STIXGeneralItalic")
FACES += ("cmss10", "cmtt10")


def fonts() -> Iterator[Example]:
    """35 images of each font for each split, with four letters each."""
    draw = np.random.default_rng(2)
    for split, font, _ in product(SPLITS, FACES, range(35)):
        text = "".join(draw.choice(list(string.ascii_letters), 4))
        yield split, font, printed(f"{text[:2]}\n{text[2:]}", font, draw.integers(24, 30), draw, angle=5, noise=20)


SYMBOLS = {  # kind -> its Unicode ranges, both ends included
    "arrows": [(0x2190, 0x21FF), (0x27F0, 0x27FF)],
    "operators": [(0x2200, 0x22FF)],
    "box drawing": [(0x2500, 0x257F)],
    "geometric": [(0x25A0, 0x25FF)],
    "miscellaneous": [(0x2600, 0x26FF)],
    "dingbats": [(0x2701, 0x2775), (0x2794, 0x27BF)],
    "circled": [(0x2460, 0x2469), (0x24B6, 0x24E9), (0x2776, 0x2793)],
    "dominoes": [(0x1F030, 0x1F093)],
    "playing cards": [(0x1F0A0, 0x1F0DF)],
    "faces": [(0x1F600, 0x1F640)],
}


def symbols() -> Iterator[Example]:
    """Up to 28 images of each kind for each split, each of another symbol of DejaVu Sans."""
    draw = np.random.default_rng(3)
    known = TTFont(FONTS / "DejaVuSans.ttf").getBestCmap()
    for kind, ranges in SYMBOLS.items():
        codes = [code for first, last in ranges for code in range(first, last + 1) if code in known]
        for number, code in enumerate(draw.permutation(codes)[:56].tolist()):
            image = printed(chr(code), "DejaVuSans", draw.integers(36, 52), draw, angle=15, noise=15, colours=True)
            yield SPLITS[number % 2], kind, image


def printed(
    text: str, font: str, size: int, draw: np.random.Generator, *, angle: int, noise: int, colours: bool = False
) -> Image.Image:
    """Text in the middle of an image, turned by up to `angle` degrees, shifted, blurred, with noise.

    colours: any two, instead of dark gray on light gray.
    """
    face = ImageFont.truetype(FONTS / f"{font}.ttf", int(size))
    mask = Image.new("L", (SIDE, SIDE))
    place = (SIDE / 2 + draw.uniform(-6, 6), SIDE / 2 + draw.uniform(-6, 6))
    left, top, right, bottom = ImageDraw.Draw(mask).multiline_textbbox((0, 0), text, face)
    corner = (place[0] - (left + right) / 2, place[1] - (top + bottom) / 2)
    ImageDraw.Draw(mask).multiline_text(corner, text, 255, face)
    mask = mask.rotate(draw.uniform(-angle, angle), Image.Resampling.BICUBIC, center=place)
    mask = mask.filter(ImageFilter.GaussianBlur(draw.uniform(0, 1.2)))
    ink = np.asarray(mask)[..., None] / 255
    back, front = two_colours(draw) if colours else (draw.uniform(170, 255), draw.uniform(0, 90))
    return noisy((back + (front - back) * ink).repeat(1 if colours else 3, axis=2), draw, noise)


def two_colours(draw: np.random.Generator) -> np.ndarray:
    """Two colours in 0..255, [2, 3], whose brightnesses differ by at least 60."""
    while True:
        colours = draw.uniform(0, 255, (2, 3))
        if abs(np.subtract(*colours.mean(1))) > 60:
            return colours


def noisy(pixels: np.ndarray, draw: np.random.Generator, most: float) -> Image.Image:
    """With normal noise of a standard deviation of up to `most`."""
    pixels = pixels + draw.normal(0, draw.uniform(0, most), pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def textures() -> Iterator[Example]:
    """30 images of each pattern for each split."""
    draw = np.random.default_rng(4)
    for split, name, _ in product(SPLITS, PATTERNS, range(30)):
        angle, scale = draw.uniform(0, 2 * np.pi), draw.uniform(5, 14)
        down, right = np.mgrid[:SIDE, :SIDE] - SIDE / 2
        u = (np.cos(angle) * right + np.sin(angle) * down) / scale + draw.uniform(0, 9)
        v = (np.cos(angle) * down - np.sin(angle) * right) / scale + draw.uniform(0, 9)
        pattern = drawn(name, u, v, draw).astype(float)
        pattern = (pattern - pattern.min()) / np.ptp(pattern)
        contrast = draw.uniform(0.25, 1)
        back, front = two_colours(draw)
        yield split, name, noisy(back + (front - back) * contrast * pattern[..., None], draw, 40)


def distances(u: np.ndarray, v: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Distances to the nearest and the second nearest of random points, [2, SIDE, SIDE]; about one in a unit square."""
    low, high = np.array([u.min(), v.min()]) - 1, np.array([u.max(), v.max()]) + 1
    points = draw.uniform(low, high, (int(np.prod(high - low)), 2))
    all_distances = np.hypot(u[..., None] - points[:, 0], v[..., None] - points[:, 1])
    return np.moveaxis(np.partition(all_distances, 1, axis=-1)[..., :2], -1, 0)


def clouds(draw: np.random.Generator, exponent: float) -> np.ndarray:
    """Noise whose amplitude falls as frequency ** -exponent, [SIDE, SIDE]."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE))
    frequency[0, 0] = np.inf
    spectrum = np.fft.fft2(draw.normal(size=(SIDE, SIDE))) * frequency**-exponent
    field = np.fft.ifft2(spectrum).real
    return ((field - field.mean()) / field.std()).clip(-2.5, 2.5)


PATTERNS = ("stripes", "waves", "wood", "checks", "bricks", "grid of dots", "random dots", "cracks", "grains", "clouds")


def drawn(pattern: str, u: np.ndarray, v: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Values [SIDE, SIDE] of a pattern at the places u, v, which are in units of its scale, turned and shifted."""
    match pattern:
        case "stripes":
            return np.sin(2 * np.pi * u) > 0
        case "waves":
            return np.sin(2 * np.pi * (u + 0.2 * np.sin(np.pi * v))) > 0
        case "wood":
            return np.sin(2 * np.pi * (u + 0.5 * clouds(draw, 1.8)))
        case "checks":
            return (np.floor(u) + np.floor(v)) % 2
        case "bricks":
            return (u % 1 < 0.15) | ((v / 2 + np.floor(u) / 2) % 1 < 0.08)
        case "grid of dots":
            return np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.3
        case "random dots":
            return distances(u, v, draw)[0] < 0.3
        case "cracks":
            nearest, second = distances(u, v, draw)
            return second - nearest < 0.1
        case "grains":
            return distances(u, v, draw)[0]
    return clouds(draw, draw.uniform(0.8, 1.4))


def photos() -> Iterator[Example]:
    """A crop of each of the 16 x 12 tiles of each photograph; the class is the half that the tile lies in."""
    draw = np.random.default_rng(5)
    pictures = {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    pictures["portrait"] = Image.open(MATPLOTLIB / "sample_data" / "grace_hopper.jpg").convert("RGB")
    for (name, picture), x, y in product(pictures.items(), range(16), range(12)):
        width, height = picture.width / 16, picture.height / 12
        side = draw.uniform(0.7, 1) * min(width, height)
        left, top = (x * width + draw.uniform(0, width - side), y * height + draw.uniform(0, height - side))
        crop = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        half = f"{name}, {'upper' if y < 6 else 'lower'} half"
        yield SPLITS[(x + y) % 2], half, noisy(np.asarray(crop) * draw.uniform(0.6, 1.2), draw, 10)


SETS: dict[str, Callable[[], Iterator[Example]]] = {
    "digits": digits,
    "letters": letters,
    "fonts": fonts,
    "symbols": symbols,
    "textures": textures,
    "photos": photos,
}


def write(name: str, folder: Path) -> Path:
    """Write a set as FOLDER/NAME/SPLIT/CLASS/NUMBER.png, which data=image_folder reads. Returns FOLDER/NAME."""
    for number, (split, label, image) in enumerate(SETS[name]()):
        place = folder / name / split / label
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number}.png")
    return folder / name
