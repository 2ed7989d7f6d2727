"""Heads, and blocks below them, trained on the parts of a run: together where they can be."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch

from tuner.device import is_out_of_memory, release_memory
from tuner.networks.blocks import Blocks
from tuner.training.fit import fit, predict, score
from tuner.training.heads import Classifier, Head, Stack
from tuner.training.parts import Parts
from tuner.training.spec import Fitted, Metrics, OnEpoch, Plan

log = logging.getLogger("tuner.training.trainer")


@dataclass
class Trained:
    """A head, and what was trained below it, with the weights that were kept. It looks at `views` of each image.

    images: whether it takes images, not features.
    """

    model: Classifier
    fitted: Fitted
    batch_size: int
    views: int
    images: bool

    def score(self, x: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Log-probabilities [len(rows), classes] of these rows of x, on the CPU, and their accuracy."""
        cached = len(x) // len(labels)
        seen = [
            predict(self.model, x, [rows], batch_size=self.batch_size, mirrored=bool(v))
            if self.images
            else predict(self.model, x, [rows * cached + v], batch_size=self.batch_size)
            for v in range(self.views)
        ]
        log_p = torch.stack(seen).logsumexp(0).cpu() - math.log(self.views)  # of the mean probability
        return log_p[0], score(log_p, labels[rows])["accuracy"][0]


class Trainer:
    """Trains heads on parts: what plans of one key have in common."""

    def __init__(self, parts: Parts):
        self.parts, self.heads_alone = parts, parts.backbone.frozen == parts.backbone.last_block
        self.size, self.classes = parts.backbone.feature_size, len(parts.data.classes)

    @cached_property
    def trunk(self) -> Blocks | None:
        """The blocks that are trained below the head; made when it is their turn, and not while others train."""
        trunk = self.parts.backbone.trained_part()
        return trunk.to(self.parts.device) if trunk else None

    def shapes(self, head: Head) -> dict[str, torch.Size]:
        """Of the tensors of such a head, and of the blocks, by name."""
        stack = Stack(self.size, self.classes, [head], torch.device("meta"))
        return {name: tensor.shape for name, tensor in Classifier(self.trunk, stack).state(0).items()}

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
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(plans) == 1 or noted:
                return [Fitted(error=error.with_traceback(None)) for _ in plans]  # whose frames hold the memory
            half = len(plans) // 2
            log.warning("%d heads are too many at once: %s", len(plans), str(error).splitlines()[0])
        log.warning("training %d, then %d: set hydra.launcher.stack=%d", half, len(plans) - half, half)
        release_memory(self.parts.device)
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
            views=made.views,
        )

    def trained(self, plan: Plan, fitted: Fitted) -> Trained:
        """Raises what ended its training: DivergedError where a loss was not finite, or out of memory."""
        if fitted.error:
            raise fitted.error
        made = self.parts
        stack = Stack(self.size, self.classes, [plan.head], made.device, made.precision)
        model = Classifier(self.trunk, stack)
        model.load_state(0, fitted.state)
        return Trained(model, fitted, plan.batch_size, made.test_views, made.backbone.frozen is None)


def train_all(parts: Parts, plans: Sequence[Plan]) -> list[Trained]:
    """Train several heads of one run: together where that is heads alone, else each with blocks of its own."""
    trainer = Trainer(parts)
    if trainer.heads_alone:
        return [trainer.trained(plan, fitted) for plan, fitted in zip(plans, trainer(plans), strict=True)]
    trainers = [(Trainer(parts), plan) for plan in plans]
    return [trainer.trained(plan, *trainer([plan])) for trainer, plan in trainers]
