"""Train a stack of heads on tensors: fit() and predict(). Knows torch and nothing else."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.optim import Optimizer

from tuner.heads import Classifier

Schedule = Callable[[float], float]  # share of the training that is done, 0..1 -> factor of the lr
Metrics = dict[str, float]
OnEpoch = Callable[[int, list[Metrics]], None]  # the epoch, counted from 1, and K metrics


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
    error: DivergedError | None = None


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


def fit(
    model: Classifier,
    optimizer: Optimizer,
    schedules: Sequence[Schedule],
    x: torch.Tensor,
    labels: torch.Tensor,
    train: torch.Tensor,
    val: torch.Tensor | None,
    *,
    epochs: int,
    stop: int | None = None,
    batch_size: int,
    label_smoothing: Sequence[float],
    grad_clip: float | None,
    keep: str,
    patience: int | None,
    precision: torch.dtype,
    seed: int,
    on_epoch: OnEpoch,
) -> list[Fitted]:
    """Train K heads at once, each as if it were alone: one batch order, one `on_epoch` call an epoch, K results.

    optimizer: its parameter group k holds head k's parameters, with its own lr, weight decay and so on.
    schedules, label_smoothing: one a head.
    x: [N, ...] features, cached maps or uint8 images, on any device.   labels: int64 [N].
    train, val: int64, rows of both. Without `val` there is no val_loss and val_accuracy, and `keep` must be "last".
    epochs: that the schedules are for; `stop`, where given, ends the training after so many of them.
    grad_clip: largest norm of a head's gradient, or None.
    keep: the epoch whose weights are kept: "last", or "best" in validation accuracy, the latest of equals.
    patience: epochs without a better validation accuracy after which a head's training ends, or None.
    precision: of matrix products; the weights and the optimizer's state are float32.
    seed: of the batch order and dropout.
    on_epoch: gets train_loss, train_accuracy (means over the epoch, with dropout on), val_loss, val_accuracy, lr (of
        the epoch's last step) and seconds of each head. What it raises ends the training.

    Losses are cross-entropies without label smoothing, which only the gradient has. A head whose loss is not finite
    gets an `error`, and no better weights from then on.
    """
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    smoothing = torch.tensor(label_smoothing, device=model.stack.weight.device)[:, None]  # [K, 1]
    steps = epochs * math.ceil(len(train) / batch_size)
    step, groups = 0, optimizer.param_groups
    lrs = [group["lr"] for group in groups]
    fitted = [Fitted() for _ in schedules]
    for epoch in range(1, (stop or epochs) + 1):
        start = time.perf_counter()
        model.train()
        totals = torch.zeros(2, len(fitted), dtype=torch.float64, device=smoothing.device)  # loss and hits of each head
        for rows in train[torch.randperm(len(train), generator=order)].split(batch_size):
            target = labels[rows].to(smoothing.device)
            log_p = _log_probabilities(model, x[rows], precision)  # [K, B, classes]
            losses = -log_p.gather(2, target.expand(len(log_p), -1)[..., None])[..., 0]  # [K, B]
            smoothed = (1 - smoothing) * losses - smoothing * log_p.mean(2)
            for group, lr, schedule in zip(groups, lrs, schedules, strict=True):
                group["lr"] = lr * schedule(step / steps)
            optimizer.zero_grad(set_to_none=True)
            smoothed.mean(1).sum().backward()  # heads share no weights: the gradient of the sum is each one's own
            if grad_clip is not None:
                for group in groups:
                    torch.nn.utils.clip_grad_norm_(group["params"], grad_clip)
            optimizer.step()
            step += 1
            with torch.no_grad():  # nothing here waits for the device
                totals += torch.stack([losses.sum(1), (log_p.argmax(2) == target).sum(1)])
        train_loss, train_accuracy = (totals / len(train)).tolist()
        columns = {"train_loss": train_loss, "train_accuracy": train_accuracy}
        if val is not None:
            log_p = predict(model, x, val, batch_size=batch_size, precision=precision)
            columns["val_loss"], columns["val_accuracy"] = score(log_p, labels[val])
        columns |= {"lr": [group["lr"] for group in groups], "seconds": [time.perf_counter() - start] * len(fitted)}
        metrics = [{name: column[k] for name, column in columns.items()} for k in range(len(fitted))]
        going = [_note(f, model, k, epoch, metrics[k], keep, patience) for k, f in enumerate(fitted)]
        on_epoch(epoch, metrics)
        if not any(going):
            break
    return fitted


def _note(
    fitted: Fitted, model: Classifier, k: int, epoch: int, metrics: Metrics, keep: str, patience: int | None
) -> bool:
    """Write down head k's epoch; say whether its training goes on."""
    if fitted.error or (patience is not None and fitted.epochs - fitted.best_epoch >= patience):
        return False
    fitted.epochs = epoch
    losses = {"train": metrics["train_loss"], "validation": metrics.get("val_loss", 0.0)}
    if not all(map(math.isfinite, losses.values())):
        fitted.error = DivergedError(
            f"the loss is not finite (train {losses['train']:.3g}, validation {losses['validation']:.3g}) "
            f"in epoch {epoch} at lr {metrics['lr']:.3g}: lower optimizer.lr, or set grad_clip"
        )
        return False
    accuracy = metrics.get("val_accuracy", 0.0)
    if keep == "last" or accuracy >= fitted.best_accuracy:
        fitted.epoch, fitted.metrics = epoch, metrics
        fitted.state = {name: tensor.detach().clone() for name, tensor in model.state(k).items()}
    if accuracy > fitted.best_accuracy:
        fitted.best_epoch, fitted.best_accuracy = epoch, accuracy
    return patience is None or epoch - fitted.best_epoch < patience


def _log_probabilities(model: Classifier, batch: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """Inputs [B, ...] -> float32 [K, B, classes], with matrix products in `precision`."""
    device = model.stack.weight.device
    half = precision != torch.float32
    batch = batch.to(device, non_blocking=True)
    with torch.autocast(device.type, dtype=precision, enabled=half):
        logits = model(batch if half or not batch.is_floating_point() else batch.float())
    return F.log_softmax(logits.float(), dim=2)


@torch.inference_mode()
def predict(
    model: Classifier, x: torch.Tensor, rows: torch.Tensor, *, batch_size: int, precision: torch.dtype
) -> torch.Tensor:
    """Log-probabilities float32 [K, len(rows), classes], on the CPU, of the given rows of x, without dropout."""
    model.eval()
    batches = rows.split(max(batch_size, 256))
    return torch.cat([_log_probabilities(model, x[batch], precision).cpu() for batch in batches], dim=1)


def score(log_p: torch.Tensor, labels: torch.Tensor) -> tuple[list[float], list[float]]:
    """Cross-entropy and accuracy of each head, from log-probabilities [K, N, classes] and labels int64 [N]."""
    losses = [F.nll_loss(head, labels).item() for head in log_p]
    return losses, (log_p.argmax(2) == labels).double().mean(1).tolist()
