"""Augmentation of batches on their device: flip, crop, RandAugment and random erasing; mixup and cutmix.

Each image has draws of its own, and no operation loops over images. All random numbers come from torch's global
generator on the CPU, whatever device the images are on: with its state saved and restored, the same numbers come again.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from tuner import InputError

CHUNK = 64  # images that views() augments at once: part of what the views are
MOST = 30  # of magnitude, as in torchvision
ERASED = (0.02, 0.33)  # share of the area that is erased, and height to width of the box: torchvision's values
ASPECT = (0.3, 3.3)

_affine = partial(functional.affine, angle=0.0, scale=1.0, interpolation=InterpolationMode.BILINEAR)
# RandAugment's operations and their ranges as in torchvision; the strength is magnitude / 30, and of either sign in the
# first nine. What comes in from outside an image is black. `Color` leaves an image of one channel as it is.
Operation = Callable[[torch.Tensor, float], torch.Tensor]
SIGNED: dict[str, Operation] = {
    "ShearX": lambda x, s: _affine(x, translate=[0, 0], shear=[math.degrees(math.atan(0.3 * s)), 0.0], center=[0, 0]),
    "ShearY": lambda x, s: _affine(x, translate=[0, 0], shear=[0.0, math.degrees(math.atan(0.3 * s))], center=[0, 0]),
    "TranslateX": lambda x, s: _affine(x, translate=[int(150 / 331 * s * x.shape[-1]), 0], shear=[0.0, 0.0]),
    "TranslateY": lambda x, s: _affine(x, translate=[0, int(150 / 331 * s * x.shape[-2])], shear=[0.0, 0.0]),
    "Rotate": lambda x, s: functional.rotate(x, 30 * s, InterpolationMode.BILINEAR),
    "Brightness": lambda x, s: functional.adjust_brightness(x, 1 + 0.9 * s),
    "Color": lambda x, s: functional.adjust_saturation(x, 1 + 0.9 * s),
    "Contrast": lambda x, s: functional.adjust_contrast(x, 1 + 0.9 * s),
    "Sharpness": lambda x, s: functional.adjust_sharpness(x, 1 + 0.9 * s),
}
UNSIGNED: dict[str, Operation] = {
    "Identity": lambda x, s: x,
    "Posterize": lambda x, s: functional.posterize(x, round(8 - 4 * s)),
    "Solarize": lambda x, s: functional.solarize(x, 255 * (1 - s)),
    "AutoContrast": lambda x, s: functional.autocontrast(x),
    "Equalize": lambda x, s: functional.equalize(x),
}
OPERATIONS = [*SIGNED.values(), *UNSIGNED.values()]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return type(value) is int


RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("flip", lambda v: _number(v) and 0 <= v <= 1, "a probability, 0 to 1"),
    ("crop", lambda v: _number(v) and 0 <= v <= 0.5, "a share of the image's side, 0 to 0.5"),
    ("erase", lambda v: _number(v) and 0 <= v <= 1, "a probability, 0 to 1"),
    ("randaugment", lambda v: _whole(v) and v >= 0, "a whole number of operations, at least 0"),
    ("magnitude", lambda v: _whole(v) and 0 <= v <= MOST, f"a whole number, 0 to {MOST}"),
    ("mixup", lambda v: _number(v) and v >= 0, "at least 0, which is off"),
    ("cutmix", lambda v: _number(v) and v >= 0, "at least 0, which is off"),
)


@dataclass(frozen=True)
class Augment:
    """What is done to training images; the default is nothing. Equal ones do the same, and their repr says all.

    flip: probability of a left-right mirror.
    crop: padding on each side, by reflection, as a share of the side; from there a box of the old size is cut anywhere.
    randaugment: operations an image, one after another; 0 is off.   magnitude: their strength, 0 to 30.
        Cubuk et al., arXiv:1909.13719.
    erase: probability that a box is filled with noise. Zhong et al., arXiv:1708.04896.
    mixup, cutmix: alpha of Beta(alpha, alpha), from which the share of the other image is drawn; 0 is off. Where both
        are on, a coin chooses for each batch. Zhang et al., arXiv:1710.09412; Yun et al., arXiv:1905.04899.
    Raises InputError for a value out of range.
    """

    flip: float = 0.0
    crop: float = 0.0
    randaugment: int = 0
    magnitude: int = 9
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for key, holds, rule in RULES:
            value = getattr(self, key)
            if not holds(value):
                raise InputError(f"augment.{key}={value} must be {rule}")

    @property
    def changes_images(self) -> bool:
        return bool(self.flip or self.crop or self.randaugment or self.erase)

    @property
    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def images(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 1 or 3, H, W] -> the same, changed by draws of each image's own. x itself is left as it is."""
        if self.flip or self.crop:
            x = _shift_and_flip(x, self.crop, self.flip)
        if self.randaugment:
            x = _randaugment(x, self.randaugment, self.magnitude / MOST)
        return _erase(x, self.erase) if self.erase else x

    def mix(self, x: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Mix each image of a batch with another one of it: (x, other targets, lam), with one lam for the batch.

        x: [B, C, H, W], uint8 or floating; its type and the order of its memory are kept.   targets: [B].
        The loss is lam * CE(targets) + (1 - lam) * CE(other targets).
        """
        if not self.mixes or len(x) == 0:
            return x, targets, 1.0
        cut = bool(self.cutmix) and (not self.mixup or torch.rand(()).item() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        lam = torch.distributions.Beta(alpha, alpha).sample().item()
        order = torch.randperm(len(x))
        others, other_targets = x[order.to(x.device)], targets[order.to(targets.device)]
        mixed, lam = _cutmix(x, others, lam) if cut else (_mixup(x, others, lam), lam)
        return mixed, other_targets, lam


def _draw(b: int, least: float, most: float) -> torch.Tensor:
    return torch.empty(b).uniform_(least, most)


def _shift_and_flip(x: torch.Tensor, crop: float, flip: float) -> torch.Tensor:
    """Each image moved by up to the padding, mirrored where it goes over the edge, and flipped by chance."""
    b, _, h, w = x.shape
    rows = _reflected(h, _shifts(b, round(crop * h)))
    columns = _reflected(w, _shifts(b, round(crop * w)))
    columns = torch.where(torch.rand(b, 1) < flip, columns.flip(1), columns)
    image = torch.arange(b, device=x.device)[:, None, None]
    cut = x.permute(0, 2, 3, 1)[image, rows.to(x.device)[:, :, None], columns.to(x.device)[:, None, :]]  # [B, H, W, C]
    return cut.permute(0, 3, 1, 2)


def _shifts(b: int, padding: int) -> torch.Tensor:
    return torch.randint(-padding, padding + 1, (b, 1))


def _reflected(n: int, shifts: torch.Tensor) -> torch.Tensor:
    """For each shift [B, 1] the n places that are seen [B, n], those outside 0..n-1 mirrored back at the edge."""
    places = (torch.arange(n) + shifts).abs()
    return n - 1 - (n - 1 - places).abs()


def _randaugment(x: torch.Tensor, n: int, strength: float) -> torch.Tensor:
    """n operations an image. Images that drew the same one are changed together.

    torchvision's own RandAugment gives a whole batch the same operations, and is slow image by image. As one magnitude
    holds for all there are but 23 operations with their signs, so that no batch takes more than 23 calls each time.
    """
    x = x.clone()
    for _ in range(n):
        kinds = torch.randint(len(OPERATIONS), (len(x),))
        negative = (torch.rand(len(x)) < 0.5) & (kinds < len(SIGNED))
        drawn = 2 * kinds + negative
        for code in drawn.unique().tolist():
            images = (drawn == code).nonzero().flatten().to(x.device)
            x[images] = OPERATIONS[code // 2](x[images], -strength if code % 2 else strength)
    return x


def _erase(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Fill a box with noise, by chance in each image. A box that would be longer than the image ends with it."""
    h, w = x.shape[-2:]
    chosen = (torch.rand(len(x)) < probability).nonzero().flatten()
    n = len(chosen)
    area = _draw(n, *ERASED) * h * w
    aspect = _draw(n, math.log(ASPECT[0]), math.log(ASPECT[1])).exp()
    inside = _within(h, (area * aspect).sqrt())[:, None, :, None] & _within(w, (area / aspect).sqrt())[:, None, None, :]
    noise = torch.randint(256, (n, *x.shape[1:]), dtype=torch.uint8)
    x, chosen = x.clone(), chosen.to(x.device)
    x[chosen] = torch.where(inside.to(x.device), noise.to(x.device), x[chosen])
    return x


def _within(n: int, lengths: torch.Tensor) -> torch.Tensor:
    """Intervals of these lengths [B], at random places of 0..n-1: bool [B, n]."""
    lengths = lengths.round().clamp(1, n)
    starts = (torch.rand(len(lengths)) * (n - lengths + 1)).floor()[:, None]
    places = torch.arange(n)
    return (places >= starts) & (places < starts + lengths[:, None])


def _mixup(x: torch.Tensor, others: torch.Tensor, lam: float) -> torch.Tensor:
    mixed = torch.lerp(others.float(), x.float(), lam)
    return (mixed if x.is_floating_point() else mixed.round()).to(x.dtype)


def _cutmix(x: torch.Tensor, others: torch.Tensor, lam: float) -> tuple[torch.Tensor, float]:
    """A box of 1 - lam of the area, around a point anywhere, comes from the others; lam is what is left without it."""
    sides = []
    for n in x.shape[-2:]:
        half, centre = int(n * math.sqrt(1 - lam)) / 2, int(torch.randint(n, ()))
        sides.append(slice(max(0, math.floor(centre - half)), min(n, math.floor(centre + half))))
    x = x.clone()
    x[..., sides[0], sides[1]] = others[..., sides[0], sides[1]]
    box = math.prod(side.stop - side.start for side in sides)
    return x, 1 - box / math.prod(x.shape[-2:])


def views(images: torch.Tensor, augment: Augment, n: int, seed: int) -> Iterator[torch.Tensor]:
    """Each image and n - 1 augmented views of it, in uint8 batches of [N * n, C, H, W]; row i * n + v is view v of i.

    View 0 is the image itself and, where images are flipped, view 1 its mirror image. All are the same for whoever asks
    with the same images, augment, n and seed, also with another n; the state of torch's generator neither matters nor
    changes. They are drawn by 64 images at a time.
    """
    for number, chunk in enumerate(images.split(CHUNK)):
        yield torch.stack([chunk, *(_view(chunk, augment, (seed, v, number)) for v in range(1, n))], 1).flatten(0, 1)


def _view(chunk: torch.Tensor, augment: Augment, key: tuple[int, int, int]) -> torch.Tensor:
    """Not around the yield: there the fork would last while the caller draws numbers."""
    if key[1] == 1 and augment.flip:
        return chunk.flip(-1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))
        return augment.images(chunk)
