"""Image files become one array in the cache. They are decoded once, and again when anything about them changes."""

import errno
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tuner import InputError
from tuner.cache_files import Cache
from tuner.data import Samples, digests
from tuner.data.files import image_array
from tuner.data.files.image_array import Files, How
from tuner.data.files.image_file import read

SHAPE = (3, 8, 8)


def draw(path, seed=0):
    """Write an image of noise as BMP, so that all files have the same size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def files(tmp_path):
    """Nine images of three classes, in an arbitrary order."""
    names = [f"{i % 2}/{i}.bmp" for i in (5, 3, 8, 1, 0, 7, 2, 6, 4)]
    for i, name in enumerate(names):
        draw(tmp_path / "root" / name, seed=i)
    return Files(tmp_path / "root", names, torch.tensor([2, 0, 1, 1, 0, 2, 2, 1, 0]))


def load(files, **options) -> tuple[Samples, torch.Tensor]:
    defaults = {"size": 8, "fit": "crop", "cache": Cache(files.root.parent / "cache"), "skip_broken": False}
    [loaded] = image_array.load([files], **defaults | options)
    return loaded


def remains(files):
    """The files in the cache, except locks."""
    return sorted(p for p in (files.root.parent / "cache" / "images").iterdir() if p.suffix != ".lock")


def expected(files, shape=SHAPE, fit="crop"):
    return torch.stack([read(files.root / name, shape, fit) for name in files.names])


def test_images_labels_and_names_stay_in_order(files):
    for _ in range(2):  # freshly decoded, and cached
        samples, rows = load(files)
        assert torch.equal(samples.images, expected(files))
        assert torch.equal(samples.labels, files.labels)
        assert samples.names == files.names
        assert rows.tolist() == list(range(9))
        assert rows.dtype == torch.int64
        assert torch.equal(samples.digests, digests(expected(files)))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("at_a_time", [1, 2, 64])
def test_any_number_of_threads_keeps_the_order(files, monkeypatch, threads, at_a_time):
    monkeypatch.setattr(image_array, "CHUNK", at_a_time * 3 * 8 * 8)
    (files.root / files.names[4]).write_text("no image")
    parts = list(image_array.decode(files, How(SHAPE, "crop"), threads))
    assert len(parts) == -(-9 // at_a_time)
    assert torch.equal(
        torch.cat([part.images for part in parts]), expected(files.rows(torch.arange(9)[[*range(4), *range(5, 9)]]))
    )
    assert [row for part in parts for row, _ in part.broken] == [4]


def test_each_part_has_its_own_array(files):
    first, second = files.rows(torch.tensor([8, 0, 3])), files.rows(torch.tensor([1]))
    loaded = image_array.load(
        [first, second], size=8, fit="crop", cache=Cache(files.root.parent / "cache"), skip_broken=False
    )
    assert len(remains(files)) == 2
    for part, (samples, rows) in zip((first, second), loaded, strict=True):
        assert torch.equal(samples.images, expected(part))
        assert torch.equal(samples.labels, part.labels)
        assert samples.names == part.names
        assert len(rows) == len(part.names)


def test_the_second_call_decodes_nothing(files, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "tuner"):
        first, _ = load(files)
    [path] = remains(files)
    decoding, done = caplog.messages
    assert decoding == f"9 images of {files.root}: decoding them into {path} (2 kB)"
    assert re.fullmatch(r"images decoded in \d s \(\d+ images/s\)", done)
    os.utime(path, (1, 1))
    caplog.clear()
    monkeypatch.setattr(image_array.image_file, "decode", None)
    with caplog.at_level(logging.INFO, "tuner"):
        second, _ = load(files)
    assert caplog.messages == [f"9 images of {files.root}: cached in {path} (2 kB)"]
    assert path.stat().st_mtime > 1  # the time of last use
    assert torch.equal(second.images, first.images)
    assert torch.equal(second.stored_digests, first.stored_digests)


def test_a_link_to_the_folder_shares_its_array(files, tmp_path):
    load(files)
    (tmp_path / "link").symlink_to(files.root)
    load(Files(tmp_path / "link", files.names, files.labels))
    assert len(remains(files)) == 1


def another_content(files):
    """Other pixels; the name, size and modification time are the same, as some tools leave them."""
    path = files.root / files.names[3]
    before = path.stat()
    draw(path, seed=99)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    return files


def another_root(files):
    """Another folder whose files have the same names, sizes and modification times."""
    root = files.root.parent / "other"
    shutil.copytree(files.root, root)
    for i, name in enumerate(files.names):
        draw(root / name, seed=100 + i)
        shutil.copystat(files.root / name, root / name)
    return Files(root, files.names, files.labels)


CHANGES = {
    "content": (another_content, {}),
    "root": (another_root, {}),
    "time": (lambda files: os.utime(files.root / files.names[0], (5, 5)) or files, {}),
    "order": (lambda files: files.rows(torch.arange(9).flip(0)), {}),
    "fewer": (lambda files: files.rows(torch.arange(8)), {}),
    "size": (lambda files: files, {"size": 7}),
    "shape": (lambda files: files, {"size": [3, 8, 9]}),
    "channels": (lambda files: files, {"size": [1, 8, 8]}),
    "fit": (lambda files: files, {"fit": "pad"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_leads_to_a_new_array(files, what):
    change, options = CHANGES[what]
    load(files)
    changed = change(files)
    samples, _ = load(changed, **options)
    assert len(remains(files)) == 2
    size = options.get("size", 8)
    shape = tuple(size) if isinstance(size, list) else (3, size, size)
    assert torch.equal(samples.images, expected(changed, shape, options.get("fit", "crop")))


def test_labels_are_not_part_of_the_array(files):
    load(files)
    samples, _ = load(Files(files.root, files.names, files.labels.flip(0)))
    assert len(remains(files)) == 1
    assert torch.equal(samples.labels, files.labels.flip(0))


@pytest.mark.parametrize("size", [[1, 20, 30], (3, 5, 2), [3, 1, 1]])
def test_sizes_of_three_numbers(files, size):
    samples, _ = load(files, size=size)
    assert torch.equal(samples.images, expected(files, tuple(size)))


@pytest.mark.parametrize(
    "size",
    [
        *(0, -1, 1.5, None, True, "8", "333", [], [8], [8, 8], [3, 8, 8, 8]),
        *([2, 8, 8], [3, 0, 8], [3, 8, -1], [3, 8, 8.0], [3.0, 8, 8], [True, 8, 8], [3, True, 8]),
    ],
)
def test_wrong_sizes(files, size):
    with pytest.raises(InputError) as error:
        load(files, size=size)
    assert str(error.value) == (
        f"data.size={size} must be a whole number of pixels, at least 1, or [channels, height, width] with 1 (gray) "
        "or 3 (RGB) channels"
    )
    assert not (files.root.parent / "cache").exists()


def test_wrong_fit(files):
    with pytest.raises(InputError, match=r"^data\.fit=zoom must be one of crop, pad, stretch$"):
        load(files, fit="zoom")


TEXT = "its content is not an image, despite its name"


def spoil(files, rows):
    for row in rows:
        (files.root / files.names[row]).write_text("no image")


def test_broken_files_are_reported_together(files):
    (files.root / files.names[7]).unlink()
    spoil(files, [2, 4])
    parts = [files.rows(torch.arange(5)), files.rows(torch.arange(5, 9))]
    for _ in range(2):  # freshly decoded, and cached
        with pytest.raises(InputError) as error:
            image_array.load(parts, size=8, fit="crop", cache=Cache(files.root.parent / "cache"), skip_broken=False)
        assert str(error.value) == (
            "3 files cannot be used as images: repair or remove them, or skip them with data.skip_broken=true: "
            f"{files.names[2]} ({TEXT}); {files.names[4]} ({TEXT}); {files.names[7]} (No such file or directory)"
        )


@pytest.mark.parametrize(("count", "more"), [(10, ""), (11, "; ... and 1 more"), (13, "; ... and 3 more")])
def test_ten_broken_files_are_listed(files, count, more):
    missing = Files(files.root, [f"{i}.png" for i in range(count)], torch.zeros(count, dtype=torch.int64))
    listed = "; ".join(f"{i}.png (No such file or directory)" for i in range(10))
    with pytest.raises(InputError, match=f"^{count} files .*{re.escape(f': {listed}{more}')}$"):
        load(missing)


def test_a_long_name_is_shortened(files):
    long = Files(files.root, ["a" * 5000], torch.zeros(1, dtype=torch.int64))
    with pytest.raises(InputError, match=r"^1 file cannot be used .*: a{200} \(File name too long\)$"):
        load(long)


@pytest.mark.parametrize("broken", [[0], [8], [1, 2, 6], [*range(9)]])
def test_broken_files_can_be_skipped(files, caplog, broken):
    readable = [row for row in range(9) if row not in broken]
    images = expected(files)[readable]
    spoil(files, broken)
    for _ in range(2):  # freshly decoded, and cached
        caplog.clear()
        samples, rows = load(files, skip_broken=True)
        assert rows.tolist() == readable
        assert torch.equal(samples.images, images)
        assert torch.equal(samples.labels, files.labels[readable])
        assert torch.equal(samples.digests, digests(images))
        assert samples.names == [files.names[row] for row in readable]
        [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        n = "1 file cannot be used as an image" if len(broken) == 1 else f"{len(broken)} files cannot be used as images"
        listed = "; ".join(f"{files.names[row]} ({TEXT})" for row in broken)
        assert warning == f"{n}, skipped (data.skip_broken=true): {listed}"


def test_a_repaired_file_is_noticed(files):
    spoil(files, [3])
    with pytest.raises(InputError, match="1 file cannot be used"):
        load(files)
    draw(files.root / files.names[3], seed=50)
    assert torch.equal(load(files)[0].images, expected(files))


def flip(at):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[at(content) if callable(at) else at] ^= 0x04
        path.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), id="a byte short"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:900]), id="truncated"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:5]), id="truncated header"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes() + b"\0"), id="a byte more"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"garbage " * 9 + path.read_bytes()[72:]), id="garbage as header"),
        pytest.param(lambda path: path.write_text("no images\n" * 1000), id="text"),
        pytest.param(flip(2), id="length of the header"),
        pytest.param(flip(lambda content: content.index(b'"sha256"') + 12), id="checksum"),
        pytest.param(flip(lambda content: content.index(b'"shape"') + 10), id="number of images"),
        pytest.param(flip(-1), id="list of broken files"),
        pytest.param(flip(-20), id="digests"),
    ],
)
def test_a_damaged_array_is_decoded_again_with_a_warning(files, caplog, damage):
    load(files)
    [path] = remains(files)
    damage(path)
    samples, _ = load(files)
    assert torch.equal(samples.images, expected(files))
    assert torch.equal(samples.stored_digests, digests(expected(files)))
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert re.fullmatch(f"the array of images {path} is damaged \\(.+\\): decoding it again", warning)
    caplog.clear()
    with caplog.at_level(logging.INFO, "tuner"):
        load(files)
    assert [r.getMessage().partition(" (")[0] for r in caplog.records] == [
        f"9 images of {files.root}: cached in {path}"
    ]


@pytest.mark.parametrize("skip_broken", [False, True])
def test_a_temporary_read_error_leaves_no_array(files, monkeypatch, skip_broken):
    opened, unlucky = Image.open, files.root / files.names[6]

    def fail(path, **_options):
        if path == unlucky:
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, **_options)

    monkeypatch.setattr(Image, "open", fail)
    text = f"^{unlucky} cannot be read now \\(Input/output error\\): try again$"
    with pytest.raises(InputError, match=text):
        load(files, skip_broken=skip_broken)
    assert remains(files) == []
    monkeypatch.undo()
    assert torch.equal(load(files)[0].images, expected(files))


# Run in a child process: decode the same files, two at a time, and stop after the first two.
CHILD = """
import sys, time
import torch
from pathlib import Path
from tuner.cache_files import Cache
from tuner.data.files import image_array

decode = image_array.decode

def slowly(*args):
    for part in decode(*args):
        yield part
        print("stopped", flush=True)
        time.sleep(60)

image_array.decode, image_array.CHUNK = slowly, 2 * 3 * 8 * 8
files = image_array.Files(Path(sys.argv[1]), sys.argv[3:], torch.zeros(9, dtype=torch.int64))
image_array.load([files], size=8, fit="crop", cache=Cache(Path(sys.argv[2])), skip_broken=False)
"""


def test_after_kill_9_the_next_call_decodes_again(files):
    words = [sys.executable, "-c", CHILD, files.root, files.root.parent / "cache", *files.names]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "stopped\n"
        child.kill()
    [left] = remains(files)
    assert left.suffix == ".partial"
    assert torch.equal(load(files)[0].images, expected(files))
    [path] = remains(files)  # the leftover is gone
    assert path.suffix == ".safetensors"


def test_not_enough_disk_space(files, monkeypatch):
    usage = shutil.disk_usage(files.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000))
    with pytest.raises(InputError, match=r"^the images need 2 kB and .* has 1 kB free; .*, choose smaller images, or"):
        load(files)
    assert remains(files) == []


def test_images_are_memory_mapped(files):
    for _ in range(2):  # freshly decoded, and cached
        samples, _ = load(files)
        [path] = remains(files)
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
        ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
        assert any(start <= samples.images.data_ptr() < end for start, end in ranges)
