"""A training step as a CUDA graph: captured once, then replayed, so that small steps don't wait for Python."""

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import torch
from torch.optim import SGD, Optimizer

from tuner.device import is_out_of_memory

log = logging.getLogger(__name__)
# Eager steps for each set of shapes before its capture: the optimizer makes its state in the first one, and cuBLAS its
# workspace.
WARM_UP = 2
Shapes = tuple[torch.Size, ...]


def capturable(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer can be captured: all its numbers, such as the lr, may live on the device."""
    return all(
        group.get("fused") and ("capturable" in group or type(optimizer) is SGD) for group in optimizer.param_groups
    )


def lr_from_device(optimizer: Optimizer, lrs: torch.Tensor) -> None:
    """Have the optimizer's K groups read their learning rates from `lrs`, [K] on the device."""
    for group, lr in zip(optimizer.param_groups, lrs.unbind(), strict=True):
        group["lr"] = lr
        if "capturable" in group:
            group["capturable"] = True


class CapturedStep:
    """Runs `step(*tensors)` as a CUDA graph. Whatever else the step reads or writes must keep its place in memory.

    There is one graph for each set of shapes, as the last batch of an epoch is smaller. All share one memory pool: they
    never run at once, and nothing that they allocate is used after a step.
    A capture that fails costs a warning, and all further steps are eager.
    https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, step: Callable[..., None], device: torch.device):
        self.step, self.device = step, device
        self.stream = torch.cuda.Stream(device)
        self.failed = False
        self.reset()

    def reset(self) -> None:
        """Forget the graphs, as when the step's tensors have moved."""
        self.eager_steps: Counter[Shapes] = Counter()
        self.graphs: dict[Shapes, tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *tensors: torch.Tensor, may_raise: bool = False) -> None:
        """Do a step. may_raise: whether a capture that runs out of memory raises that, instead of going on eagerly."""
        if self.failed:
            self.step(*tensors)
            return
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self.graphs:
            if self.eager_steps[shapes] < WARM_UP:
                self.eager_steps[shapes] += 1
                self._on_side_stream(*tensors)
                return
            try:
                self._capture(shapes, *tensors)
            except RuntimeError as error:
                self._abandon()
                cause = error.__context__ or error  # where an operation made the capture invalid, its end fails, too
                if may_raise and is_out_of_memory(cause):
                    raise cause from None
                self.failed = True
                reason = str(cause).partition("\n")[0]
                log.warning("the training step can't be captured as a CUDA graph (%s): going on without", reason)
            if self.failed:
                self.step(*tensors)
                return
        graph, inputs = self.graphs[shapes]
        for place, tensor in zip(inputs, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()

    def _on_side_stream(self, *tensors: torch.Tensor) -> None:
        """An eager step where captures take place, as CUDA wants it of what goes before them."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.step(*tensors)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _capture(self, shapes: Shapes, *tensors: torch.Tensor) -> None:
        """Record the step; nothing runs yet."""
        inputs = [tensor.clone() for tensor in tensors]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # a graph's pool can't use what other streams have cached
        self.generator = torch.cuda.default_generators[self.device.index]
        self.generator_before = self.generator.clone_state()
        with torch.cuda.stream(self.stream):
            # Other threads, such as a tracker's, may go on using CUDA meanwhile.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                self.step(*inputs)
            finally:
                graph.capture_end()
        self.graphs[shapes] = graph, inputs

    def _abandon(self) -> None:
        """Leave capture mode: a capture that an operation made invalid leaves torch's generator and allocator in it."""
        with suppress(RuntimeError):  # raised where the capture ended as it should
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        self.generator.graphsafe_set_state(self.generator_before)
        self.reset()
