"""The heads of one or many runs, trained in as few stacks as possible; and a trained head, which scores images."""

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tuner.device import is_out_of_memory, release_memory
from tuner.networks.blocks import Blocks
from tuner.training.fit import fit, predict
from tuner.training.heads import Classifier, Head, Stack
from tuner.training.setup import Setup
from tuner.training.spec import Fitted, Metrics, OnEpoch, Spec

log = logging.getLogger(__name__)


def fit_all(
    heads: Sequence[tuple[Setup, Spec]], on_epoch: OnEpoch, ended: Collection[Spec] = ()
) -> Iterator[tuple[Spec, Fitted]]:
    """Train these heads: those that can form a stack together, and one stack after another. Yields the heads of a stack
    when it has been trained.

    An exception becomes the `error` of each head of its stack, and does not affect other stacks.
    ended: heads that are not to be trained any more; the caller may add to it.
    """
    stacks: dict[Any, list[tuple[Setup, Spec]]] = {}
    for setup, spec in heads:
        stacks.setdefault(_stack_key(setup, spec), []).append((setup, spec))
    for stack in stacks.values():
        setup, specs = stack[0][0], [spec for _, spec in stack if spec not in ended]
        yield from ((spec, Fitted()) for _, spec in stack if spec not in specs)
        if not specs:
            continue
        try:
            fitted = fit_stack(setup, specs, on_epoch)
        except Exception as error:  # noqa: BLE001 - each run of the stack reports it as its own
            fitted = [Fitted(error=error) for _ in specs]
        for spec in specs:
            yield spec, fitted.pop(0)  # weights of finished runs are not kept


def _stack_key(setup: Setup, spec: Spec) -> Any:
    """Heads with equal keys form a stack."""
    if not setup.trains_heads_alone or not spec.optimizer.func.__module__.startswith("torch.optim."):
        return spec  # blocks are not stacked, and somebody else's optimizer may look at all parameters at once
    labels = setup.data.pool.labels.numpy().tobytes()
    return id(setup.x), labels, len(setup.data.classes), setup.precision, *spec.kind()


def fit_stack(setup: Setup, specs: Sequence[Spec], on_epoch: OnEpoch) -> list[Fitted]:
    """Train these heads as one stack; if the device has too little memory for all, one half after the other.

    Out of memory is the `error` of a head that is too large alone, and of all heads once an epoch has been reported.
    """
    reported = False

    def report(epoch: int, metrics: Mapping[Spec, Metrics]) -> Collection[Spec]:
        nonlocal reported
        reported = True  # from here on they can't start again
        return on_epoch(epoch, metrics)

    try:
        return fit(
            specs,
            setup.x,
            setup.data.pool.labels,
            on_epoch=report,
            num_classes=len(setup.data.classes),
            feature_size=setup.backbone.feature_size,
            device=setup.device,
            precision=setup.precision,
            trunk=_trunk(setup),
            views=setup.views,
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        half = len(specs) // 2 // specs[0].folds * specs[0].folds
        if half == 0 or reported:
            return [Fitted(error=error.with_traceback(None)) for _ in specs]  # its frames hold the memory
        log.warning("%d heads are too many at once: %s", len(specs), str(error).splitlines()[0])
    log.warning("training %d, then %d: set hydra.launcher.stack=%d", half, len(specs) - half, half)
    release_memory(setup.device)
    return fit_stack(setup, specs[:half], on_epoch) + fit_stack(setup, specs[half:], on_epoch)


def _trunk(setup: Setup) -> Blocks | None:
    """The blocks to train below the head, on the device; None where only a head is trained."""
    trunk = setup.backbone.trained_part()
    return trunk.to(setup.device) if trunk else None


def shapes(setup: Setup, head: Head) -> dict[str, torch.Size]:
    """Shapes of the tensors that such a head, and the blocks below it, have in a state, by name."""
    stack = Stack(setup.backbone.feature_size, len(setup.data.classes), [head], torch.device("meta"))
    return {name: tensor.shape for name, tensor in Classifier(setup.backbone.trained_part(), stack).state(0).items()}


@dataclass
class TrainedHead:
    """A head with the blocks trained below it, and the weights that were kept.

    views: how many views of each image it looks at; their probabilities are averaged.
    takes_images: whether its input is images, not features.
    """

    model: Classifier
    batch_size: int
    views: int
    takes_images: bool

    def score(self, x: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Log-probabilities [len(rows), classes] of these rows of x, on the CPU, and their accuracy."""
        cached_views = len(x) // len(labels)
        by_view = [
            predict(self.model, x, [rows], batch_size=self.batch_size, mirrored=bool(view))
            if self.takes_images
            else predict(self.model, x, [rows * cached_views + view], batch_size=self.batch_size)
            for view in range(self.views)
        ]
        log_p = torch.stack(by_view).logsumexp(0)[0].cpu() - math.log(self.views)  # of the mean probability
        return log_p, float((log_p.argmax(1) == labels[rows]).double().mean())


def trained_head(setup: Setup, spec: Spec, fitted: Fitted) -> TrainedHead:
    """The head, ready to score. Raises the error that ended its training."""
    fitted.raise_error()
    stack = Stack(setup.backbone.feature_size, len(setup.data.classes), [spec.head], setup.device, setup.precision)
    model = Classifier(_trunk(setup), stack)
    model.load_state(0, fitted.state)
    return TrainedHead(model, spec.batch_size, setup.test_views, setup.backbone.frozen is None)
