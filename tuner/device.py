"""Every decision about devices: CPU, CUDA and Apple's MPS.

No other module names a kind of device or compares two devices, except for the CUDA calls in training/cuda_graph.py.
Devices always have the index that tensors report: `cuda:0`, never `cuda`. The MPS code follows torch's documentation
and has never been run.
"""

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from tuner import InputError

log = logging.getLogger(__name__)
T = TypeVar("T")
# Without this variable cuBLAS may sum in any order. cuBLAS reads it at the first product. It has no cost unless
# deterministic algorithms are requested.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CHOICES = "auto, cpu, cuda, cuda:N or mps"
# Limits for a batch of a frozen network, measured (benchmarks/README.md): numbers in the inputs and outputs of its
# largest layer, and images.
LARGEST_LAYER = {"cpu": 2**25, "cuda": 2**30, "mps": 2**27}
MOST_IMAGES = {"cpu": 256, "cuda": 8192, "mps": 1024}
SHARE_OF_FREE = (
    16  # the largest layer may take 1/16 of the free memory, because blocks with branches hold several layers
)
# Cached features per batch for trained heads: the kernels of a small batch take a GPU less time than their launch.
HEAD_ROWS = {"cpu": 256, "cuda": 4096, "mps": 256}
STACK_SIZE = {"cpu": 8, "cuda": 64, "mps": 8}  # heads per stack; larger stacks are not faster (benchmarks/README.md)


def choose_device(choice: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`, with its index as tensors report it.

    `auto` takes CUDA, then MPS, then the CPU, and logs which and why.
    Raises InputError for an unknown device and for one that this machine does not have.
    """
    gpus = _count_gpus()
    mps = torch.backends.mps.is_available()
    if choice == "auto":
        device, why = _best(gpus, mps)
        log.info("device: %s (auto: %s)", device, why)
        return device
    kind, _, index = str(choice).partition(":")
    is_valid = kind in ("cpu", "cuda", "mps") and re.fullmatch("[0-9]{0,4}", index)
    if not is_valid or (kind == "cpu" and index):
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


def cuda_devices() -> int:
    """The number of CUDA GPUs. CUDA is not started by it, so CUDA_VISIBLE_DEVICES may still be set."""
    return int(torch.cuda.device_count())


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

    `auto` takes bfloat16 if the hardware multiplies it natively, else float32, and logs the choice.
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
    """A description for result.json: the device with the name of the GPU or the number of threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device) if device.type == "mps" else f"{device} ({torch.get_num_threads()} threads)"


def is_cpu(device: torch.device) -> bool:
    """Whether this is the CPU, which runs synchronously and needs no transfers."""
    return device.type == "cpu"


def has_graphs(device: torch.device) -> bool:
    """Whether a training step on this device can be captured as a CUDA graph."""
    return device.type == "cuda"


def has_cudnn(device: torch.device) -> bool:
    """Whether this device has cuDNN, with its fused convolutions."""
    return device.type == "cuda" and torch.version.hip is None and torch.backends.cudnn.is_available()


def widest_float(device: torch.device) -> torch.dtype:
    """The type for sums: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def stack_size(device: torch.device) -> int:
    """The largest useful number of heads in a stack."""
    return STACK_SIZE[device.type]


def head_rows(device: torch.device) -> int:
    """Images per batch when heads score cached features."""
    return HEAD_ROWS[device.type]


# Moving tensors


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device: the same tensor if it is already there, else a copy.

    A copy from the CPU to a CUDA GPU goes through pinned memory, so it overlaps with the GPU's earlier work.
    """
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fetch(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start copying a tensor to the CPU. Returns a function that waits for the copy and returns it."""
    if tensor.device.type != "cuda":
        on_cpu = tensor.cpu().contiguous()
        return lambda: on_cpu
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensor.device))

    def wait() -> torch.Tensor:
        done.synchronize()
        return copy

    return wait


def wait(device: torch.device) -> None:
    """Block until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# Memory


def free_memory(device: torch.device) -> int | None:
    """Bytes available for tensors on the device; None for the CPU, whose memory the operating system pages.

    Blocks cached by torch's allocator count as free, because it reuses them.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return None


def total_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory, or of the machine's for the CPU; None if the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def release_memory(device: torch.device) -> None:
    """Return the allocator's cached blocks to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means too little device memory. Libraries below torch raise other RuntimeErrors for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # of CUDA, MPS, cuBLAS and cuDNN 9; the last one: no workspace of cuDNN fits into memory
    reasons = (
        *("CUDA error: out of memory", "MPS backend out of memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED"),
        "unable to find an engine",
    )
    return isinstance(error, RuntimeError) and any(reason in str(error) for reason in reasons)


def batch_size(device: torch.device, largest_layer: int) -> int:
    """Images per batch for a network in inference.

    largest_layer: numbers in the inputs and outputs of its largest layer, per image.
    """
    numbers = LARGEST_LAYER[device.type]
    free = free_memory(device)
    if free is not None:
        numbers = min(numbers, free // (4 * SHARE_OF_FREE))  # four bytes each
    return max(1, min(MOST_IMAGES[device.type], numbers // largest_layer))


class Batches:
    """Applies a function to batches. When the device runs out of memory, it halves the batch size permanently."""

    def __init__(self, size: int, device: torch.device):
        self.size, self.device = size, device

    def __call__(self, function: Callable[[Any], T], items: Sequence[Any] | torch.Tensor) -> Iterator[T]:
        """Yields the function's result for each batch of items, in order.

        Raises the errors of the function; an out-of-memory error only for a batch of one item.
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
                    "out of memory on %s with batches of %d: continuing with %d", self.device, len(batch), self.size
                )
            else:
                start += len(batch)
                yield result
                continue
            release_memory(self.device)  # after the except block, because the error's frames hold memory


# Numbers


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute float32 products in float32. By default cuDNN's convolutions use TF32, with 10 bits of mantissa."""
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends  # torch's stubs lack these attributes
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
    """Use deterministic algorithms and exact float32 on a GPU: the same seed then gives the same numbers.

    Operations without a deterministic algorithm still run; docs/explanation/devices.md lists the networks that have
    some. The settings of the process are restored afterwards.
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
            settings.fill_uninitialized_memory = (
                False  # uninitialised memory is never read here, and filling it takes time
            )
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
    """Restore a state that rng_state() returned on a device of the same kind."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
