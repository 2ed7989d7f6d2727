"""What a run trains on, from its config: the device, the images, the cut network and its features."""

import copy
import dataclasses
import logging
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from weakref import WeakValueDictionary

import torch

from tuner import InputError
from tuner.bank.features import bank_on_device, to_device_if_it_fits
from tuner.cache_files import Cache
from tuner.config import ModelConfig, RunConfig, argument_errors
from tuner.data import Data, Samples, exclusion, summary
from tuner.data.augmentation import Augment
from tuner.device import choose_device, choose_precision
from tuner.networks.backbone import Backbone
from tuner.networks.blocks import Preprocess
from tuner.training.heads import Head
from tuner.training.model_choice import SIZES, Choice, applied, check_fixed, choose, chosen_values, is_auto, with_size

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Setup:
    """The images and the network's input to what is trained: `x` of the pool, `x_test` of the test images, [N, ...].

    If nothing is frozen, both are the uint8 images. Otherwise they are features, computed once and then read from the
    bank, with `views` and `test_views` of each image in neighbouring rows.
    """

    device: torch.device
    precision: torch.dtype
    backbone: Backbone
    data: Data
    cache: Cache
    augment: Augment
    views: int
    test_views: int
    choice: Choice | None = None  # if the config leaves the network, its cut or its input size to us

    @cached_property
    def x(self) -> torch.Tensor:
        """Inputs of the pool: uint8 images [N, C, H, W], or features [N * views, ...]; computed on first access."""
        return self._inputs(self.data.pool, self.views)

    @cached_property
    def x_test(self) -> torch.Tensor:
        """Inputs of the test images, likewise, with `test_views` of each image."""
        return self._inputs(self.data.test, self.test_views)

    @cached_property
    def macs(self) -> int:
        """Multiply-adds of the network for one image."""
        return self.backbone.macs()

    @property
    def trains_heads_alone(self) -> bool:
        """Whether all blocks are frozen, so only the head is trained."""
        return self.backbone.frozen == self.backbone.last_block

    def cost(self, head: Head) -> dict[str, float]:
        """`trained_parameters`, and `gmacs`: billions of multiply-adds for one image, network and head together."""
        classes = len(self.data.classes)
        weights = sum(i * o for i, o in pairwise([self.backbone.feature_size, *head.widths, classes]))
        trained = weights + sum(head.widths) + classes + self.backbone.trained_parameters()
        return {"trained_parameters": trained, "gmacs": round((self.macs + weights) / 1e9, 6)}

    def fed(self, rows: torch.Tensor, *, augmented: bool) -> torch.Tensor:
        """Images of the pool as the network gets them, but not normalised: uint8 [N, 3, size, size], on the CPU.

        augmented: as in training, though without mixup and cutmix.
        """
        images = self.data.pool.images[rows]
        if augmented:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                images = self.augment.images(images)
        resize = Preprocess(self.backbone.image_size, [0.0] * 3, [1.0] * 3, torch.float32)
        return (resize(images).expand(-1, 3, -1, -1) * 255).round().to(torch.uint8)

    def frozen_whole(self) -> "Setup":
        """The same with all blocks frozen."""
        backbone = copy.copy(self.backbone)
        backbone.frozen = backbone.last_block
        return replace(self, backbone=backbone)

    def _inputs(self, samples: Samples, views: int) -> torch.Tensor:
        if self.backbone.frozen is None:
            return to_device_if_it_fits(samples.images, self.device)
        return bank_on_device(
            samples.images,
            self.backbone,
            cache=self.cache,
            device=self.device,
            dtype=self.precision,
            augment=self.augment,
            views=views,
            digests=samples.digests,
        )


# Runs of a sweep in this process share a setup, with its images and features. The latest is kept for the next run.
_in_use: WeakValueDictionary[str, Setup] = WeakValueDictionary()
_latest: list[Setup] = []


def setup_of(config: RunConfig, *, shared: bool) -> Setup:
    """Choose the device, load and split the images, find and cut the network. The features are computed when read.

    shared: runs of this process whose configs agree in all of that share one setup.
    Raises InputError if something cannot be used.
    """
    key = _key(config)
    if shared and key in _in_use:
        return _in_use[key]
    _latest.clear()
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    augment, views, choice = config.augment.build(), (config.data.views, config.data.test_views), None
    if not is_auto(config.model):  # mistakes are reported before the images are read
        backbone = backbone_of(config)
        _check_views(augment, *views, backbone)
    else:
        check_fixed(config.model)
    first = config.data
    if is_auto(config.model):
        first = with_size(config, SIZES[0]).data
        if first != config.data:  # a list of images to leave out knows them at another size
            first = replace(first, exclude=None)
            if config.data.exclude:
                log.info("model: data.exclude applies after the choice, as its list knows the images at another size")
    data = exclusion.load(first)
    for line in summary.lines(data, config.data.folds):
        log.info("%s", line)
    if is_auto(config.model):
        choice = choose(
            config.model,
            data,
            seed=config.seed,
            cache=config.cache,
            device=device,
            dtype=precision,
            sized=first != config.data,
        )
        config = applied(config, chosen_values(config.model, choice))
        if config.data != first:
            data = exclusion.load(config.data)
        backbone = backbone_of(config)
        _check_views(augment, *views, backbone)
    setup = Setup(device, precision, backbone, data, config.cache, augment, *views, choice)
    if shared:
        _in_use[key] = _in_use[_key(config)] = setup  # with what was chosen in place of auto, too
        _latest.append(setup)
    return setup


def _key(config: RunConfig) -> str:
    """What a setup depends on."""
    model = replace(config.model, head=ModelConfig.head)
    return repr((model, config.data, config.augment, config.seed, config.device, config.precision, config.cache))


def backbone_of(config: RunConfig) -> Backbone:
    """The cut network. Its weights are located but not read."""
    model = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(config.model)}
    del model["head"], model["budget"], model["screen"]
    with argument_errors("model"):
        return Backbone(**model, seed=config.seed)


def _check_views(augment: Augment, views: int, test_views: int, backbone: Backbone) -> None:
    """Raises InputError for options that contradict each other or would have no effect."""
    changes, cached = augment.changes_images, backbone.frozen is not None
    rules = [
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
            f"data.views={views} would be identical: choose an augmentation, such as augment=light",
        ),
        (
            views > 1 and not cached,
            f"data.views={views} is for cached features; leave it at 1 with model.frozen=null",
        ),
        (test_views > 1 and not augment.flip, f"data.test_views={test_views} adds mirror images: set augment.flip"),
        (
            test_views > 1 and cached and views == 1,
            f"data.test_views={test_views} needs data.views of at least {test_views}",
        ),
    ]
    for broken, message in rules:
        if broken:
            raise InputError(message)
