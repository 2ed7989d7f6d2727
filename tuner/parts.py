"""What a run is made of, from its config: the images, the network cut in two, and its features."""

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from omegaconf import DictConfig, OmegaConf

from tuner.backbones import Backbone
from tuner.data import Data
from tuner.features import resident
from tuner.plan import Augment
from tuner.settings import build, cache_dir, called, choose_device, choose_precision


@dataclass(eq=False)
class Parts:
    """The images, and what the network makes of them: `x` of the pool, `x_test` of the test images, [N, ...].

    Where nothing is frozen both are the uint8 images themselves, else features, computed once and then read from files.
    """

    device: torch.device
    precision: torch.dtype
    backbone: Backbone
    data: Data
    cache: Path
    augment: Augment | None = None
    views: int = 1
    test_views: int = 1

    @cached_property
    def macs(self) -> int:
        """Multiply-adds of the network, for one image."""
        return self.backbone.macs()

    @cached_property
    def x(self) -> torch.Tensor:
        return self._inputs(self.data.pool.images)

    @cached_property
    def x_test(self) -> torch.Tensor:
        return self._inputs(self.data.test.images)

    def head_alone(self) -> "Parts":
        """The same, where all blocks are frozen."""
        backbone = copy.copy(self.backbone)
        backbone.frozen = backbone.features
        return replace(self, backbone=backbone)

    def _inputs(self, images: torch.Tensor) -> torch.Tensor:
        if self.backbone.frozen is None:
            return images.to(self.device)
        return resident(images, self.backbone, cache_dir=self.cache, device=self.device, dtype=self.precision)


_known: WeakValueDictionary[str, Parts] = WeakValueDictionary()
_latest: list[Parts] = []  # kept although no run needs it: the next one of the sweep will


def parts(cfg: DictConfig, *, shared: bool) -> Parts:
    """Choose the device; find the network and cut it; load the images and split them.

    shared: runs of this process whose configs have these parts in common share them.
    Raises InputError where something can't be had.
    """
    used = OmegaConf.masked_copy(cfg, ["data", "model", "device", "precision", "cache_dir", "seed"])
    network: dict[str, Any] = OmegaConf.to_container(used, resolve=True)  # type: ignore[assignment]
    model = network["model"]
    del model["head"]
    key = repr(network)
    if shared and key in _known:
        return _known[key]
    _latest.clear()
    device = choose_device(cfg.device)
    precision = choose_precision(cfg.precision, device)
    with called("model"):
        backbone = Backbone(**model, seed=cfg.seed)
    made = Parts(device, precision, backbone, build("data", cfg), cache_dir(cfg))
    if shared:
        _known[key] = made
        _latest.append(made)
    return made
