"""Train a stack of heads on tensors: fit() and predict(). Knows torch and nothing else."""

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim import Optimizer

from tuner import DivergedError, InputError, earlier
from tuner.device import (
    Batches,
    exact_float32,
    has_graphs,
    head_rows,
    repeatable,
    rng_state,
    send,
    set_rng_state,
    widest_float,
)
from tuner.networks.blocks import Blocks
from tuner.runs.metrics import OBJECTIVES, scores
from tuner.training.cuda_graph import CapturedSteps, capturable, lr_from_device
from tuner.training.heads import Classifier, Stack
from tuner.training.spec import Fitted, Metrics, OnEpoch, Spec

log = logging.getLogger("tuner.training.fit")
PROGRESS = ("epochs", "saved_epoch", "best_epoch", "best_value", "metrics", "state")  # of Fitted, in a checkpoint
_Labels = list[tuple[torch.Tensor, torch.Tensor | float]]


def fit(
    specs: Sequence[Spec],
    x: torch.Tensor,
    labels: torch.Tensor,
    *,
    on_epoch: OnEpoch = lambda _epoch, _metrics: (),
    num_classes: int,
    feature_size: int,
    device: torch.device,
    precision: torch.dtype,
    trunk: Blocks | None = None,
    views: int = 1,
) -> list[Fitted]:
    """Train K heads of one `kind` as a stack, each as if it were alone.

    x: [N * views, ...] features, cached maps or uint8 images, on any device.   labels: int64 [N], on any device.
    on_epoch: called once an epoch with the metrics of all heads; see OnEpoch.
    precision: of matrix products; the weights and the optimizer's state are float32.
    trunk: x -> features [B, feature_size], trained together with a single head; None: x is the features.
    views: of each image, in neighbouring rows. An epoch takes one of them at random; validation takes the first.

    A head leaves the stack when its training ends, or when its loss is not finite: then its `error` is a DivergedError.
    """
    assert len({spec.kind() for spec in specs}) == 1, "the heads of a stack must be of one kind"
    assert trunk is None or len(specs) == 1, "blocks are trained with a single head"
    with repeatable(device):
        torch.manual_seed(specs[0].seed)  # of dropout on a GPU, in the blocks, and of augmentation
        distinct = list(dict.fromkeys(spec.batches() for spec in specs))
        inputs_of = [distinct.index(spec.batches()) for spec in specs]
        heads = [spec.head for spec in specs]
        model = Classifier(trunk, Stack(feature_size, num_classes, heads, device, precision, inputs_of))
        if trunk is not None:
            trunk.recompute = specs[0].recompute
        training = _Training(specs, inputs_of, model, x, labels, views, on_epoch)
        last = specs[0].stop or specs[0].epochs
        for epoch in range(training.fitted[0].epochs + 1, last + 1):
            if training.live:
                training.epoch(epoch)
            if specs[0].checkpoint and training.live and epoch < last:
                specs[0].checkpoint(training.state)
        return training.end()


class _Training:
    """The training of a stack.

    stacked: indices into `specs` of the heads in the stack, in order.   live: indices of the heads still training.
    A head that leaves is removed from the stack at once. If the step is a CUDA graph, it stays, with a learning rate of
    0, until half of the heads have left.
    Each parameter group of the optimizer has the index of its head, `head`, and the `factor` of its lr.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        inputs_of: Sequence[int],
        model: Classifier,
        x: torch.Tensor,
        labels: torch.Tensor,
        views: int,
        on_epoch: OnEpoch,
    ):
        self.specs, self.model, self.x, self.labels, self.views = specs, model, x, labels.to(x.device), views
        self.on_epoch = on_epoch
        self.device = model.stack.device
        self.live = list(range(len(specs)))
        self.stacked = self.live
        self.captured: CapturedSteps | None = None
        self.fitted = [Fitted() for _ in specs]
        for k, spec in enumerate(specs):
            model.load_state(k, spec.initial or {})
        groups = [
            {"params": part, **spec.optimizer.keywords, "head": k, "factor": spec.lr_factor(below)}
            for k, spec in enumerate(specs)
            for below, part in enumerate(model.parts_of(k))
            if part
        ]
        self.optimizer: Optimizer = specs[0].optimizer.func(groups)
        self.lrs = [spec.optimizer.keywords.get("lr", self.optimizer.defaults["lr"]) for spec in specs]
        self.batch_size = specs[0].batch_size
        self.micro_batch = specs[0].micro_batch or self.batch_size
        self.augment = specs[0].augment
        self.steps_done, self.steps = 0, specs[0].epochs * math.ceil(len(specs[0].train) / self.batch_size)
        self.inputs = [specs[inputs_of.index(number)] for number in range(max(inputs_of) + 1)]  # a spec for each input
        self.orders = [torch.Generator().manual_seed(spec.seed) for spec in self.inputs]
        if specs[0].resume:
            try:
                self._restore(specs[0].resume)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise InputError(f"the checkpoint is not of this run ({reason}): delete it to start again") from error
        self.loss = specs[0].loss
        known = self.loss is None  # a loss of the user may wait for the device
        if has_graphs(self.device) and model.trunk is None and known and capturable(self.optimizer):
            self.captured = CapturedSteps(self.device)
        self._set_up()

    def _set_up(self) -> None:
        """Make what a step needs for the heads that are in the stack."""
        stack, specs = self.model.stack, [self.specs[k] for k in self.stacked]
        self.inputs_of = torch.tensor(stack.inputs_of(), device=self.device)
        shared = {p for first in stack.firsts for member in first.members for p in member.layers[0]}
        self.loose = [p for group in self.optimizer.param_groups for p in group["params"] if p not in shared]
        self.smoothing = torch.tensor([spec.label_smoothing for spec in specs], device=self.device)[:, None]  # [K, 1]
        self.class_weights = _stacked([spec.class_weights for spec in specs], self.device)
        self.totals = torch.zeros(2, len(specs), dtype=widest_float(self.device), device=self.device)  # loss, hits
        if self.captured:
            self.lr_on_device = torch.zeros(len(specs), device=self.device)
            lr_from_device(self.optimizer, self.lr_on_device)
            self.captured.reset()

    def epoch(self, epoch: int) -> None:
        """Train for an epoch, validate, report; heads whose training ends leave."""
        start = time.perf_counter()
        columns = self._train()
        rows = [spec.val for spec in self.inputs if spec.val is not None]
        if rows:
            log_p = predict(self.model, self.x, [r * self.views for r in rows], batch_size=self.batch_size)
            labels = torch.stack([self.labels[r.to(self.labels.device)] for r in rows]).to(self.device)[self.inputs_of]
            columns |= validation_columns(log_p, labels, [spec.objective for spec in self.specs])
        seconds = time.perf_counter() - start
        metrics, ended = {}, set()
        for k in self.live:
            place, spec = self.stacked.index(k), self.specs[k]
            metrics[spec] = {name: column[place] for name, column in columns.items()} | {"seconds": seconds}
            if _has_ended(self.fitted[k], self.model, place, epoch, metrics[spec], spec):
                ended.add(spec)
        ended.update(self.on_epoch(epoch, metrics))
        self.live = [k for k in self.live if self.specs[k] not in ended]
        least = len(self.stacked) / 2 if self.captured else len(self.stacked) - 1
        if 0 < len(self.live) <= least:
            self._shrink()

    def _train(self) -> dict[str, list[float]]:
        """Run an epoch's steps. Returns train_loss, train_accuracy and lr of each head in the stack."""
        self.model.train()
        self.totals.zero_()
        pairs = [self._order(spec.train, g) for spec, g in zip(self.inputs, self.orders, strict=True)]
        for batches in zip(*(pair.to(self.x.device).split(self.batch_size, dim=1) for pair in pairs), strict=True):
            lrs = self._set_lr()
            inputs = [send(self.x[rows], self.device) for _, rows in batches]
            targets = torch.stack([send(self.labels[images], self.device) for images, _ in batches])
            if self.captured:  # a stack that is too large may begin again as two only before its first epoch is noted
                may_raise = len(self.stacked) > 1 and not self.fitted[0].epochs
                self.captured(self._step, targets, *inputs, may_raise=may_raise)
            else:
                self._step(targets, *inputs)
            self.steps_done += 1
        losses, accuracies = (self.totals / pairs[0].shape[1]).tolist()  # the one place that waits for the GPU
        return {"train_loss": losses, "train_accuracy": accuracies, "lr": lrs}

    def _order(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The images of an epoch in random order, and a row of x for each: [2, N]."""
        images = images[torch.randperm(len(images), generator=generator)]
        if self.views == 1:
            return torch.stack([images, images])
        return torch.stack([images, images * self.views + torch.randint(self.views, images.shape, generator=generator)])

    def _set_lr(self) -> list[float]:
        done = self.steps_done / self.steps
        lrs = {k: self.lrs[k] * self.specs[k].schedule(done) if k in self.live else 0.0 for k in self.stacked}
        if self.captured:
            self.lr_on_device.copy_(torch.tensor(list(lrs.values())), non_blocking=True)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lrs[group["head"]] * group["factor"]
        return list(lrs.values())

    def _step(self, targets: torch.Tensor, *inputs: torch.Tensor) -> None:
        """targets: [inputs, B]; inputs: [B, ...] each. Does not wait for the device."""
        labels: _Labels = [(targets, 1.0)]  # and their shares
        if self.augment:
            [images], [target] = inputs, targets
            images = self.augment.images(images)
            if self.augment.mixes:
                images, others, share = self.augment.mix(images, target)
                labels = [(targets, share), (others[None], 1 - share)]
            inputs = (images,)
        for parameter in self.loose:
            parameter.grad = None  # those of first layers are overwritten
        size = targets.shape[1]
        for i in range(0, size, self.micro_batch):
            some = slice(i, i + self.micro_batch)
            for first in self.model.stack.firsts:
                first.adds = i > 0
            part: _Labels = [(t[:, some], s[some] if isinstance(s, torch.Tensor) else s) for t, s in labels]
            self._backward(part, [x[some] for x in inputs], size)
        for k in self.stacked:
            if (clip := self.specs[k].grad_clip) is not None:
                mine = [p for group in self.optimizer.param_groups if group["head"] == k for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(mine, clip)
        if self.captured:
            self.captured.step(self.optimizer)
        else:
            self.optimizer.step()

    def _backward(self, labels: _Labels, inputs: Sequence[torch.Tensor], size: int) -> None:
        """Add the gradient of these images, a part of the mean over `size`. labels: [inputs, B], with their shares."""
        log_p = F.log_softmax(self.model(*inputs), dim=2)  # [K, B, classes]
        rest = self.smoothing * log_p.mean(2)
        total = torch.zeros((), device=self.device)
        for targets, share in labels:
            target = targets[self.inputs_of]  # [K, B]
            losses = F.nll_loss(log_p.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
            if self.loss:
                smoothed = self.loss(log_p.flatten(0, 1), target.flatten()).view_as(target)
            else:
                smoothed = (1 - self.smoothing) * losses - rest
            if self.class_weights is not None:
                smoothed = smoothed * self.class_weights.gather(1, target)
            total = total + (smoothed * share).sum() / size
            with torch.no_grad():
                hits = log_p.argmax(2) == target
                self.totals += torch.stack([(losses * share).sum(1), (hits * share).sum(1)])
        total.backward()  # heads share no weights: the gradient of the sum is each one's own

    def _shrink(self) -> None:
        """Remove the heads that have left from the stack."""
        groups = self.optimizer.param_groups
        for parameter in (p for group in groups if group["head"] not in self.live for p in group["params"]):
            self.optimizer.state.pop(parameter, None)
        groups[:] = [group for group in groups if group["head"] in self.live]
        inputs = self.model.stack.keep([self.stacked.index(k) for k in self.live])
        self.inputs, self.orders = [self.inputs[i] for i in inputs], [self.orders[i] for i in inputs]
        self.stacked = self.live
        self._set_up()

    def state(self) -> dict[str, Any]:
        """The state of the training of a single head, to resume from: tensors, numbers, dicts and lists."""
        return {
            "fitted": {name: getattr(self.fitted[0], name) for name in PROGRESS},
            "steps_done": self.steps_done,
            "model": self.model.state(0),
            "optimizer": self.optimizer.state_dict()["state"],
            "random": [torch.get_rng_state(), rng_state(self.device), *(g.get_state() for g in self._generators())],
            "device": self.device.type,
            "precision": str(self.model.stack.precision),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.fitted, self.steps_done = [Fitted(**earlier.fitted(state["fitted"]))], state["steps_done"]
        self.model.load_state(0, state["model"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})
        cpu, own, *others = state["random"]
        torch.set_rng_state(cpu)
        now = self.device.type, str(self.model.stack.precision)
        before = state.get("device", now[0]), state.get("precision", now[1])
        if before == now:
            if own is not None:
                set_rng_state(self.device, own)
        else:
            log.warning(
                "resuming on %s in %s a run that was on %s in %s: the numbers will differ from an uninterrupted run's",
                *now,
                *before,
            )
        for generator, saved in zip(self._generators(), others, strict=True):
            generator.set_state(saved)

    def _generators(self) -> list[torch.Generator]:
        return [*self.orders, *(member.generator for member in self.model.stack.members)]

    def end(self) -> list[Fitted]:
        for k in self.live:
            if self.specs[k].keep == "last":
                self.fitted[k].state = _copied(self.model.state(self.stacked.index(k)))
        return self.fitted


def validation_columns(
    log_p: torch.Tensor, labels: torch.Tensor, objectives: Collection[str]
) -> dict[str, list[float]]:
    """The validation metrics of an epoch, with those of the objectives: val_NAME -> a value for each head.

    log_p: [K, N, classes].   labels: int64 [N], or [K, N].
    """
    names = {"log_loss", "accuracy", "balanced_accuracy", *(OBJECTIVES[objective].name for objective in objectives)}
    columns = scores(log_p, labels, sorted(names))
    return {"val_loss" if name == "log_loss" else f"val_{name}": values for name, values in columns.items()}


def _has_ended(fitted: Fitted, model: Classifier, place: int, epoch: int, metrics: Metrics, spec: Spec) -> bool:
    """Record an epoch of the head at this place of the stack. Returns whether its training has ended."""
    fitted.epochs = epoch
    losses = {"train": metrics["train_loss"], "validation": metrics.get("val_loss", 0.0)}
    if not all(map(math.isfinite, losses.values())):
        fitted.error = DivergedError(
            f"the loss is not finite (train {losses['train']:.3g}, validation {losses['validation']:.3g}) "
            f"in epoch {epoch} at lr {metrics['lr']:.3g}: lower optimizer.lr, or set grad_clip"
        )
        return True
    value = spec.value(metrics) if "val_loss" in metrics else 0.0
    if spec.keep == "last" or value >= fitted.best_value:
        fitted.saved_epoch, fitted.metrics = epoch, metrics
    if spec.keep == "best" and value >= fitted.best_value:
        fitted.state = _copied(model.state(place))
    if value > fitted.best_value:
        fitted.best_epoch, fitted.best_value = epoch, value
    return spec.patience is not None and epoch - fitted.best_epoch >= spec.patience


def _copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@torch.inference_mode()
def predict(
    model: Classifier, x: torch.Tensor, rows: Sequence[torch.Tensor], *, batch_size: int, mirrored: bool = False
) -> torch.Tensor:
    """Log-probabilities float32 [K, N, classes], without dropout, on the model's device.

    rows: int64 [N], the rows of x for each input that the model takes.
    mirrored: the images, which x then is, are flipped left to right.
    """
    model.eval()
    device = model.stack.device

    rows = [r.to(x.device) for r in rows]

    def log_p(batch: range) -> torch.Tensor:
        inputs = [send(x[r[batch.start : batch.stop]], device) for r in rows]
        return F.log_softmax(model(*(i.flip(-1) if mirrored else i for i in inputs)), dim=2)

    with exact_float32(device):
        size = max(batch_size, head_rows(device) if model.trunk is None else 256)
        return torch.cat(list(Batches(size, device)(log_p, range(len(rows[0])))), dim=1)


def _stacked(weights: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
    """Class weights of each head, [K, classes], or None where none has any."""
    given = [w for w in weights if w is not None]
    if not given:
        return None
    return torch.stack([torch.ones_like(given[0]) if w is None else w for w in weights]).to(device)
