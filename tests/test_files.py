"""Recognising a full disk by the errors of different libraries."""

from pathlib import Path

import pytest
import torch

from tuner.files import no_space

FULL = "[Errno 28] No space left on device"


def test_a_full_disk():
    with pytest.raises(OSError, match="No space") as caught:
        Path("/dev/full").write_text("more")
    assert no_space(caught.value) == FULL


def test_a_full_disk_behind_another_error():
    with pytest.raises((OSError, RuntimeError)) as caught, Path("/dev/full").open("wb", buffering=0) as file:
        torch.save({"weight": torch.zeros(100_000)}, file)  # its message may be about an unexpected position
    assert no_space(caught.value) == FULL


def ring():
    error, other = ValueError("a"), ValueError("b")
    error.__cause__, other.__cause__ = other, error
    return error


OTHERS = [
    None,
    ValueError("full of errors"),
    torch.OutOfMemoryError("CUDA out of memory"),
    OSError("Quota exceeded"),
    ring(),
]


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors(error):
    assert no_space(error) is None
