"""A training step as a CUDA graph: captured once, then replayed, so that small steps don't wait for Python."""

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache

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


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for captures and what goes before them: cuBLAS keeps a workspace for every stream it has seen."""
    return torch.cuda.Stream(device)


class CapturedSteps:
    """Runs `step(*tensors)` as a CUDA graph. Whatever else the step reads or writes must keep its place in memory.

    There is one graph for each set of shapes, as the last batch of an epoch is smaller. All share one memory pool: they
    never run at once, and nothing that they allocate is used after a step.
    A capture that fails costs a warning, and all further steps are eager.
    https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, device: torch.device):
        self.device, self.failed = device, False
        self.reset()

    def reset(self) -> None:
        """Forget the graphs, as when the step's tensors have moved."""
        self.eager_steps: Counter[Shapes] = Counter()
        self.graphs: dict[Shapes, tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[..., None], *tensors: torch.Tensor, may_raise: bool = False) -> None:
        """Do a step, which is the same function each time.

        may_raise: whether a capture that runs out of memory raises that, instead of going on eagerly.
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
                log.warning("the training step can't be captured as a CUDA graph (%s): going on without", reason)
        if self.failed:  # the error, whose frames hold what the capture allocated, is gone by now
            step(*tensors)
            return
        graph, inputs = self.graphs[shapes]
        for place, tensor in zip(inputs, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()

    def _on_side_stream(self, step: Callable[..., None], *tensors: torch.Tensor) -> None:
        """An eager step where captures take place, as CUDA wants it of what goes before them."""
        stream, current = _side_stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                step(*tensors)
        finally:
            current.wait_stream(stream)

    def _capture(self, shapes: Shapes, step: Callable[..., None], *tensors: torch.Tensor) -> None:
        """Record the step; nothing runs yet. Where that fails, torch is as it was, and all graphs are forgotten."""
        generator = torch.cuda.default_generators[self.device.index]
        before = generator.clone_state()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # a graph's pool can't use what other streams have cached
        inputs = [tensor.clone() for tensor in tensors]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(_side_stream(self.device)):
            # Other threads, such as a tracker's, may go on using CUDA meanwhile.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            recorded = False
            try:
                step(*inputs)
                recorded = True
                graph.capture_end()
            except BaseException:
                if not recorded:
                    with suppress(RuntimeError, UserWarning):  # the step has made the capture invalid, or left it empty
                        graph.capture_end()
                self._leave_capture(generator, before)
                raise
        self.graphs[shapes] = graph, inputs

    def _leave_capture(self, generator: torch.Generator, before: torch.Generator) -> None:
        """An invalid capture can leave torch's allocator (up to 2.11 at least) and generator in capture mode."""
        with suppress(RuntimeError):  # raised by the first where the allocator has left it: the usual case
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        generator.graphsafe_set_state(before)
        self.reset()
