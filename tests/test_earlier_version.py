"""Run folders and a study that 0.1.0 wrote before `model.features` became `model.last_block`: all can still be used.

earlier_version.tar.gz holds a run, a run that was killed, and a search of four trials, without most of their weights.
"""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

import tuner
from tuner.earlier import KEYS, rename_keys


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A folder with `run`, `killed` and `multirun`, which is the working folder."""
    with tarfile.open(Path(__file__).with_name("earlier_version.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    for path in tmp_path.rglob("*.yaml"):
        path.write_text(path.read_text().replace("PROJECT_FOLDER", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_is_loaded_evaluated_and_compared(earlier, call):
    assert tuner.load("run", device="cpu").classes == ("class0", "class1", "class2", "class3")
    code, out, err = call("evaluate", "run", "--device", "cpu", "--precision", "bf16", "--json")
    assert code == 0, err
    tested = json.loads(Path("run/result.json").read_text())  # in bfloat16, on another processor
    assert json.loads(out)["accuracy"] == pytest.approx(tested["test_accuracy"], abs=1.01 / tested["n_test"])
    code, out, err = call("compare", "run", "multirun/mine", "--json")
    assert code == 0, err
    assert "model.features" not in out


def test_a_killed_run_goes_on(earlier, call, monkeypatch):
    monkeypatch.chdir("/")
    code, output, err = call("resume", earlier / "killed")
    monkeypatch.chdir(earlier)
    assert code == 0, err
    assert "resuming after epoch 3" in output
    epochs = [line.split(",")[0] for line in Path("killed/metrics.csv").read_text().splitlines()[1:]]
    assert epochs == list("123456")


def test_a_study_is_read_and_continued(earlier, call, command):
    code, _, err = call("study", "multirun/mine", "--json")
    assert code == 0, err
    tiny = ("data=synthetic", "model=tiny", "epochs=2", "batch_size=32", "device=cpu")
    search = ("-m", *tiny, "hparams_search=optuna", "study=mine", "hydra.sweeper.n_trials=5", "final.seeds=1")
    code, output = command(*search)
    assert code == 0, output
    assert "continuing after 4 of 5 trials" in output


def test_the_best_of_a_study_is_retrained(earlier, command):
    shutil.rmtree("multirun/mine/best")
    tiny = ("data=synthetic", "model=tiny", "epochs=2", "batch_size=32", "device=cpu")
    code, output = command(
        "-m", *tiny, "hparams_search=optuna", "study=mine", "hydra.sweeper.n_trials=4", "final.seeds=2"
    )
    assert code == 0, output
    assert "all of its 4 trials" in output
    assert json.loads(Path("multirun/mine/best/result.json").read_text())["seeds"] == [0, 1]


@pytest.mark.parametrize("line", ["model.features=block1", "+model.features=block1", "~model.features"])
def test_an_old_key_is_refused_with_its_new_name(command, line):
    code, output = command("data=synthetic", "model=tiny", line)
    assert code == 1
    assert output.strip().splitlines()[-1].endswith("model.features is now called model.last_block")
    assert not Path("outputs").exists()


@pytest.mark.parametrize("old", KEYS)
def test_an_old_key_in_a_file_of_the_user_is_refused_with_its_new_name(command, old):
    Path("own/experiment").mkdir(parents=True)
    group, key = old.split(".")
    Path("own/experiment/mine.yaml").write_text(f"# @package _global_\n{group}:\n  {key}: block1\n")
    code, output = command("--config-dir", "own", "data=synthetic", "model=tiny", "experiment=mine")
    assert code == 1
    assert output.strip().splitlines()[-1].endswith(f"{old} is now called {KEYS[old]}")
    shutil.rmtree("own")


def test_references_to_an_old_key_follow_it():
    config = {
        "model": {"features": "block1", "frozen": "${.features}"},
        "note": ["x"],
        "more": {"cut": "${model.features}"},
    }
    rename_keys(config)
    assert config["model"] == {"last_block": "block1", "frozen": "${.last_block}"}
    assert config["more"] == {"cut": "${model.last_block}"}
