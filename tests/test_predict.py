"""The command that uses a model: any files in, a class and a probability each out."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import tuner
from tuner import predict
from tuner.data.tables.csv_unlabelled import of_files
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
    batches = list(predict.predicted([model], of_files(paths)))
    assert seen == [3, 2, 3]
    assert [len(batch.broken) for batch in batches] == [0, 1, 0]
    assert [path for batch in batches for path in batch.names["file"]] == [
        str(path) for path in paths if path.stem != "broken"
    ]


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


NAMES = [f"pixel{i}" for i in range(784)]
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)


@pytest.fixture(scope="module")
def from_table(tmp_path_factory):
    """The folder of a run on a table of pixels, with named columns."""
    folder = tmp_path_factory.mktemp("table")
    images = np.concatenate([PIXELS // 4, 128 + PIXELS // 4, PIXELS // 2])
    labels = ["dark"] * 9 + ["light"] * 9 + ["wide"] * 9
    table = pd.DataFrame(images.reshape(27, -1), columns=NAMES)
    table.insert(0, "label", labels)
    table.to_csv(folder / "train.csv", index=False)
    command = [
        sys.executable,
        "-m",
        "tuner.train",
        "data=csv",
        f"data.path={folder}/train.csv",
        "model=tiny",
        "epochs=5",
    ]
    command += [
        "plots=false",
        "test=false",
        f"cache_dir={folder}/cache",
        f"hydra.run.dir={folder}/run",
        "precision=fp32",
    ]
    subprocess.run(command, check=True, cwd=folder, capture_output=True)
    return folder / "run"


def expected(run, images=PIXELS):
    model = tuner.load(run)
    return [model.classes[i] for i in model.predict(images[:, None]).argmax(1)]


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1]], ids=["in order", "reversed"])
@pytest.mark.parametrize(
    "more", [{}, {"id": [f"a{i}" for i in range(9)]}, {"label": ["?"] * 9}, {"ID": range(9), "x": 1}]
)
def test_a_table_of_pixels_is_matched_by_name(from_table, call, names, more):
    table = pd.DataFrame(PIXELS.reshape(9, -1), columns=NAMES)[names].assign(**more)
    table.to_csv("new.csv", index=False)
    code, out, err = call("predict", from_table, "new.csv", "--csv")
    assert code == 0, err
    found = pd.read_csv(io.StringIO(out))
    assert found["class"].tolist() == expected(from_table)
    key = next((name for name in more if name.lower() == "id"), None)
    assert [*found.columns] == [key or "line", "class", "probability"]
    assert found.iloc[:, 0].tolist() == (list(more[key]) if key else list(range(2, 11)))


@pytest.mark.parametrize("header", [True, False])
def test_without_names_columns_are_matched_by_position(trained, call, header):
    run = trained("data.size=28")
    pd.DataFrame(PIXELS.reshape(9, -1)).to_csv("new.csv.gz", index=False, header=header)
    code, out, err = call("predict", run, "new.csv.gz", "--json", "--top", "2")
    assert code == 0, err
    assert "the columns of new.csv.gz are matched to those of the run by position" in err
    found = json.loads(out)
    assert [row["class"] for row in found if row["rank"] == 1] == expected(run)
    assert [row["line"] for row in found] == [i + 1 + header for i in range(9) for _ in range(2)]


def test_a_table_of_files(trained, call):
    run = trained()
    for i in range(3):
        picture(f"photos/{i}.png", seed=i)
    Path("new.csv").write_text("id,file\n" + "".join(f"x{i},{i}\n" for i in range(3)))
    code, _, err = call("predict", run, "new.csv")
    assert code == 1
    assert err.strip().splitlines()[-1].endswith("there is photos/0.png: set --folder=photos --suffix=.png")
    code, out, err = call("predict", run, "new.csv", "--folder", "photos", "--suffix", ".png", "--csv")
    assert code == 0, err
    assert [(row["id"], row["file"]) for row in rows(out)] == [(f"x{i}", f"photos/{i}.png") for i in range(3)]
    Path("new.csv").write_text("when,what\n" + "".join(f"{i},photos/{i}.png\n" for i in range(3)))
    code, out, err = call("predict", run, "new.csv", "--image", "what", "--csv", "--maps", "maps")
    assert code == 0, err
    assert [row["file"] for row in rows(out)] == [f"photos/{i}.png" for i in range(3)]
    assert len(list(Path("maps").iterdir())) == 3


TABLES = [  # content of the table, arguments, what the one line says
    ("a,b\n1,2\n", (), "has neither the pixel columns of the run nor a column that names images: name that column"),
    ("a,b\n1,2\n", ("--image", "c"), "--image=c must be a column of new.csv other than the label: 'a', 'b'"),
    ("file\na.png\n", ("a.png",), "new.csv is a table: predict it alone, without further files"),
    (",".join(NAMES) + "\n" + "1," * 783 + "x\n", (), "line 2 of new.csv, column 'pixel783': 'x' is not a number"),
    (",".join(NAMES[1:]) + "\n" + "1," * 782 + "1\n", (), "has no column 'pixel0', a pixel of the run"),
    (",".join(NAMES) + "\n" + "1," * 783 + "1\n", ("--maps", "m"), "--maps is for image files: a table of pixels has"),
]


@pytest.mark.parametrize(("content", "arguments", "says"), TABLES)
def test_a_table_that_cannot_be_predicted(from_table, call, content, arguments, says):
    picture("a.png")
    Path("new.csv").write_text(content)
    code, out, err = call("predict", from_table, "new.csv", *arguments)
    assert (code, out) == (1, "")
    assert says in err.strip().splitlines()[-1]


def test_options_of_a_table_without_a_table(trained, call):
    picture("a.png")
    code, _, err = call("predict", trained(), "a.png", "--suffix", ".png")
    assert (code, err.strip().splitlines()[-1]) == (1, "--suffix is for a CSV file of image files: name one")


@pytest.mark.parametrize("order", [1, -1])
def test_evaluation_matches_columns_by_name(from_table, call, order):
    table = pd.read_csv(from_table.parent / "train.csv")
    table[[*NAMES[::order], "label"]].to_csv("new.csv", index=False)
    code, out, err = call("evaluate", from_table, "data.path=new.csv", "--split", "all", "--json")
    assert code == 0, err
    images = table[NAMES].to_numpy(np.uint8).reshape(-1, 28, 28)
    right = [a == b for a, b in zip(expected(from_table, images), table["label"], strict=True)]
    assert json.loads(out)["accuracy"] == pytest.approx(sum(right) / 27)
