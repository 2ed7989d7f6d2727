"""What lies around and between a network's cuts: preprocessing, the blocks that are trained, pooling."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Preprocess(nn.Module):
    """uint8 [B, 1 or 3, H, W] -> [B, 3, size, size] in `dtype`: resized, then normalised as the weights expect.

    The resize is bilinear with antialiasing, straight to a square, in float32.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype):
        super().__init__()
        self.size, self.dtype = size, dtype
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float() / 255
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        x = (x - self.mean) / self.std  # one channel becomes three by broadcasting
        return x.to(self.dtype, memory_format=torch.channels_last)


class Pool(nn.Module):
    """A block's output -> [B, F]: where k is given a map is averaged to k x k, tokens to their mean; then flattened."""

    def __init__(self, k: int | None, channels_last: bool):
        super().__init__()
        self.k, self.channels_last = k, channels_last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 4:
            x = x.permute(0, 3, 1, 2) if self.channels_last else x
            x = x if self.k is None else averaged(x, self.k)
        elif x.ndim == 3 and self.k is not None:  # [B, tokens, C]
            x = x.mean(1)
        return x.flatten(1)


def averaged(x: torch.Tensor, k: int) -> torch.Tensor:
    """Average maps [B, C, H, W] to [B, C, k, k] as F.adaptive_avg_pool2d does, but with a deterministic gradient.

    On CUDA the gradient of adaptive pooling is not deterministic: where k does not divide H and W, windows overlap and
    their sums race. Here equal windows use ordinary pooling; others use two matrix products.
    """
    if k == 1 or not x.requires_grad:
        return F.adaptive_avg_pool2d(x, k)
    h, w = x.shape[2:]
    if h % k == 0 and w % k == 0:
        return F.avg_pool2d(x, (h // k, w // k))
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = (_window_means(n, k).to(x.device) for n in (h, w))
        return (rows @ x.float() @ columns.t()).to(x.dtype)


def _window_means(n: int, k: int) -> torch.Tensor:
    """float32 [k, n]: row i takes the mean of the i-th of k windows over n places, as adaptive pooling has them."""
    starts = torch.arange(k) * n // k
    stops = -(-(torch.arange(k) + 1) * n // k)  # rounded up
    places = torch.arange(n)
    inside = (places >= starts[:, None]) & (places < stops[:, None])
    return inside / inside.sum(1, keepdim=True)


def _recomputing(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What a block is in while its activations are computed, and while they are computed again."""
    return nullcontext(), _statistics_left_alone(block)


@contextmanager
def _statistics_left_alone(block: nn.Module) -> Iterator[None]:
    """Batch normalisation goes by its batch, as in training, and does not note its statistics a second time."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    counts = [(count, count.clone()) for norm in norms if (count := norm.num_batches_tracked) is not None]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # of what the batch adds
    try:
        yield
    finally:
        for norm, value in zip(norms, momentum, strict=True):
            norm.momentum = value
        for count, value_before in counts:
            count.copy_(value_before)


class Blocks(nn.Module):
    """The blocks that are trained: cached maps, or uint8 images if nothing is frozen, [B, ...] -> features [B, F].

    preprocess: of images, or None.   blocks: from the first to the last that is used, in channels-last layout.
    recompute: their activations are not kept for the backward pass but computed again, a block at a time, which takes a
        third more time and far less memory. Chen et al., arXiv:1604.06174.
    """

    def __init__(self, preprocess: Preprocess | None, blocks: Sequence[nn.Module], pool: Pool):
        super().__init__()
        self.preprocess, self.blocks, self.pool = preprocess, nn.ModuleList(blocks), pool
        self.recompute = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.preprocess is not None:
            x = self.preprocess(x)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            if self.recompute and self.training:
                x = checkpoint(block, x, use_reentrant=False, context_fn=partial(_recomputing, block))
            else:
                x = block(x)
        return self.pool(x)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and buffers under the names that they have in the whole network; not copies."""
        return {name: tensor for block in self.blocks for name, tensor in block.state_dict().items()}
