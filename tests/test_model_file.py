"""Files that a run wrote and that are read again: model.safetensors and checkpoint.pt, with their checksums."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tuner import InputError
from tuner.runs import model_file
from tuner.training import checkpoint

ABOUT = {"class_names": ["a", "b"], "input_shape": [1, 8, 8], "fit": "crop", "temperature": 1.5, "weights": "x"}
STATE = {"head.0.weight": torch.arange(6.0).reshape(2, 3), "head.0.bias": torch.zeros(2)}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    model_file.write(path, STATE, ABOUT)
    return path


def of_an_earlier_version(path, **changes):
    save_file(STATE, path, {key: json.dumps(value) for key, value in (ABOUT | changes).items()})


def test_what_was_written_is_read(path, caplog):
    caplog.set_level(logging.INFO)
    about, state = model_file.read(path)
    assert about == ABOUT | {"range": 65535, "columns": None}  # as files of earlier versions, which have none
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
    assert not caplog.messages


def test_any_bit_that_flips_is_noticed(path):
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(InputError, match=r"model\.safetensors is damaged \(.*\): train it again"):
            model_file.read(path)


def test_a_file_of_an_earlier_version_has_no_checksum_and_the_log_says_so(path, caplog):
    caplog.set_level(logging.INFO)
    of_an_earlier_version(path)
    assert model_file.read(path)[0] == ABOUT | {"range": 65535, "columns": None}
    assert caplog.messages == [f"{path} has no checksum: written by an earlier version"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("range", 0, "range=0 must be a whole number of at least 1 and at most 65,535"),
        ("temperature", 0, "temperature=0 must be a number of more than 0"),
        ("temperature", -1.0, "temperature=-1.0 must be"),
        ("temperature", float("nan"), "temperature=nan must be"),
        ("temperature", float("inf"), "temperature=inf must be"),
        ("temperature", True, "temperature=True must be"),
        ("temperature", "1", "temperature=1 must be"),
        ("fit", "zoom", "fit=zoom must be crop, pad or stretch"),
        ("fit", ["crop"], "fit="),
        ("input_shape", [1, -8, 8], r"input_shape=\[1, -8, 8\] must be \[C, H, W\]"),
        ("input_shape", [1, 10**6, 10**6], "input_shape=.* at most 67,108,864 pixels"),
        ("input_shape", [2, 8, 8], "input_shape="),
        ("input_shape", [1, 8], "input_shape="),
        ("input_shape", [1, 8.0, 8], "input_shape="),
        ("input_shape", None, "input_shape="),
        ("class_names", [], "class_names="),
        ("class_names", "ab", "class_names="),
        ("class_names", ["a", 1], "class_names="),
        ("class_names", ["a", "a"], r"class_names=\['a', 'a'\] must be a list of different names"),
        ("weights", 1, "weights="),
    ],
)
@pytest.mark.parametrize(
    "write", [of_an_earlier_version, lambda path, **new: model_file.write(path, STATE, ABOUT | new)]
)
def test_values_that_no_model_has_are_refused(path, write, key, value, message):
    write(path, **{key: value})
    with pytest.raises(InputError, match=rf"is not a model: {message}"):
        model_file.read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(path, value):
    model_file.write(path, STATE | {"head.0.bias": torch.tensor([0.0, value])}, ABOUT)
    with pytest.raises(InputError, match=r"is not a model: head\.0\.bias must be finite numbers"):
        model_file.read(path)


@pytest.mark.parametrize("command", ["predict", "evaluate", "export"])
def test_commands_refuse_a_model_in_which_a_bit_flipped(trained, call, tmp_path, command):
    folder = shutil.copytree(trained(), tmp_path / "run")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 64
    (folder / "model.safetensors").write_bytes(content)
    more = {"predict": [tmp_path], "evaluate": [], "export": ["--format", "pt2"]}[command]
    (tmp_path / "image.png").write_bytes((Path(__file__).parents[1] / "docs/pictures/accuracy.png").read_bytes())
    code, out, err = call(command, folder, *more)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == f"{folder}/model.safetensors is damaged (its checksum is wrong): train it again"


# checkpoint.pt


@pytest.mark.parametrize("place", [0.02, 0.2, 0.5, 0.8, 0.95])
def test_a_bit_that_flips_in_a_checkpoint_is_noticed(tmp_path, place):
    path = tmp_path / "checkpoint.pt"
    state = {"fitted": {"epochs": 1}, "model": torch.randn(1000)}
    torch.save({"config": "{}", "seconds": 1.0, "state": state}, path)
    assert torch.equal(checkpoint.read(path)["state"]["model"], state["model"])
    content = bytearray(path.read_bytes())
    content[content.index(state["model"].numpy().tobytes()) + int(place * 4000)] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint\.pt is damaged \(.*checksum.*\): delete it to start again"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    "content",
    [[1], {}, {"config": "{}", "seconds": 1.0}, {"config": "[]", "seconds": 1.0, "state": {"fitted": {"epochs": 1}}}],
)
def test_a_file_of_tensors_that_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=r"checkpoint\.pt is damaged \("):
        checkpoint.read(tmp_path / "checkpoint.pt")
