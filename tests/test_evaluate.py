"""A model's scores on its own data are those of the run; other data is brought to its classes and its shape."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import result
from PIL import Image
from sklearn import metrics as sk

import tuner
from tuner import evaluate, runs
from tuner.data import synthetic
from tuner.data.files import image_file
from tuner.networks import weights

EXACT = "precision=fp32"  # in bfloat16 sums depend on the size of the batch


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("arguments", [(EXACT,), (EXACT, "model.frozen=null", "epochs=1")])
def test_the_runs_own_test_images(trained, call, arguments):
    run = trained(*arguments)
    code, out, err = call("evaluate", run, "--json")
    assert code == 0, err
    found, r = json.loads(out), result(run)
    assert "split: test (of the run's own data)" in err
    assert (found["split"], found["images"]) == ("test", 80)
    assert found["accuracy"] == pytest.approx(r["test_accuracy"])
    assert found["ece_calibrated"] == pytest.approx(r["test_ece_calibrated"], abs=1e-4)
    said = pd.read_csv(run / "predictions.csv").query("split == 'test'")
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(said.label, said.predicted))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(said.label, said.predicted, average="macro"))


SPLITS = {"train": 256, "val": 64, "test": 80, "all": 400}


@pytest.mark.parametrize("split", SPLITS)
def test_splits(trained, call, split):
    code, out, err = call("evaluate", trained(EXACT), "--split", split, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["images"] == SPLITS[split]
    name = {"train": "train_accuracy", "val": "val_accuracy", "test": "test_accuracy"}.get(split)
    assert name is None or found["accuracy"] == pytest.approx(result(trained(EXACT))[name])


def test_tables_and_pictures_of_other_data(trained, call):
    arguments = ("data.noise=30", "data.size=40", "data.channels=3", "--out", "scores")
    code, out, err = call("evaluate", trained(EXACT), *arguments)
    assert code == 0, err
    assert "split: all (of other data than the run's)" in err
    assert "images are converted from [3, 40, 40] to [1, 16, 16], as files would be: fit=stretch" in err
    names = {path.name for path in Path("scores").iterdir()}
    assert names == {
        *("per_class.csv", "confusion_matrix.csv", "predictions.csv", "confusion_matrix.png", "per_class.png"),
        *("examples.png", "reliability.png"),
    }
    table = pd.read_csv("scores/predictions.csv")
    assert dict(table.split.value_counts()) == {"training and validation": 320, "test": 80}
    assert pd.read_csv("scores/confusion_matrix.csv", index_col=0).to_numpy().sum() == 400
    accuracy = (table.label == table.predicted).mean()
    assert f"accuracy           {accuracy:.4f}" in out
    assert "log loss" in out
    assert "By class" in out


def csv_file(name, labels):
    header = ",".join(["label", *(f"p{i}" for i in range(256))])
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 256))
    lines = [f"{label}," + ",".join(map(str, row)) for label, row in zip(labels, pixels, strict=True)]
    Path(name).write_text("\n".join([header, *lines]))
    return f"data.path={name}"


def test_classes_are_matched_by_name(trained, call):
    some = csv_file("some.csv", ["class3", "class1"] * 6)
    code, out, err = call("evaluate", trained(EXACT), "data=csv", some, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [(row["class"], row["support"]) for row in found["per_class"]] == [("class1", 6), ("class3", 6)]


def image_files(root):
    """Fifty images of the trained model's classes, of 40 x 20 pixels, a folder a class."""
    data = synthetic.load(n=50, size=40, noise=30)
    for number, (image, label) in enumerate(zip(data.pool.images, data.pool.labels, strict=True)):
        folder = Path(root) / data.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0, :20].numpy()).save(folder / f"{number}.png")
    return sorted(Path(root).glob("*/*.png"))


@pytest.mark.parametrize("table", [True, False])
def test_files_are_seen_as_prediction_sees_them(trained, call, table):
    files, model = image_files("images"), tuner.load(trained(EXACT))
    Path("t.csv").write_text("\n".join(["image,label", *(f"{file},{file.parent.name}" for file in files)]))
    arguments = ("data=csv", "data.path=t.csv") if table else ("data=image_folder", "data.root=images")
    code, out, err = call("evaluate", trained(EXACT), *arguments, "--out", "scores", "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == len(files)
    said = pd.read_csv("scores/predictions.csv").set_index("image")
    confidence, which = model.predict(files).max(1)
    for file, p, label in zip(files, confidence.tolist(), which.tolist(), strict=True):
        row = said.loc[str(file if table else file.relative_to("images"))]
        assert row.predicted == model.classes[label]
        assert row.confidence == pytest.approx(p, abs=1e-4)


def test_options_stand_anywhere(trained, call):
    some = csv_file("some.csv", ["class3", "class1"] * 20)
    code, out, err = call("evaluate", trained(EXACT), "--split", "test", "data=csv", "--json", some)
    assert code == 0, err
    assert json.loads(out)["split"] == "test"


@pytest.mark.parametrize(
    ("options", "warns"),
    [((), False), (("data.noise=30",), True), (("data=synthetic",), False), (("data=synthetic", "data.n=90"), False)],
)
def test_the_runs_own_data_made_in_another_way_may_not_be_new_to_it(trained, call, options, warns):
    code, _, err = call("evaluate", trained(EXACT), *options)
    assert code == 0, err
    assert ("the model may have been trained on some of these images" in err) == warns


def test_a_data_set_that_there_is_not(trained, call):
    code, _, err = call("evaluate", trained(EXACT), "data=nowhere")
    assert code == 1
    assert err.endswith(
        "data=nowhere is not a data set; choose one of csv, fashion_mnist, fmnist_small, huggingface, image_folder, "
        "synthetic\n"
    )


def test_relative_paths_of_a_run_are_seen_from_where_it_was_started(command, call, tmp_path, monkeypatch):
    shutil.copy(weights.BUNDLED, "own.safetensors")
    [first, *_] = image_files("images")
    tiny = ("data=image_folder", "data.root=images", "model=tiny", "model.weights=own.safetensors", "epochs=1")
    code, output = command(*tiny, "data.test_share=0.4", "hydra.run.dir=run")
    assert code == 0, output
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    code, out, err = call("evaluate", "../run", "--json")
    assert code == 0, err
    assert json.loads(out)["accuracy"] == pytest.approx(result(tmp_path / "run")["test_accuracy"], abs=0.05)
    code, out, err = call("predict", "../run", Path("..") / first)
    assert code == 0, err
    code, out, err = call("evaluate", "../run", "data.root=images")  # what is given here is seen from here
    assert code == 1
    assert "images" in err


def test_one_image_is_enough(trained, call):
    keep, *others = image_files("images")
    for file in others:
        file.unlink()
    for folder in Path("images").iterdir():
        if folder != keep.parent:
            folder.rmdir()
    code, out, err = call("evaluate", trained(EXACT), "data=image_folder", "data.root=images", "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == 1


def test_a_run_whose_data_has_grown_is_not_scored_on_what_it_has_learnt(command, call, tmp_path):
    csv_file("grows.csv", ["a", "b"] * 30)
    code, output = command("data=csv", "data.path=grows.csv", "model=tiny", "epochs=1", "hydra.run.dir=run")
    assert code == 0, output
    assert call("evaluate", "run")[0] == 0
    with Path("grows.csv").open("a") as file:
        file.write("\na," + ",".join(["7"] * 256))
    code, _, err = call("evaluate", "run")
    assert code == 1
    assert "the test images of the run's data have changed since" in err
    code, out, err = call("evaluate", "run", "--split", "all", "--json")
    assert (code, json.loads(out)["images"]) == (0, 61)


WRONG = [
    (("data=csv",), "data.path has no default; give it, as in data.path=VALUE"),
    (("data=csv", "data.path=nowhere.csv"), "there is no file nowhere.csv"),
    (("data=nothing",), "nothing"),
    (("data.colour=red",), "colour"),
    (("data.test_views=2",), "data.test_views=2 is fixed by the model: leave it out"),
    (("optimizer.lr=1",), "optimizer.lr=1: a run is evaluated as it is; only data=NAME and data.KEY=VALUE"),
    (("data.n=[",), "data.n=["),
    (("data=synthetic", "data.classes=5"), "the model does not know the class 'class4': the data has class0, "),
    (("--out", "file/x"), "--out file/x can't be a folder"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_what_cannot_be_done_is_one_line(trained, call, arguments, message):
    Path("file").write_text("")
    code, out, err = call("evaluate", trained(EXACT), *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err


def test_a_users_own_config(trained, call):
    Path("conf/data").mkdir(parents=True)
    Path("conf/data/mine.yaml").write_text("_target_: tuner.data.synthetic.load\nseed: ${seed}\nn: 100\n")
    code, out, err = call("evaluate", trained(EXACT), "data=mine", "data.n=60", "--config-dir", "conf", "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == 60


@pytest.mark.parametrize("fit", image_file.FITS)
@pytest.mark.parametrize("before", [(1, 28, 28), (3, 40, 20), (3, 21, 40)])
@pytest.mark.parametrize("after", [(1, 16, 16), (3, 32, 24)])
def test_a_tensor_gets_its_shape_as_a_file_does(fit, before, after):
    channels, height, width = before
    ramp = torch.linspace(0, 200, height)[:, None] + torch.linspace(0, 55, width)
    image = torch.stack([ramp, 255 - ramp, ramp / 2])[:channels].round().to(torch.uint8)
    pixels = image.permute(1, 2, 0).numpy()
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save("image.png")
    of_file = image_file.read(Path("image.png"), after, fit).float()
    of_tensor = evaluate.shaped(image[None], after, fit)[0].float()
    assert of_tensor.shape == after
    assert (of_file - of_tensor).abs().mean() < 4  # where an odd margin is halved, they differ by a row


def test_a_run_of_an_earlier_version_is_read(trained, call, tmp_path):
    """The functions and classes that its config names have moved since."""
    folder = tmp_path / "old"
    shutil.copytree(trained(EXACT), folder)
    shutil.rmtree(folder / "conf")  # newer
    path = folder / ".hydra" / "config.yaml"
    old = path.read_text()
    for new, was in (("tuner.training.schedules.", "tuner.fit."), ("tuner.data.augmentation.", "tuner.augment.")):
        assert new in old
        old = old.replace(new, was)
    path.write_text(old)
    code, out, err = call("evaluate", folder, "--json")
    assert code == 0, err
    assert json.loads(out)["accuracy"] == pytest.approx(result(folder)["test_accuracy"])
    frame = runs.load(folder, trained(EXACT))
    assert frame["scheduler._target_"].unique().tolist() == ["tuner.training.schedules.onecycle"]
