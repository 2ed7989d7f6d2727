"""CapturedSteps without a GPU: the real class, with stand-ins for torch's CUDA calls.

A stand-in graph runs the step when it is replayed. tests/test_gpu.py repeats the tests with real graphs.
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


POOL = (0, 1)


class Stream:
    """A stand-in for torch.cuda.Stream."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def wait_stream(self, other):
        self.calls.append(f"{self.name} waits for {other.name}")


class Cuda:
    """Stand-ins for the CUDA calls in cuda_graph.py, and a record of those calls.

    fails: the error that a step raises while it is captured.
    """

    def __init__(self, monkeypatch):
        self.captures, self.capturing, self.fails, self.calls = 0, None, None, []
        self.main, self.side = Stream("main", self.calls), Stream("side", self.calls)
        for name in ("CUDAGraph", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.main)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing is not None)
        monkeypatch.setattr(cuda_graph, "_side_stream", lambda device: self.side)
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "default_generators", {None: self})
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, partial(self.pool_call, name), raising=False)

    def CUDAGraph(self):  # noqa: N802 - torch's name
        cuda = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                assert pool == POOL
                cuda.capturing = self
                cuda.calls.append("capture")

            def capture_end(self):
                cuda.capturing = None
                cuda.captures += 1

            def replay(self):
                cuda.calls.append("replay")
                self.step()(*self.inputs)

        return Graph()

    @contextmanager
    def stream(self, stream):
        self.calls.append(f"on {stream.name}")
        yield
        self.calls.append("on main")

    def pool_call(self, name, device_index, pool):
        assert pool == POOL
        self.calls.append(name)

    def clone_state(self):
        return "state before the capture"

    def graphsafe_set_state(self, state):
        self.calls.append(f"generator: {state}")

    def recording(self, step):
        """The step; during a capture it is recorded instead of run."""

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
        """The real CapturedSteps, with steps that are recorded during a capture."""
        cuda = self

        class Recording(CapturedSteps):
            def __call__(self, step, *tensors, **options):
                super().__call__(cuda.recording(step), *tensors, **options)

        return Recording(device)


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


GPU = torch.device("cuda", 0)


@pytest.fixture
def branches(cuda, monkeypatch):
    """Stand-ins for the streams of the branches."""
    streams = [Stream(f"branch {i}", cuda.calls) for i in range(cuda_graph.BRANCHES)]
    monkeypatch.setattr(cuda_graph, "_branches", lambda device: streams)
    return streams


def test_branches_begin_after_what_came_before_and_what_follows_waits_for_them(cuda, branches):
    cuda.capturing = "a graph"
    with cuda_graph.side_by_side(GPU) as branch:
        assert cuda.calls == [f"{stream.name} waits for main" for stream in branches]
        for number in (1, len(branches) + 1):
            cuda.calls.clear()
            with branch(number):
                assert cuda.calls == ["on branch 1"]
        cuda.calls.clear()
    assert cuda.calls == [f"main waits for {stream.name}" for stream in branches]


def test_there_are_no_branches_outside_of_a_capture(cuda, branches):
    for device, capturing in ((GPU, None), (CPU, "a graph")):
        cuda.capturing = capturing
        with cuda_graph.side_by_side(device) as branch, branch(3):
            assert cuda.calls == []


@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_captured_step_of_the_optimizer_updates_each_group_once(cuda, branches, count):
    def optimizer():
        groups = [{"params": [torch.full((2,), float(i), requires_grad=True)], "lr": 0.1 * i} for i in range(count)]
        for group in groups:
            group["params"][0].grad = torch.ones(2)
        return torch.optim.SGD(groups)

    alone, captured = optimizer(), optimizer()
    alone.step()
    cuda.capturing = "a graph"
    CapturedSteps(GPU).step(captured)
    for group, expected in zip(captured.param_groups, alone.param_groups, strict=True):
        assert torch.equal(group["params"][0], expected["params"][0])
    assert sum(call.startswith("on branch") for call in cuda.calls) == min(count, len(branches))


LENGTHS = [4, 4, 4, 4, 3, 4, 4, 3, 3, 4, 3]  # each length more than WARM_UP times
ABANDONED = ["_cuda_endAllocateToPool", "_cuda_releasePool", "generator: state before the capture"]


def steps(captured, **options):
    """Run steps with batches of LENGTHS. Returns the sums of each step's inputs, and the sums expected."""
    sums = []

    def step(*tensors):
        sums.append([tensor.sum().item() for tensor in tensors])

    for i, length in enumerate(LENGTHS):
        captured(step, torch.full((length,), i), torch.full((length,), 10.0 * i), **options)
    return sums, [[i * length, 10.0 * i * length] for i, length in enumerate(LENGTHS)]


def abandoned(cuda):
    """The calls that take the allocator and the generator out of capture mode."""
    return [call for call in cuda.calls if call in ABANDONED]


def test_every_step_runs_once_with_its_own_inputs_and_each_shape_is_captured_once(cuda):
    sums, expected = steps(cuda.captured())
    assert sums == expected
    assert cuda.captures == 2
    assert cuda.calls.count("replay") == len(LENGTHS) - 2 * WARM_UP
    assert abandoned(cuda) == []


def test_warm_up_and_capture_run_on_the_side_stream_in_order(cuda):
    captured, calls = cuda.captured(), cuda.calls
    for _ in range(WARM_UP + 1):
        captured(lambda x: calls.append("step") or None, torch.zeros(3))
    warm_up = ["side waits for main", "on side", "step", "on main", "main waits for side"]
    assert calls == [*warm_up * WARM_UP, "on side", "capture", "on main", "replay", "step"]


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted when stream is capturing"), torch.OutOfMemoryError("too little")]
)
def test_a_failed_capture_causes_one_warning_and_loses_no_step(cuda, caplog, error):
    cuda.fails = error
    captured = cuda.captured()
    sums, expected = steps(captured)
    assert sums == expected
    assert captured.failed
    assert cuda.calls.count("capture") == 1
    assert abandoned(cuda) == ABANDONED
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert str(error) in record.getMessage()


def test_out_of_memory_during_a_capture_raises_if_the_stack_can_be_halved(cuda):
    cuda.fails = torch.OutOfMemoryError("too little")
    captured = cuda.captured()
    with pytest.raises(torch.OutOfMemoryError, match="too little"):
        steps(captured, may_raise=True)
    assert abandoned(cuda) == ABANDONED
    assert not captured.failed


def test_the_warning_names_the_error_that_made_the_capture_invalid(cuda, caplog, monkeypatch):
    cuda.fails = RuntimeError("item() synchronises")
    end_fails(cuda, monkeypatch, "operation failed due to a previous error during capture")
    sums, expected = steps(cuda.captured())
    assert sums == expected
    assert abandoned(cuda) == ABANDONED
    assert "item() synchronises" in caplog.text


def end_fails(cuda, monkeypatch, message):
    """Make the end of each capture raise an error."""

    def create():
        graph = cuda.CUDAGraph()
        graph.capture_end = partial(end, graph.capture_end)
        return graph

    def end(capture_end):
        capture_end()
        raise RuntimeError(message)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", create)


def test_a_capture_whose_end_fails_is_abandoned_and_loses_no_step(cuda, caplog, monkeypatch):
    end_fails(cuda, monkeypatch, "the graph can't be instantiated")
    sums, expected = steps(cuda.captured())
    assert sums == expected
    assert abandoned(cuda) == ABANDONED
    assert "the graph can't be instantiated" in caplog.text


def test_out_of_memory_before_a_capture_raises(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: raising(torch.OutOfMemoryError("too little")))
    with pytest.raises(torch.OutOfMemoryError):
        steps(cuda.captured(), may_raise=True)


def raising(error):
    raise error


def test_memory_of_a_failed_capture_is_freed_before_the_eager_step(cuda):
    allocated, alive = [], []

    def step(x):
        local = x + 1
        if cuda.capturing is not None:
            allocated.append(weakref.ref(local))
            raise RuntimeError("no")
        alive.extend(ref() is not None for ref in allocated)

    captured = CapturedSteps(CPU)
    for _ in range(WARM_UP + 1):
        captured(step, torch.zeros(3))
    assert alive == [False]


def optimizer(kind, heads=2, **options):
    return kind([{"params": [torch.zeros(3, requires_grad=True)]} for _ in range(heads)], lr=0.1, **options)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
def test_the_optimizer_reads_each_lr_from_the_device(kind):
    lrs, ours = torch.zeros(2), optimizer(kind, fused=True)
    assert capturable(ours)
    lr_from_device(ours, lrs)
    lrs.copy_(torch.tensor([1.0, 2.0]))
    assert [group["lr"].item() for group in ours.param_groups] == [1.0, 2.0]
    assert all(group.get("capturable", True) for group in ours.param_groups)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, {"fused": False}), (torch.optim.AdamW, {}), (torch.optim.RMSprop, {}), (torch.optim.NAdam, {})],
)
def test_an_optimizer_with_values_in_python_is_not_captured(kind, options):
    assert not capturable(optimizer(kind, **options))


HEADS = 6
LEAVE = {0: 2, 4: 3, 2: 4, 5: 4}  # head -> the epoch after which it is pruned; 1 and 3 stay


def trained(capture, *, smallest=3e-3):
    """Curves and final weights of six heads, four of which are pruned. capture: replaces CapturedSteps; None: eager."""
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
    return curves, [head.state for head in fitted]


def test_pruned_heads_are_masked_until_half_are_pruned_and_then_the_graph_is_captured_again(cuda, monkeypatch):
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
    # in the constructor, for six heads, and for two heads after epoch 4; not after epochs 2 and 3
    assert len(resets) == 3
    assert cuda.captures == 3  # six heads: two shapes; two heads: only the full batch comes often enough


def test_a_masked_head_that_diverges_does_not_affect_others(cuda):
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


def test_a_captured_training_is_freed_without_the_garbage_collector(cuda, monkeypatch):
    """Otherwise the halves of a stack that was too large would not get its memory."""
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
