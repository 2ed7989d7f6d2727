"""Heads and stacks: shapes, gradients, dropout, initial weights and state."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tuner import InputError
from tuner.networks.blocks import Blocks, Pool
from tuner.training.heads import Classifier, Head, Stack, widths

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("width", "depth", "expected"),
    [
        (64, None, (64,)),
        (64, 1, (64,)),
        (64, 3, (64, 64, 64)),
        (64, 0, ()),
        ([64, 32], None, (64, 32)),
        ([64], 1, (64,)),
    ],
)
def test_width_and_depth(width, depth, expected):
    assert widths(width, depth) == expected


@pytest.mark.parametrize(
    ("width", "depth", "dropout", "message"),
    [
        ([64, 32], 3, 0.0, r"model.head.depth=3 contradicts model.head.width=\[64, 32\]; leave depth null"),
        (64, -1, 0.0, "model.head.depth=-1 must be a whole number of at least 0"),
        (64, 1.5, 0.0, "model.head.depth=1.5 must be a whole number"),
        (0, None, 0.0, r"model.head.width=\[0\] must be whole numbers of at least 1"),
        (1.5, None, 0.0, r"model.head.width=\[1.5\] must be whole numbers of at least 1"),
        ("wide", None, 0.0, r"model.head.width=wide must be a whole number or a list of them"),
        (64, None, 1.5, "model.head.dropout=1.5 must be at least 0 and less than 1"),
        (64, None, -0.1, "model.head.dropout=-0.1 must be at least 0 and less than 1"),
        (64, None, "half", "model.head.dropout=half must be at least 0 and less than 1"),
    ],
)
def test_error_messages(width, depth, dropout, message):
    with pytest.raises(InputError, match=message):
        Head(widths(width, depth), dropout, seed=0)


def sequential(stack: Stack, k: int) -> nn.Sequential:
    """Head k built from torch's own modules, with the same weights."""
    parameters = [p.detach().clone() for p in stack.parameters_of(k)]
    layers: list[nn.Module] = []
    for i in range(0, len(parameters), 2):
        weight, bias = parameters[i], parameters[i + 1]
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


HEADS = [Head((16,), 0.0, 1), Head((8, 4), 0.0, 2), Head((), 0.0, 3), Head((32, 32, 32), 0.0, 4)]


def test_logits_and_gradients_equal_those_of_single_heads():
    stack = Stack(20, 5, HEADS, CPU)
    x, labels = torch.randn(7, 20), torch.randint(0, 5, (7,))
    logits = stack(x)
    assert logits.shape == (4, 7, 5)
    for _ in range(2):  # twice, to check that the second gradient replaces the first
        sum(F.cross_entropy(head, labels) for head in stack(x)).backward()
    for k in range(4):
        reference = sequential(stack, k)
        expected = reference(F.layer_norm(x, [20]))
        F.cross_entropy(expected, labels).backward()
        torch.testing.assert_close(logits[k], expected)
        for ours, theirs in zip(stack.parameters_of(k)[:2], reference[0].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_initial_weights_do_not_depend_on_the_stack():
    alone, among = Stack(20, 5, [HEADS[1]], CPU), Stack(20, 5, HEADS, CPU)
    for ours, theirs in zip(alone.parameters_of(0), among.parameters_of(1), strict=True):
        assert torch.equal(ours, theirs)
    other = Stack(20, 5, [Head((8, 4), 0.0, 9)], CPU)
    assert not torch.equal(alone.parameters_of(0)[0], other.parameters_of(0)[0])


def test_initial_weights_are_distributed_as_in_torch():
    torch.manual_seed(0)
    ours, theirs = Stack(400, 5, [Head((300,), 0.0, 0)], CPU).parameters_of(0)[0], nn.Linear(400, 300).weight
    assert ours.abs().max() <= theirs.abs().max() * 1.001
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.02)


def test_dropout_is_per_head_and_only_in_training():
    stack = Stack(20, 5, [Head((1000,), 0.0, 1), Head((1000,), 0.9, 1)], CPU)
    x = torch.randn(3, 20)
    without, dropped = stack.train()(x)
    assert not torch.allclose(without, dropped)
    without, dropped = stack.eval()(x)
    torch.testing.assert_close(without, dropped)


def test_state_can_be_saved_and_loaded():
    model = Classifier(
        Blocks(None, [nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20))], Pool(None, False)),
        Stack(20, 5, [HEADS[1]], CPU),
    )
    x = torch.randn(4, 6)
    expected = model.eval()(x)
    state = {name: tensor.clone() for name, tensor in model.state(0).items()}
    assert {"head.0.weight", "head.2.bias", "trunk.0.weight", "trunk.1.running_mean"} <= set(state)
    for parameter in (p for part in model.parts_of(0) for p in part):
        parameter.data.zero_()
    model.load_state(0, state)
    assert torch.equal(model(x), expected)
