"""Trainable classifiers: a stack of K heads over the same features, each trained as if it were alone."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import nn

from tuner import InputError
from tuner.device import is_cpu
from tuner.networks.blocks import Blocks
from tuner.rules import BELOW_ONE, Rule, check_fields, shown, whole
from tuner.training.cuda_graph import side_by_side

WIDEST, DEEPEST = 2**16, 100  # units of a layer, layers


@dataclass(frozen=True)
class Head:
    """A multilayer perceptron: Linear, ReLU and Dropout for each width, then a Linear to the classes.

    widths: of the hidden layers, from features to classes; () is a linear classifier.   dropout: 0 <= p < 1.
    seed: for the initial weights, distributed as those of torch.nn.Linear, and for dropout.
    Raises InputError for a value out of range.
    """

    widths: tuple[int, ...]
    dropout: Annotated[float, BELOW_ONE]
    seed: int

    def __post_init__(self) -> None:
        if not all(map(whole(1, WIDEST).holds, self.widths)):
            given = shown(list(self.widths))
            raise InputError(f"model.head.width={given} must be whole numbers of at least 1 and at most {WIDEST:,}")
        check_fields(self, "model.head.")


def widths(width: int | Sequence[int], depth: int | None) -> tuple[int, ...]:
    """Widths of the hidden layers: `depth` layers (None: 1) of width `width`; or `width` itself, if it is a list.

    Raises InputError if the two contradict each other, and for a wrong type or a negative depth.
    """
    if isinstance(width, str):
        raise InputError(f"model.head.width={width} must be a whole number or a list of them")
    if isinstance(width, Sequence):
        if len(width) > DEEPEST:
            raise InputError(f"model.head.width has {len(width):,} layers; at most {DEEPEST} are allowed")
        if depth not in (None, len(width)):
            raise InputError(f"model.head.depth={depth} contradicts model.head.width={list(width)}; leave depth null")
        return tuple(width)
    if depth is not None:
        rule = whole(0, DEEPEST)
        Rule(rule.holds, f"{rule.text}; 0 is a linear classifier").check("model.head.depth", depth)
    return (width,) * (1 if depth is None else depth)


class Member:
    """One head of a stack: its parameters and its dropout."""

    def __init__(self, in_features: int, num_classes: int, head: Head, device: torch.device):
        self.head = head
        sizes = [in_features, *head.widths, num_classes]
        self.layers = [  # (weight, bias); those of the first layer become views of the shared matrix
            (nn.Parameter(torch.empty(o, i, device=device)), nn.Parameter(torch.empty(o, device=device)))
            for i, o in pairwise(sizes)
        ]
        self.generator = torch.Generator()
        self.threshold = min(
            round(head.dropout * 2**16), 2**16 - 1
        )  # a unit is dropped if its 16 random bits are below
        self.scale = 2**16 / (2**16 - self.threshold)

    @property
    def width(self) -> int:
        """Outputs of the first layer."""
        return len(self.layers[0][0])

    def parameters(self) -> list[nn.Parameter]:
        """Weight and bias of each layer, from the features to the classes."""
        return [parameter for layer in self.layers for parameter in layer]

    def initialise(self) -> None:
        """Draw the initial weights from the head's seed."""
        self.generator.manual_seed(self.head.seed)
        for weight, bias in self.layers:
            bound = weight.shape[1] ** -0.5
            for parameter in (weight, bias):
                values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=self.generator)
                parameter.data.copy_(values)

    def drop(self, out: torch.Tensor) -> None:
        """Write the units to drop to `out`, bool [B, units]. Each 64-bit random number decides four units."""
        numbers = torch.empty((out.numel() + 3) // 4, dtype=torch.int64).random_(
            -(2**63), None, generator=self.generator
        )
        bits = numbers.view(torch.int16)[: out.numel()].view(out.shape)
        torch.lt(bits, self.threshold - 2**15, out=out)

    def after_first(self, h: torch.Tensor, training: bool) -> torch.Tensor:
        """Output of the first layer [B, width], after ReLU and dropout if it is hidden -> logits [B, classes]."""
        for i, (weight, bias) in enumerate(self.layers[1:], 2):
            scale = self.scale if training else 1.0  # of inverted dropout; exact, and cheaper than scaling the units
            h = torch.addmm(bias.to(h.dtype), h, weight.to(h.dtype).t(), alpha=scale)
            if i < len(self.layers):
                h = _ReLUDropout.apply(h, self._mask(h) if training and self.threshold else None)
        return h

    def _mask(self, h: torch.Tensor) -> torch.Tensor:
        if not is_cpu(h.device):
            return torch.rand(h.shape, device=h.device) < self.threshold / 2**16
        mask = torch.empty(h.shape, dtype=torch.bool)
        self.drop(mask)
        return mask


class _ReLUDropout(torch.autograd.Function):
    """ReLU, then zero at `drop`, in place. Units that are 0 afterwards get no gradient."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, drop: torch.Tensor | None) -> torch.Tensor:
        h.clamp_min_(0)
        if drop is not None:
            h.masked_fill_(drop, 0)
        ctx.mark_dirty(h)
        ctx.save_for_backward(h)
        return h

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.ops.aten.threshold_backward(grad, *ctx.saved_tensors, 0), None


class First:
    """The first layers of the heads that share an input, as one matrix [R, F]; R is the sum of their widths.

    The gradient and the copies in the precision of the products are allocated once and reused in every step.
    adds: whether a backward pass adds to the existing gradient instead of replacing it.
    """

    adds = False

    def __init__(self, number: int, members: list[Member], precision: torch.dtype):
        self.number, self.members, self.precision = number, members, precision
        rows, features = sum(m.width for m in members), members[0].layers[0][0].shape[1]
        device = members[0].layers[0][0].device
        self.weight, self.weight_grad = torch.zeros(2, rows, features, device=device)
        self.bias, self.bias_grad = torch.zeros(2, rows, device=device)
        self.half: tuple[torch.Tensor, ...] = (self.weight, self.weight_grad)
        if precision != torch.float32:
            self.half = tuple(torch.empty(2, rows, features, device=device, dtype=precision))
        self.token = torch.zeros((), device=device, requires_grad=True)  # requires grad, so autograd calls our backward
        self.share()

    def share(self) -> None:
        """Turn the parameters of the members' first layers, and their gradients, into views of the matrix."""
        widths = [m.width for m in self.members]
        rows = sum(widths)
        self.widths, self.half = widths, tuple(tensor[:rows] for tensor in self.half)
        self.weight, self.weight_grad = self.weight[:rows], self.weight_grad[:rows]
        self.bias, self.bias_grad = self.bias[:rows], self.bias_grad[:rows]
        threshold = [m.threshold for m in self.members for _ in range(m.width)]
        self.dropped = torch.tensor(threshold, device=self.weight.device) / 2**16
        for shared, gradient, which in ((self.weight, self.weight_grad, 0), (self.bias, self.bias_grad, 1)):
            for member, view, grad in zip(self.members, shared.split(widths), gradient.split(widths), strict=True):
                parameter = member.layers[0][which]
                view.copy_(parameter.data.clone())  # the view may overlap with the old data
                parameter.data, parameter.grad = view, grad

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[B, F] -> [B, R], in the precision of the products."""
        weight, _ = self.half
        if weight is not self.weight:
            weight.copy_(self.weight)
        return torch.addmm(self.bias.to(x.dtype), x, weight.t())

    def drop(self, h: torch.Tensor) -> torch.Tensor | None:
        """The units to drop, bool [B, R]; None for no dropout. On the CPU each head draws from its own generator."""
        if not any(m.threshold for m in self.members):
            return None
        if not is_cpu(h.device):
            return torch.rand(h.shape, device=h.device) < self.dropped
        mask = torch.empty(h.shape, dtype=torch.bool)
        for member, part in zip(self.members, mask.split(self.widths, dim=1), strict=True):
            member.drop(part)
        return mask


class _Product(torch.autograd.Function):
    """[B, F] -> [B, R]. Writes the gradients of weights and biases to the memory of the parameters' gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, _token: torch.Tensor, first: First) -> torch.Tensor:
        ctx.first = first
        ctx.save_for_backward(x)
        return first.product(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (x,), first = ctx.saved_tensors, ctx.first
        weight, gradient = first.half
        if not first.adds:
            torch.mm(grad.t(), x, out=gradient)
            if gradient is not first.weight_grad:
                first.weight_grad.copy_(gradient)
            torch.sum(grad, 0, dtype=torch.float32, out=first.bias_grad)
        else:
            first.weight_grad += grad.t() @ x
            first.bias_grad += grad.sum(0, dtype=torch.float32)
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None


class Stack(nn.Module):
    """K heads over the same features, each trained as if it were alone.

    The first layers need nearly all of the arithmetic. Those of all heads with the same input form one matrix: one
    matrix product forward, one backward. Each head's parameters and gradients are views of it, so an optimizer sees K
    ordinary heads. Deeper layers are separate.

    inputs_of: for each head, the index of its input; None: all heads share one input.
    precision: of matrix products; parameters and their gradients are float32.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        heads: Sequence[Head],
        device: torch.device,
        precision: torch.dtype = torch.float32,
        inputs_of: Sequence[int] | None = None,
    ):
        super().__init__()
        self.device, self.precision = device, precision
        self.members = [Member(in_features, num_classes, head, device) for head in heads]
        for member in self.members:
            member.initialise()
        groups: dict[tuple[int, bool], list[Member]] = {}  # heads without a hidden layer form their own group
        for member, number in zip(self.members, inputs_of or [0] * len(heads), strict=True):
            groups.setdefault((number, bool(member.head.widths)), []).append(member)
        self.firsts = [First(number, members, precision) for (number, _), members in groups.items()]

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """Head k's parameters: weight and bias of each layer, from the features to the classes."""
        return self.members[k].parameters()

    def inputs_of(self) -> list[int]:
        """For each head, the index of its input."""
        number = {member: first.number for first in self.firsts for member in first.members}
        return [number[member] for member in self.members]

    def keep(self, ks: Collection[int]) -> list[int]:
        """Remove all heads except `ks`. Returns the old indices of the inputs that are still needed.

        Heads and inputs are renumbered from 0, in the same order.
        """
        self.members = [member for k, member in enumerate(self.members) if k in ks]
        for first in self.firsts:
            first.members = [member for member in first.members if member in self.members]
        self.firsts = [first for first in self.firsts if first.members]
        inputs = sorted({first.number for first in self.firsts})
        for first in self.firsts:
            first.number = inputs.index(first.number)
            first.share()
        return inputs

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Features [B, F], one tensor per input -> logits [K, B, classes].

        The features of each image are first normalised to mean 0 and variance 1: LayerNorm (Ba et al.,
        arXiv:1607.06450) without parameters. The scales of backbones differ by a factor of 1,000, and one lr should
        work for all.
        """
        normalised = [F.layer_norm(x, x.shape[1:]).to(self.precision) for x in inputs]
        logits = {}
        for first in self.firsts:
            h = _Product.apply(normalised[first.number], first.token, first)
            if first.members[0].head.widths:
                h = _ReLUDropout.apply(h, first.drop(h) if self.training else None)
            parts = h.split(first.widths, dim=1)
            with side_by_side(self.device) as branch:
                for number, (member, part) in enumerate(zip(first.members, parts, strict=True)):
                    with branch(number):
                        logits[member] = member.after_first(part, self.training)
        return torch.stack([logits[member] for member in self.members])


class Classifier(nn.Module):
    """The trained part of a model: a stack of heads on top of the trained blocks of the backbone, if any.

    trunk: cached maps or uint8 images -> features [B, F]; K = 1. None: the stack gets cached features.
    """

    def __init__(self, trunk: Blocks | None, stack: Stack):
        super().__init__()
        self.trunk, self.stack = trunk, stack

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Inputs [B, ...], one tensor per input of the stack -> float32 logits [K, B, classes]."""
        precision, device = self.stack.precision, self.stack.device
        if self.trunk is not None:
            with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
                inputs = tuple(self.trunk(x) for x in inputs)
        elif precision == torch.float32:
            inputs = tuple(x.float() for x in inputs)
        return self.stack(*inputs).float()

    def parts_of(self, k: int) -> list[list[nn.Parameter]]:
        """The parameters of head k, then those of each trained block, from the head downwards."""
        blocks = reversed(self.trunk.blocks) if self.trunk else ()
        return [self.stack.parameters_of(k), *(list(block.parameters()) for block in blocks)]

    def state(self, k: int) -> dict[str, torch.Tensor]:
        """Tensors of head k (`head.0.weight`, `head.0.bias`, ...) and of the blocks (`trunk.NAME`); not copies."""
        tensors = enumerate(p.data for p in self.stack.parameters_of(k))
        state = {f"head.{i // 2}.{('weight', 'bias')[i % 2]}": tensor for i, tensor in tensors}
        return state | {f"trunk.{n}": v for n, v in (self.trunk.tensors() if self.trunk else {}).items()}

    def load_state(self, k: int, state: Mapping[str, torch.Tensor]) -> None:
        """Copy a state to head k and the blocks; tensors that it lacks stay unchanged."""
        for name, tensor in self.state(k).items():
            if name in state:
                tensor.copy_(state[name])
