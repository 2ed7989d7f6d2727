"""Augmentation of batches on their device: flip, crop, RandAugment and random erasing; mixup and cutmix.

Random numbers are drawn separately for each image, without a loop over images. They come from torch's global CPU
generator for every device, so a checkpoint that restores its state repeats them.

Why not torchvision.transforms.v2: its transforms draw once per call, so a batch of 128 copies of an image has 1 result
of RandAugment, here 22; one call per image takes 2.3 times the CPU time (128 images of 3 x 64 x 64, one thread). Its
MixUp fails on uint8 images, and MixUp and CutMix give one-hot labels, while the training loss takes class indices.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from tuner.rules import PROBABILITY, Rule, check_fields, number, whole

CHUNK = 64  # images that views() augments at once; another value gives other views
MOST = 30  # largest magnitude, as in torchvision
ERASED = (0.02, 0.33)  # share of the area that the erased box takes, as in torchvision
ASPECT = (0.3, 3.3)  # its height divided by its width

_affine = partial(functional.affine, angle=0.0, scale=1.0, interpolation=InterpolationMode.BILINEAR)
# RandAugment's operations with torchvision's ranges. The strength s is magnitude / 30, with a random sign for those in
# SIGNED. Pixels from outside the image are black. `Color` does not change an image of one channel.
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
    "Identity": lambda x, _s: x,
    "Posterize": lambda x, s: functional.posterize(x, round(8 - 4 * s)),
    "Solarize": lambda x, s: functional.solarize(x, 255 * (1 - s)),
    "AutoContrast": lambda x, _s: functional.autocontrast(x),
    "Equalize": lambda x, _s: functional.equalize(x),
}
OPERATIONS = [*SIGNED.values(), *UNSIGNED.values()]


SHARE = number(lambda v: 0 <= v <= 0.5, "a share of the image's side, 0 to 0.5")
OPERATION_COUNT = Rule(whole(0, 100).holds, "a whole number of operations, 0 to 100")
MAGNITUDE = Rule(lambda v: whole(0).holds(v) and v <= MOST, f"a whole number, 0 to {MOST}")
ALPHA = number(lambda v: v == 0 or 0.001 <= v <= 1000, "a number from 0.001 to 1000, or 0, which is off")


@dataclass(frozen=True)
class Augment:
    """How training images are augmented; by default not at all. The repr is complete, so it can serve as a cache key.

    flip: probability of a left-right flip.
    crop: reflection padding on each side, as a share of the side, before a crop of the original size.
    randaugment: operations per image; 0 is off.   magnitude: their strength, 0 to 30. Cubuk et al., arXiv:1909.13719.
    erase: probability that a box is filled with noise. Zhong et al., arXiv:1708.04896.
    mixup, cutmix: alpha of Beta(alpha, alpha), which gives the weight of the other image; 0 is off. If both are on, one
        is drawn for each batch. Zhang et al., arXiv:1710.09412; Yun et al., arXiv:1905.04899.
    Raises InputError for a value out of range.
    """

    flip: Annotated[float, PROBABILITY] = 0.0
    crop: Annotated[float, SHARE] = 0.0
    randaugment: Annotated[int, OPERATION_COUNT] = 0
    magnitude: Annotated[int, MAGNITUDE] = 9
    erase: Annotated[float, PROBABILITY] = 0.0
    mixup: Annotated[float, ALPHA] = 0.0
    cutmix: Annotated[float, ALPHA] = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "augment.")

    @property
    def changes_images(self) -> bool:
        """Whether `images` changes images: flip, crop, randaugment or erase is on."""
        return bool(self.flip or self.crop or self.randaugment or self.erase)

    @property
    def mixes(self) -> bool:
        """Whether `mix` changes batches: mixup or cutmix is on."""
        return bool(self.mixup or self.cutmix)

    def images(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 1 or 3, H, W] -> augmented images of the same shape and type. x is not modified."""
        if self.flip or self.crop:
            x = _shift_and_flip(x, self.crop, self.flip)
        if self.randaugment:
            x = _randaugment(x, self.randaugment, self.magnitude / MOST)
        return _erase(x, self.erase) if self.erase else x

    def mix(self, x: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Mix each image with another one of the batch: (mixed images, targets of the others, lam).

        x: [B, C, H, W], uint8 or floating point; the result has the same type and memory format.   targets: [B].
        lam: one for the batch. The loss is lam * CE(targets) + (1 - lam) * CE(targets of the others).
        """
        if not self.mixes or len(x) == 0:
            return x, targets, 1.0
        use_cutmix = bool(self.cutmix) and (not self.mixup or torch.rand(()).item() < 0.5)
        alpha = self.cutmix if use_cutmix else self.mixup
        lam = torch.distributions.Beta(alpha, alpha).sample().item()
        order = torch.randperm(len(x))
        others, other_targets = x[order.to(x.device)], targets[order.to(targets.device)]
        mixed, lam = _cutmix(x, others, lam) if use_cutmix else (_mixup(x, others, lam), lam)
        return mixed, other_targets, lam


def _draw(b: int, least: float, most: float) -> torch.Tensor:
    return torch.empty(b).uniform_(least, most)


def _shift_and_flip(x: torch.Tensor, crop: float, flip: float) -> torch.Tensor:
    """Shift each image by up to the padding, with reflection at the edges, and flip it with a probability."""
    b, _, h, w = x.shape
    rows = _reflected(h, _shifts(b, round(crop * h)))
    columns = _reflected(w, _shifts(b, round(crop * w)))
    columns = torch.where(torch.rand(b, 1) < flip, columns.flip(1), columns)
    image = torch.arange(b, device=x.device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[
        image, rows.to(x.device)[:, :, None], columns.to(x.device)[:, None, :]
    ]  # [B, H, W, C]
    return moved.permute(0, 3, 1, 2)


def _shifts(b: int, padding: int) -> torch.Tensor:
    return torch.randint(-padding, padding + 1, (b, 1))


def _reflected(n: int, shifts: torch.Tensor) -> torch.Tensor:
    """Source indices [B, n] of a row of n pixels for each shift [B, 1], reflected at 0 and n - 1."""
    indices = (torch.arange(n) + shifts).abs()
    return n - 1 - (n - 1 - indices).abs()


def _randaugment(x: torch.Tensor, n: int, strength: float) -> torch.Tensor:
    """n operations per image. Images that drew the same operation are processed together.

    One magnitude applies to all images, so there are 23 operations, counted with their signs: at most 23 calls per
    round and batch.
    """
    x = x.clone()
    for _ in range(n):
        operations = torch.randint(len(OPERATIONS), (len(x),))
        negative = (torch.rand(len(x)) < 0.5) & (operations < len(SIGNED))
        codes = 2 * operations + negative
        for code in codes.unique().tolist():
            images = (codes == code).nonzero().flatten().to(x.device)
            x[images] = OPERATIONS[code // 2](x[images], -strength if code % 2 else strength)
    return x


def _erase(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Fill a box with noise, in each image with this probability. A box longer than the image is cut off."""
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
    """Intervals of these lengths [B] at random positions in 0..n-1: bool [B, n]."""
    lengths = lengths.round().clamp(1, n)
    starts = (torch.rand(len(lengths)) * (n - lengths + 1)).floor()[:, None]
    positions = torch.arange(n)
    return (positions >= starts) & (positions < starts + lengths[:, None])


def _mixup(x: torch.Tensor, others: torch.Tensor, lam: float) -> torch.Tensor:
    mixed = torch.lerp(others.float(), x.float(), lam)
    return (mixed if x.is_floating_point() else mixed.round()).to(x.dtype)


def _cutmix(x: torch.Tensor, others: torch.Tensor, lam: float) -> tuple[torch.Tensor, float]:
    """Copy a box with 1 - lam of the area, around a random point. Returns lam for the part inside the image."""
    sides = []
    for n in x.shape[-2:]:
        half, centre = int(n * math.sqrt(1 - lam)) / 2, int(torch.randint(n, ()))
        sides.append(slice(max(0, math.floor(centre - half)), min(n, math.floor(centre + half))))
    x = x.clone()
    x[..., sides[0], sides[1]] = others[..., sides[0], sides[1]]
    box = math.prod(side.stop - side.start for side in sides)
    return x, 1 - box / math.prod(x.shape[-2:])


def views(images: torch.Tensor, augment: Augment, n: int, seed: int) -> Iterator[torch.Tensor]:
    """Each image and n - 1 augmented views of it: batches uint8 [B * n, C, H, W]; row i * n + v is view v of image i.

    View 0 is the image itself. View 1 is its mirror image if `augment` flips. Views depend only on images, augment and
    seed: another n adds or drops views but does not change them, and torch's generator is neither used nor changed.
    """
    for i, chunk in enumerate(images.split(CHUNK)):
        yield torch.stack([chunk, *(_view(chunk, augment, (seed, v, i)) for v in range(1, n))], 1).flatten(0, 1)


def _view(chunk: torch.Tensor, augment: Augment, key: tuple[int, int, int]) -> torch.Tensor:
    """One view of up to CHUNK images. key: (seed, number of the view, number of the chunk)."""
    if key[1] == 1 and augment.flip:
        return chunk.flip(-1)
    with torch.random.fork_rng(devices=[]):  # not in views(): the fork must end before its yield
        torch.default_generator.manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))
        return augment.images(chunk)
