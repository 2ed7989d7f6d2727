"""The command that uses a model: any files in, a class and a probability each out."""

import csv
import io
import json
import os
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image

import tuner
from tuner import predict
from tuner.inference import evidence as maps

RGB = ("precision=fp32", "data.channels=3")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def picture(path, width=28, height=28, mode="L", seed=0):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (7, 7, 4), dtype=np.uint8)
    Image.fromarray(noise, "RGBA" if mode == "RGBA" else None).convert(mode).resize((width, height)).save(path)
    return path


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


SIZES = [
    ("small.png", 28, 28, "L"),
    ("photo.jpg", 4000, 3000, "RGB"),
    ("thin.png", 3, 300, "RGBA"),
    ("one.bmp", 1, 1, "1"),
    ("print.tif", 40, 30, "CMYK"),
]


@pytest.mark.parametrize("arguments", [(), RGB], ids=["gray", "RGB"])
def test_any_size_and_mode(trained, call, arguments):
    for name, *options in SIZES:
        picture(f"images/{name}", *options)
    code, out, err = call("predict", trained(*arguments), "images", "--csv")
    assert code == 0, err
    found = rows(out)
    assert [row["file"] for row in found] == sorted(f"images/{name}" for name, *_ in SIZES)
    expected = tuner.load(trained(*arguments)).predict([row["file"] for row in found])
    assert [row["class"] for row in found] == [f"class{i}" for i in expected.argmax(1)]
    assert [float(row["probability"]) for row in found] == pytest.approx(expected.amax(1).tolist(), abs=0.02)


def test_a_table_on_the_terminal(trained, call):
    picture("a.png")
    picture("b.png", seed=1)
    code, out, _ = call("predict", trained(), "b.png", "a.png")
    assert code == 0
    lines = [line.split() for line in out.strip().splitlines()]
    assert lines[0] == ["file", "class", "probability"]
    assert [line[0] for line in lines[1:]] == ["b.png", "a.png"]


def test_the_k_most_probable(trained, call):
    picture("a.png")
    code, out, _ = call("predict", trained(), "a.png", "--top", "4", "--json")
    found = json.loads(out)
    assert code == 0
    assert [row["rank"] for row in found] == [1, 2, 3, 4]
    assert {row["class"] for row in found} == {f"class{i}" for i in range(4)}
    p = [row["probability"] for row in found]
    assert p == sorted(p, reverse=True)
    assert sum(p) == pytest.approx(1, abs=1e-4)


def test_broken_files_are_named_and_the_others_predicted(trained, call):
    for name in ("a", "c"):
        picture(f"images/{name}.png")
    Path("images/b.jpg").write_text("this is text")
    Path("images/cut.png").write_bytes(Path("images/a.png").read_bytes()[:200])
    Path("images/notes.txt").write_text("not looked at")
    code, out, err = call("predict", trained(), "images", "--csv")
    assert code == 1
    assert [row["file"] for row in rows(out)] == ["images/a.png", "images/c.png"]
    for name in ("images/b.jpg", "images/cut.png"):
        assert name in err
    assert "2 of 4 files can't be read, and have no prediction" in err
    assert "Traceback" not in err


def test_nothing_but_broken_files(trained, call):
    Path("b.jpg").write_text("this is text")
    code, out, err = call("predict", trained(), "b.jpg", "--json")
    assert (code, json.loads(out)) == (1, [])
    assert "1 of 1 files can't be read" in err


def test_several_runs_are_an_ensemble(trained, call):
    picture("a.png")
    runs = trained(), trained("seed=1"), trained("data.size=24")
    code, out, err = call("predict", runs[0], "a.png", "--with", runs[1], "--with", runs[2], "--json", "--top", "4")
    assert code == 0, err
    mean = torch.stack([tuner.load(run).predict("a.png")[0] for run in runs]).mean(0)
    for row in json.loads(out):
        assert row["probability"] == pytest.approx(float(mean[int(row["class"][5:])]), abs=0.02)


def test_predictions_come_by_the_batch(trained, monkeypatch):
    model = tuner.load(trained())
    model.batch_size = 3
    paths = [picture(Path(f"{i}.png"), seed=i) for i in range(8)]
    paths.insert(4, Path("broken.png"))
    paths[4].write_text("")
    seen, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    batches = list(predict.predicted([model], paths))
    assert seen == [3, 2, 3]
    assert [len(batch.broken) for batch in batches] == [0, 1, 0]
    assert [path for batch in batches for path in batch.paths] == [path for path in paths if path.stem != "broken"]


WRONG = [  # arguments after the run, what the one line says
    (("nowhere.png",), "there is no file or folder nowhere.png"),
    (("empty",), "there is no image in empty"),
    (("a.png", "--top", "5"), "--top 5 must be a number from 1 to 4, the number of classes"),
    (("a.png", "--top", "0"), "--top 0 must be a number from 1 to 4"),
    (("a.png", "--with", "nowhere"), "nowhere does not exist"),
    (("a.png", "--with", "three"), "an ensemble's runs must have the same classes: those of "),
    (("a.png", "--with", "three", "--maps", "m"), "--maps works with one run only: leave --with out"),
    (("a.png", "--maps", "a.png/m"), "--maps a.png/m can't be a folder"),
    ((os.fsdecode(b"caf\xe9.png"),), "the name caf\\xe9.png is not valid UTF-8: rename the file or folder"),
    (("a.png", "--device", "tpu"), "device=tpu must be auto, cpu"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[ascii(" ".join(arguments)) for arguments, _ in WRONG])
def test_what_cannot_be_done_is_one_line(trained, call, arguments, message):
    picture("a.png")
    Path(os.fsdecode(b"caf\xe9.png")).write_bytes(Path("a.png").read_bytes())
    Path("empty").mkdir()
    Path("three").symlink_to(trained("data.classes=3"))
    code, out, err = call("predict", trained(), *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err


# Maps


def test_maps_stay_in_their_folder(trained, call):
    picture("x/a.png")
    picture("y/b.png")
    assert call("predict", trained(), "x/a.png", "x/../y/b.png", "--maps", "seen")[0] == 0
    assert sorted(map(str, Path().rglob("*.png.png"))) == ["seen/x/a.png.png", "seen/y/b.png.png"]


def spot(top, left):
    """An image that is gray but for a white square."""
    image = torch.full((1, 16, 16), 128, dtype=torch.uint8)
    image[:, top : top + 4, left : left + 4] = 255
    return image


@pytest.mark.parametrize("arguments", [(), ("model.frozen=null", "epochs=1"), RGB])
def test_maps_are_written_for_each_file(trained, call, arguments):
    names = ["x/a.png", "x/y/a.png", "x/photo.jpg"]
    for name in names:
        picture(name, 200, 100)
    code, _, err = call("predict", trained(*arguments), "x", "--maps", "seen")
    assert code == 0, err
    found = sorted(str(path.relative_to("seen")) for path in Path("seen").rglob("*.png"))
    assert found == ["a.png.png", "photo.jpg.png", "y/a.png.png"]
    assert matplotlib.image.imread(f"seen/{found[0]}").shape[0] > 400


def test_both_kinds_of_maps_lie_over_what_the_class_depends_on(trained, monkeypatch):
    """With a model that looks at one corner alone, the map lies there."""
    model = tuner.load(trained("model.image_size=64", "model.pool=null"))
    explain = maps.Explainer(model)
    assert not explain.occludes
    assert explain.method == "Grad-CAM on a map of 16 x 16"
    monkeypatch.setattr(model, "head", Corner())
    for occludes in (False, True):
        explain.occludes = occludes
        heat = explain(spot(1, 1), 1)
        assert heat.shape == (16, 16)
        assert 0 <= heat.min() <= heat.max() <= 1
        assert heat[:6, :6].mean() > 5 * heat[8:, 8:].mean()


class Corner(torch.nn.Module):
    """Logits that depend on the upper left corner of the map alone."""

    precision = torch.float32

    def forward(self, x):
        corner = x.float().view(len(x), -1, 16, 16)[:, :, :6, :6].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(corner), corner], 1)


@pytest.mark.slow
def test_a_block_without_a_map_gets_occlusion_which_is_said(trained, call):
    vit = ("model=torchvision", "model.name=vit_b_32", "model.weights=null", "model.last_block=encoder")
    picture("a.png")
    code, _, err = call("predict", trained(*vit, "model.pool=null", "data.n=40", "epochs=1"), "a.png", "--maps", "m")
    assert code == 0, err
    assert "maps: occlusion, as the last used block outputs a vector" in err
    assert Path("m/a.png.png").exists()


def test_a_map_of_one_place_is_none(trained):
    model = tuner.load(trained("model.last_block=block4", "model.image_size=16", "model.pool=null"))
    assert maps.Explainer(model).method == "Occlusion map"


def test_best_of_a_search_has_its_best_trials_temperature_predicts_and_is_exported(command, call):
    code, output = command(
        *("-m", "hparams_search=optuna", "study=mine", "hydra.sweeper.n_trials=2", "final.seeds=2"),
        *("data=synthetic", "model=tiny", "epochs=3", "batch_size=32"),
    )
    assert code == 0, output
    folder = Path("multirun/mine")
    results = [json.loads((folder / name / "result.json").read_text()) for name in ("0", "1", "best")]
    assert results[2]["temperature"] in (results[0]["temperature"], results[1]["temperature"])
    assert results[2]["temperature"] != 1
    assert results[2]["test_ece_calibrated"] is not None
    assert results[0]["test_ece"] is results[2]["val_ece"] is None

    picture("a.png")
    best = folder / "best"
    code, out, err = call("predict", best, "a.png", "--with", best / "model-1.safetensors", "--json")
    assert code == 0, err
    assert [row["file"] for row in json.loads(out)] == ["a.png"]
    code, out, err = call("export", best, "--format", "pt2")
    assert code == 0, err
    assert (best / "model.pt2").exists()
    code, out, err = call("export", best / "model-1.safetensors", "--format", "torchscript")
    assert code == 0, err
    assert (best / "model-1.torchscript").exists()
    code, out, err = call("predict", best.parent, "a.png")
    assert code == 1
    assert "is a sweep, not a run; its retrained best is multirun/mine/best" in err
