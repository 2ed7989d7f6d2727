"""An image as a small PNG, for a web page."""

import io
from typing import TYPE_CHECKING

import matplotlib.image

if TYPE_CHECKING:
    import torch  # takes seconds to import, and most figures don't need it

SIDE = 128  # pixels


def thumbnail(image: "torch.Tensor") -> bytes:
    """uint8 [C, H, W] as a PNG; the longer side has at most SIDE pixels."""
    import torch
    import torch.nn.functional as F

    longest = max(image.shape[1:])
    if longest > SIDE:
        size = [max(1, round(side * SIDE / longest)) for side in image.shape[1:]]
        image = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0].round().to(torch.uint8)
    file = io.BytesIO()
    matplotlib.image.imsave(file, image.expand(3, -1, -1).permute(1, 2, 0).numpy(), format="png")
    return file.getvalue()
