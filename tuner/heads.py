"""Trainable classifiers: a stack of K heads over the same features, each as if it were alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from tuner import InputError


@dataclass(frozen=True)
class Head:
    """A multilayer perceptron: for each width a Linear, ReLU and Dropout, then a Linear to the classes.

    widths: of the hidden layers, features to classes; () is a linear classifier.   dropout: in 0 <= p < 1.
    seed: of its initial weights (torch.nn.Linear's own distribution).   Raises InputError for a value out of range.
    """

    widths: tuple[int, ...]
    dropout: float
    seed: int

    def __post_init__(self) -> None:
        if not all(type(w) is int and w >= 1 for w in self.widths):
            raise InputError(f"model.head.width={list(self.widths)} must be whole numbers of at least 1")
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            raise InputError(f"model.head.dropout={self.dropout} must be at least 0 and less than 1")


def widths(width: int | Sequence[int], depth: int | None) -> tuple[int, ...]:
    """The hidden layers' widths: `depth` layers (None: one) as wide as `width`, or the list that `width` is.

    Raises InputError where the two contradict each other.
    """
    if isinstance(width, str):
        raise InputError(f"model.head.width={width} must be a whole number or a list of them")
    if isinstance(width, Sequence):
        if depth not in (None, len(width)):
            raise InputError(f"model.head.depth={depth} contradicts model.head.width={list(width)}; leave depth null")
        return tuple(width)
    if depth is not None and not (type(depth) is int and depth >= 0):
        raise InputError(f"model.head.depth={depth} must be a whole number of at least 0; 0 is a linear classifier")
    return (width,) * (1 if depth is None else depth)


class Stack(nn.Module):
    """K heads whose first layers, where nearly all the arithmetic is, are one matrix product.

    Their first weights lie side by side in one matrix [sum of first widths, F]. Each head has ordinary parameters that
    are views into it, with gradients that are views too: an optimizer sees K heads. Deeper layers are separate.
    """

    def __init__(self, in_features: int, num_classes: int, heads: Sequence[Head], device: torch.device):
        super().__init__()
        self.heads = tuple(heads)
        sizes = [(in_features, *head.widths, num_classes) for head in heads]
        self.outputs = [s[1] for s in sizes]  # of each head's first layer
        self.weight = nn.Parameter(torch.empty(sum(self.outputs), in_features, device=device))
        self.bias = nn.Parameter(torch.empty(sum(self.outputs), device=device))
        rows = zip(self.weight.data.split(self.outputs), self.bias.data.split(self.outputs), strict=True)
        self.first = [(nn.Parameter(weight), nn.Parameter(bias)) for weight, bias in rows]
        for which, shared in enumerate((self.weight, self.bias)):
            # no reference to self: a cycle would keep the stack's memory until Python looks for cycles
            shared.register_post_accumulate_grad_hook(partial(_hand_out, [pair[which] for pair in self.first]))
        self.deeper = nn.ModuleList(
            nn.ModuleList(nn.Linear(i, o, device=device) for i, o in pairwise(s[1:])) for s in sizes
        )
        for k, head in enumerate(heads):
            generator = torch.Generator().manual_seed(head.seed)
            for i, parameter in enumerate(self.parameters_of(k)):
                bound = sizes[k][i // 2] ** -0.5  # weight and bias of a layer follow each other
                parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """Head k's parameters: weight and bias of each layer, from the features to the classes."""
        return [*self.first[k], *self.deeper[k].parameters()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, F] -> logits [K, B, classes]. Each image's features are first brought to mean 0 and variance 1.

        That is LayerNorm (Ba et al., arXiv:1607.06450) without parameters: backbones differ in scale by a factor of
        1,000, and one lr should suit them all.
        """
        x = F.layer_norm(x, x.shape[1:])
        first = F.linear(x, self.weight, self.bias).split(self.outputs, dim=1)  # K of [B, first width]
        logits = []
        for head, h, layers in zip(self.heads, first, self.deeper, strict=True):
            for layer in layers.children():
                h = layer(F.dropout(F.relu(h), head.dropout, self.training))
            logits.append(h)
        return torch.stack(logits)


def _hand_out(views: Sequence[nn.Parameter], shared: torch.Tensor) -> None:
    """Give each view its rows of the shared gradient, and keep none, so that the next step's is not added to it."""
    assert shared.grad is not None
    for view, gradient in zip(views, shared.grad.split([len(view) for view in views]), strict=True):
        view.grad = gradient
    shared.grad = None


class Classifier(nn.Module):
    """What a run trains: a stack of heads and, below it, the blocks of the backbone that are not frozen (K = 1 then).

    trunk: cached maps or uint8 images -> features [B, F] (Backbone.trained_part), or None.
    """

    def __init__(self, trunk: nn.Module | None, stack: Stack):
        super().__init__()
        self.trunk, self.stack = trunk, stack

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs [B, ...] -> logits [K, B, classes]."""
        return self.stack(x if self.trunk is None else self.trunk(x))

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        return [*self.stack.parameters_of(k), *(self.trunk.parameters() if self.trunk else ())]

    def state(self, k: int) -> dict[str, torch.Tensor]:
        """Head k's tensors, and the trunk's: `head.0.weight`, `head.0.bias`, ...; not copies."""
        tensors = enumerate(p.data for p in self.stack.parameters_of(k))
        state = {f"head.{i // 2}.{('weight', 'bias')[i % 2]}": tensor for i, tensor in tensors}
        return state | {f"trunk.{n}": v for n, v in (self.trunk.state_dict() if self.trunk else {}).items()}

    def load_state(self, k: int, state: dict[str, torch.Tensor]) -> None:
        """Copy into head k, and the trunk, what `state` gave."""
        for name, tensor in self.state(k).items():
            tensor.copy_(state[name])
