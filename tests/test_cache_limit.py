"""A cache with a limit: which files are removed to make room for a new one, and which stay."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import TINY
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

from tuner import InputError, cache_files
from tuner.cache_files import Cache, Entry, Kind, evict, obtain, obtain_folder
from tuner.config import of_run
from tuner.data import image_folder
from tuner.rules import SIZE, as_bytes

BANK = Kind("the feature bank", "the features", "computing", "computed", "set model.pool")
SIZES = [
    ("1B", 1),
    ("500MB", 500 * 10**6),
    ("20GB", 20 * 10**9),
    ("1.5 gb", 15 * 10**8),
    ("2 kB", 2000),
    ("1TB", 10**12),
]
NO_SIZES = [
    "",
    "20",
    "GB",
    "-1GB",
    "0GB",
    "0.1B",
    "1e3GB",
    "1_0GB",
    "20GiB",
    "20G",
    "nanGB",
    "\u0661GB",
    " 1GB",
    "1GB\n",
]
NO_SIZES += ["9" * 400 + "GB", "a" * 100_000, 20, 20.5, True, ["20GB"], {}, b"20GB"]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_a_size(text, size):
    SIZE.check("cache_limit", text)
    assert as_bytes(text) == size


@pytest.mark.parametrize("value", NO_SIZES, ids=lambda value: str(value)[:20])
def test_other_values_are_refused(value):
    with pytest.raises(
        InputError, match=r"(?s)^data\.cache_limit=.* must be a size with its unit, such as 500MB or 20GB"
    ):
        Cache.of("cache", value, "data.")


def test_null_is_no_limit():
    assert Cache.of("~", None) == Cache(Path.home(), None)


def key(name):
    return hashlib.sha256(name.encode()).hexdigest()[:24]


@pytest.fixture
def put(tmp_path):
    """A function that puts a file of 1,000 bytes, unused for so many days, into the cache. It gives the path."""

    def put(name, days, folder="banks", form="{}.safetensors"):
        path = tmp_path / folder / form.format(key(name))
        path.parent.mkdir(exist_ok=True)
        if path.suffix:
            path.write_bytes(bytes(1000))
        else:
            path.mkdir()
            (path / cache_files.KEY).write_text("{}")
            (path / "a.png").write_bytes(bytes(998))
        os.utime(path, (time.time() - days * 86400,) * 2)
        return path

    return put


def write(folder, limit, name="new", size=1000):
    """Write a file of `size` bytes into the cache, through obtain."""
    path = folder / "banks" / f"{key(name)}.safetensors"
    content = obtain(
        Cache(folder, limit),
        path,
        BANK,
        Path.read_bytes,
        lambda file: file.write(b"x" * size),
        what="features",
        count=1,
        size=size,
    )
    assert content == b"x" * size
    return path


def test_the_longest_unused_are_removed_until_the_new_one_fits(tmp_path, put, caplog):
    ages = {"a": 3, "b": 40, "c": 5.5, "d": 0}
    paths = {name: put(name, days, "images" if name == "c" else "banks") for name, days in ages.items()}
    with caplog.at_level(logging.INFO):
        new = write(tmp_path, 3000)
    assert [name for name, path in paths.items() if path.exists()] == ["a", "d"]
    assert new.exists()
    assert [line for line in caplog.messages if "removed" in line] == [
        f"removed {paths['b'].name} (1 kB, used 40.0 days ago) to make room for the features: cache_limit=3 kB",
        f"removed {paths['c'].name} (1 kB, used 5.5 days ago) to make room for the features: cache_limit=3 kB",
    ]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("limit", [None, 3000])
def test_nothing_is_removed_without_need(tmp_path, put, limit):
    paths = [put("a", 30), put("b", 40)]
    write(tmp_path, limit)
    assert all(path.exists() for path in paths)


def test_reading_a_file_removes_nothing_and_makes_it_the_latest(tmp_path, put):
    first = write(tmp_path, None, "first")
    os.utime(first, (1, 1))
    other = put("other", 3)
    write(tmp_path, 1, "first")  # it is there
    assert other.exists()
    write(tmp_path, 2000, "second")
    assert (first.exists(), other.exists()) == (True, False)


def test_a_damaged_file_makes_room_for_its_own_successor(tmp_path, put):
    old, path = put("old", 30), put("new", 40)
    obtain(Cache(tmp_path, 2000), path, BANK, _not_zeros, partial(_put, b"1"), what="it", count=1, size=1000)
    assert old.exists()
    assert path.read_bytes() == b"1"


def _not_zeros(path):
    if not any(path.read_bytes()):
        raise ValueError("only zeros")
    return path.read_bytes()


def _put(content, file):
    file.write(content)


def test_what_is_larger_than_the_limit_is_written_with_one_warning(tmp_path, put, caplog):
    old = put("old", 1)
    new = write(tmp_path, 1500, size=2000)
    assert (new.exists(), old.exists()) == (True, False)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "the cache exceeds cache_limit=2 kB: the features need 2 kB; raise the limit, or set model.pool"
    ]


def test_a_file_that_this_process_has_mapped_stays(tmp_path, caplog):
    path = write_tensor(tmp_path, "mapped")
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor("x")
    write(tmp_path, 1500)
    assert path.exists()
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == (
        "the cache exceeds cache_limit=2 kB: the features need 1 kB, and others that cannot be removed now take 4 kB; "
        "raise the limit, or set model.pool"
    )
    assert tensor.sum() == 1000
    del tensor, file
    write(tmp_path, 1500, "next")
    assert not path.exists()


def write_tensor(folder, name):
    path = folder / "banks" / f"{key(name)}.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(save({"x": torch.ones(1000)}))
    os.utime(path, (1, 1))
    return path


READER = """
import sys
from safetensors import safe_open

with safe_open(sys.argv[1], framework="pt") as file:
    tensor = file.get_tensor("x")
print("mapped", flush=True)
sys.stdin.readline()
print(tensor.sum().item())
"""


def test_a_reader_in_another_process_keeps_what_it_has_mapped(tmp_path):
    path = write_tensor(tmp_path, "mapped")
    words = [sys.executable, "-c", READER, path]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "mapped\n"
        write(tmp_path, 1500)
        assert not path.exists()
        assert reader.communicate("go on\n")[0] == "1000.0\n"


@pytest.mark.parametrize(
    ("folder", "form", "days", "stays"),
    [
        ("banks", ".{}.safetensors.0a1b2c3d.partial", 0.9, True),
        ("banks", ".{}.safetensors.0a1b2c3d.partial", 1.1, False),
        ("archives", "{}", 0.9, True),  # another run may be decoding its images
        ("archives", "{}", 1.1, False),
        ("archives", ".{}.0a1b2c3d.partial", 0.9, True),
        ("images", "{}.safetensors", 0.9, False),
    ],
)
def test_what_others_may_be_writing_or_reading_stays_for_a_day(tmp_path, put, folder, form, days, stays):
    path = put("old", days, folder, form)
    write(tmp_path, 1500)
    assert path.exists() == stays


@pytest.mark.parametrize("form", ["{}.safetensors", ".{}.safetensors.0a1b2c3d.partial"])
def test_a_file_that_another_process_is_writing_stays(tmp_path, put, form):
    path = put("old", 40, form=form)
    with FileLock(path.with_name(f"{key('old')}.lock")):
        write(tmp_path, 1500)
        assert path.exists()
    write(tmp_path, 1500, "next")
    assert not path.exists()


def test_what_others_have_put_there_stays(tmp_path, put):
    """Somebody's folder may have an `images` of its own."""
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(5000))
    kept = [put("a", 40, "other"), put("b", 40, form="my-{}.safetensors"), put("c", 40, form="{}.png")]
    (tmp_path / "images" / key("folder")).mkdir(parents=True)
    (tmp_path / "images" / key("folder") / "cat.png").write_bytes(bytes(5000))
    (tmp_path / "banks" / f"{key('link')}.safetensors").symlink_to(victim)
    gone = put("d", 40)
    removed, left = evict(tmp_path, 0)
    assert [entry.path for entry in removed] == [gone]
    assert left == 0
    assert all(path.exists() for path in (*kept, victim, tmp_path / "images" / key("folder") / "cat.png"))


def test_a_file_used_since_it_was_listed_stays(tmp_path, put):
    path = put("old", 40)
    assert not cache_files._remove(Entry(path, 1000, path.stat().st_mtime - 1))
    assert path.exists()


def test_what_cannot_be_removed_stays(closed):
    folder, close = closed
    path = folder / "banks" / f"{key('a')}.safetensors"
    path.parent.mkdir()
    path.write_bytes(bytes(1000))
    path.parent.chmod(0o555)
    (folder / "other").mkdir()
    close(folder / "other")
    assert evict(folder, 0) == ([], 1000)
    assert path.exists()


EVICTING = """
import sys
from pathlib import Path
from tuner.cache_files import evict

print("ready", flush=True)
sys.stdin.readline()
removed, left = evict(Path(sys.argv[1]), 0)
print(len(removed), left)
"""


def test_processes_that_remove_at_once_share_the_work(tmp_path, put):
    for i in range(300):
        put(str(i), 40, "archives" if i % 10 == 0 else "banks", "{}" if i % 10 == 0 else "{}.safetensors")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([sys.executable, "-c", EVICTING, tmp_path], **pipes) for _ in range(3)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    outputs = [child.communicate()[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert sum(int(removed) for removed, _ in outputs) == 300
    assert cache_files.entries(tmp_path) == []


def test_a_file_that_is_removed_while_it_is_read_is_written_again(tmp_path):
    path = write(tmp_path, None)

    def read(path):
        if path.read_bytes() == b"x" * 1000:
            path.unlink()
            raise RuntimeError("unable to open file in read-only mode")  # as torch does
        return path.read_bytes()

    again = obtain(Cache(tmp_path), path, BANK, read, partial(_put, b"1"), what="it", count=1, size=1)
    assert again == b"1"


def test_an_archive_makes_room_for_itself(tmp_path, put, caplog):
    old, target = put("old", 2), tmp_path / "archives" / key("new")
    with caplog.at_level(logging.INFO):
        obtain_folder(
            Cache(tmp_path, 1500), target, lambda folder: (folder / "a").write_bytes(bytes(1400)), {}, what="it"
        )
    assert (old.exists(), target.exists()) == (False, True)
    assert f"removed {old.name} (1 kB, used 2.0 days ago) to make room for the unpacked images: " in caplog.text


def test_decoded_images_make_room(tmp_path, put):
    for i in range(12):
        path = tmp_path / "root" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(path)
    old = put("old", 2)
    load = partial(image_folder.load, tmp_path / "root", size=8, cache_dir=tmp_path)
    load(cache_limit="10kB")
    assert old.exists()
    for array in (tmp_path / "images").glob("*.safetensors"):
        array.unlink()
    load(cache_limit="2kB")
    assert not old.exists()


# The config and the command


def test_a_run_and_its_data_get_the_limit(command):
    for i in range(24):
        path = Path("root") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * i).save(path)
    arguments = [word for word in TINY if not word.startswith("data")]
    code, output = command(
        *(*arguments, "data=image_folder", "data.root=root", "data.size=8", "cache_dir=cache", "cache_limit=1kB")
    )
    assert code == 0, output
    assert "the cache exceeds cache_limit=1 kB: the images need" in output
    assert "the cache exceeds cache_limit=1 kB: the features need" in output
    code, output = command(*TINY, "cache_limit=20")
    assert code == 1
    assert output.endswith("cache_limit=20 must be a size with its unit, such as 500MB or 20GB, or null\n")


def test_the_folder_of_a_run_sets_no_limit(tmp_path):
    """It may be somebody else's, and evaluate loads its data."""
    model = {"name": "tiny", "weights": None, "image_size": 8, "last_block": "a", "frozen": "a", "pool": 1}
    data = {"_target_": "tuner.data.image_folder.load", "cache_limit": "1B"}
    (tmp_path / "conf").mkdir()
    config = {"seed": 0, "precision": "fp32", "model": model, "data": data, "cache_limit": "1B"}
    (tmp_path / "conf" / "config.yaml").write_text(json.dumps(config))
    config = of_run(tmp_path, "data")
    assert config.cache_limit is None
    assert config.data.target.keywords["cache_limit"] is None


def test_a_run_from_before_the_limit_is_evaluated_on_todays_data_sets(trained, call, tmp_path):
    folder = shutil.copytree(trained(), tmp_path / "run")
    path = folder / "conf" / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "cache_limit" not in line))
    for i in range(8):
        image = tmp_path / "root" / f"class{i % 4}" / f"{i}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * i).save(image)
    code, out, err = call("evaluate", folder, "data=image_folder", f"data.root={tmp_path / 'root'}", "--split", "all")
    assert code == 0, out + err


def test_the_command_removes_until_the_limit(tmp_path, put, call):
    old, unfinished = put("old", 40), put("unfinished", 0.5, form=".{}.safetensors.1.partial")
    put("new", 0)
    code, out, err = call("cache", "--cache-dir", tmp_path, "--limit", "2kB")
    assert code == 0, err
    assert out.splitlines() == [
        f"deleted {old.name}     1 kB  used 40.0 days ago  damaged",
        f"1 kB freed, 2 kB used in {tmp_path}",
    ]
    code, out, err = call("cache", "--cache-dir", tmp_path, "--limit", "0.5kB")
    assert code == 0, err
    assert out.splitlines()[-2:] == [
        f"1 kB freed, 1 kB used in {tmp_path}",
        "the rest, more than 0.5kB, is in use or was used within a day",
    ]
    assert unfinished.exists()


def test_the_command_refuses_other_sizes_and_contradictions(tmp_path, call):
    code, _, err = call("cache", "--cache-dir", tmp_path, "--limit", "20")
    assert (code, err.splitlines()[-1]) == (1, "--limit=20 must be a size with its unit, such as 500MB or 20GB")
    code, _, err = call("cache", "--cache-dir", tmp_path, "--limit", "20GB", "--days", "3")
    assert code == 2
    assert "--limit chooses the files to delete itself: leave --prune and --days out" in err
