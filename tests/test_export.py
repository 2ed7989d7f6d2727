"""An exported file gives what the model gives, in the program that the format is for; otherwise there is no file."""

import io
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tuner
from tuner import InputError, export
from tuner.data import synthetic
from tuner.inference import quantization
from tuner.networks.backbone import Preprocess

LARGE = ("data.size=40", "precision=fp32")  # its images are made smaller: with antialiasing
NAMES = ["class0", "class1", "class2", "class3"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read_onnx(path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    about = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(i.name, i.type) for i in session.get_inputs()] == [("images", "tensor(uint8)")]
    assert [(o.name, o.type) for o in session.get_outputs()] == [("probabilities", "tensor(float)")]
    return about, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def read_torchscript(path):
    about = dict.fromkeys(["class_names", "input_shape", "fit", "range", "temperature"], "")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated")
        loaded = torch.jit.load(io.BytesIO(Path(path).read_bytes()), _extra_files=about)
    return {key: value.decode() for key, value in about.items()}, loaded


def read_pt2(path):
    about = dict.fromkeys(["class_names", "input_shape", "fit", "range", "temperature"], "")
    return about, torch.export.load(path, extra_files=about).module()


READERS = {"onnx": read_onnx, "torchscript": read_torchscript, "pt2": read_pt2}


@pytest.mark.parametrize("form", READERS)
def test_a_file_gives_what_the_model_gives(trained, call, form):
    code, out, err = call("export", trained(*LARGE), "--format", form, "--out", f"mine.{form}")
    assert code == 0, err
    assert f"mine.{form}: uint8 [N, 1, 40, 40] -> probabilities [N, 4]" in out
    assert "checked on 80 of the run's test images: probabilities differ by " in out
    assert ", the top class of 0" in out
    assert ("TorchScript is deprecated" in err) == (form == "torchscript")
    about, run = READERS[form](f"mine.{form}")
    model = tuner.load(trained(*LARGE))
    assert {key: json.loads(value) for key, value in about.items()} == {
        **{"class_names": NAMES, "input_shape": [1, 40, 40], "fit": "stretch", "range": 65535},
        "temperature": model.temperature,
    }
    for n in (1, 2, 80):
        images = synthetic.load(size=40).test.images[:n]
        assert torch.allclose(run(images), model.predict(images), atol=1e-5)


CUTS = [
    ("model.frozen=null", "epochs=1"),
    ("model.frozen=block1", "epochs=1", "precision=fp32"),
    ("model.head.depth=0",),
    ("precision=bf16", "model.pool=null"),
    ("precision=fp32", "data.channels=3"),
]


@pytest.mark.parametrize("arguments", CUTS, ids=" ".join)
def test_every_cut_can_be_exported(trained, arguments):
    model = tuner.load(trained(*arguments), precision="fp32")
    images = torch.randint(256, (5, *model.input_shape), dtype=torch.uint8)
    content, difference, others = export.export(model, "pt2", images)
    assert difference < 1e-5
    assert others == 0
    assert len(content) > 1000
    assert any(isinstance(module, Preprocess) for module in model.modules()), "the model itself is as it was"


NETWORKS = [
    ("vgg16", "block5", 32),
    ("resnet18", "layer4", 64),
    ("efficientnet_b0", "features.8", 64),
]


@pytest.mark.slow
@pytest.mark.parametrize("form", READERS)
@pytest.mark.parametrize(("name", "block", "size"), NETWORKS)
def test_other_networks_can_be_exported(trained, call, name, block, size, form):
    arguments = (f"model={name}", "model.weights=null", f"model.last_block={block}", f"model.image_size={size}")
    run = trained(*arguments, "model.pool=null", "data.n=60", "data.size=48", "data.channels=3", "epochs=1")
    code, out, err = call("export", run, "--format", form, "--out", "model.file")
    assert code == 0, err
    assert ", the top class of 0" in out
    assert Path("model.file").stat().st_size > 10_000


@pytest.mark.parametrize("size", [8, 32, 33, 64, 100])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 40, 100)])
def test_two_matrices_are_the_resize(size, shape):
    original = Preprocess(size, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), torch.float32)
    images = torch.randint(256, (2, *shape), dtype=torch.uint8)
    assert torch.allclose(export.Fixed(original, *shape[1:])(images), original(images), atol=1e-5)


def test_files_to_check_on(trained, call):
    for i, image in enumerate(synthetic.load(channels=3, size=99).test.images[:3]):
        Path("images").mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"images/{i}.png")
    code, out, err = call("export", trained(), "--format", "pt2", "--out", "m.pt2", "--check", "images")
    assert code == 0, err
    assert "checked on 3 of the files given: " in out


GONE = {
    "its code": lambda text: text.replace("tuner.data.synthetic.load", "tuner.data.nowhere.load"),
    "all of it": lambda text: text.replace("\ndata:\n", "\nwas_data:\n"),
}


@pytest.mark.parametrize("change", GONE.values(), ids=GONE)
def test_where_the_data_is_gone_random_images_are_taken_which_is_said(trained, call, tmp_path, change):
    folder = tmp_path / "run"
    shutil.copytree(trained(), folder)
    config = folder / "conf" / "config.yaml"
    config.write_text(change(config.read_text()))
    code, out, err = call("export", folder, "--format", "pt2")
    assert code == 0, err
    assert "test images are not available" in err
    assert "checked on 200 random images" in out
    assert (folder / "model.pt2").exists()


@pytest.mark.parametrize("form", READERS)
def test_a_file_that_differs_is_not_written(trained, call, monkeypatch, form):
    class Wrong(export.Fixed):
        def forward(self, images):
            return super().forward(images) + 0.1

    monkeypatch.setattr(export, "Fixed", Wrong)
    code, _, err = call("export", trained(), "--format", form, "--out", "m.file")
    assert code == 1
    assert f"--format {form}: a probability differs by " in err
    assert "No file was written" in err
    assert list(Path().iterdir()) == []


def test_nan_is_a_difference(trained, monkeypatch):
    model = tuner.load(trained(), precision="fp32")
    images = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    broken = b"", lambda images: torch.full((len(images), 4), np.nan)
    monkeypatch.setitem(export.FORMATS, "pt2", lambda *_: broken)
    with pytest.raises(InputError, match="a probability differs by nan"):
        export.export(model, "pt2", images)


def test_what_cannot_be_done_is_one_line(trained, call, monkeypatch):
    code, _, err = call("export", trained(), "--format", "pt2", "--out", "nowhere/m.pt2")
    assert (code, "there is no folder" in err) == (1, True)
    Path("folder").mkdir()
    code, _, err = call("export", trained(), "--format", "pt2", "--out", "folder")
    assert (code, "--out folder is a folder: name a file, as in --out folder/model.pt2" in err) == (1, True)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    code, _, err = call("export", trained(), "--format", "onnx", "--out", "m.onnx")
    assert (code, "--format onnx needs onnx, onnxscript, onnxruntime: pip install 'tuner[onnx]'" in err) == (1, True)


# int8

EASY = ("data.noise=10", "data.n=200", "precision=fp32")  # a run that gets all images right


def test_int8_is_measured_beside_float_before_it_is_written(trained, call):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    code, out, err = call("export", trained(*EASY), "--format", "onnx", "--quantize", "int8", "--out", "m.onnx")
    assert code == 0, err
    measured = re.findall(
        r"^  (float32|int8) +accuracy (\S+), (\S+) ms an image \(median of 30\), (\S+) MB$", out, re.M
    )
    assert [name for name, *_ in measured] == ["float32", "int8"]
    assert out.index("they agree on") < out.index("m.onnx: uint8 [N, 1, 16, 16]")
    about = {entry.key: json.loads(entry.value) for entry in onnx.load("m.onnx").metadata_props}
    assert about["class_names"] == NAMES
    told = about["quantization"]
    assert [f"{value:.4f}" for value in told["accuracy"].values()] == [accuracy for _, accuracy, *_ in measured]
    assert (told["calibration_images"], told["validation_images"]) == (128, 32)

    data = synthetic.load(n=200, noise=10)
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    [probabilities] = session.run(None, {"images": data.pool.images[data.val].numpy()})
    right = probabilities.argmax(1) == data.pool.labels[data.val].numpy()
    assert right.mean() == pytest.approx(told["accuracy"]["int8"])
    kinds = [node.op_type for node in onnx.load("m.onnx").graph.node]
    assert kinds.count("QuantizeLinear") > 5


def test_int8_that_loses_much_is_not_written(trained, call, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(quantization, "LARGE_LOSS", -1)
    code, _, err = call("export", trained(*EASY), "--format", "onnx", "--quantize", "int8", "--out", "m.onnx")
    assert code == 1
    assert "validation accuracy falls from " in err
    assert "No file was written: export without --quantize" in err
    assert list(Path().iterdir()) == []


def test_int8_needs_the_images_of_the_run_and_onnx(trained, call, tmp_path):
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "run"
    shutil.copytree(trained(*EASY), folder)
    config = folder / "conf" / "config.yaml"
    config.write_text(config.read_text().replace("noise: 10", "noise: 11"))
    code, _, err = call("export", folder, "--format", "onnx", "--quantize", "int8")
    assert (code, "needs the images that the run was trained on, and its data has changed" in err) == (1, True)
    assert not (folder / "model.onnx").exists()
    code, _, err = call("export", folder, "--format", "pt2", "--quantize", "int8")
    assert (code, "--quantize needs --format onnx" in err) == (2, True)
