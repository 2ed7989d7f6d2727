"""A model that is loaded gives what its run has scored; what can't be loaded is one line."""

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

import tuner
from tuner import InputError, data
from tuner.data import synthetic
from tuner.data.files import image_file
from tuner.inference.model import Layers
from tuner.sweep import hydra_private
from tuner.training.heads import Classifier, Head, Stack

CUTS = [
    (),
    ("model.frozen=block1", "epochs=1", "precision=fp32"),
    ("model.frozen=null", "epochs=1"),
    ("model.head.depth=0",),
    ("model.head.width=[32,16]",),
    ("precision=fp32", "data.channels=3"),
    ("precision=bf16", "model.pool=null"),
]


def predictions(folder, split="test"):
    table = pd.read_csv(folder / "predictions.csv")
    return table[table.split == split]


@pytest.mark.parametrize("arguments", CUTS, ids=lambda arguments: " ".join(arguments) or "defaults")
def test_it_gives_what_the_run_scored(trained, arguments):
    folder = trained(*arguments)
    model = tuner.load(folder)
    channels = 3 if "data.channels=3" in arguments else 1
    test = synthetic.load(noise=60.0, channels=channels).test
    p = model.predict(test.images)
    said = predictions(folder)
    assert p.shape == (80, 4)
    assert p.dtype == torch.float32
    assert model.input_shape == (channels, 16, 16)
    assert torch.allclose(p.sum(1), torch.ones(80), atol=1e-5)
    exact = "precision=fp32" in arguments  # in bfloat16 sums depend on the size of the batch, to three digits
    others = sum(model.classes[i] != name for i, name in zip(p.argmax(1), said.predicted, strict=True))
    assert others <= (0 if exact else 1)
    assert p.amax(1).tolist() == pytest.approx(list(said.confidence), abs=1e-4 if exact else 0.02)
    assert torch.allclose(model.predict(test.images, batch_size=7), p, atol=1e-5 if exact else 0.02)


@pytest.mark.parametrize("widths", [(), (8,), (8, 4), (3, 5, 7)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_plain_layers_compute_what_the_stack_does(widths, precision):
    stack = Stack(20, 3, [Head(widths, 0.5, seed=1)], torch.device("cpu"), precision)
    classifier = Classifier(None, stack).eval()
    x = torch.randn(6, 20).to(precision)
    layers = Layers(classifier.state(0), precision)
    with torch.no_grad():
        assert torch.equal(layers(x).float(), classifier(x)[0])


def test_the_temperature_is_in_the_probabilities(trained):
    model = tuner.load(trained("label_smoothing=0.6"))
    images = synthetic.load().test.images
    assert model.temperature != 1
    with torch.inference_mode():
        expected = torch.softmax(model.logits(images) / model.temperature, 1)
    torch.testing.assert_close(model.predict(images), expected)


def test_tensors_files_and_one_file_are_the_same_images(trained, tmp_path):
    model = tuner.load(trained())
    images = synthetic.load().test.images[:3]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[0].numpy()).save(path)
    assert torch.equal(model.predict(paths), model.predict(images))
    assert model.predict(str(paths[1])).allclose(model.predict(images)[1:2], atol=1e-6)  # a batch of one
    assert model.predict([]).shape == (0, 4)
    assert model(images).shape == (3, 4)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, 1, 16, 16)])
def test_another_shape_or_type_is_refused(trained, images):
    with pytest.raises(InputError, match=r"the model takes uint8 images \[N, 1, 16, 16\], not"):
        tuner.load(trained()).predict(images)


def test_a_broken_file_is_named(trained, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(image_file.BrokenImageError, match=r"a\.png"):
        tuner.load(trained()).predict([tmp_path / "a.png"])


def test_each_seed_of_a_best_can_be_loaded(trained, tmp_path):
    folder = tmp_path / "best"
    shutil.copytree(trained(), folder)
    shutil.copy(folder / "model.safetensors", folder / "model-1.safetensors")
    images = synthetic.load().test.images
    assert torch.equal(tuner.load(folder / "model-1.safetensors").predict(images), tuner.load(folder).predict(images))


def damage(name):
    """Spoil a copy of a run's folder in a certain way."""

    def edit_metadata(folder, **changes):
        about = {"class_names": '["class0","class1","class2","class3"]', "input_shape": "[1,16,16]", "fit": '"stretch"'}
        about |= {"temperature": "1.0", "weights": json.dumps(changes.pop("weights", "x"))} | changes
        path = folder / "model.safetensors"
        save_file(load_file(path), path, {key: value for key, value in about.items() if value})

    def config(folder, old, new):
        path = folder / "conf" / "config.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return {
        "gone": lambda folder: shutil.rmtree(folder),
        "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
        "no run": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
        "unfinished": lambda folder: (folder / "model.safetensors").unlink(),
        "a sweep": lambda folder: (
            (folder / "best").mkdir() or (folder / "model.safetensors").rename(folder / "best" / "model.safetensors")
        ),
        "cut off": lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" * 100),
        "older": lambda folder: save_file(
            load_file(folder / "model.safetensors"), folder / "model.safetensors", {"class_names": "[]"}
        ),
        "other weights": edit_metadata,
        "no config": lambda folder: [shutil.rmtree(folder / name) for name in ("conf", ".hydra")],
        "config damaged": lambda folder: (folder / "conf" / "config.yaml").write_text("a: [b"),
        "hydra damaged": lambda folder: (
            shutil.rmtree(folder / "conf"),
            (folder / ".hydra" / "hydra.yaml").write_text("a: ["),
        ),
        "config of another": lambda folder: (folder / "conf" / "config.yaml").write_text("a: b"),
        "weights gone": lambda folder: config(folder, "weights: bundled", "weights: /nowhere/w.safetensors"),
        "other cut": lambda folder: config(folder, "last_block: block2", "last_block: block1"),
        "unset": lambda folder: config(folder, "weights: bundled", "weights: ${oc.env:NOT_SET_AT_ALL}"),
        "trunk missing": lambda folder: config(folder, "frozen: ${.last_block}", "frozen: block1"),
    }[name]


REFUSED = [
    ("gone", r"does not exist; runs are in outputs/ and multirun/"),
    ("a file", r"is not a run: name a run's folder, or a \.safetensors file in it"),
    ("no run", r"is not a run folder: it has no model\.safetensors"),
    ("unfinished", r"has no model\.safetensors: the run is still going, or was killed, pruned or failed"),
    ("a sweep", r"is a sweep, not a run; its retrained best is .*best"),
    ("cut off", r"model\.safetensors is damaged"),
    (
        "older",
        r"by an older version of tuner, without input_shape, .*: train it again, with the overrides in ",
    ),
    ("other weights", r"model\.weights=bundled are not the weights that it was trained on: restore those"),
    ("no config", r"has no conf/config\.yaml: keep a model in the folder of its run"),
    ("config damaged", r"config\.yaml can't be read"),
    ("hydra damaged", r"hydra\.yaml can't be read"),
    ("config of another", r"config\.yaml is not the config of a run"),
    ("weights gone", r"model\.weights=/nowhere/w\.safetensors is neither a readable file"),
    ("other cut", r"has no head from 256 features to 4 classes"),
    ("unset", r"the config of .*run cannot be used: the config cannot be resolved: .*NOT_SET_AT_ALL"),
    ("trunk missing", r"does not match the config beside it .*: train it again"),
]


@pytest.mark.parametrize(("what", "message"), REFUSED, ids=[what for what, _ in REFUSED])
def test_what_cannot_be_loaded_is_one_line(trained, tmp_path, what, message):
    folder = tmp_path / "run"
    shutil.copytree(trained(), folder)
    damage(what)(folder)
    with pytest.raises(InputError, match=message) as error:
        tuner.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"device": "cuda:77"}, {"precision": "fp16"}])
def test_devices_and_precisions_are_checked(trained, options):
    [(key, value)] = options.items()
    with pytest.raises(InputError, match=f"{key}={value}"):
        tuner.load(trained(), **options)


def test_an_array_is_as_good_as_a_tensor(trained):
    model = tuner.load(trained())
    images = torch.randint(0, 256, (3, *model.input_shape), dtype=torch.uint8)
    assert torch.equal(model.predict(images.numpy()), model.predict(images))
    with pytest.raises(InputError, match="a tensor, or paths of files, not ndarray"):
        model.predict(images.double().numpy())


def test_the_data_set_is_not_needed(trained, monkeypatch):
    folder = trained()
    monkeypatch.setattr(synthetic, "load", lambda **_: pytest.fail("the data was asked for"))
    monkeypatch.setattr(data, "split", lambda *_, **__: pytest.fail("the data was asked for"))
    assert tuner.load(folder).classes == ("class0", "class1", "class2", "class3")


def test_importing_tuner_is_light():
    heavy = "torch", "hydra", "pandas", "matplotlib"
    code = f"import sys, tuner; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_where_the_run_looked_at_mirror_images_the_model_does(trained):
    run = trained("augment=light", "data.views=2", "data.test_views=2", "precision=fp32")
    model, images = tuner.load(run), synthetic.load(noise=60.0).test.images  # as the config has it
    assert model.mirrors
    torch.testing.assert_close(model.predict(images), model.predict(images.flip(-1)), rtol=1e-4, atol=1e-5)
    said = pd.read_csv(run / "predictions.csv").query("split == 'test'")
    assert [model.classes[i] for i in model.predict(images).argmax(1)] == said.predicted.tolist()
    assert model.predict(images).amax(1).tolist() == pytest.approx(said.confidence.tolist(), abs=2e-3)


@pytest.fixture
def without_hydra():
    """As in a process in which Hydra runs no job: its resolvers are not registered."""
    for name in ("now", "hydra"):
        OmegaConf.clear_resolver(name)
    yield
    hydra_private.setup_globals()


def test_a_run_is_read_where_only_its_job_could_resolve_all_of_its_config(trained, call, without_hydra, tmp_path):
    folder = trained()
    for name in ("now", "hydra"):  # the run has registered them again, if it was not there yet
        OmegaConf.clear_resolver(name)
    assert "${now:" in (folder / ".hydra" / "config.yaml").read_text()
    assert len(tuner.load(folder).classes) == 4
    for command in (["evaluate", folder, "--json"], ["export", folder, "--format", "pt2", "--out", tmp_path / "m.pt2"]):
        code, _, err = call(*command)
        assert code == 0, err
