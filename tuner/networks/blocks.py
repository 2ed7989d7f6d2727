"""The parts around a network's cut: preprocessing, trained blocks, pooling."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Preprocess(nn.Module):
    """uint8 [B, 1 or 3, H, W] -> [B, 3, size, size] in `dtype`, resized and then normalised by mean and std.

    The resize is bilinear with antialiasing, in float32, and ignores the aspect ratio.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype):
        super().__init__()
        self.size, self.dtype = size, dtype
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 1 or 3, H, W] -> `dtype` [B, 3, size, size], in channels-last layout."""
        x = images.float() / 255
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        x = (x - self.mean) / self.std  # one channel becomes three by broadcasting
        return x.to(self.dtype, memory_format=torch.channels_last)


class Pool(nn.Module):
    """A block's output -> [B, F]. If k is given, maps are averaged to k x k and tokens to one. Then flattened."""

    def __init__(self, k: int | None, channels_last: bool):
        super().__init__()
        self.k, self.channels_last = k, channels_last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W], or [B, H, W, C] if channels_last, or [B, tokens, C], or [B, C] -> [B, F]."""
        if x.ndim == 4:
            x = x.permute(0, 3, 1, 2) if self.channels_last else x
            x = x if self.k is None else average_pool(x, self.k)
        elif x.ndim == 3 and self.k is not None:  # [B, tokens, C]
            x = x.mean(1)
        return x.flatten(1)


class JoinedPools(nn.Module):
    """The outputs of several blocks -> [B, F], joined. Those of each block are normalised on their own.

    As in a head: to mean 0 and variance 1 for each image. Else the block with the largest activations would count most.
    """

    def __init__(self, pools: Sequence[Pool]):
        super().__init__()
        self.pools = nn.ModuleList(pools)

    def forward(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """One tensor a block, each as Pool takes it -> [B, F] in their dtype."""
        features = [pool(x).float() for pool, x in zip(self.pools, outputs, strict=True)]
        return torch.cat([F.layer_norm(x, x.shape[1:]) for x in features], 1).to(outputs[0].dtype)


def average_pool(x: torch.Tensor, k: int) -> torch.Tensor:
    """Average maps [B, C, H, W] to [B, C, k, k] as F.adaptive_avg_pool2d does, but with a deterministic gradient.

    On CUDA the gradient of adaptive pooling is not deterministic: where k does not divide H and W, windows overlap and
    their sums race. Here equal windows use ordinary pooling; unequal windows use two matrix products.
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
    """float32 [k, n]: row i averages window i of the k windows that adaptive pooling forms over n positions."""
    starts = torch.arange(k) * n // k
    stops = -(-(torch.arange(k) + 1) * n // k)  # rounded up
    positions = torch.arange(n)
    inside = (positions >= starts[:, None]) & (positions < stops[:, None])
    return inside / inside.sum(1, keepdim=True)


def _recomputing(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts for a block's first forward pass and for its recomputation."""
    return nullcontext(), _frozen_statistics(block)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norm uses the statistics of the batch, as in training, but does not update its running statistics."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    counts = [(count, count.clone()) for norm in norms if (count := norm.num_batches_tracked) is not None]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # weight of the batch in the running statistics
    try:
        yield
    finally:
        for norm, value in zip(norms, momentum, strict=True):
            norm.momentum = value
        for count, value_before in counts:
            count.copy_(value_before)


class Blocks(nn.Module):
    """The trained blocks: cached maps [B, ...], or uint8 images if nothing is frozen -> features [B, F].

    preprocess: for images, or None.   blocks: from the first to last_block, in channels-last layout.
    recompute: compute the activations again in the backward pass, block by block, instead of keeping them. That takes
        a third more time and much less memory. Chen et al., arXiv:1604.06174.
    """

    def __init__(self, preprocess: Preprocess | None, blocks: Sequence[nn.Module], pool: Pool):
        super().__init__()
        self.preprocess, self.blocks, self.pool = preprocess, nn.ModuleList(blocks), pool
        self.recompute = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Cached maps [B, C, H, W] or [B, tokens, C], or uint8 images [B, 1 or 3, H, W] -> features [B, F]."""
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
        """Weights and buffers by their names in the whole network; not copies."""
        return {name: tensor for block in self.blocks for name, tensor in block.state_dict().items()}
