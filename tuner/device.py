"""Every decision about devices: CPU, CUDA and Apple's MPS.

No other module names a kind of device or compares two devices, except for the CUDA calls in training/cuda_graph.py. A
device here is what a tensor on it reports: `cuda:0`, never `cuda`. MPS is written after torch's documentation and has
not been run.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from tuner import InputError

log = logging.getLogger(__name__)
T = TypeVar("T")
# Without it cuBLAS may sum in any order. It is read once, at the first product, and costs nothing where nobody asks for
# deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CHOICES = "auto, cpu, cuda, cuda:N or mps"
# Images a batch of a frozen network, by measurement (benchmarks/README.md): as many as keep the inputs and outputs of
# its largest layer within so many numbers, and no more than so many images.
LARGEST_LAYER = {"cpu": 2**25, "cuda": 2**30, "mps": 2**27}
MOST_IMAGES = {"cpu": 256, "cuda": 8192, "mps": 1024}
SHARE_OF_FREE = 16  # a batch's largest layer takes at most a sixteenth of the free memory: blocks branch and add
STACK_SIZE = {"cpu": 8, "cuda": 64, "mps": 8}  # heads; larger stacks gain nothing (benchmarks/README.md)


def choose_device(choice: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`, with its index as tensors report it.

    `auto` takes CUDA, then MPS, then the CPU, and logs which and why.
    Raises InputError for a device that this machine does not have.
    """
    gpus = _count_gpus()
    mps = torch.backends.mps.is_available()
    if choice == "auto":
        device, why = _best(gpus, mps)
        log.info("device: %s (auto: %s)", device, why)
        return device
    kind, _, index = str(choice).partition(":")
    known = kind in ("cpu", "cuda", "mps") and (not index or (index.isascii() and index.isdigit()))
    if not known or (kind == "cpu" and index):
        raise InputError(f"device={choice} must be {CHOICES}")
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "mps":
        if not mps:
            raise InputError(
                f"device={choice}, but torch {torch.__version__} sees no MPS; use device=cpu or device=auto"
            )
        if int(index or 0):
            raise InputError(f"device={choice}, but there is one MPS device, mps:0")
        return torch.device("mps", 0)
    if not gpus:
        raise InputError(f"device={choice}, but {_no_cuda()}; use device=cpu or device=auto")
    if int(index or 0) >= gpus:
        names = ", ".join(f"cuda:{i}" for i in range(gpus))
        raise InputError(f"device={choice}, but this machine has {names}")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())


def _count_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _best(gpus: int, mps: bool) -> tuple[torch.device, str]:
    if gpus:
        index = torch.cuda.current_device()
        return torch.device("cuda", index), f"{torch.cuda.get_device_name(index)}, of {gpus} CUDA GPUs"
    if mps:
        return torch.device("mps", 0), f"{_no_cuda()}, but there is MPS"
    return torch.device("cpu"), f"{_no_cuda()}, and no MPS"


def _no_cuda() -> str:
    built = f"torch {torch.__version__}"
    return f"{built} is built without CUDA" if torch.version.cuda is None else f"{built} sees no CUDA GPU"


def choose_precision(choice: str, device: torch.device) -> torch.dtype:
    """The precision of matrix products for `bf16`, `fp32` or `auto`.

    `auto` takes bfloat16 where the hardware multiplies it, which is faster, and float32 elsewhere; it logs which.
    """
    if choice != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[choice]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        native = False  # some of Apple's GPUs emulate it
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    log.info(
        "precision: %s (auto: %s %s bfloat16)", "bf16" if native else "fp32", device, "has" if native else "has no"
    )
    return torch.bfloat16 if native else torch.float32


def describe(device: torch.device) -> str:
    """The device for result.json, with the GPU's name or the number of threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device) if device.type == "mps" else f"{device} ({torch.get_num_threads()} threads)"


def is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def has_graphs(device: torch.device) -> bool:
    """Whether a step on it can be captured as a CUDA graph."""
    return device.type == "cuda"


def widest_float(device: torch.device) -> torch.dtype:
    """The type to sum in: float64, except on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def stack_size(device: torch.device) -> int:
    """How many heads a stack should have at most."""
    return STACK_SIZE[device.type]


# Moving tensors


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device: itself where it is there already, else a copy.

    From the CPU to a CUDA GPU the copy goes through pinned memory, while the GPU is still at work on what came before.
    """
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fetch(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start copying a tensor to the CPU; the function returned waits for the copy and gives it."""
    if tensor.device.type != "cuda":
        here = tensor.cpu().contiguous()
        return lambda: here
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensor.device))

    def wait() -> torch.Tensor:
        done.synchronize()
        return copy

    return wait


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# Memory


def free_memory(device: torch.device) -> int | None:
    """Bytes that a tensor on the device could take; None for the CPU, where the system pages.

    The blocks that torch's allocator has cached count as free: it gives them back when it needs them.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return None


def release_memory(device: torch.device) -> None:
    """Give the allocator's cached blocks back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had too little memory. Libraries below torch raise RuntimeErrors of their own for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # cuBLAS, cuDNN 9, and cuDNN where no plan's workspace had room
    reasons = (
        *("CUDA error: out of memory", "MPS backend out of memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED"),
        "unable to find an engine",
    )
    return isinstance(error, RuntimeError) and any(reason in str(error) for reason in reasons)


def batch_size(device: torch.device, largest_layer: int) -> int:
    """Images a batch for a network in inference.

    largest_layer: numbers in the inputs and outputs of its largest layer, for one image.
    """
    numbers = LARGEST_LAYER[device.type]
    free = free_memory(device)
    if free is not None:
        numbers = min(numbers, free // (4 * SHARE_OF_FREE))  # of four bytes
    return max(1, min(MOST_IMAGES[device.type], numbers // largest_layer))


class Batches:
    """Applies a function to batches; where the device runs out of memory, they have half the size from then on."""

    def __init__(self, size: int, device: torch.device):
        self.size, self.device = size, device

    def __call__(self, function: Callable[[Any], T], items: Sequence[Any] | torch.Tensor) -> Iterator[T]:
        """The function's result for each slice of the items, in order.

        Raises what the function raises, out of memory with a single item among it.
        """
        start = 0
        while start < len(items):
            batch = items[start : start + self.size]
            try:
                result = function(batch)
            except RuntimeError as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
                self.size = (len(batch) + 1) // 2
                log.warning(
                    "out of memory on %s with %d at a time: going on with %d", self.device, len(batch), self.size
                )
            else:
                start += len(batch)
                yield result
                continue
            release_memory(self.device)  # here the error, whose frames hold memory, is gone


# Numbers


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute float32 products in float32. By default cuDNN's convolutions use TF32, which has 10 bits of mantissa."""
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends  # whose attributes torch's stubs lack
    kinds = [backends.cudnn.conv, backends.cuda.matmul]
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, value in zip(kinds, before, strict=True):
            kind.fp32_precision = value


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Where a GPU has a deterministic algorithm it is used, and float32 is exact: same seed, same numbers.

    Operations without one run all the same; README.md says which networks have them. The state of the process is as
    before afterwards.
    """
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    with exact_float32(device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have a deterministic implementation")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            settings.fill_uninitialized_memory = False  # none is read, and filling takes time
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            settings.fill_uninitialized_memory = fill


def rng_state(device: torch.device) -> torch.Tensor | None:
    """The state of the device's own generator; None for the CPU, whose generator is torch's default one."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else None


def set_rng_state(device: torch.device, state: torch.Tensor) -> None:
    """Put back what rng_state() gave on a device of the same kind."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
