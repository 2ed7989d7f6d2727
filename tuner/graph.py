"""A training step as a CUDA graph: captured once, then replayed, so that small steps don't wait for Python."""

import logging
from collections.abc import Callable

import torch
from torch.optim import SGD, Optimizer

log = logging.getLogger(__name__)
WARM_UP = 3  # steps before the capture: the optimizer makes its state in the first, and cuBLAS its workspace


def capturable(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer can be captured: its numbers, the lr among them, may all live on the device."""
    return all(
        group.get("fused") and ("capturable" in group or type(optimizer) is SGD) for group in optimizer.param_groups
    )


class Captured:
    """Runs a `step(*tensors)` as a graph. What else the step reads or writes must keep its place in memory.

    One graph for each set of shapes: the last batch of an epoch is smaller. https://pytorch.org/docs/stable/notes/cuda.html
    """

    def __init__(self, optimizer: Optimizer, lrs: torch.Tensor):
        """lrs: [K] on the device, of the optimizer's K groups; they are read from there from now on."""
        self.calls = 0
        self.graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]] = {}
        for group, lr in zip(optimizer.param_groups, lrs.unbind(), strict=True):
            group["lr"] = lr
            if "capturable" in group:
                group["capturable"] = True

    def __call__(self, step: Callable[..., None], *tensors: torch.Tensor) -> None:
        self.calls += 1
        if self.calls <= WARM_UP:
            _on_a_stream_of_its_own(step, *tensors)
            return
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self.graphs:
            inputs = [tensor.clone() for tensor in tensors]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # nothing runs yet
                step(*inputs)
            self.graphs[shapes] = graph, inputs
        graph, inputs = self.graphs[shapes]
        for place, tensor in zip(inputs, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()


def _on_a_stream_of_its_own(step: Callable[..., None], *tensors: torch.Tensor) -> None:
    """As captures want it of what goes before them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
