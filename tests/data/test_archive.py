"""Archives of image folders: unpacked once into the cache; refused if a member is unsafe, or the archive damaged."""

import io
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections import namedtuple

import pytest
import torch
from test_image_folder import load, make, message

from tuner import InputError, cache, cache_files
from tuner.cache_files import Cache
from tuner.data.files import archive

CLASSES = {"pets/cat": 5, "pets/dog": 5}
SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
MODES = {"gz": "w:gz", "xz": "w:xz", "z2": "w:bz2", "ar": "w:"}


@pytest.fixture
def folder(tmp_path):
    root = make(tmp_path / "folder", CLASSES | {"__MACOSX/pets": 1, ".hidden": 1})
    (root / "pets/read.me").write_text("text")
    return root


def packed(folder, suffix=".zip"):
    """The archive FOLDER.SUFFIX."""
    path = folder.with_name(f"pets{suffix}")
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name in sorted(folder.rglob("*")):
                file.write(name, name.relative_to(folder))
    else:
        mode = "w:gz" if suffix == ".tgz" else "w:xz" if suffix == ".txz" else MODES[suffix[-2:]]
        with tarfile.open(path, mode) as file:
            file.add(folder, ".")
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_is_read_like_its_folder(folder, suffix, caplog):
    path, of_folder = packed(folder, suffix), load(folder)
    with caplog.at_level(logging.INFO):
        data = load(path)
    assert data.classes == of_folder.classes == ("cat", "dog")
    assert data.hashes == of_folder.hashes
    assert list(data.pool.names) == list(of_folder.pool.names)
    [unpacked] = [p for p in (path.parent / "cache/archives").iterdir() if p.suffix != ".lock"]
    files = sorted(p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file())
    assert files == [".key.json", *sorted(f"{name}/{i}.png" for name in CLASSES for i in range(5))]
    assert f"{path}: unpacking it into {unpacked}" in caplog.messages


def test_it_is_unpacked_once(folder, monkeypatch, caplog):
    path = packed(folder)
    first = load(path)
    monkeypatch.setattr(archive, "_unpack", lambda path, folder: pytest.fail("it was unpacked again"))
    [unpacked] = (path.parent / "cache/archives").glob("*[!k]")
    os.utime(unpacked, (1, 1))
    with caplog.at_level(logging.INFO):
        second = load(path)
    assert torch.equal(first.pool.images, second.pool.images)
    assert f"{path}: unpacked in {unpacked}" in caplog.messages
    assert unpacked.stat().st_mtime > 1  # the time of last use


def test_another_content_is_unpacked_again(folder):
    load(packed(folder))
    make(folder, {"pets/owl": 5})
    assert load(packed(folder)).classes == ("cat", "dog", "owl")


def test_it_is_listed_and_deleted_with_the_cache(folder, monkeypatch, capsys):
    path = packed(folder)
    load(path)
    (path.parent / f"cache/archives/.{'a' * 24}.1234.partial").mkdir()
    for options, word in (((), ""), (("--prune",), "deleted ")):
        monkeypatch.setattr(sys, "argv", ["cache", "--cache-dir", str(path.parent / "cache"), *options])
        cache.main()
        out = capsys.readouterr().out
        assert re.search(rf"(?m)^{word}[0-9a-f]{{24}} +\d kB  used 0.0 days ago  unpacked from {path}$", out)
        assert ("unfinished" in out) == (not word)
    assert [p.name for p in (path.parent / "cache/archives").glob("*[!k]")] == [f".{'a' * 24}.1234.partial"]
    assert load(path).classes == ("cat", "dog")


CHILD = """
import sys
from pathlib import Path
from tuner import cache_files

def write(folder):
    (folder / "a").write_text("half")
    print("writing", flush=True)
    sys.stdin.readline()
    (folder / "a").write_text("whole")

target = Path(sys.argv[1])
cache_files.obtain_folder(cache_files.Cache(target.parent.parent), target, write, {}, what="it")
"""


def test_one_process_unpacks_and_others_wait(tmp_path):
    target = tmp_path / "archives/x"
    words = [sys.executable, "-c", CHILD, target]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "writing\n"
        assert not target.exists()
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as other:
            child.stdin.write("go on\n")
            child.stdin.flush()
            assert other.wait() == child.wait() == 0
            assert other.stdout.read() == ""  # it wrote nothing
    assert (target / "a").read_text() == "whole"


def test_after_kill_9_it_is_unpacked_again(tmp_path):
    target = tmp_path / "archives/x"
    words = [sys.executable, "-c", CHILD, target]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "writing\n"
        child.kill()
    cache_files.obtain_folder(Cache(tmp_path), target, lambda folder: (folder / "a").touch(), {}, what="it")
    assert sorted(p.name for p in target.parent.iterdir()) == ["x", "x.lock"]


def tar_of(path, *members):
    with tarfile.open(path, "w") as file:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
            file.addfile(info, io.BytesIO(content))
    return path


def zip_of(path, *members):
    with zipfile.ZipFile(path, "w") as file:
        for name, mode, content in members:
            info = zipfile.ZipInfo("x")
            info.filename, info.external_attr = name, mode << 16
            file.writestr(info, content)
    return path


ELSEWHERE = "has a name that leads elsewhere or is not valid text"
NAMES = {
    "/a/x.png": ELSEWHERE,
    "../x.png": ELSEWHERE,
    "a/../../x.png": ELSEWHERE,
    "a\\..\\x.png": ELSEWHERE,
    "C:/x.png": ELSEWHERE,
    "c:x.txt": ELSEWHERE,
    "a/x\udcff.png": ELSEWHERE,
}


def refused(path):
    says = message(path)
    assert {p.suffix for p in (path.parent / "cache/archives").iterdir()} == {".lock"}
    return says.replace("\\udcff", "\udcff")


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere(tmp_path, name):
    says = f"ROOT is not unpacked, because its member {name!r} {NAMES[name]}: unpack it yourself, and set data.root to"
    tar = tar_of(tmp_path / "a.tar", ("a/1.png", tarfile.REGTYPE, b""), (name, tarfile.REGTYPE, b"x"))
    assert refused(tar).startswith(says.replace("\\udcff", "\udcff"))
    if name.isascii():
        path = zip_of(tmp_path / "a.zip", ("a/1.png", 0, b""), (name, 0, b"x"))
        assert refused(path).startswith(says)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) in (["a.tar"], ["a.tar", "a.zip"])


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_links_and_devices_of_a_tar_file(tmp_path, kind):
    path = tmp_path / "a.tar"
    if kind == tarfile.GNUTYPE_SPARSE:
        (tmp_path / "s.png").touch()
        os.truncate(tmp_path / "s.png", 10**6)
        subprocess.run(["tar", "-cSf", path, "--format=gnu", "s.png"], cwd=tmp_path, check=True)
    else:
        tar_of(path, ("a/s.png", kind, b""))
    assert "s.png' is a link, a device or a sparse file" in refused(path)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_of_a_zip_file(tmp_path, kind):
    path = zip_of(tmp_path / "a.zip", ("a/s.png", kind | 0o777, b"/etc/passwd"))
    assert "its member 'a/s.png' is a link or a device" in refused(path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a/1.png", "a/1.png"], "'a/1.png' is there twice"),
        (["a/1.png", "./a//1.png"], "1.png' is there twice"),
        (["a/1.png", "a"], "'a' is there twice"),
        (["a", "a/1.png"], "'a/1.png' lies in a file"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_are_there_twice(tmp_path, names, says):
    assert says in refused(tar_of(tmp_path / "a.tar", *((name, tarfile.REGTYPE, b"") for name in names)))
    assert says in refused(zip_of(tmp_path / "a.zip", *((name, 0, b"") for name in names)))


def test_an_encrypted_zip_file(tmp_path):
    path = zip_of(tmp_path / "a.zip", ("a/1.png", 0, b"x"))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    assert "its member 'a/1.png' is encrypted" in refused(path)


def test_too_many_members_and_bytes(folder, monkeypatch):
    path = packed(folder)
    monkeypatch.setattr(archive, "MOST_MEMBERS", 7)
    assert refused(path).startswith("ROOT has more than 7 members or 500.0 GB: if that is right, unpack it yourself")
    monkeypatch.undo()
    monkeypatch.setattr(archive, "MOST_BYTES", 500)
    assert "or 500 B: if that is right" in refused(path)


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_a_bomb_is_refused_before_the_disk_is_full(tmp_path, monkeypatch, suffix):
    root = make(tmp_path / "folder", {"a": 1})
    (root / "a/large.png").write_bytes(bytes(5_000_000))
    path, usage = packed(root, suffix), namedtuple("usage", "free")
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1_000_000))
    assert refused(path).startswith("the images of ROOT need more than the 1 MB that are free in")


def test_a_size_that_is_wrong_is_noticed(tmp_path):
    path = zip_of(tmp_path / "a.zip", ("a/1.png", 0, b"x" * 1000))
    content = path.read_bytes()
    path.write_bytes(content.replace((1000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    assert "is damaged or not an archive" in refused(path)


def test_a_header_of_a_tar_file_that_is_too_large(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("a/1.png")
        info.pax_headers = {"comment": "x" * 3 * 2**20}
        file.addfile(info)
    assert re.search(r"is damaged or not an archive \(a header of 3,\d+,\d+ bytes\)", refused(tmp_path / "a.tar.gz"))


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz", ".tar.bz2"])
@pytest.mark.parametrize("damage", ["half", "short", "empty", "text", "middle"])
def test_damaged_archives(folder, suffix, damage):
    path = packed(folder, suffix)
    content = path.read_bytes()
    if damage == "middle":  # of a tar file that is not compressed, the header of a member
        at = content.index(b"pets/dog/3") if suffix == ".tar" else len(content) // 2
        content = content[:at] + bytes(byte ^ 0xFF for byte in content[at : at + 64]) + content[at + 64 :]
    changed = {
        "half": content[: len(content) // 2],
        "short": content[: -len(content) // 8],
        "empty": b"",
        "text": b"no " * 999,
    }
    path.write_bytes(changed.get(damage, content))
    says = refused(path)
    assert re.fullmatch(r"ROOT is damaged or not an archive \(.+\): get it again, or unpack it yourself, .*", says)


@pytest.mark.parametrize("name", ["a.rar", "a.7z", "a.RAR", "a.png.gz", "a.tar.zst"])
def test_other_archives_are_not_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(b"Rar!")
    known = ".zip, .tar, .tar.gz, .tgz, .tar.xz, .txz, .tar.bz2, .tbz2, .tbz"
    assert message(tmp_path / name).startswith(f"data.root=ROOT: of archives, {known} are read; unpack it yourself")


def test_an_archive_without_images(tmp_path):
    path = zip_of(tmp_path / "a.zip", ("a/1.txt", 0, b""), ("a/101_ObjectCategories.tar.gz", 0, b""))
    assert refused(path) == (
        "there is no image in ROOT; it has another archive, a/101_ObjectCategories.tar.gz: unpack it yourself, and set "
        "data.root to the folder"
    )


def test_a_cache_that_cannot_be_written(folder):
    path = packed(folder)
    (path.parent / "cache").touch()
    with pytest.raises(InputError, match=r"^the cache folder .*/cache/archives cannot be written \(Not a directory\)"):
        load(path)


def test_a_run_trains_on_an_archive_and_is_evaluated(folder, command, call):
    path = packed(folder)
    arguments = ("data=image_folder", f"data.root={path}", "data.size=16", "model=tiny", "epochs=1", "plots=false")
    code, said = command(*arguments, "hydra.run.dir=run")
    assert code == 0, said
    assert "only pets/ in" in said
    code, _, said = call("evaluate", "run")
    assert code == 0, said
