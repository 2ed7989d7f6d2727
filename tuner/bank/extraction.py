"""Feature extraction: running the frozen part of a network over images."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from tqdm import tqdm

from tuner.device import Batches, fetch, has_cudnn, is_cpu, repeatable, send
from tuner.networks.backbone import Backbone
from tuner.networks.fusion import fuse_relus


def network_of(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> nn.Sequential:
    """The frozen part on the device, with the fused operations that it has. Reads the weights."""
    network = backbone.frozen_part(dtype).to(device)
    if has_cudnn(device):
        fuse_relus(network)
    return network


def extract(
    images: torch.Tensor,
    backbone: Backbone,
    *,
    device: torch.device,
    dtype: torch.dtype,
    views: Iterator[torch.Tensor] | None = None,
    n: int = 1,
) -> Iterator[torch.Tensor]:
    """Run the frozen part over uint8 [N, C, H, W], with a progress bar; yields `dtype` [B, ...] on the CPU.

    views: batches of n views per image, to use instead of `images`.
    """
    network = network_of(backbone, device, dtype)
    in_batches = Batches(backbone.batch_size(device), device)

    @torch.inference_mode()  # not around the yield: a caller that stops early would stay in inference mode
    def start(batch: torch.Tensor) -> tuple[int, Callable[[], torch.Tensor]]:
        with repeatable(device):
            return len(batch), fetch(network(send(batch, device)))

    bar = tqdm(total=len(images) * n, desc=f"{backbone.name} features", unit="image", disable=None)
    pending: list[Callable[[], torch.Tensor]] = []
    with bar:
        for count, features in (batch for chunk in views or [images] for batch in in_batches(start, chunk)):
            pending.append(features)
            if is_cpu(device) or len(pending) == 2:  # a GPU computes one batch while another is written
                yield pending.pop(0)()
            bar.update(count)
        for features in pending:
            yield features()
