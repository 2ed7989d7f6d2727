"""How a head is trained, and how that went: what goes into fit() and what comes out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from tuner.data.augmentation import Augment
from tuner.training.heads import Head

Schedule = Callable[[float], float]  # share of the training that is done, 0..1 -> factor of the lr
Metrics = dict[str, float]
OnEpoch = Callable[[int, Metrics], bool | None]  # the epoch, counted from 1; False ends the head's training
State = dict[str, torch.Tensor]


@dataclass
class Fitted:
    """How one head's training went: `epochs` of it, and the `epoch` whose weights are kept, with its metrics.

    best_epoch: the first with the best value of what judges, from which patience counts; `best` is that value.
    """

    epochs: int = 0
    epoch: int = 0
    best_epoch: int = 0
    best: float = -1.0
    metrics: Metrics = field(default_factory=dict)
    state: State = field(default_factory=dict)
    error: Exception | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """How one head is trained.

    optimizer: a class of torch.optim with its keywords, which become those of the head's parameter group.
    seed: of the batch order; the head's own is that of its weights and its dropout.
    train, val: int64, rows of both. Without `val` there is no val_loss and val_accuracy, and `keep` must be "last".
    epochs: that the schedule is for; `stop`, where given, ends the training after so many of them.
    on_epoch: gets train_loss, train_accuracy (means over the epoch, with dropout on), val_loss, val_accuracy, lr (of
        the epoch's last step) and seconds. Where it returns False, this head's training ends; what it raises ends all.
    label_smoothing: of the gradient only; losses are cross-entropies without it.
    class_weights: float32 [classes], of each image's part of the gradient, by its class; likewise. None: all 1.
    grad_clip: largest norm of the gradient, or None.
    keep: the epoch whose weights are kept: "last", or "best" in what `judge` names, the latest of equals.
    judge: a metric, val_accuracy or val_balanced_accuracy.
    patience: epochs without a better one after which the training ends, or None.

    Of the blocks below the head, where there are any, which then is trained alone:
    block_lr: the factors of the lr of the block next to the head, and of each further one on top of that.
        Howard and Ruder, arXiv:1801.06146, call it discriminative fine-tuning.
    micro_batch: so many images of a batch go through them at a time; their gradients are summed. None: all.
    recompute: whether their activations are computed again in the backward pass, instead of kept.
    augment: changes a batch's images, and may mix them, see tuner.data.augmentation.
    initial: weights to begin with, as Fitted.state has them; what it lacks is drawn.
    resume: what `checkpoint` got, to go on from there.
    checkpoint: is called after each epoch but the last with a function that returns all that the rest depends on.
    """

    head: Head
    optimizer: "partial[Optimizer]"
    schedule: Schedule
    seed: int
    train: torch.Tensor
    val: torch.Tensor | None
    epochs: int
    batch_size: int
    on_epoch: OnEpoch
    stop: int | None = None
    label_smoothing: float = 0.0
    class_weights: torch.Tensor | None = None
    grad_clip: float | None = None
    keep: str = "last"
    judge: str = "val_accuracy"
    patience: int | None = None
    block_lr: tuple[float, float] = (1.0, 1.0)
    micro_batch: int | None = None
    recompute: bool = False
    augment: Augment | None = None
    initial: State | None = None
    resume: Mapping[str, Any] | None = None
    checkpoint: Callable[[Callable[[], dict[str, Any]]], None] | None = None

    def kind(self) -> tuple[Any, ...]:
        """What the heads of a stack must have in common."""
        images = len(self.train), None if self.val is None else len(self.val)
        return self.optimizer.func, self.epochs, self.stop, self.batch_size, *images

    def feed(self) -> tuple[Any, ...]:
        """What decides which images the head gets, and in which order."""
        return self.seed, *(None if rows is None else rows.numpy().tobytes() for rows in (self.train, self.val))

    def factor(self, below: int) -> float:
        """Of the lr, for the head (0) or a block that many places below it."""
        scale, decay = self.block_lr
        return scale * decay ** (below - 1) if below else 1.0
