"""Fashion-MNIST: the folders searched and their order, and errors for wrong or missing files."""

import gzip
import hashlib
import logging
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torchvision

from tuner import InputError
from tuner.data import fashion_mnist

N = {"train": 40, "t10k": 20}  # tiny files of the same format


def idx(values):
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


@pytest.fixture
def files(monkeypatch):
    """Four tiny files, name -> bytes, accepted as the originals; Debian's files are hidden."""
    random = np.random.default_rng(0)
    contents = {}
    for part, n in N.items():
        contents[f"{part}-images-idx3-ubyte"] = idx(random.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        contents[f"{part}-labels-idx1-ubyte"] = idx(np.arange(n, dtype=np.uint8) % 10)
    monkeypatch.setattr(fashion_mnist, "MD5", {name: hashlib.md5(data).hexdigest() for name, data in contents.items()})
    monkeypatch.setattr(fashion_mnist, "DEBIAN", fashion_mnist.Path("/no/such/folder"))
    return contents


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing listens there


def write(folder, files, zipped):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / (f"{name}.gz" if zipped else name)).write_bytes(gzip.compress(data) if zipped else data)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_reads_the_files_in_root(tmp_path, files, caplog, below, zipped):
    write(tmp_path / below, files, zipped)
    with caplog.at_level(logging.INFO):
        data = fashion_mnist.load(tmp_path, val_share=0.25)
    assert caplog.messages == [f"reading Fashion-MNIST from {tmp_path / below}"]
    assert data.pool.images.shape == (40, 1, 28, 28)
    assert data.test.images.shape == (20, 1, 28, 28)
    assert data.pool.images.numpy().tobytes() == files["train-images-idx3-ubyte"][16:]
    assert data.pool.images.dtype == torch.uint8
    assert data.test.labels.tolist() == [*range(10)] * 2
    assert data.test.labels.dtype == torch.int64
    assert (len(data.train), len(data.val)) == (30, 10)
    assert data.classes[0] == "T-shirt/top"
    assert data.classes[9] == "Ankle boot"


def test_root_comes_before_debian(tmp_path, files, monkeypatch, caplog):
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    write(tmp_path / "debian", files, zipped=True)
    with caplog.at_level(logging.INFO):
        fashion_mnist.load(tmp_path / "root")
        write(tmp_path / "root", files, zipped=True)
        fashion_mnist.load(tmp_path / "root")
    assert caplog.messages == [f"reading Fashion-MNIST from {tmp_path / name}" for name in ("debian", "root")]


def test_missing_files_are_downloaded(tmp_path, files, monkeypatch, caplog):
    write(tmp_path / "served", files, zipped=True)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "served")
    handler.log_message = lambda *_: None
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in (tmp_path / "served").iterdir()}
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", list(md5.items()))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with caplog.at_level(logging.INFO):
                data = fashion_mnist.load(tmp_path / "new" / "root")
        finally:
            server.shutdown()
            thread.join()
    assert (len(data.pool), len(data.test)) == (40, 20)
    folder = tmp_path / "new" / "root" / "FashionMNIST" / "raw"
    assert caplog.messages == [f"downloading Fashion-MNIST to {folder}", f"reading Fashion-MNIST from {folder}"]
    assert len(fashion_mnist.load(tmp_path / "new" / "root").pool) == 40  # the server is gone: read from the folder


def test_a_failed_download_lists_the_ways_out(tmp_path, files, no_network):
    with pytest.raises(InputError) as error:
        fashion_mnist.load(tmp_path / "root")
    message = str(error.value)
    assert message.startswith(f"Fashion-MNIST cannot be downloaded to {tmp_path / 'root'} (Error downloading ")
    assert message.endswith(
        "): tried to get train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, "
        "t10k-labels-idx1-ubyte.gz from http://127.0.0.1:9/; apt install dataset-fashion-mnist, or put the "
        "four files into data.root, or use data=fmnist_small"
    )
    assert "\n" not in message


def test_root_cannot_be_written(tmp_path, files, no_network):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"cannot be downloaded to .*file/root \(.*Not a directory.*data=fmnist_small$"
    ):
        fashion_mnist.load(tmp_path / "file" / "root")


def test_a_wrong_file(tmp_path, files):
    write(tmp_path, files, zipped=False)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(b"other")
    expected = hashlib.md5(files[path.name]).hexdigest()
    with pytest.raises(InputError) as error:
        fashion_mnist.load(tmp_path)
    assert str(error.value) == (
        f"{path} is not the original file (md5 of its contents {hashlib.md5(b'other').hexdigest()}, expected "
        f"{expected}): delete it or replace it with the original"
    )


def test_a_truncated_file(tmp_path, files):
    write(tmp_path, files, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=rf"^{path} cannot be read \(.*\): delete it or replace it with the original$"):
        fashion_mnist.load(tmp_path)
