"""A training step as a CUDA graph: captured once, then replayed without waiting for Python."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from typing import Any

import torch
from torch.optim import SGD, Optimizer

from tuner.device import is_out_of_memory

log = logging.getLogger(__name__)
# Eager steps per set of shapes before its capture. The first one creates the optimizer's state and cuBLAS's workspace.
WARM_UP = 2
BRANCHES = 8  # of a graph; 4 and 16 are as fast
Shapes = tuple[torch.Size, ...]


def capturable(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer can be captured: all its values, including the lr, can be on the device."""
    return all(
        group.get("fused") and ("capturable" in group or type(optimizer) is SGD) for group in optimizer.param_groups
    )


def lr_from_device(optimizer: Optimizer, lrs: torch.Tensor) -> None:
    """Make the optimizer's K parameter groups read their learning rates from `lrs`, [K] on the device."""
    for group, lr in zip(optimizer.param_groups, lrs.unbind(), strict=True):
        group["lr"] = lr
        if "capturable" in group:
            group["capturable"] = True


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures and warm-up steps, because cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


@cache
def _branches(device: torch.device) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(BRANCHES)]


@contextmanager
def side_by_side(device: torch.device) -> Iterator[Callable[[int], AbstractContextManager[Any]]]:
    """In a step that is being captured: gives a function from a number to a context. Operations in contexts of
    different numbers may run at the same time. Elsewhere the contexts have no effect.

    The operations of a single head are too small to fill a GPU.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield lambda _: nullcontext()
        return
    current, branches = torch.cuda.current_stream(device), _branches(device)
    for stream in branches:
        stream.wait_stream(current)
    yield lambda number: torch.cuda.stream(branches[number % BRANCHES])
    for stream in branches:
        current.wait_stream(stream)


class CapturedSteps:
    """Runs `step(*tensors)` as a CUDA graph. All other tensors that the step uses must keep their addresses.

    Each set of shapes has its own graph, because the last batch of an epoch is smaller. The graphs share a memory pool:
    they never run at the same time, and nothing that they allocate is used after a step.
    A failed capture causes one warning; all later steps are eager.
    https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, device: torch.device):
        self.device, self.failed = device, False
        self.reset()

    def step(self, optimizer: Optimizer) -> None:
        """A step of the optimizer. In a graph its parameter groups, which share nothing, run side by side."""
        if not torch.cuda.is_current_stream_capturing():
            optimizer.step()
            return
        groups = optimizer.param_groups
        with side_by_side(self.device) as branch:
            try:
                for i in range(min(BRANCHES, len(groups))):
                    optimizer.param_groups = groups[i::BRANCHES]
                    with branch(i):
                        optimizer.step()
            finally:
                optimizer.param_groups = groups

    def reset(self) -> None:
        """Discard the graphs, for example because the step's tensors have moved."""
        self.eager_steps: Counter[Shapes] = Counter()
        self.graphs: dict[Shapes, tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[..., None], *tensors: torch.Tensor, may_raise: bool = False) -> None:
        """Run one step.

        step: the same function in every call.   tensors: its inputs, copied to the graph's own before a replay.
        may_raise: raise if a capture runs out of memory, instead of continuing with eager steps.
        """
        shapes = tuple(tensor.shape for tensor in tensors)
        if not self.failed and shapes not in self.graphs:
            if self.eager_steps[shapes] < WARM_UP:
                self.eager_steps[shapes] += 1
                self._on_side_stream(step, *tensors)
                return
            try:
                self._capture(shapes, step, *tensors)
            except RuntimeError as error:
                if may_raise and is_out_of_memory(error):
                    raise
                self.failed = True
                reason = str(error).partition("\n")[0]
                log.warning("the training step can't be captured as a CUDA graph (%s): continuing without", reason)
        if self.failed:  # outside the except block: the error's frames hold what the capture allocated
            step(*tensors)
            return
        graph, inputs = self.graphs[shapes]
        for graph_input, tensor in zip(inputs, tensors, strict=True):
            graph_input.copy_(tensor)
        graph.replay()

    def _on_side_stream(self, step: Callable[..., None], *tensors: torch.Tensor) -> None:
        """An eager step on the stream of captures, which CUDA requires for warm-up."""
        stream, current = _side_stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                step(*tensors)
        finally:
            current.wait_stream(stream)

    def _capture(self, shapes: Shapes, step: Callable[..., None], *tensors: torch.Tensor) -> None:
        """Record the step without running it. If that fails, torch's state is restored and all graphs are discarded."""
        generator = torch.cuda.default_generators[self.device.index]
        before = generator.clone_state()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # a graph's pool can't use blocks cached for other streams
        inputs = [tensor.clone() for tensor in tensors]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(_side_stream(self.device)):
            # thread_local: other threads, such as a tracker's, may use CUDA during the capture
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            is_recorded = False
            try:
                step(*inputs)
                is_recorded = True
                graph.capture_end()
            except BaseException:
                if not is_recorded:
                    with suppress(RuntimeError, UserWarning):  # the capture may be invalid or empty
                        graph.capture_end()
                self._leave_capture(generator, before)
                raise
        self.graphs[shapes] = graph, inputs

    def _leave_capture(self, generator: torch.Generator, before: torch.Generator) -> None:
        """Take torch's allocator and generator out of capture mode, in which an invalid capture can leave them.

        Seen in torch 2.11.
        """
        with suppress(
            RuntimeError
        ):  # the first call raises if the allocator has left capture mode itself, the usual case
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        generator.graphsafe_set_state(before)
        self.reset()
