"""What a run is made of, from its config: the images, the network cut in two, its features, and a plan for the head."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tuner.backbones import Backbone
from tuner.data import Data
from tuner.features import resident
from tuner.fit import Fitted, Metrics, OnEpoch, Plan, Schedule, fit, predict, score
from tuner.heads import Classifier, Head, Stack, widths
from tuner.settings import build, cache_dir, called, choose_device, choose_precision

log = logging.getLogger("tuner.parts")


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
    del network["model"]["head"]
    key = repr(network)
    if shared and key in _known:
        return _known[key]
    _latest.clear()
    device = choose_device(cfg.device)
    precision = choose_precision(cfg.precision, device)
    made = Parts(device, precision, backbone(cfg), build("data", cfg), cache_dir(cfg))
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


def hidden(cfg: DictConfig, seed: int) -> Head:
    """The head as the config has it."""
    head: dict[str, Any] = OmegaConf.to_container(cfg.model.head, resolve=True)  # type: ignore[assignment]
    return Head(widths(head["width"], head["depth"]), head["dropout"], seed)


def plan(cfg: DictConfig, seed: int, on_epoch: OnEpoch, train: torch.Tensor, val: torch.Tensor | None) -> Plan:
    """How the config has its head trained; without `val` for final.epochs."""
    with called("optimizer"):
        optimizer = build("optimizer", cfg)
        optimizer([torch.zeros(1, requires_grad=True)])  # complains here, not where others are trained with it
    with called("scheduler"):
        schedule: Schedule = build("scheduler", cfg)
        schedule(0.0)
    knobs = {key: cfg[key] for key in ("epochs", "batch_size", "label_smoothing", "grad_clip", "keep", "patience")}
    if val is None:
        knobs |= {"stop": cfg.final.epochs, "keep": "last", "patience": None}
    return Plan(hidden(cfg, seed), optimizer, schedule, seed, train, val, on_epoch=on_epoch, **knobs)


@dataclass
class Trained:
    """A head, and what was trained below it, with the weights that were kept."""

    model: Classifier
    fitted: Fitted
    batch_size: int

    def score(self, x: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Log-probabilities [len(rows), classes] of these rows of x, on the CPU, and their accuracy."""
        log_p = predict(self.model, x, [rows], batch_size=self.batch_size).cpu()
        return log_p[0], score(log_p, labels[rows])[1][0]


class Trainer:
    """Trains heads on parts: what plans of one key have in common."""

    def __init__(self, parts: Parts):
        self.parts, self.heads_alone = parts, parts.backbone.frozen == parts.backbone.features
        self.size, self.classes = parts.backbone.feature_size, len(parts.data.classes)

    @cached_property
    def trunk(self) -> nn.Module | None:
        """The blocks that are trained below the head; made when it is their turn, and not while others train."""
        trunk = self.parts.backbone.trained_part()
        return trunk.to(self.parts.device) if trunk else None

    def cost(self, head: Head) -> dict[str, float]:
        """`trained_parameters`, and `gmacs`, billions of multiply-adds for an image, of the network with this head."""
        weights = sum(i * o for i, o in pairwise([self.size, *head.widths, self.classes]))
        trained = weights + sum(head.widths) + self.classes
        trained += self.parts.backbone.trained_parameters()
        return {"trained_parameters": trained, "gmacs": round((self.parts.macs + weights) / 1e9, 6)}

    def key(self, plan: Plan) -> Any:
        """Plans with an equal key may be trained together; one with None only alone."""
        if not self.heads_alone or not plan.optimizer.func.__module__.startswith("torch.optim."):
            return None  # blocks are not stacked, and another's optimizer may look at all parameters at once
        labels = self.parts.data.pool.labels.numpy().tobytes()
        return id(self.parts.x), labels, self.classes, self.parts.precision, *plan.kind()

    def __call__(self, plans: Sequence[Plan]) -> list[Fitted]:
        """Train these together; where the device has too little memory for all, one half after the other.

        One that is too large alone, or all those that had begun when memory ran out, have that as their `error`.
        """
        noted = False

        def note(on_epoch: OnEpoch, epoch: int, metrics: Metrics) -> bool | None:
            nonlocal noted
            noted = True  # from here on they can't begin again
            return on_epoch(epoch, metrics)

        try:
            return self._fit([replace(plan, on_epoch=partial(note, plan.on_epoch)) for plan in plans])
        except torch.OutOfMemoryError as error:
            if len(plans) == 1 or noted:
                return [Fitted(error=error.with_traceback(None)) for _ in plans]  # whose frames hold the memory
            half = len(plans) // 2
            log.warning("%d heads are too many at once: %s", len(plans), str(error).splitlines()[0])
        log.warning("training %d, then %d: set hydra.launcher.stack=%d", half, len(plans) - half, half)
        torch.cuda.empty_cache()
        return self(plans[:half]) + self(plans[half:])

    def _fit(self, plans: Sequence[Plan]) -> list[Fitted]:
        made = self.parts
        return fit(
            plans,
            made.x,
            made.data.pool.labels,
            num_classes=self.classes,
            feature_size=self.size,
            device=made.device,
            precision=made.precision,
            trunk=self.trunk,
        )

    def trained(self, plan: Plan, fitted: Fitted) -> Trained:
        """Raises what ended its training: DivergedError where a loss was not finite, or out of memory."""
        if fitted.error:
            raise fitted.error
        stack = Stack(self.size, self.classes, [plan.head], self.parts.device, self.parts.precision)
        model = Classifier(self.trunk, stack)
        model.load_state(0, fitted.state)
        return Trained(model, fitted, plan.batch_size)


def train_all(parts: Parts, plans: Sequence[Plan]) -> list[Trained]:
    """Train several heads of one run: together where that is heads alone, else each with blocks of its own."""
    trainer = Trainer(parts)
    if trainer.heads_alone:
        return [trainer.trained(plan, fitted) for plan, fitted in zip(plans, trainer(plans), strict=True)]
    trainers = [(Trainer(parts), plan) for plan in plans]
    return [trainer.trained(plan, *trainer([plan])) for trainer, plan in trainers]
