"""How a head is trained and how that went: what goes into fit() and what comes out."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from tuner import InputError
from tuner.cache_files import format_bytes
from tuner.config import HeadConfig, RunConfig, argument_errors
from tuner.data.augmentation import Augment
from tuner.device import total_memory
from tuner.rules import shown
from tuner.runs.metrics import OBJECTIVES, objective_value
from tuner.training.heads import Head, widths
from tuner.training.setup import Setup

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # log-probabilities [N, classes], labels [N] -> [N]
Schedule = Callable[[float], float]  # completed share of the training, 0..1 -> factor of the lr
Metrics = dict[str, float]
State = dict[str, torch.Tensor]


@dataclass
class Fitted:
    """How one head's training went.

    epochs: number of epochs trained.   saved_epoch: the epoch whose weights, `state`, and `metrics` are kept.
    best_epoch: the first epoch with the best value of the objective, `best_value`; patience counts from it.
    error: what ended the training, such as DivergedError, or None.
    """

    epochs: int = 0
    saved_epoch: int = 0
    best_epoch: int = 0
    best_value: float = -math.inf
    metrics: Metrics = field(default_factory=dict)
    state: State = field(default_factory=dict)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.traceback = self.error.__traceback__ if self.error else None

    def raise_error(self) -> None:
        """Raise `error`, if there is one. Several heads may share it: each raises it from where it came."""
        if self.error:
            raise self.error.with_traceback(self.traceback)


@dataclass(frozen=True, eq=False)
class Spec:
    """How one head is trained.

    optimizer: a class of torch.optim with its keywords, which become those of the head's parameter group.
    seed: of the batch order. The head's own seed is for its weights and its dropout.
    train, val: int64 [N], image numbers. Without `val` there are no validation metrics, and `keep` must be "last".
    epochs: length of the schedule.   stop: the epoch after which training ends; None: after `epochs`.
    label_smoothing: in the gradient only; reported losses are plain cross-entropies.
    loss: log-probabilities float32 [N, classes] and labels int64 [N] -> float32 [N], in the gradient only. None: the
        cross-entropy, with label_smoothing.
    class_weights: float32 [classes], weight of an image in the gradient, by its class. None: all 1.
    grad_clip: largest norm of the gradient, or None.
    keep: the epoch whose weights are kept: "last", or "best" by `objective` (the latest of equals).
    objective: one of runs.metrics.OBJECTIVES, on the validation split; larger is better.
    patience: epochs without a better value after which training ends, or None.
    folds: the number of heads of its cross-validation, which are neighbours and stay in one stack.

    If blocks below the head are trained, the head is trained without others, and these apply:
    block_lr: factor of the lr for the block next to the head, and a further factor for each block below it.
        Discriminative fine-tuning, Howard and Ruder, arXiv:1801.06146.
    micro_batch: images of a batch that pass through the blocks at a time; gradients are summed. None: all.
    recompute: recompute the blocks' activations in the backward pass instead of keeping them.
    augment: changes a batch's images, and may mix them, see tuner.data.augmentation.
    initial: weights to start from, as Fitted.state has them; missing ones are drawn.
    resume: a state that `checkpoint` was given, to continue from.
    checkpoint: called after each epoch but the last, with a function that returns the state of the training.
    """

    head: Head
    optimizer: "partial[Optimizer]"
    schedule: Schedule
    seed: int
    train: torch.Tensor
    val: torch.Tensor | None
    epochs: int
    batch_size: int
    stop: int | None = None
    label_smoothing: float = 0.0
    class_weights: torch.Tensor | None = None
    loss: Loss | None = None
    grad_clip: float | None = None
    keep: str = "last"
    objective: str = "accuracy"
    patience: int | None = None
    folds: int = 1
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
        same_loss = (self.loss.func, repr(self.loss.keywords)) if isinstance(self.loss, partial) else self.loss
        return self.optimizer.func, same_loss, self.epochs, self.stop, self.batch_size, self.folds, *images

    def batches(self) -> tuple[Any, ...]:
        """What decides which images the head gets, and in which order: heads with equal batches share them."""
        return self.seed, *(None if rows is None else rows.numpy().tobytes() for rows in (self.train, self.val))

    def value(self, metrics: Metrics) -> float:
        """The objective, from the metrics of an epoch that has validated."""
        scores = {name.removeprefix("val_"): value for name, value in metrics.items() if name.startswith("val_")}
        return objective_value(self.objective, scores | {"log_loss": metrics["val_loss"]})

    def lr_factor(self, below: int) -> float:
        """Factor of the lr for the head (0) or a block that many places below it."""
        scale, decay = self.block_lr
        return scale * decay ** (below - 1) if below else 1.0


# Called after each epoch, counted from 1, with the metrics of each head that is still training: train_loss and
# train_accuracy (means over the epoch, with dropout), val_loss, val_accuracy, val_balanced_accuracy, val_METRIC of the
# objective, lr (of the epoch's last step), seconds. It returns the heads whose training ends now.
OnEpoch = Callable[[int, Mapping[Spec, Metrics]], Collection[Spec]]


def head_of(config: HeadConfig, seed: int) -> Head:
    """Raises InputError for a value out of range."""
    return Head(widths(config.width, config.depth), config.dropout, seed)


def spec_of(
    config: RunConfig, setup: Setup, seed: int, train: torch.Tensor, val: torch.Tensor | None, *, folds: int = 1
) -> Spec:
    """How a config trains its head, and the blocks below it. Without `val`: for final.epochs, keeping the last.

    folds: the number of heads that are validated together.
    """
    with argument_errors("optimizer"):
        optimizer = config.optimizer.target.build()
        _check(optimizer)
    with argument_errors("scheduler"):
        schedule: Schedule = config.scheduler.build()
        schedule(0.0)
    names = ("epochs", "batch_size", "label_smoothing", "grad_clip", "keep", "patience", "micro_batch", "recompute")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    options["objective"] = objective_of(config, len(setup.data.classes))
    options["block_lr"] = config.optimizer.backbone_lr_scale, config.optimizer.backbone_lr_decay
    if setup.backbone.frozen is None and (setup.augment.changes_images or setup.augment.mixes):
        options["augment"] = setup.augment
    if config.class_weights:
        options["class_weights"] = balanced_weights(setup.data.pool.labels[train], len(setup.data.classes))
    options["loss"] = loss_of(config, len(setup.data.classes))
    if val is None:
        options |= {"stop": config.final.epochs, "keep": "last", "patience": None}
    head = head_of(config.model.head, seed)
    _check_memory(config, setup, head)
    return Spec(head, optimizer, schedule, seed, train, val, folds=folds, **options)


def _check_memory(config: RunConfig, setup: Setup, head: Head) -> None:
    """Raises InputError if weights, gradients and two moments, float32 each, are more than the device's memory."""
    parameters, memory = setup.cost(head)["trained_parameters"], total_memory(setup.device)
    if memory and 16 * parameters > memory:
        raise InputError(
            f"model.head.width={shown(config.model.head.width)} makes {parameters:,} trained parameters, which take "
            f"{format_bytes(16 * parameters)}; {setup.device} has {format_bytes(memory)}: lower model.head.width"
        )


def _check(optimizer: "partial[Optimizer]") -> None:
    """A step on a parameter of zeros, so that a bad argument fails before training starts. Raises ValueError."""
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.zeros(1)
    try:
        optimizer([parameter]).step()
    except (ArithmeticError, LookupError, AttributeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{optimizer.func.__name__} does not take its arguments ({error})") from error
    if not torch.isfinite(parameter).all():
        raise ValueError(f"a step of {optimizer.func.__name__} is not finite: an argument is too large or too small")


def loss_of(config: RunConfig, num_classes: int) -> Loss | None:
    """The user's loss, tried on two images; None for the cross-entropy. Raises InputError if it does not fit."""
    if not config.loss.keywords:
        return None
    loss: Loss = config.loss.build()
    logits = torch.zeros(2, num_classes, requires_grad=True)
    name = config.loss.keywords["_target_"]
    with argument_errors("loss"):
        try:
            values = loss(logits.log_softmax(1), torch.tensor([0, num_classes - 1]))
            values.sum().backward()
        except (ArithmeticError, LookupError, AttributeError, RuntimeError, AssertionError) as error:
            raise ValueError(f"{name} does not take log-probabilities [N, classes] and labels [N] ({error})") from error
    if values.shape != (2,):
        raise InputError(f"loss: {name} must return a loss for each image, [N]; it returns {list(values.shape)} of 2")
    return loss


def objective_of(config: RunConfig, num_classes: int) -> str:
    """Raises InputError for an objective that is not known, or that needs more classes."""
    if config.objective not in OBJECTIVES:
        raise InputError(f"objective={shown(config.objective)} must be one of {', '.join(OBJECTIVES)}")
    least = OBJECTIVES[config.objective].min_classes
    if num_classes < least:
        raise InputError(f"objective={config.objective} needs at least {least} classes; there are {num_classes}")
    return config.objective


def balanced_weights(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Weights, float32 [num_classes], that give each class the same part in the gradient; 1 in the mean over images."""
    counts = torch.bincount(labels, minlength=num_classes)
    return len(labels) / (num_classes * counts.clamp(min=1).float())
