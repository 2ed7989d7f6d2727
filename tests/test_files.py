"""Links that somebody has planted; recognising a disk that cannot be written by the errors of different libraries."""

import errno
import os
import secrets
import sqlite3
from pathlib import Path

import pytest
import torch

from tuner import InputError
from tuner.files import appending, disk_error, replacing, subfolder

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


# Links that somebody has planted


@pytest.fixture
def victim(tmp_path):
    """A file that must not change, and a folder in which somebody plants links to it."""
    path = tmp_path / "victim.txt"
    path.write_text("precious")
    (tmp_path / "run").mkdir()
    yield path
    assert path.read_text() == "precious"


def test_a_link_is_replaced_and_not_followed(victim):
    path = victim.parent / "run" / "result.json"
    path.symlink_to(victim)
    with replacing(path) as file:
        file.write(b"{}")
    assert (path.read_text(), path.is_symlink()) == ("{}", False)


@pytest.mark.parametrize("name", [".result.json.{pid}.partial", ".result.json.0a0a0a0a.partial"])
def test_a_link_under_the_temporary_name_is_not_followed(victim, monkeypatch, name):
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0a0a0a0a")  # as if it could be guessed
    folder = victim.parent / "run"
    (folder / name.format(pid=os.getpid())).symlink_to(victim)
    try:
        with replacing(folder / "result.json") as file:
            file.write(b"{}")
    except FileExistsError:
        assert not (folder / "result.json").exists()


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a") as file:
            file.write(b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_longest_name(tmp_path):
    path = tmp_path / ("a" * 251 + ".png")
    with replacing(path) as file:
        file.write(b"1")
    assert path.read_bytes() == b"1"


def test_nothing_is_appended_to_the_target_of_a_link(victim):
    link = victim.parent / "run" / "metrics.csv"
    link.symlink_to(victim)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        appending(link)
    with appending(victim.parent / "run" / "other.csv") as file:
        file.write("1\n")
    assert (victim.parent / "run" / "other.csv").read_text() == "1\n"


def test_a_folder_that_is_a_link_is_refused(victim, tmp_path):
    (tmp_path / "run" / "plots").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"plots is a link, and files are written into it: remove the link$"):
        subfolder(tmp_path / "run", "plots")
    assert subfolder(tmp_path / "run", "conf").is_dir()
