"""Train a stack of heads on tensors: fit() and predict(). Knows torch and nothing else."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from tuner.graph import Captured, capturable
from tuner.heads import Classifier, Head, Stack

Schedule = Callable[[float], float]  # share of the training that is done, 0..1 -> factor of the lr
Metrics = dict[str, float]
OnEpoch = Callable[[int, Metrics], bool | None]  # the epoch, counted from 1; False ends the head's training


class DivergedError(ArithmeticError):
    """A loss is not finite."""


@dataclass
class Fitted:
    """How one head's training went: `epochs` of it, and the `epoch` whose weights are kept, with its metrics.

    best_epoch: the first with the best validation accuracy, from which patience counts.
    """

    epochs: int = 0
    epoch: int = 0
    best_epoch: int = 0
    best_accuracy: float = -1.0
    metrics: Metrics = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    error: Exception | None = None


def onecycle(progress: float, *, warmup: float = 0.3, start: float = 0.04) -> float:
    """From `start` of the lr up to all of it, over the first `warmup` of the training, then down to 0.

    Both ways are half cosines. Smith and Topin, arXiv:1708.07120; the momentum stays as it is.
    """
    if progress < warmup:
        return start + (1 - start) * (1 - math.cos(math.pi * progress / warmup)) / 2
    return cosine((progress - warmup) / (1 - warmup))


def cosine(progress: float) -> float:
    """Half a cosine from all of the lr to 0. Loshchilov and Hutter, arXiv:1608.03983, without restarts."""
    return (1 + math.cos(math.pi * progress)) / 2


def constant(progress: float) -> float:
    """The lr as it is."""
    return 1.0


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
    grad_clip: largest norm of the gradient, or None.
    keep: the epoch whose weights are kept: "last", or "best" in validation accuracy, the latest of equals.
    patience: epochs without a better validation accuracy after which the training ends, or None.
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
    grad_clip: float | None = None
    keep: str = "last"
    patience: int | None = None

    def kind(self) -> tuple[Any, ...]:
        """What the heads of a stack must have in common."""
        images = len(self.train), None if self.val is None else len(self.val)
        return self.optimizer.func, self.epochs, self.stop, self.batch_size, *images

    def feed(self) -> tuple[Any, ...]:
        """What decides which images the head gets, and in which order."""
        return self.seed, *(None if rows is None else rows.numpy().tobytes() for rows in (self.train, self.val))


def fit(
    plans: Sequence[Plan],
    x: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_classes: int,
    feature_size: int,
    device: torch.device,
    precision: torch.dtype,
    trunk: nn.Module | None = None,
) -> list[Fitted]:
    """Train K heads of one `kind` together, each as if it were alone.

    x: [N, ...] features, cached maps or uint8 images, on any device.   labels: int64 [N], likewise.
    precision: of matrix products; the weights and the optimizer's state are float32.
    trunk: x -> features [B, feature_size], trained with the head, which is the only one then; None: x is the features.

    A head whose training ends, or whose loss is not finite, which becomes its `error`, leaves the others.
    """
    assert len({plan.kind() for plan in plans}) == 1, "heads that are trained together are of one kind"
    torch.manual_seed(plans[0].seed)  # of dropout on a GPU, and in the trunk
    feeds = list(dict.fromkeys(plan.feed() for plan in plans))  # heads with the same batches share them
    inputs_of = [feeds.index(plan.feed()) for plan in plans]
    heads = [plan.head for plan in plans]
    model = Classifier(trunk, Stack(feature_size, num_classes, heads, device, precision, inputs_of))
    training = _Training(plans, inputs_of, model, x, labels)
    for epoch in range(1, (plans[0].stop or plans[0].epochs) + 1):
        if training.live:
            training.epoch(epoch)
    return training.end()


class _Training:
    """Heads in training: `live` are those that still are, by their place among the plans; `fitted` is noted of each."""

    def __init__(
        self, plans: Sequence[Plan], inputs_of: Sequence[int], model: Classifier, x: torch.Tensor, labels: torch.Tensor
    ):
        self.plans, self.model, self.x, self.labels = plans, model, x, labels.to(x.device)
        self.device = model.stack.device
        self.live = list(range(len(plans)))
        self.fitted = [Fitted() for _ in plans]
        groups = [{"params": model.parameters_of(k), **plan.optimizer.keywords} for k, plan in enumerate(plans)]
        self.optimizer: Optimizer = plans[0].optimizer.func(groups)
        self.lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.batch_size = plans[0].batch_size
        self.steps_done, self.steps = 0, plans[0].epochs * math.ceil(len(plans[0].train) / self.batch_size)
        self.feeds = [plans[inputs_of.index(number)] for number in range(max(inputs_of) + 1)]  # a plan for each input
        self.orders = [torch.Generator().manual_seed(plan.seed) for plan in self.feeds]
        self._set_up()

    def _set_up(self) -> None:
        """What a step of the heads that are left works with."""
        stack = self.model.stack
        self.inputs_of = torch.tensor(stack.inputs_of(), device=self.device)
        self.loose = [p for k in range(len(self.live)) for p in self.model.parameters_of(k)[2:]]
        smoothing = [self.plans[k].label_smoothing for k in self.live]
        self.smoothing = torch.tensor(smoothing, device=self.device)[:, None]  # [K, 1]
        self.totals = torch.zeros(2, len(self.live), dtype=torch.float64, device=self.device)  # loss and hits of each
        self.lr_on_device = torch.zeros(len(self.live), device=self.device)
        on_gpu = self.device.type == "cuda" and self.model.trunk is None and capturable(self.optimizer)
        self.captured = Captured(self.optimizer, self.lr_on_device) if on_gpu else None

    def epoch(self, epoch: int) -> None:
        """Train for an epoch, validate, and note how it went; heads that are done leave."""
        start = time.perf_counter()
        columns = self._train()
        rows = [plan.val for plan in self.feeds if plan.val is not None]
        if rows:
            log_p = predict(self.model, self.x, rows, batch_size=self.batch_size)
            labels = torch.stack([self.labels[r.to(self.labels.device)] for r in rows]).to(self.device)[self.inputs_of]
            columns["val_loss"], columns["val_accuracy"] = score(log_p, labels)
        seconds = time.perf_counter() - start
        stay = []
        for place, k in enumerate(self.live):
            metrics = {name: column[place] for name, column in columns.items()} | {"seconds": seconds}
            going = _note(self.fitted[k], self.model, place, epoch, metrics, self.plans[k])
            if self.plans[k].on_epoch(epoch, metrics) is not False and going:
                stay.append(place)
        if len(stay) < len(self.live):
            self._keep(stay)

    def _train(self) -> dict[str, list[float]]:
        """An epoch's steps; returns train_loss, train_accuracy and lr of each head."""
        self.model.train()
        self.totals.zero_()
        rows = [
            plan.train[torch.randperm(len(plan.train), generator=g)]
            for plan, g in zip(self.feeds, self.orders, strict=True)
        ]
        for batches in zip(*(order.to(self.x.device).split(self.batch_size) for order in rows), strict=True):
            lrs = self._set_lr()
            inputs = [_to(self.x[batch], self.device) for batch in batches]
            targets = torch.stack([_to(self.labels[batch], self.device) for batch in batches])
            if self.captured:
                self.captured(self._step, targets, *inputs)
            else:
                self._step(targets, *inputs)
            self.steps_done += 1
        losses, accuracies = (self.totals / len(rows[0])).tolist()  # the one place of an epoch that waits for the GPU
        return {"train_loss": losses, "train_accuracy": accuracies, "lr": lrs}

    def _set_lr(self) -> list[float]:
        done = self.steps_done / self.steps
        lrs = [self.lrs[k] * self.plans[k].schedule(done) for k in self.live]
        if self.captured:
            self.lr_on_device.copy_(torch.tensor(lrs), non_blocking=True)
        else:
            for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
        return lrs

    def _step(self, targets: torch.Tensor, *inputs: torch.Tensor) -> None:
        """targets: [inputs, B]; inputs: [B, ...] each. Waits for nothing that the device does."""
        log_p = F.log_softmax(self.model(*inputs), dim=2)  # [K, B, classes]
        target = targets[self.inputs_of]  # [K, B]
        losses = F.nll_loss(log_p.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        smoothed = (1 - self.smoothing) * losses - self.smoothing * log_p.mean(2)
        for parameter in self.loose:
            parameter.grad = None  # those of first layers are written anew
        smoothed.mean(1).sum().backward()  # heads share no weights: the gradient of the sum is each one's own
        for group, k in zip(self.optimizer.param_groups, self.live, strict=True):
            if (clip := self.plans[k].grad_clip) is not None:
                torch.nn.utils.clip_grad_norm_(group["params"], clip)
        self.optimizer.step()
        with torch.no_grad():
            self.totals += torch.stack([losses.sum(1), (log_p.argmax(2) == target).sum(1)])

    def _keep(self, places: Sequence[int]) -> None:
        """Go on with the heads at these places of `live`."""
        gone = [
            p for place, group in enumerate(self.optimizer.param_groups) if place not in places for p in group["params"]
        ]
        for parameter in gone:
            self.optimizer.state.pop(parameter, None)
        self.optimizer.param_groups[:] = [self.optimizer.param_groups[place] for place in places]
        self.live = [self.live[place] for place in places]
        if places:
            inputs = self.model.stack.keep(places)
            self.feeds, self.orders = [self.feeds[i] for i in inputs], [self.orders[i] for i in inputs]
            self._set_up()

    def end(self) -> list[Fitted]:
        for place, k in enumerate(self.live):
            if self.plans[k].keep == "last":
                self.fitted[k].state = _copied(self.model.state(place))
        return self.fitted


def _note(fitted: Fitted, model: Classifier, place: int, epoch: int, metrics: Metrics, plan: Plan) -> bool:
    """Write down the epoch of the head at this place; say whether its training goes on."""
    fitted.epochs = epoch
    losses = {"train": metrics["train_loss"], "validation": metrics.get("val_loss", 0.0)}
    if not all(map(math.isfinite, losses.values())):
        fitted.error = DivergedError(
            f"the loss is not finite (train {losses['train']:.3g}, validation {losses['validation']:.3g}) "
            f"in epoch {epoch} at lr {metrics['lr']:.3g}: lower optimizer.lr, or set grad_clip"
        )
        return False
    accuracy = metrics.get("val_accuracy", 0.0)
    if plan.keep == "last" or accuracy >= fitted.best_accuracy:
        fitted.epoch, fitted.metrics = epoch, metrics
    if plan.keep == "best" and accuracy >= fitted.best_accuracy:
        fitted.state = _copied(model.state(place))
    if accuracy > fitted.best_accuracy:
        fitted.best_epoch, fitted.best_accuracy = epoch, accuracy
    return plan.patience is None or epoch - fitted.best_epoch < plan.patience


def _copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _to(batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    if batch.device == device:
        return batch
    return batch.pin_memory().to(device, non_blocking=True)  # while the device is at the step before


@torch.inference_mode()
def predict(model: Classifier, x: torch.Tensor, rows: Sequence[torch.Tensor], *, batch_size: int) -> torch.Tensor:
    """Log-probabilities float32 [K, N, classes], without dropout, on the model's device.

    rows: int64 [N], the rows of x for each input that the model takes.
    """
    model.eval()
    device = model.stack.device
    batches = zip(*(r.to(x.device).split(max(batch_size, 256)) for r in rows), strict=True)
    return torch.cat(
        [F.log_softmax(model(*(_to(x[rows], device) for rows in batch)), dim=2) for batch in batches], dim=1
    )


def score(log_p: torch.Tensor, labels: torch.Tensor) -> tuple[list[float], list[float]]:
    """Cross-entropy and accuracy of each head: log-probabilities [K, N, classes], labels int64 [N] or [K, N]."""
    labels = labels.to(log_p.device).expand(log_p.shape[:2])
    losses = F.nll_loss(log_p.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).mean(1)
    return losses.tolist(), (log_p.argmax(2) == labels).double().mean(1).tolist()
