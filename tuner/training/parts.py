"""What a run is made of, from its config: the images, the network cut in two, and its features."""

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from omegaconf import DictConfig, OmegaConf

from tuner import InputError
from tuner.bank.features import bank_on_device, to_device_if_it_fits
from tuner.config import build, cache_dir, called
from tuner.data import Data, Samples
from tuner.data.augmentation import Augment
from tuner.device import choose_device, choose_precision
from tuner.networks.backbone import Backbone


@dataclass(eq=False)
class Parts:
    """The images, and what the network makes of them: `x` of the pool, `x_test` of the test images, [N, ...].

    Where nothing is frozen both are the uint8 images themselves, else features, computed once and then read from files;
    of `views` and `test_views` of each image, in neighbouring rows.
    """

    device: torch.device
    precision: torch.dtype
    backbone: Backbone
    data: Data
    cache: Path
    augment: Augment
    views: int
    test_views: int

    @cached_property
    def macs(self) -> int:
        """Multiply-adds of the network, for one image."""
        return self.backbone.macs()

    @cached_property
    def x(self) -> torch.Tensor:
        return self._inputs(self.data.pool, self.views)

    @cached_property
    def x_test(self) -> torch.Tensor:
        return self._inputs(self.data.test, self.test_views)

    def head_alone(self) -> "Parts":
        """The same, where all blocks are frozen."""
        backbone = copy.copy(self.backbone)
        backbone.frozen = backbone.last_block
        return replace(self, backbone=backbone)

    def _inputs(self, samples: Samples, views: int) -> torch.Tensor:
        if self.backbone.frozen is None:
            return to_device_if_it_fits(samples.images, self.device)
        return bank_on_device(
            samples.images,
            self.backbone,
            cache_dir=self.cache,
            device=self.device,
            dtype=self.precision,
            augment=self.augment,
            views=views,
            digests=samples.digests,
        )


_known: WeakValueDictionary[str, Parts] = WeakValueDictionary()
_latest: list[Parts] = []  # kept although no run needs it: the next one of the sweep will


def parts(cfg: DictConfig, *, shared: bool) -> Parts:
    """Choose the device; find the network and cut it; load the images and split them.

    shared: runs of this process whose configs have these parts in common share them.
    Raises InputError where something can't be had.
    """
    used = OmegaConf.masked_copy(cfg, ["data", "augment", "model", "device", "precision", "cache_dir", "seed"])
    network: dict[str, Any] = OmegaConf.to_container(used, resolve=True)  # type: ignore[assignment]
    del network["model"]["head"]
    key = repr(network)
    if shared and key in _known:
        return _known[key]
    _latest.clear()
    device = choose_device(cfg.device)
    precision = choose_precision(cfg.precision, device)
    network_cut = backbone(cfg)
    augment = build("augment", cfg)
    _check_views(augment, cfg.data.views, cfg.data.test_views, network_cut)
    data = build("data", cfg)
    made = Parts(device, precision, network_cut, data, cache_dir(cfg), augment, cfg.data.views, cfg.data.test_views)
    if shared:
        _known[key] = made
        _latest.append(made)
    return made


def backbone(cfg: DictConfig) -> Backbone:
    """The network as the config has it, cut; its weights are found, and not read."""
    model: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore[assignment]
    del model["head"]
    with called("model"):
        return Backbone(**model, seed=cfg.seed)


def _check_views(augment: Augment, views: int, test_views: int, backbone: Backbone) -> None:
    """Raises InputError where what is asked for would have no effect, or can't be had."""
    changes, cached = augment.changes_images, backbone.frozen is not None
    wrong = [
        (
            cached and augment.mixes,
            "augment.mixup and cutmix need model.frozen=null: features can't be mixed",
        ),
        (
            cached and changes and views == 1,
            "augment would have no effect on cached features: set data.views above 1, or model.frozen=null",
        ),
        (
            views > 1 and not changes,
            f"data.views={views} would be equal: choose how they differ, as augment=light",
        ),
        (
            views > 1 and not cached,
            f"data.views={views} is of a cache; with model.frozen=null leave it at 1",
        ),
        (test_views > 1 and not augment.flip, f"data.test_views={test_views} adds mirror images: set augment.flip"),
        (
            test_views > 1 and cached and views == 1,
            f"data.test_views={test_views} needs data.views as large",
        ),
    ]
    for is_so, message in wrong:
        if is_so:
            raise InputError(message)
