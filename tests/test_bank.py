"""The feature bank: computed once, correct, shared between processes, and never half-written."""

import errno
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import torch
from safetensors.torch import load_file, save_file

from tuner import InputError
from tuner import cache as cache_module
from tuner.bank import features
from tuner.cache_files import Cache
from tuner.networks.backbone import Backbone
from tuner.networks.weights import BUNDLED

CPU = torch.device("cpu")


def vgg16(**options):
    """The real network with the bundled weights, on small images."""
    defaults = {"weights": "bundled", "image_size": 32, "last_block": "block2", "frozen": "block2", "pool": 2}
    return Backbone(**{"name": "vgg16"} | defaults | options)


BATCH = vgg16().batch_size(CPU)


def bank(images, cache_dir, backbone=None, dtype=torch.float32, limit=None):
    return features.bank(images, backbone or vgg16(), cache=Cache(cache_dir, limit), device=CPU, dtype=dtype)


def draw(n):
    return torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


@pytest.fixture(scope="module")
def images():
    return draw(12)


def files(cache_dir, pattern="*.safetensors"):
    """The files of the banks."""
    return sorted((cache_dir / "banks").glob(pattern))


def remains(cache_dir):
    """All files in the folder, except locks, which are empty."""
    return [p for p in (cache_dir / "banks").iterdir() if p.suffix != ".lock"]


@pytest.mark.parametrize("n", [1, BATCH, BATCH + 44])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_content_equals_the_output_of_the_frozen_part(tmp_path, n, dtype):
    images = draw(n)
    got = bank(images, tmp_path, dtype=dtype)
    network = vgg16().frozen_part(dtype)
    expected = torch.cat([network(batch) for batch in images.split(BATCH)])
    assert got.shape == (n, 128 * 2 * 2)
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    assert torch.equal(bank(images, tmp_path, dtype=dtype), expected)
    assert torch.equal(load_file(files(tmp_path)[0])["features"], expected)  # an ordinary safetensors file


def test_below_trained_blocks_the_bank_holds_whole_maps(tmp_path, images):
    backbone = vgg16(frozen="block1")
    maps = bank(images, tmp_path, backbone)
    assert maps.shape == (12, 64, 16, 16)
    torch.testing.assert_close(maps, backbone.frozen_part(torch.float32)(images))


def test_the_second_call_runs_nothing_and_reads_no_weights(tmp_path, images, caplog):
    first = bank(images, tmp_path)
    backbone = vgg16()

    def load():
        raise AssertionError("the weights are read")

    backbone.weights = replace(backbone.weights, load=load)
    with caplog.at_level(logging.INFO, "tuner"):
        assert torch.equal(bank(images, tmp_path, backbone), first)
    [message] = caplog.messages
    assert message == f"features of 12 images: cached in {files(tmp_path)[0]} (25 kB)"


SMALL = {"name": "squeezenet1_1", "weights": None, "last_block": "features.3", "frozen": "features.3"}


@pytest.mark.parametrize(
    ("base", "change"),
    [
        pytest.param(SMALL, {"name": "squeezenet1_0"}, id="network"),
        pytest.param(SMALL, {"seed": 1}, id="seed of random weights"),
        pytest.param({}, {"weights": "copy.safetensors"}, id="weights"),
        pytest.param({}, {"last_block": "block1", "frozen": "block1"}, id="cut"),
        pytest.param({}, {"frozen": "block1"}, id="cut, with a trained block"),
        pytest.param({}, {"pool": 1}, id="pool"),
        pytest.param({}, {"pool": None}, id="no pool"),
        pytest.param({}, {"image_size": 24}, id="image size"),
        pytest.param({}, {"mean": [0, 0, 0]}, id="mean"),
        pytest.param({}, {"std": [1, 1, 1]}, id="std"),
        pytest.param({}, {"dtype": torch.bfloat16}, id="precision"),
        pytest.param({}, {"images": lambda x: x[1:]}, id="fewer images"),
        pytest.param({}, {"images": lambda x: x.flip(0)}, id="order of images"),
        pytest.param({}, {"images": lambda x: x.index_fill(2, torch.tensor(0), 0)}, id="pixels"),
        pytest.param({}, {"images": lambda x: x.reshape(12, 1, 14, 56)}, id="shape of images"),
    ],
)
def test_a_change_leads_to_a_new_bank(tmp_path, images, monkeypatch, base, change):
    monkeypatch.chdir(tmp_path)
    save_file({name: -value for name, value in load_file(BUNDLED).items()}, "copy.safetensors")
    options = base | change
    changed, dtype = options.pop("images", torch.clone)(images), options.pop("dtype", torch.float32)
    first = bank(images, tmp_path, vgg16(**base))
    got = bank(changed, tmp_path, vgg16(**options), dtype)
    assert len(files(tmp_path)) == 2
    assert got.shape != first.shape or not torch.equal(got, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({}, {}, id="the same"),
        pytest.param({}, {"seed": 5}, id="seed of the run"),
        pytest.param(
            {}, {"mean": [0.48235, 0.45882, 0.40784], "std": [1 / 255] * 3}, id="the weights' own mean and std"
        ),
        pytest.param({}, {"images": lambda x: x.repeat(1, 2, 1, 1)[:, :1]}, id="layout of images in memory"),
        pytest.param({"frozen": "block1"}, {"frozen": "block1", "pool": 1}, id="pool of a map after the cut"),
        pytest.param({"frozen": "block1"}, {"frozen": "block1", "last_block": "block3"}, id="last block"),
    ],
)
def test_equal_content_shares_a_bank(tmp_path, images, first, second):
    options = dict(second)
    layout = options.pop("images", torch.clone)
    bundled = vgg16()
    if "mean" in options:  # the exact numbers of the preset
        options |= {"mean": list(bundled.mean), "std": list(bundled.std), "weights": str(BUNDLED)}
    assert torch.equal(bank(images, tmp_path, vgg16(**first)), bank(layout(images), tmp_path, vgg16(**options)))
    assert len(files(tmp_path)) == 1


def test_the_content_is_memory_mapped(tmp_path):
    for _ in range(2):  # freshly computed, and cached
        got = bank(draw(BATCH), tmp_path)
        [path] = files(tmp_path)
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
        ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
        assert any(start <= got.data_ptr() < end for start, end in ranges)


def test_features_in_use_survive_the_deletion_of_the_file(tmp_path, images):
    got = bank(images, tmp_path)
    expected = got.clone()
    files(tmp_path)[0].unlink()
    assert torch.equal(got, expected)


def flip(at):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[at if isinstance(at, int) else content.index(at) + len(at) + 4] ^= 0x04
        path.write_bytes(content)

    return damage


def another(change):
    def damage(path):
        with features.safe_open(path, framework="pt") as file:
            content, metadata = file.get_tensor("features").clone(), file.metadata()
        save_file({"features": change(content)}, path, metadata)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), id="a byte short"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:4000]), id="truncated"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:5]), id="truncated header"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes() + b"\0"), id="a byte more"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_text("no bank\n" * 1000), id="text"),
        pytest.param(flip(-1), id="last byte"),
        pytest.param(flip(-5000), id="byte in the middle"),
        pytest.param(flip(2), id="length of the header"),
        pytest.param(flip(8), id="first byte of the header"),
        pytest.param(flip(b'"sha256"'), id="checksum"),
        pytest.param(flip(b'"dtype"'), id="dtype"),
        pytest.param(flip(b'"data_offsets"'), id="offsets"),
        pytest.param(another(lambda x: x[1:]), id="fewer images"),
        pytest.param(another(lambda x: x.view(12, 2, 256)), id="shape"),
        pytest.param(another(lambda x: x.view(torch.int32)), id="type"),
        pytest.param(lambda path: save_file({"features": torch.zeros(12, 512)}, path), id="no checksum"),
        pytest.param(lambda path: save_file({"other": torch.zeros(12, 512)}, path), id="no features"),
    ],
)
def test_a_damaged_file_is_computed_again_with_a_warning(tmp_path, images, caplog, damage):
    expected = bank(images, tmp_path).clone()
    [path] = files(tmp_path)
    damage(path)
    assert torch.equal(bank(images, tmp_path), expected)
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert re.fullmatch(f"the feature bank {path} is damaged \\(.+\\): computing it again", warning)
    caplog.clear()
    with caplog.at_level(logging.INFO, "tuner"):
        assert torch.equal(bank(images, tmp_path), expected)
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["features of 12 images"]


# Run in a child process: compute the same bank; with the argument "stop", wait for a line of input after each batch.
CHILD = """
import hashlib, logging, sys
from pathlib import Path
import torch
from tuner.bank import features
from tuner.cache_files import Cache
from tuner.networks.backbone import Backbone

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
extract = features.extract

def slowly(*args, **kwargs):
    for batch in extract(*args, **kwargs):
        yield batch
        if sys.argv[2] == "stop":
            print("stopped", flush=True)
            sys.stdin.readline()

features.extract = slowly
images = torch.randint(0, 256, (12, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(12))
Backbone.batch_size = lambda *_: 8
backbone = Backbone("vgg16", weights="bundled", image_size=32, last_block="block2", frozen="block2", pool=2)
got = features.bank(images, backbone, cache=Cache(Path(sys.argv[1])), device=torch.device("cpu"), dtype=torch.float32)
print(hashlib.sha256(got.numpy()).hexdigest(), flush=True)
"""


class Child:
    """A process that computes the bank of `draw(12)`."""

    def __init__(self, cache_dir, how):
        command = [sys.executable, "-W", "error", "-c", CHILD, str(cache_dir), how]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines = []

    def wait_for(self, text):
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if text in line:
                return
        raise AssertionError(f"{text!r} is not in {self.lines}")

    def finish(self):
        rest, _ = self.process.communicate("\n\n", timeout=60)
        self.lines += rest.splitlines()
        assert self.process.returncode == 0
        return self.lines[-1]

    def end(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def child():
    children = []

    def start(*args):
        children.append(Child(*args))
        return children[-1]

    yield start
    for process in children:
        if process.process.poll() is None:
            process.end()


def test_one_of_two_processes_computes_and_the_other_waits(tmp_path, child):
    first, second = child(tmp_path, "stop"), child(tmp_path, "stop")
    # either can be first: the one that stops after a batch holds the lock
    first.wait_for("computing")
    second.wait_for("computing")
    waiting, working = sorted((first, second), key=lambda c: "computing them into" in c.lines[-1])
    [path] = [p.with_suffix(".safetensors") for p in files(tmp_path, "*.lock")]
    assert waiting.lines == [f"another process is computing {path}: waiting for it"]
    working.wait_for("stopped")
    assert not path.exists()
    assert working.finish() == waiting.finish()
    assert sum("computing them into" in line for line in working.lines + waiting.lines) == 1
    assert remains(tmp_path) == [path]


def test_after_kill_9_the_next_call_computes_it_again(tmp_path, child):
    killed = child(tmp_path, "stop")
    killed.wait_for("stopped")
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.end()
    [leftover] = remains(tmp_path)
    assert leftover.suffix == ".partial"
    images = draw(12)
    assert torch.equal(bank(images, tmp_path), vgg16().frozen_part(torch.float32)(images))
    [path] = remains(tmp_path)  # the leftover is gone
    assert path.suffix == ".safetensors"


def test_a_caller_that_stops_early_is_not_left_in_inference_mode():
    batches = features.extract(draw(BATCH + 1), vgg16(), device=CPU, dtype=torch.float32)
    next(batches)
    assert not torch.is_inference_mode_enabled()
    batches.close()


def refused(images, cache_dir):
    with pytest.raises(InputError) as error:
        bank(images, cache_dir)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("below", "reason"), [("cache", "Not a directory"), ("", "Not a directory")])
def test_a_cache_folder_that_cannot_be_created(tmp_path, images, below, reason):
    (tmp_path / "file").touch()
    cache_dir = tmp_path / "file" / below
    text = f"the cache folder {cache_dir / 'banks'} cannot be written ({reason}); set cache_dir=FOLDER"
    assert refused(images, cache_dir) == text


def test_not_enough_disk_space(tmp_path, images, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000))
    assert refused(images, tmp_path) == (
        f"the features need 25 kB and {tmp_path / 'banks'} has 20 kB free; set cache_dir to a larger disk, set "
        "model.pool, or free some with `python -m tuner.cache --prune`"
    )
    assert remains(tmp_path) == []


@pytest.fixture
def small_files():
    """Limit files to 300 kB, which causes a real error in the middle of writing."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_fills_up_while_writing(tmp_path):
    text = f"the cache folder {tmp_path / 'banks'} cannot be written (File too large); set cache_dir=FOLDER"
    assert refused(draw(3 * BATCH // 2), tmp_path) == text  # 786 kB
    assert remains(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOLCK, "No locks available"), "No locks available"),
        (
            NotImplementedError("FileSystem does not appear to support flock"),
            "FileSystem does not appear to support flock",
        ),
    ],
)
def test_a_file_system_without_locks(tmp_path, images, monkeypatch, error, reason):
    def acquire(*args, **kwargs):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    text = f"the cache folder {tmp_path / 'banks'} cannot be written ({reason}); set cache_dir=FOLDER"
    assert refused(images, tmp_path) == text


def test_a_cache_that_vanishes_while_it_is_written(tmp_path, images, monkeypatch):
    extract = features.extract

    def and_delete(*args, **kwargs):
        yield from extract(*args, **kwargs)
        shutil.rmtree(tmp_path / "cache")

    monkeypatch.setattr(features, "extract", and_delete)
    text = (
        f"the cache folder {tmp_path}/cache/banks cannot be written (No such file or directory); set cache_dir=FOLDER"
    )
    assert refused(images, tmp_path / "cache") == text
    monkeypatch.undo()
    assert bank(images, tmp_path / "cache").shape == (12, 512)


@pytest.fixture
def shared():
    """A readable folder, and a function that makes it read-only, also for root."""
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()

        def lock():
            for path in (*folder.rglob("*"), folder):
                path.chmod(0o555 if path.is_dir() else 0o444)
            if user == 0:
                os.seteuid(65534)  # the user nobody, because root can write anywhere

        yield folder, lock
        os.seteuid(user)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


def test_a_read_only_cache_is_read(shared, images):
    folder, lock = shared
    first = bank(images, folder)
    lock()
    assert torch.equal(bank(images, folder), first)
    text = f"the cache folder {folder / 'banks'} cannot be written (Permission denied); set cache_dir=FOLDER"
    assert refused(images[1:], folder) == text


def age(path, days):
    os.utime(path, (time.time() - days * 86400,) * 2)


def test_reading_a_bank_updates_its_time_of_use(tmp_path, images):
    bank(images, tmp_path)
    [path] = files(tmp_path)
    age(path, 40)
    bank(images, tmp_path)
    assert time.time() - path.stat().st_mtime < 60


@pytest.fixture
def cache(tmp_path, images):
    """Two banks, the larger one unused for 40 days; a damaged one; and the partial file of a killed process."""
    bank(images[:3], tmp_path)
    [small] = files(tmp_path)
    bank(images, tmp_path, vgg16(frozen="block1"), torch.bfloat16)
    [large] = [path for path in files(tmp_path) if path != small]
    damaged = small.with_name(f"{'d' * 24}.safetensors")
    leftover = small.with_name(f".{'b' * 24}.safetensors.17.partial")
    damaged.write_text("no bank")
    leftover.write_bytes(large.read_bytes())
    age(large, 40)
    age(damaged, 50)
    return {"small": small, "large": large, "damaged": damaged, "leftover": leftover}


def command(monkeypatch, capsys, cache, *args):
    monkeypatch.setattr(sys, "argv", ["cache", "--cache-dir", str(cache["small"].parent.parent), *args])
    cache_module.main()
    return capsys.readouterr().out.splitlines()


def test_listing(monkeypatch, capsys, cache):
    lines = command(monkeypatch, capsys, cache)
    assert lines == [
        f"{cache['damaged'].name}      7 B  used 50.0 days ago  damaged",
        f"{cache['large'].name}   394 kB  used 40.0 days ago  vgg16 block1 pool=None 32 px BF16, 12 images",
        f"{cache['small'].name}     7 kB  used 0.0 days ago  vgg16 block2 pool=2 32 px F32, 3 images",
        f"{cache['leftover'].name}   394 kB  used 0.0 days ago  unfinished",
        f"795 kB used in {cache['small'].parent.parent}",
    ]
    assert all(path.exists() for path in cache.values())


@pytest.mark.parametrize(
    ("args", "age_of_leftover", "stay"),
    [
        (["--prune", "--days", "30"], 0, {"small", "leftover"}),
        (["--prune", "--days", "45"], 0, {"small", "large", "leftover"}),
        (["--prune", "--days", "0.5"], 0.75, {"small", "leftover"}),  # its process may still be running
        (["--prune", "--days", "0.5"], 2, {"small"}),
        (["--prune"], 2, set()),
        (["--days", "30"], 0, {"small", "large", "damaged", "leftover"}),  # listed only
    ],
)
def test_pruning_deletes_files_unused_for_so_many_days(monkeypatch, capsys, cache, args, age_of_leftover, stay):
    age(cache["leftover"], age_of_leftover)
    lines = command(monkeypatch, capsys, cache, *args)
    assert {name for name, path in cache.items() if path.exists()} == stay
    gone = {path.name for name, path in cache.items() if name not in stay}
    assert {line.split()[1] for line in lines if line.startswith("deleted ")} == gone
    assert lines[-1].endswith(f"{'freed' if '--prune' in args else 'used'} in {cache['small'].parent.parent}")


def test_the_command_uses_the_cache_of_runs(tmp_path, cache):
    """TUNER_CACHE, which the config's cache_dir uses too."""
    run = [sys.executable, "-W", "error", "-m", "tuner.cache"]
    env = os.environ | {"TUNER_CACHE": str(tmp_path)}
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
    assert cache["small"].name in done.stdout
    assert done.stderr == ""


def test_an_empty_cache_is_listed(monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, capsys, {"small": tmp_path / "no" / "file"}) == [f"0 B used in {tmp_path}"]
