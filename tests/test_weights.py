"""Weights by name; intact and damaged files of every kind; downloads that succeed and that fail."""

import hashlib
import logging
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import get_model, get_model_weights

from tuner import InputError
from tuner.networks.backbone import Backbone
from tuner.networks.weights import BUNDLED, IMAGENET_MEAN, IMAGENET_STD, resolve
from tuner.safe_text import printable

SHA256 = "08c15c59675ae074b9da1cccd2e6c3a9880891b9340305299eec547cfe79bdc8"
KNOWN = "use bundled, IMAGENET1K_V1, IMAGENET1K_FEATURES, DEFAULT, a path, or null (random)"


def vgg16(weights, **options):
    return Backbone("vgg16", weights=weights, image_size=32, last_block="block1", frozen="block1", pool=None, **options)


def features(backbone):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return backbone.frozen_part(torch.float32)(images)


@pytest.fixture(scope="module")
def bundled():
    return load_file(BUNDLED)


def test_the_bundled_file_is_the_original():
    assert hashlib.sha256(BUNDLED.read_bytes()).hexdigest() == SHA256
    assert vgg16("bundled").key["weights"] == SHA256


def write_safetensors(state, path):
    save_file(state, path)


def write_old_pth(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("vgg.safetensors", write_safetensors),
        ("vgg.pth", torch.save),
        ("vgg.pt", torch.save),
        ("vgg.bin", write_old_pth),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_file_gives_the_same_features_as_the_bundled_weights(tmp_path, bundled, name, write, dtype):
    whole = vgg16("bundled")
    write({k: v.to(dtype) for k, v in bundled.items() if k.startswith("features.0.") or ".2." in k}, tmp_path / name)
    file = vgg16(str(tmp_path / name), mean=whole.mean, std=whole.std)
    assert torch.equal(features(file), features(whole))
    assert file.key["weights"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() != SHA256


def test_a_copy_of_the_same_file_has_the_same_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "copy.safetensors").write_bytes(BUNDLED.read_bytes())
    backbone = vgg16("~/copy.safetensors")
    assert backbone.key["weights"] == SHA256
    assert (backbone.mean, backbone.std) == (IMAGENET_MEAN, IMAGENET_STD)  # a file does not record its normalisation


@pytest.mark.parametrize(
    ("network", "old", "new"),
    [
        ("densenet121", "features.denseblock1.denselayer1.norm.1.bias", "features.denseblock1.denselayer1.norm1.bias"),
        (
            "densenet121",
            "features.denseblock4.denselayer16.conv.2.weight",
            "features.denseblock4.denselayer16.conv2.weight",
        ),
        ("vit_b_32", "encoder.layers.encoder_layer_0.mlp.linear_1.bias", "encoder.layers.encoder_layer_0.mlp.0.bias"),
        ("vit_b_32", "encoder.layers.encoder_layer_3.mlp.linear_2.bias", "encoder.layers.encoder_layer_3.mlp.3.bias"),
    ],
)
def test_layer_names_of_torchvisions_older_files_are_translated(tmp_path, network, old, new):
    with torch.device("meta"):
        assert new in get_model(network).state_dict()
    save_file({old: torch.arange(3.0)}, tmp_path / "old.safetensors")
    assert resolve(network, str(tmp_path / "old.safetensors"), 0).load().keys() == {new}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("IMAGENET1K_V9", "No such file or directory"),
        ("folder", "it is not a regular file"),
        ("missing/weights.pth", "No such file or directory"),
        ("x" * 300, "File name too long"),
        ("a\0b", "embedded null byte"),
        (5, "No such file or directory"),
        ("~nobody_of_that_name/w.pth", "Could not determine home directory."),
    ],
)
def test_an_unknown_name_lists_the_known_names(tmp_path, monkeypatch, spec, reason):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(InputError) as error:
        resolve("vgg16", spec, 0)
    assert str(error.value) == (
        f"model.weights={printable(str(spec))} is neither a readable file ({reason}) nor weights of vgg16; {KNOWN}"
    )


def test_bundled_weights_are_only_for_vgg16():
    with pytest.raises(InputError, match="of resnet18; use IMAGENET1K_V1, DEFAULT, a path, or null"):
        resolve("resnet18", "bundled", 0)


class Code:
    """Unpickling an instance runs code that creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("write", [torch.save, write_old_pth, lambda o, path: path.write_bytes(pickle.dumps(o))])
def test_code_in_a_file_is_not_run(tmp_path, write):
    marker, path = tmp_path / "the code ran", tmp_path / "weights.pth"
    write({"features.0.weight": Code(marker)}, path)
    with pytest.raises(InputError) as error:
        vgg16(str(path)).frozen_part(torch.float32)
    assert not marker.exists()
    assert str(error.value) == (
        f"model.weights={path} cannot be read (not a PyTorch file of tensors alone); "
        "it must be a whole .safetensors or PyTorch state dict"
    )


def half(write):
    def write_half(path):
        write({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return write_half


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("half.safetensors", half(write_safetensors)),
        ("half.pth", half(torch.save)),
        ("old half.pth", half(write_old_pth)),
        *((f"empty.{ending}", Path.touch) for ending in ("safetensors", "pth")),
        *((f"text.{ending}", lambda path: path.write_text("text\n" * 100)) for ending in ("safetensors", "pth")),
        *((f"page.{ending}", lambda path: path.write_text("<html>404</html>")) for ending in ("safetensors", "pth")),
        ("a PyTorch file.safetensors", partial(torch.save, {"a": torch.zeros(1)})),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name, write):
    write(tmp_path / name)
    with pytest.raises(InputError) as error:
        vgg16(str(tmp_path / name)).frozen_part(torch.float32)
    message = str(error.value)
    assert message.startswith(f"model.weights={tmp_path / name} cannot be read (")
    assert message.endswith("); it must be a whole .safetensors or PyTorch state dict")
    assert "\n" not in message
    assert "()" not in message


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"epoch": 3, "state_dict": {}}, {"a": [torch.zeros(1)]}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, path := tmp_path / "weights.pth")
    with pytest.raises(InputError) as error:
        vgg16(str(path)).frozen_part(torch.float32)
    assert str(error.value) == (
        f"model.weights={path} is not a state dict (names to tensors); save model.state_dict() as .safetensors"
    )


@pytest.mark.parametrize(
    ("network", "block", "problem"),
    [
        ("resnet18", "layer1", "conv1.weight is missing (25 of 30 tensors are wrong)"),
        ("vgg11", "block2", "features.3.weight is missing (2 of 4 tensors are wrong)"),
        (
            "alexnet",
            "block1",
            "features.0.weight is [64, 3, 3, 3] where [64, 3, 11, 11] is expected (1 of 2 tensors are wrong)",
        ),
    ],
)
def test_weights_of_another_network_are_refused(network, block, problem):
    backbone = Backbone(network, weights=str(BUNDLED), image_size=64, last_block=block, frozen=block, pool=None)
    with pytest.raises(InputError) as error:
        backbone.frozen_part(torch.float32)
    text = f"model.weights: {BUNDLED} do not fit {network}: {problem}; choose the model that they belong to"
    assert str(error.value) == text


@pytest.mark.parametrize("network", ["squeezenet1_1", "googlenet"])  # googlenet warns when its weights are drawn
def test_random_weights_depend_only_on_the_seed(network):
    before = torch.get_rng_state()
    first, again, other = (resolve(network, None, seed) for seed in (1, 1, 2))
    assert first.key == again.key != other.key
    first, again, other = (weights.load() for weights in (first, again, other))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = next(name for name in first if name.endswith("weight"))
    assert not torch.equal(first[name], other[name])


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if not self.path.startswith("/cut-short/"):
            return super().do_GET()
        content = Path(self.translate_path(self.path.removeprefix("/cut-short"))).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True
        return None


@pytest.fixture
def server(tmp_path):
    """A folder and the address that serves it."""
    (tmp_path / "served").mkdir()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "served"))
    thread = threading.Thread(target=http.serve_forever, args=(0.05,))
    thread.start()
    yield tmp_path / "served", f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def publish(server, monkeypatch):
    """Put a small checkpoint on the server as squeezenet1_1's IMAGENET1K_V1; returns its content and file name."""
    folder, address = server

    def put(below="", hash_prefix=None):
        state = resolve("squeezenet1_1", None, seed=7).load()
        torch.save(state, folder / "new.pth")
        name = f"squeezenet1_1-{hash_prefix or hashlib.sha256((folder / 'new.pth').read_bytes()).hexdigest()[:8]}.pth"
        (folder / "new.pth").rename(folder / name)
        enum = get_model_weights("squeezenet1_1").IMAGENET1K_V1
        monkeypatch.setattr(enum.value, "url", f"{address}{below}/{name}")
        return state, name

    return put


@pytest.fixture(autouse=True)
def no_checkpoints_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def checkpoints():
    return Path(torch.hub.get_dir()) / "checkpoints"


def test_torchvisions_weights_are_downloaded_once(publish, server, caplog):
    state, name = publish()
    weights = resolve("squeezenet1_1", "IMAGENET1K_V1", 0)
    assert not checkpoints().exists()  # nothing is fetched before it is needed
    assert weights.key == name
    assert tuple(weights.mean) == IMAGENET_MEAN
    with caplog.at_level(logging.INFO):
        loaded = weights.load()
    assert caplog.messages == [f"downloading {server[1]}/{name} to {checkpoints()}"]
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], state[k]) for k in state)
    assert [p.name for p in checkpoints().iterdir()] == [name]

    (server[0] / name).unlink()
    again = resolve("squeezenet1_1", "DEFAULT", 0).load()
    assert torch.equal(again["features.0.weight"], state["features.0.weight"])


def refused(weights):
    with pytest.raises(InputError) as error:
        weights.load()
    if isinstance(error.value.__cause__, HTTPError):
        error.value.__cause__.close()  # its socket
    assert "\n" not in str(error.value)
    return str(error.value)


OUT = "or set model.weights to a path, to bundled (vgg16), or to null (random)"


@pytest.mark.parametrize(
    ("below", "hash_prefix", "reason"),
    [
        ("", "0123abcd", 'invalid hash value (expected "0123abcd", got "'),
        ("/missing", None, "HTTP Error 404: File not found"),
        ("/cut-short", None, "invalid hash value (expected "),
    ],
)
def test_a_failed_download_leaves_no_file_and_lists_the_ways_out(publish, server, below, hash_prefix, reason):
    _, name = publish(below, hash_prefix)
    message = refused(resolve("squeezenet1_1", "IMAGENET1K_V1", 0))
    assert message.startswith(f"{name} could not be downloaded from {server[1]}{below}/{name} ({reason}")
    assert message.endswith(f"); put the file into {checkpoints()}, {OUT}")
    assert list(checkpoints().iterdir()) == []


def test_an_unreachable_server(monkeypatch):
    url = "http://127.0.0.1:9/vgg16-397923af.pth"  # nothing listens there
    monkeypatch.setattr(get_model_weights("vgg16").IMAGENET1K_V1.value, "url", url)
    assert refused(resolve("vgg16", "IMAGENET1K_V1", 0)) == (
        f"vgg16-397923af.pth could not be downloaded from {url} (<urlopen error [Errno 111] Connection refused>); "
        f"put the file into {checkpoints()}, {OUT}"
    )
    assert list(checkpoints().iterdir()) == []


def test_the_checkpoint_folder_cannot_be_created(publish, tmp_path, monkeypatch):
    publish()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    assert "Not a directory" in refused(resolve("squeezenet1_1", "IMAGENET1K_V1", 0))


def test_a_damaged_file_in_the_checkpoint_folder_is_not_used(publish):
    _, name = publish()
    checkpoints().mkdir(parents=True)
    torch.save(resolve("squeezenet1_1", None, seed=8).load(), checkpoints() / name)  # intact, but with other content
    assert refused(resolve("squeezenet1_1", "IMAGENET1K_V1", 0)) == (
        f"{checkpoints() / name} is damaged: its sha256 must begin with {name[14:22]}; delete it to download it again"
    )
