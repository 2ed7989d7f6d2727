"""A realistic folder of photographs, from training to ONNX Runtime."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import tuner
from tuner.data.files import image_file

pytestmark = pytest.mark.slow
KINDS = (
    "rgb.jpg",
    "rgba.png",
    "cmyk.jpg",
    "gray.jpg",
    "16 bit.png",
    "turned.jpg",
    "palette.gif",
    "wide.jpg",
    "tall.png",
)
ORIENTATION = 0x0112  # the EXIF tag


def save(crop: Image.Image, path: Path, kind: str) -> None:
    if kind == "rgba.png":
        alpha = Image.fromarray(np.tile(np.linspace(0, 255, crop.width, dtype=np.uint8), (crop.height, 1)))
        crop.putalpha(alpha)
    elif kind == "cmyk.jpg":
        crop = crop.convert("CMYK")
    elif kind == "gray.jpg":
        crop = crop.convert("L")
    elif kind == "16 bit.png":
        crop = Image.fromarray(np.asarray(crop.convert("L")).astype(np.uint16) * 257)
    elif kind == "palette.gif":
        crop = crop.quantize(64)
    elif kind == "turned.jpg":
        exif = Image.Exif()
        exif[ORIENTATION] = 6  # rotate by 90 degrees for display
        crop.rotate(90, expand=True).save(path, exif=exif)
        return
    crop.save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Crops of two photographs that scikit-learn ships, in many sizes and modes, and two files that are not images."""
    folder = tmp_path_factory.mktemp("my photos é")
    draw = random.Random(0)
    for name in ("china", "flower"):
        (folder / name).mkdir()
        whole = Image.fromarray(load_sample_image(f"{name}.jpg"))
        for i in range(54):
            kind = KINDS[i % len(KINDS)]
            w, h = {"wide.jpg": (400, 60), "tall.png": (50, 380)}.get(
                kind, (draw.randint(80, 300), draw.randint(80, 300))
            )
            left, top = draw.randint(0, whole.width - w), draw.randint(0, whole.height - h)
            save(whole.crop((left, top, left + w, top + h)), folder / name / f"{i} {kind}", kind)
    whole = (folder / "china" / "0 rgb.jpg").read_bytes()
    (folder / "china" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "flower" / "text.jpg").write_text("this is no image")
    return folder


def run(module: str, *arguments: object, code: int = 0) -> tuple[str, str]:
    words = [sys.executable, "-m", f"tuner.{module}", *map(str, arguments)]
    done = subprocess.run(words, text=True, capture_output=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_photographs_go_from_training_to_onnx_runtime(photos, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    train = [
        "data=image_folder",
        f"data.root='{photos}'",
        "model.image_size=64",
        "model.last_block=block4",
        "precision=fp32",
    ]
    train += ["epochs=8", "optimizer.lr=2e-4", "hydra.run.dir=run"]
    output, errors = run("train", *train, code=1)
    assert "broken.jpg" in output + errors
    assert "text.jpg" in output + errors
    output, _ = run("train", *train, "data.skip_broken=true")
    assert "broken.jpg" in output
    result = json.loads(Path("run/result.json").read_text())
    assert result["n_train"] + result["n_val"] + result["n_test"] == 108
    assert result["test_accuracy"] > 0.8

    # predict reports the broken files, and its results equal those of the run for the test images
    output, errors = run("predict", "run", photos, "--csv", code=1)
    assert "broken.jpg" in errors
    assert "text.jpg" in errors
    rows = list(csv.DictReader(output.splitlines()))
    assert len(rows) == 108
    right = [Path(row["file"]).parent.name == row["class"] for row in rows]
    assert sum(right) > 0.9 * len(right)
    predictions = {Path(row["file"]).relative_to(photos).as_posix(): row for row in rows}
    tested = [
        row for row in csv.DictReader(Path("run/predictions.csv").read_text().splitlines()) if row["split"] == "test"
    ]
    assert len(tested) == result["n_test"]
    for row in tested:
        assert predictions[row["image"]]["class"] == row["predicted"]
        assert float(predictions[row["image"]]["probability"]) == pytest.approx(float(row["confidence"]), abs=2e-3)

    # the exported file gives the same results
    output, _ = run("export", "run", "--format", "onnx")
    assert "the top class of 0" in output
    session = onnxruntime.InferenceSession("run/model.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == ["china", "flower"]
    shape, fit = json.loads(about["input_shape"]), json.loads(about["fit"])
    paths = [Path(row["file"]) for row in rows]
    images = torch.stack([image_file.read(path, tuple(shape), fit) for path in paths])
    [probabilities] = session.run(None, {"images": images.numpy()})
    assert [json.loads(about["class_names"])[i] for i in probabilities.argmax(1)] == [row["class"] for row in rows]
    assert probabilities.max(1).tolist() == pytest.approx([float(row["probability"]) for row in rows], abs=1e-4)
    torch.testing.assert_close(torch.from_numpy(probabilities), tuner.load("run").predict(paths), rtol=0, atol=1e-4)
