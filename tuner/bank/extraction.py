"""Extraction: the frozen part of a network, run over images."""

from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from tuner.device import Batches, fetch, is_cpu, repeatable, send
from tuner.networks.backbone import Backbone


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

    views: n of each image, to take instead.
    """
    network = backbone.frozen_part(dtype).to(device)
    in_batches = Batches(backbone.batch_size(device), device)

    @torch.inference_mode()  # not around the yield: it would stay on in a caller that stops midway
    def start(batch: torch.Tensor) -> tuple[int, Callable[[], torch.Tensor]]:
        with repeatable(device):
            return len(batch), fetch(network(send(batch, device)))

    bar = tqdm(total=len(images) * n, desc=f"{backbone.name} features", unit="image", disable=None)
    under_way: list[Callable[[], torch.Tensor]] = []
    with bar:
        for count, features in (batch for some in views or [images] for batch in in_batches(start, some)):
            under_way.append(features)
            if is_cpu(device) or len(under_way) == 2:  # a GPU is at the next batch while one is written
                yield under_way.pop(0)()
            bar.update(count)
        for features in under_way:
            yield features()
