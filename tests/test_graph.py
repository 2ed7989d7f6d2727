"""Captured, with stand-ins for CUDA's own parts, as there is no GPU here: a graph runs the step when it is replayed."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from tuner.graph import WARM_UP, Captured, capturable


class Cuda:
    """What torch.cuda has of graphs and streams: `graph` notes the step's inputs, `replay` runs it with these."""

    def __init__(self, step):
        self.step, self.captures, self.capturing = step, 0, None

    def CUDAGraph(self):  # noqa: N802 - torch's name
        cuda = self

        class Graph:
            def replay(self):
                cuda.step(*self.inputs)

        return Graph()

    @contextmanager
    def graph(self, graph):
        self.capturing = graph
        yield
        self.capturing, self.captures = None, self.captures + 1

    @contextmanager
    def stream(self, stream):
        yield

    def Stream(self):  # noqa: N802
        return self

    current_stream = Stream

    def wait_stream(self, stream):
        pass


@pytest.fixture
def seen(monkeypatch):
    """The sums of the tensors that each run of the step had; and the step, and the stand-in."""
    sums = []
    cuda = Cuda(lambda *tensors: sums.append([tensor.sum().item() for tensor in tensors]))

    def step(*tensors):
        if cuda.capturing is None:
            cuda.step(*tensors)
        else:
            cuda.capturing.inputs = tensors  # nothing runs

    for name in ("CUDAGraph", "graph", "stream", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    return sums, step, cuda


def optimizer(make, heads=2, **options):
    return make([{"params": [torch.zeros(3, requires_grad=True)]} for _ in range(heads)], lr=0.1, **options)


def test_every_step_runs_once_with_its_own_inputs_and_each_shape_is_captured_once(seen):
    sums, step, cuda = seen
    captured = Captured(optimizer(torch.optim.AdamW, fused=True), torch.zeros(2))
    lengths = [4, 4, 4, 4, 3, 4, 4, 3]
    for i, length in enumerate(lengths):
        captured(step, torch.full((length,), i), torch.full((length,), 10.0 * i))
    assert sums == [[i * length, 10.0 * i * length] for i, length in enumerate(lengths)]
    assert cuda.captures == 2
    assert len(lengths) > WARM_UP


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
def test_the_optimizer_reads_each_lr_from_the_device(make):
    lrs, made = torch.zeros(2), optimizer(make, fused=True)
    assert capturable(made)
    Captured(made, lrs)
    lrs.copy_(torch.tensor([1.0, 2.0]))
    assert [group["lr"].item() for group in made.param_groups] == [1.0, 2.0]
    assert all(group.get("capturable", True) for group in made.param_groups)


@pytest.mark.parametrize(
    ("make", "options"),
    [(torch.optim.SGD, {"fused": False}), (torch.optim.AdamW, {}), (torch.optim.RMSprop, {}), (torch.optim.NAdam, {})],
)
def test_an_optimizer_that_has_its_numbers_in_python_is_not_captured(make, options):
    assert not capturable(optimizer(make, **options))
