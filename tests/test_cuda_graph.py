"""CapturedSteps, with stand-ins for CUDA's own calls: a stand-in graph runs the step when it is replayed.

tests/test_gpu.py has the same with real graphs.
"""

import gc
import logging
import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from tuner.training import cuda_graph
from tuner.training import fit as fit_module
from tuner.training.cuda_graph import WARM_UP, CapturedSteps, capturable, lr_from_device
from tuner.training.fit import fit
from tuner.training.heads import Head
from tuner.training.schedules import constant
from tuner.training.spec import Spec

CPU = torch.device("cpu")


class Cuda:
    """What cuda_graph.py calls of CUDA. `fails` is raised by the next capture, after the step's first half."""

    def __init__(self, monkeypatch):
        self.captures, self.capturing, self.abandoned, self.fails = 0, None, 0, None
        for name in ("CUDAGraph", "stream", "current_stream", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(cuda_graph, "_side_stream", self.current_stream)
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "default_generators", {None: self})
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *_: None, raising=False)

    def CUDAGraph(self):  # noqa: N802 - torch's name
        cuda = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                cuda.capturing = self

            def capture_end(self):
                cuda.capturing = None
                cuda.captures += 1

            def replay(self):
                self.step()(*self.inputs)

        return Graph()

    def current_stream(self, device):
        return self

    @contextmanager
    def stream(self, stream):
        yield

    def wait_stream(self, stream):
        pass

    def graph_pool_handle(self):
        return (0, 1)

    def clone_state(self):
        return self

    def graphsafe_set_state(self, state):
        self.abandoned += 1

    def noted(self, step):
        """The step, which is noted and not run while it is captured."""

        def run(*tensors):
            if self.capturing is None:
                step(*tensors)
            elif self.fails:
                raise self.fails
            else:
                bound = hasattr(step, "__self__")  # a real graph holds no Python objects
                self.capturing.step = weakref.WeakMethod(step) if bound else lambda: step
                self.capturing.inputs = tensors

        return run

    def captured(self, device=CPU):
        """CapturedSteps whose steps are noted."""
        cuda = self

        class Noted(CapturedSteps):
            def __call__(self, step, *tensors, **options):
                super().__call__(cuda.noted(step), *tensors, **options)

        return Noted(device)


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


LENGTHS = [4, 4, 4, 4, 3, 4, 4, 3, 3, 4, 3]


def steps(captured, **options):
    """Steps with batches of these lengths; what each run of the step saw, and what it should have seen."""
    seen = []

    def step(*tensors):
        seen.append([tensor.sum().item() for tensor in tensors])

    for i, length in enumerate(LENGTHS):
        captured(step, torch.full((length,), i), torch.full((length,), 10.0 * i), **options)
    return seen, [[i * length, 10.0 * i * length] for i, length in enumerate(LENGTHS)]


def test_every_step_runs_once_with_its_own_inputs_and_each_shape_is_captured_once(cuda):
    ran, expected = steps(cuda.captured())
    assert ran == expected
    assert cuda.captures == 2
    assert LENGTHS.count(3) > WARM_UP


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted when stream is capturing"), torch.OutOfMemoryError("too little")]
)
def test_a_capture_that_fails_costs_one_warning_and_no_step(cuda, caplog, error):
    cuda.fails = error
    captured = cuda.captured()
    ran, expected = steps(captured)
    assert ran == expected
    assert captured.failed
    assert cuda.captures == 1
    assert cuda.abandoned == 1
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert str(error) in record.getMessage()


def test_out_of_memory_during_a_capture_is_raised_where_the_stack_can_be_halved(cuda):
    cuda.fails = torch.OutOfMemoryError("too little")
    captured = cuda.captured()
    with pytest.raises(torch.OutOfMemoryError, match="too little"):
        steps(captured, may_raise=True)
    assert cuda.abandoned == 1
    assert not captured.failed


def test_the_error_that_makes_a_capture_invalid_is_told_and_not_that_of_its_end(cuda, caplog, monkeypatch):
    cuda.fails = RuntimeError("item() synchronises")
    make = cuda.CUDAGraph

    def invalid():
        graph = make()
        graph.capture_end = partial(end, graph.capture_end)
        return graph

    def end(capture_end):
        capture_end()
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", invalid)
    ran, expected = steps(cuda.captured())
    assert ran == expected
    assert "item() synchronises" in caplog.text


def test_a_capture_whose_end_fails_is_left_and_costs_no_step(cuda, caplog, monkeypatch):
    make = cuda.CUDAGraph

    def unfit():
        graph = make()
        graph.capture_end = partial(end, graph.capture_end)
        return graph

    def end(capture_end):
        capture_end()
        raise RuntimeError("the graph can't be instantiated")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", unfit)
    ran, expected = steps(cuda.captured())
    assert ran == expected
    assert cuda.abandoned == 1
    assert "the graph can't be instantiated" in caplog.text


def test_no_memory_for_the_inputs_of_a_capture_is_out_of_memory(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: raising(torch.OutOfMemoryError("too little")))
    with pytest.raises(torch.OutOfMemoryError):
        steps(cuda.captured(), may_raise=True)


def raising(error):
    raise error


def test_what_a_failed_capture_allocated_is_gone_before_the_eager_step(cuda):
    left, alive = [], []

    def step(x):
        local = x + 1
        if cuda.capturing is not None:
            left.append(weakref.ref(local))
            raise RuntimeError("no")
        alive.extend(ref() is not None for ref in left)

    captured = CapturedSteps(CPU)
    for _ in range(WARM_UP + 1):
        captured(step, torch.zeros(3))
    assert alive == [False]


def optimizer(make, heads=2, **options):
    return make([{"params": [torch.zeros(3, requires_grad=True)]} for _ in range(heads)], lr=0.1, **options)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
def test_the_optimizer_reads_each_lr_from_the_device(make):
    lrs, ours = torch.zeros(2), optimizer(make, fused=True)
    assert capturable(ours)
    lr_from_device(ours, lrs)
    lrs.copy_(torch.tensor([1.0, 2.0]))
    assert [group["lr"].item() for group in ours.param_groups] == [1.0, 2.0]
    assert all(group.get("capturable", True) for group in ours.param_groups)


@pytest.mark.parametrize(
    ("make", "options"),
    [(torch.optim.SGD, {"fused": False}), (torch.optim.AdamW, {}), (torch.optim.RMSprop, {}), (torch.optim.NAdam, {})],
)
def test_an_optimizer_that_has_its_numbers_in_python_is_not_captured(make, options):
    assert not capturable(optimizer(make, **options))


HEADS = 6
LEAVE = {0: 2, 4: 3, 2: 4, 5: 4}  # head -> the epoch after which it leaves; 1 and 3 stay


def trained(capture, *, smallest=3e-3):
    """Curves and final weights of six heads, of which four leave; `capture` is set while they train."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (200,), generator=g)
    x = torch.randn(200, 20, generator=g) + torch.randn(3, 20, generator=g)[labels]
    rows = torch.randperm(200, generator=g)
    curves = [[] for _ in range(HEADS)]

    def on_epoch(epoch, metrics):
        for spec, m in metrics.items():
            curves[specs.index(spec)].append((m["train_loss"], m["val_loss"], m["lr"]))
        return [spec for k, spec in enumerate(specs) if LEAVE.get(k) == epoch]

    specs = [
        Spec(
            Head((8 + k,), 0.0, k),
            partial(torch.optim.SGD, lr=smallest * (k + 1), momentum=0.9, fused=True),
            constant,
            k % 2,
            rows[:150],
            rows[150:],
            epochs=6,
            batch_size=40,
        )
        for k in range(HEADS)
    ]
    options = {"on_epoch": on_epoch, "num_classes": 3, "feature_size": 20, "device": CPU, "precision": torch.float32}
    with pytest.MonkeyPatch.context() as patch:
        if capture:
            patch.setattr(fit_module, "has_graphs", lambda device: True)
            patch.setattr(fit_module, "CapturedSteps", capture)
        fitted = fit(specs, x, labels, **options)
    return curves, [one.state for one in fitted]


def test_heads_that_leave_are_masked_and_the_graph_is_captured_again_when_half_have_left(cuda, monkeypatch):
    resets = []
    reset = CapturedSteps.reset
    monkeypatch.setattr(CapturedSteps, "reset", lambda self: (resets.append(1), reset(self))[1])
    curves, states = trained(cuda.captured)
    alone, alone_states = trained(None)
    assert [len(curve) for curve in curves] == [LEAVE.get(k, 6) for k in range(HEADS)]
    for ours, theirs in zip(curves, alone, strict=True):
        assert torch.tensor(ours).allclose(torch.tensor(theirs), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(states, alone_states, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[name].allclose(theirs[name], rtol=1e-4, atol=1e-6) for name in ours)
    # made, set up for six, and for two: after epoch 4, when four of six had left; not after epochs 2 and 3
    assert len(resets) == 3
    assert cuda.captures == 3  # two shapes; of the two heads only the whole batch comes often enough


def test_a_head_that_diverges_behind_the_mask_harms_no_other(cuda):
    _, finite = trained(cuda.captured)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LEAVE, 0, 1)
        real = fit_module._Training._step

        def step(training, *tensors):
            real(training, *tensors)
            if 0 in training.stacked and 0 not in training.live:
                with torch.no_grad():
                    training.model.stack.parameters_of(0)[0].fill_(float("nan"))

        patch.setattr(fit_module._Training, "_step", step)
        _, states = trained(cuda.captured)
    for k in (1, 3):
        assert all(states[k][name].allclose(finite[k][name], rtol=1e-4, atol=1e-6) for name in states[k])


def test_nothing_of_a_captured_training_outlives_it(cuda, monkeypatch):
    """Without the garbage collector, or the halves of a stack that was too large would not have its memory."""
    alive = []

    class Training(fit_module._Training):
        def __init__(self, *args):
            super().__init__(*args)
            alive.extend([weakref.ref(self), weakref.ref(self.model.stack), weakref.ref(self.captured)])

    monkeypatch.setattr(fit_module, "_Training", Training)
    gc.collect()
    gc.disable()
    try:
        trained(cuda.captured)
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()
