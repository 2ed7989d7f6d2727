"""Cuts of a network: what their features are worth on a sample of the training images, and what they cost.

A network runs once over the sample for each image size. Its maps, pooled and normalised, give the features of many
cuts, and ridge regression scores each in closed form. Other images only serve to time the network.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from tuner import InputError
from tuner.bank import features
from tuner.bank.ridge import leave_one_out
from tuner.cache_files import Cache
from tuner.data import Data, Samples
from tuner.device import Batches, repeatable, send, wait
from tuner.networks.backbone import Backbone
from tuner.networks.blocks import JoinedPools, Pool

FEWEST, MOST = 200, 600  # images of a sample
SCREENED = 400  # images of the sample on which a search judges a cut
WARM_UP, TIMED = 4, 32  # images
Grams = Mapping[tuple[str, int | None], torch.Tensor]  # block, pool -> products of features, float32 [N, N]
_speed: dict[tuple[Any, ...], float] = {}  # network, size, device -> multiply-adds per second, as measured


@dataclass(frozen=True)
class Candidate:
    """A way to make features, and what it is worth.

    values: of the keys of `model` that make them.   features: their number.   gmacs: 10^9 multiply-adds for an image.
    accuracy: leave-one-out accuracy of ridge regression on the sample.   error: its standard error.
    loss: mean squared error of the same predictions, which decides between equal accuracies.
    bank_seconds: predicted time for the features of all images.
    chosen: whether it is the one; as_good: whether it is at most one standard error of the difference below the best.
    """

    values: Mapping[str, Any]
    features: int
    gmacs: float
    bank_seconds: float
    accuracy: float = math.nan
    error: float = math.nan
    loss: float = math.nan
    as_good: bool = False
    chosen: bool = False

    @property
    def name(self) -> str:
        """Such as "vgg16 block3+block4, pool 2, 64 px"."""
        block, pool = self.values["last_block"], self.values["pool"]
        blocks, map_size = block if isinstance(block, str) else "+".join(block), f"pool {pool}" if pool else "whole map"
        return f"{self.values['name']} {blocks}, {map_size}, {self.values['image_size']} px"


@dataclass
class Pass:
    """One run of a network over the sample, for the cuts to try at one image size.

    backbone: uses the blocks of all these cuts.   weights: as in the config.   groups: the blocks of each cut.
    """

    backbone: Backbone
    weights: str | None
    groups: Sequence[Sequence[str]]

    @property
    def name(self) -> str:
        """Such as "vgg16 at 64 px"."""
        return f"{self.backbone.name} at {self.backbone.image_size} px"

    @cached_property
    def macs(self) -> int:
        """Multiply-adds for an image."""
        return self.backbone.macs(self.backbone.frozen)

    def seconds_per_image(self, images: torch.Tensor, device: torch.device, dtype: torch.dtype) -> float:
        """The time of the network, after a warm-up. Raises InputError if its weights can't be read."""
        network = self._network(device, dtype)
        with torch.inference_mode(), repeatable(device):
            network(send(images[:WARM_UP], device))
            wait(device)
            start = time.perf_counter()
            network(send(images, device))
            wait(device)
        return (time.perf_counter() - start) / len(images)

    def grams(
        self,
        images: torch.Tensor,
        pools: Sequence[int | None],
        *,
        most: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[Grams, float]:
        """For each block and pool with at most `most` features: the products of the normalised features of each pair.

        Also the seconds that the network took for an image.
        """
        network, blocks = self._network(device, dtype), self.backbone.used
        ways = [(block, k) for block in blocks for k in pools if 0 < self.size(block, k) <= most]
        took = 0.0

        @torch.inference_mode()
        def run(batch: torch.Tensor) -> list[torch.Tensor]:
            nonlocal took
            with repeatable(device):
                sent = send(batch, device)
                wait(device)
                start = time.perf_counter()
                maps = network(sent)
                wait(device)
                took += time.perf_counter() - start
                outputs = dict(zip(blocks, maps if isinstance(maps, tuple) else (maps,), strict=True))
                pooled = [Pool(k, self.backbone.blocks[block].channels_last)(outputs[block]) for block, k in ways]
                return [F.layer_norm(x.float(), x.shape[1:]).cpu() for x in pooled]

        batches = list(Batches(self.backbone.batch_size(device), device)(run, images))
        grams = {}
        for way, parts in zip(ways, zip(*batches, strict=True), strict=True):
            x = torch.cat(parts)
            grams[way] = x @ x.T
        return grams, took / len(images)

    def candidates(self, grams: Grams, *, most: float, all_seconds: float) -> Iterator[tuple[Candidate, torch.Tensor]]:
        """The cuts with at most `most` features, not scored yet, and their products: those of joined blocks are a sum.

        all_seconds: of this pass over all images.
        """
        for blocks in self.groups:
            for k in dict.fromkeys(k for _, k in grams):
                if not all((block, k) in grams for block in blocks):
                    continue
                size = sum(self.backbone.size_of(block, k) for block in blocks)
                if size > most:
                    continue
                macs = self.backbone.macs(blocks[-1])
                values = {
                    "name": self.backbone.name,
                    "weights": self.weights,
                    "image_size": self.backbone.image_size,
                    "last_block": blocks[0] if len(blocks) == 1 else list(blocks),
                    "pool": k,
                }
                bank_seconds = round(all_seconds * macs / self.macs, 1)
                gram = torch.stack([grams[block, k] for block in blocks]).sum(0)
                yield Candidate(values, size, gmacs=round(macs / 1e9, 4), bank_seconds=bank_seconds), gram

    def _network(self, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Images -> the maps of the blocks in use, not pooled: a tuple, or one tensor."""
        parts = self.backbone.frozen_part(dtype)
        return torch.nn.Sequential(*(part for part in parts if not isinstance(part, Pool | JoinedPools))).to(device)

    def size(self, block: str, pool: int | None) -> int:
        """The number of features of a block; 0 if its map is smaller than the pool."""
        try:
            return self.backbone.size_of(block, pool)
        except InputError:
            return 0


def sample(data: Data, count: int, seed: int) -> torch.Tensor:
    """Row numbers of training images, int64: a share of each class, without copies.

    count: how many are wanted; there are FEWEST to MOST, with many classes up to twice as many.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = data.train[torch.randperm(len(data.train), generator=generator)]
    _, digest = data.pool.digests[rows].unique(return_inverse=True)
    first = torch.full((int(digest.max()) + 1,), len(rows)).scatter_reduce(0, digest, torch.arange(len(rows)), "amin")
    rows = rows[first.sort().values]
    share = min(1.0, max(min(MOST, max(FEWEST, count)), min(4 * len(data.classes), 2 * MOST)) / len(rows))
    labels = data.pool.labels[rows]
    parts = [rows[labels == label] for label in labels.unique()]
    return torch.cat([part[: math.ceil(share * len(part))] for part in parts]).sort().values


def score(
    backbone: Backbone, data: Data, *, seed: int, cache: Cache, device: torch.device, dtype: torch.dtype
) -> float:
    """The leave-one-out accuracy of ridge regression on a sample of the training images, for one cut."""
    samples = data.pool.rows(sample(data, SCREENED, seed))
    x = features.bank(samples.images, backbone, cache=cache, device=device, dtype=dtype).float().flatten(1)
    x = F.layer_norm(x, x.shape[1:])
    predicted, _ = leave_one_out(x @ x.T, samples.labels, len(data.classes))
    return float((predicted == samples.labels).double().mean())


def predicted_seconds(
    backbone: Backbone, pool: Samples, *, cache: Cache, device: torch.device, dtype: torch.dtype, views: int = 1
) -> float:
    """The time for the features of training and validation images up to model.frozen; 0 if they are cached.

    views: of each image. Whether those of several are cached is not looked up.
    """
    if views == 1 and features.is_cached(pool, backbone, cache=cache, device=device, dtype=dtype):
        return 0.0
    name = (backbone.name, backbone.weights.key, backbone.image_size, device, dtype)
    if name not in _speed:
        one = Pass(backbone, None, [backbone.used])
        _speed[name] = one.macs / one.seconds_per_image(pool.images[:TIMED], device, dtype)
    return views * len(pool) * backbone.macs(backbone.frozen) / _speed[name]
