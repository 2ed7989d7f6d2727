"""Synthetic images for tests: learnable but not trivial, and no file needed."""

import torch

from tuner import InputError
from tuner.data import Data, Samples, hold_out, split
from tuner.rules import NOT_NEGATIVE, Rule, whole

CHANNELS = Rule(lambda value: type(value) is int and value in (1, 3), "1 (gray) or 3 (RGB)")
MOST = 2**25  # values of all images: they are made at once, as float32


def load(
    *,
    n: int = 400,
    classes: int = 4,
    size: int = 16,
    channels: int = 1,
    noise: float = 80.0,
    val_share: float = 0.2,
    test_share: float = 0.2,
    seed: int = 0,
) -> Data:
    """One coarse random pattern per class, with Gaussian noise on every pixel: uint8 [n, channels, size, size].

    noise: standard deviation of the noise, in gray levels (0 to 255). That of the patterns is about 26.
    seed: draws only the validation split; the images and the test split are always the same.
    Raises InputError for a value out of range, and if a class has too few images.
    """
    for name, value in (("n", n), ("classes", classes), ("size", size)):
        whole(1).check(f"data.{name}", value)
    CHANNELS.check("data.channels", channels)
    if n * size**2 * channels > MOST or classes > n:
        values = f"data.n={n} x data.size={size} ^ 2 x data.channels={channels}"
        raise InputError(f"{values} must be at most {MOST:,} values, and data.classes={classes} at most data.n")
    NOT_NEGATIVE.check("data.noise", noise)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    coarse = 64 + 128 * torch.rand(classes, channels, 4, 4, generator=generator)
    patterns = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")  # [classes, C, size, size]
    images = patterns[labels] + noise * torch.randn(n, channels, size, size, generator=generator)
    samples = Samples(images.round().clamp(0, 255).to(torch.uint8), labels)
    names = tuple(f"class{i}" for i in range(classes))
    return split(*hold_out(samples, names, test_share=test_share), names, val_share=val_share, seed=seed)
