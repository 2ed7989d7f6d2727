"""Recognising a disk that cannot be written by the errors of different libraries."""

import errno
import os
import sqlite3
from pathlib import Path

import pytest
import torch

from tuner.files import disk_error

FULL = "[Errno 28] No space left on device"


def test_a_full_disk():
    with pytest.raises(OSError, match="No space") as caught:
        Path("/dev/full").write_text("more")
    assert disk_error(caught.value) == FULL


def test_a_full_disk_behind_another_error():
    with pytest.raises((OSError, RuntimeError)) as caught, Path("/dev/full").open("wb", buffering=0) as file:
        torch.save({"weight": torch.zeros(100_000)}, file)  # its message may be about an unexpected position
    assert disk_error(caught.value) == FULL


def ring():
    error, other = ValueError("a"), ValueError("b")
    error.__cause__, other.__cause__ = other, error
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, os.strerror(errno.EROFS), "metrics.csv"),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        sqlite3.OperationalError("attempt to write a readonly database"),
        sqlite3.OperationalError("disk I/O error"),
    ],
    ids=str,
)
def test_a_disk_that_cannot_be_written(error):
    assert disk_error(error) == str(error)


OTHERS = [
    None,
    ValueError("full of errors"),
    torch.OutOfMemoryError("CUDA out of memory"),
    OSError("Quota exceeded"),
    ring(),
]


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors(error):
    assert disk_error(error) is None
