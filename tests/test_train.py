"""The command, from arguments to run folder. Most tests call it in this process, to save the seconds of imports."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest
import torch
import yaml
from helpers import TINY, result
from safetensors import safe_open

from tuner import runs
from tuner.bank import features
from tuner.networks import weights
from tuner.runs.run import Run

FILES = {
    "metrics.csv",
    "result.json",
    "model.safetensors",
    "per_class.csv",
    "confusion_matrix.csv",
    "predictions.csv",
    "train.log",
}
PLOTS = {"data", "accuracy", "loss", "train_vs_test", "confusion_matrix", "per_class", "examples", "reliability"}


def run_folders(root: Path = Path()) -> list[Path]:
    return sorted(path.parent for path in root.rglob("result.json"))


def test_a_run_leaves_a_complete_folder(command):
    code, output = command(*TINY, "plots=true")
    assert code == 0
    [folder] = run_folders(Path("outputs"))
    last = output.strip().splitlines()[-1]
    split = r"accuracy 0\.\d{4} \(%d images, 95%%: 0\.\d{4} to [01]\.\d{4}\)"
    assert re.search(f"validation {split % 64}, test {split % 80}", last)
    assert last.endswith(str(folder.absolute()))

    assert {path.name for path in folder.iterdir()} == FILES | {".hydra", "conf", "plots"}
    assert {path.stem for path in (folder / "plots").iterdir()} == PLOTS
    assert all(matplotlib.image.imread(path).shape[0] > 400 for path in (folder / "plots").iterdir())
    curve = pd.read_csv(folder / "metrics.csv")
    named = [
        *("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy"),
        "val_balanced_accuracy",
        "lr",
        "seconds",
    ]
    assert list(curve) == named
    assert list(curve.epoch) == [1, 2, 3]

    r = result(folder)
    assert r["status"] == "complete"
    assert (r["n_train"], r["n_val"], r["n_test"], r["seed"], r["epochs"]) == (256, 64, 80, 0, 3)
    for split in ("val", "test"):
        assert r[f"{split}_top5_accuracy"] is None  # there are four classes
        assert 0.5 < r[f"{split}_auroc"] <= 1
        assert r[f"{split}_log_loss"] > 0
    assert r["val_log_loss"] < r["val_loss"]  # it is calibrated on these images
    assert r["val_accuracy"] == pytest.approx(curve.val_accuracy.iloc[-1], abs=1e-6)
    assert r["saved_epoch"] == 3
    assert r["trained_parameters"] == 128 * 2 * 2 * 64 + 64 + 64 * 4 + 4
    assert r["device"].startswith("cpu")
    assert set(r["versions"]) >= {"tuner", "python", "torch", "torchvision", "hydra-core", "optuna"}
    assert r["study"] is None
    assert r["trial"] is None

    counts = pd.read_csv(folder / "confusion_matrix.csv", index_col=0).to_numpy()
    assert counts.sum() == 80
    assert counts.trace() / 80 == pytest.approx(r["test_accuracy"])
    per_class = pd.read_csv(folder / "per_class.csv")
    assert list(per_class["class"].astype(str)) == r["class_names"]
    assert (per_class.accuracy * per_class.support).sum() / 80 == pytest.approx(r["test_accuracy"])


def test_it_prints_epochs_with_loss_and_accuracy_where_the_output_is_no_terminal(command):
    _, output = command(*TINY)
    of_splits = [rf"val {name} \d+\.\d{{4}}, train {name} \d+\.\d{{4}}" for name in ("accuracy", "loss")]
    assert len(re.findall(rf"epoch \d/3: {', '.join(of_splits)}", output)) == 3
    [folder] = run_folders()
    assert (folder / "train.log").read_text().count("epoch ") == output.count("epoch ")


def test_the_saved_model_has_the_value_that_was_returned(command):
    command(*TINY)
    [folder] = run_folders()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_tensor(name).shape for name in file.keys()}  # noqa: SIM118
        about = {key: json.loads(value) for key, value in file.metadata().items()}
    r = result(folder)
    assert len(about.pop("sha256")) == 64
    assert about.pop("weights") == weights._sha256(weights.BUNDLED)
    assert about == {
        **{"class_names": r["class_names"], "input_shape": [1, 16, 16], "fit": "stretch"},
        **{"temperature": r["temperature"], "range": 65535, "columns": None},
    }
    assert shapes == {
        "head.0.weight": torch.Size([64, 512]),
        "head.0.bias": torch.Size([64]),
        "head.1.weight": torch.Size([4, 64]),
        "head.1.bias": torch.Size([4]),
    }


def curves(*columns: str) -> list[list]:
    return [pd.read_csv(folder / "metrics.csv")[list(columns)].to_numpy().tolist() for folder in run_folders()]


def test_the_same_seed_gives_identical_metrics_and_another_does_not(command):
    for seed in (0, 0, 1):
        command(*TINY, f"seed={seed}")
    first, second, other = curves("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr")
    assert first == second != other


def test_the_second_run_neither_runs_the_network_nor_reads_its_weights(command, monkeypatch):
    command(*TINY)

    def never(*_):
        raise AssertionError("the network is not needed")

    monkeypatch.setattr(features, "extract", never)
    monkeypatch.setattr(weights, "_read", never)
    code, output = command(*TINY, "seed=5", "optimizer=sgd", "model.head.width=[32,16]")
    assert code == 0, output
    assert "computing" not in output


def test_another_seed_keeps_the_test_images(command):
    command(*TINY)
    _, output = command(*TINY, "seed=1")
    assert "computing" not in output


@pytest.mark.parametrize(
    "arguments",
    [
        ("model.frozen=block1",),
        ("model.frozen=null",),
        ("optimizer=sgd", "scheduler=cosine", "grad_clip=1.0", "label_smoothing=0.1"),
        ("optimizer=adam", "scheduler=constant", "patience=1", "keep=best", "epochs=8"),
        ("model.head.depth=0",),
        ("precision=fp32",),
        ("precision=bf16",),
        ("data.channels=3",),
    ],
)
def test_ways_to_train(command, arguments):
    code, output = command(*TINY, *arguments)
    assert code == 0, output
    [folder] = run_folders()
    assert result(folder)["status"] == "complete"


def test_blocks_above_the_cut_learn(command):
    """All-frozen, partly frozen and free networks see the same data; what is trained is what is saved."""
    sizes = {}
    for frozen in ("block2", "block1", "null"):
        command(*TINY, f"model.frozen={frozen}", f"hydra.run.dir=frozen-{frozen}", "optimizer.lr=1e-4")
        sizes[frozen] = result(Path(f"frozen-{frozen}"))["trained_parameters"]
    assert sizes["block2"] < sizes["block1"] < sizes["null"]
    for frozen in ("block1", "null"):
        with safe_open(Path(f"frozen-{frozen}") / "model.safetensors", framework="pt") as file:
            names = set(file.keys())
        assert any(name.startswith("trunk.") for name in names)


SWEEPS = [
    (("optimizer.lr=1e-3,1e-4",), 2),
    (("hparams_search=optuna", "hydra.sweeper.n_trials=3", "final.seeds=0"), 3),
]


def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_refused_run_changes_nothing_in_a_finished_runs_folder(command):
    assert command(*TINY, "hydra.run.dir=here", "plots=false")[0] == 0
    before = files("here")
    code, output = command(*TINY, "hydra.run.dir=here", "optimizer.lr=0.5", "model.head.width=7")
    assert code == 1
    assert "here holds a finished run; choose another name or hydra.run.dir" in output
    assert files("here") == before


def test_jobs_of_hydras_own_sweep_do_not_share_a_folder(command, call):
    """`compare` listed the first job's accuracies under the last one's learning rate."""
    command("-m", *TINY, "optimizer.lr=0.001,0.5", "hydra.sweep.dir=swept", "hydra.sweep.subdir=same")
    config = yaml.safe_load(Path("swept/same/conf/config.yaml").read_text())
    assert config["optimizer"]["lr"] == 0.001
    assert result(Path("swept/same"))["status"] == "complete"
    assert Path("swept/same/.hydra/overrides.yaml").read_text().count("optimizer.lr=0.001") == 1
    code, _, err = call("compare", "swept", "--json")
    assert code == 0, err


@pytest.mark.parametrize("subdir", ["null", "hydra_files"])
def test_hydras_own_record_is_not_needed(command, call, subdir):
    assert command(*TINY, "hydra.run.dir=here", "plots=false", f"hydra.output_subdir={subdir}")[0] == 0
    for name, *more in (("evaluate",), ("compare",), ("export", "--format", "torchscript")):
        code, _, err = call(name, "here", *more)
        assert code == 0, err


@pytest.mark.parametrize(("arguments", "jobs"), SWEEPS)
def test_a_sweep_never_reads_the_test_split(command, arguments, jobs):
    code, output = command("-m", *TINY, *arguments)
    assert code == 0, output
    folders = run_folders(Path("multirun"))
    assert [folder.name for folder in folders] == [str(i) for i in range(jobs)]
    for i, folder in enumerate(folders):
        r = result(folder)
        assert r["status"] == "complete"
        assert r["test_accuracy"] is None
        assert r["reported_split"] == "validation"
        assert r["trial"] == i
        assert {path.name for path in folder.iterdir()} == FILES | {".hydra", "conf", "validation.safetensors"}
        assert pd.read_csv(folder / "per_class.csv").support.sum() == 64
    assert "features of 80 images" not in output


def test_optuna_optimises_the_validation_accuracy_that_was_returned(command):
    command("-m", *TINY, "hparams_search=optuna", "hydra.sweeper.n_trials=3", "final.seeds=0")
    [best] = [path.read_text() for path in Path("multirun").rglob("optimization_results.yaml")]
    values = [result(folder)["val_accuracy"] for folder in run_folders()]
    assert float(re.search(r"best_value: (\S+)", best)[1]) == pytest.approx(max(values))
    assert {"optimizer.lr", "model.head.dropout", "model.head.width"} <= set(re.findall(r"[\w.]+(?=: )", best))


def test_test_and_plots_can_be_asked_for_in_a_sweep(command):
    command("-m", *TINY, "seed=0,1", "test=true", "plots=true")
    assert all(result(folder)["test_accuracy"] is not None for folder in run_folders())
    assert all((folder / "plots" / "accuracy.png").exists() for folder in run_folders())


def csv_file(name: str, text: str) -> str:
    Path(name).write_text(text)
    return f"data.path={name}"


WRONG = [  # arguments, what the one line says
    (("epochs=0",), "epochs=0 must be a whole number of at least 1"),
    (("epochs=2.5",), "epochs=2.5 must be a whole number of at least 1"),
    (("batch_size=0",), "batch_size=0 must be a whole number of at least 1"),
    (("seed=-1",), "seed=-1 must be a whole number of at least 0"),
    (("optimizer.lr=-1",), "optimizer.lr=-1 must be a number of more than 0"),
    (("optimizer.lr=fast",), "optimizer.lr=fast must be a number of more than 0"),
    (("optimizer.lr=nan",), "optimizer.lr=nan must be a number of more than 0"),
    (("optimizer.weight_decay=-1",), "optimizer.weight_decay=-1 must be a number of at least 0"),
    (("label_smoothing=1",), "label_smoothing=1 must be at least 0 and less than 1"),
    (("grad_clip=0",), "grad_clip=0 must be more than 0, or null"),
    (("patience=0",), "patience=0 must be a whole number of at least 1 and at most 1,000,000, or null"),
    (("patience=3",), "patience=3 ends a run after its best epoch, so it needs keep=best"),
    (("keep=first",), "keep=first must be last or best"),
    (("precision=fp16",), "precision=fp16 must be auto, bf16 or fp32"),
    (("test=maybe",), "test=maybe must be auto, true or false"),
    (("model.head.dropout=1.5",), "model.head.dropout=1.5 must be at least 0 and less than 1"),
    (("model.head.width=0",), r"model.head.width=\[0\] must be whole numbers of at least 1"),
    (("model.last_block=block9",), "model.last_block=block9 is not a block of vgg16; known: block1, block2, block3"),
    (("model.frozen=block9",), "model.frozen=block9 is not a block of vgg16; known: block1, block2, block3"),
    (("model.pool=99",), "model.pool=99 does not fit"),
    (
        ("model.weights=nowhere.pth",),
        r"model.weights=nowhere.pth is neither a readable file .* nor weights of vgg16; use bundled",
    ),
    (("model.weights=IMAGENET",), r"model.weights=IMAGENET is neither a readable file .*; use bundled, IMAGENET1K_V1"),
    (("+model.colour=red",), "model.colour is not a key of the config; the keys are budget, frozen, head, image_size"),
    (("device=cuda:77",), "device=cuda:77"),
    (("device=tpu",), "device=tpu must be auto, cpu"),
    (("+optimizer.foo=1",), "optimizer: .*unexpected keyword argument 'foo'"),
    (("+scheduler.foo=1",), "scheduler: .*unexpected keyword argument 'foo'"),
    (("optimizer.betas=[2,2]", "optimizer=adamw"), "Key 'betas' is not in struct|Invalid beta"),
    (("optimizer._target_=mymodule.Adam",), "mymodule.Adam"),
    (("optimizer._target_=os.system",), "os.system"),
    (("data=csv",), "data.path has no default; give it, as in data.path=VALUE"),
    (("data=csv", "data.path=nowhere.csv"), "there is no file nowhere.csv"),
    (("+data.foo=1",), "data: .*unexpected keyword argument 'foo'"),
    (("cache_dir=/dev/null/cache",), "the cache folder /dev/null/cache/banks cannot be written"),
    (("data.n=nan",), "data.n=nan must be a whole number of at least 1"),
    (("data.n=10000000",), "data.n=10000000 x data.size=16 . 2 x data.channels=1 must be at most 33,554,432 values"),
    (("model.image_size=1000000",), "model.image_size=1000000 must be a whole number of pixels, at least 1 and"),
    (("model.head.width=1000000",), r"model.head.width=\[1000000\] must be whole numbers of at least 1 and at"),
    (("model.head.depth=1000000",), "model.head.depth=1000000 must be a whole number of at least 0 and at most 100"),
    (("model.head.width=65536", "model.head.depth=100"), "makes .* trained parameters, which take .* lower model.head"),
    (("scheduler.warmup=-1",), "scheduler.warmup=-1 must be a share, 0 to 1"),
    (("scheduler.start=nan",), "scheduler.start=nan must be a share, 0 to 1"),
    (("model.weights=/dev/zero",), r"model.weights=/dev/zero is neither a readable file \(it is not a regular file\)"),
    (("+optimizer.betas=[0.9]",), "optimizer: "),
    (("+optimizer.eps=nan",), "optimizer: "),
    (("data=csv", "data.path=/dev/zero"), "/dev/zero is not a regular file: name a CSV file"),
    (("study=..",), "study=.. must be the name of a folder"),
    (("-m", "hparams_search=random", "study=../x"), "study=../x must be the name of a folder"),
    (("-m", "seed=0,1", "study=/x"), "study=/x must be the name of a folder"),
    (("-m", "hparams_search=random", "study=${seed}/x"), "study=0/x must be the name of a folder"),
    (("hydra.run.dir=" + "a" * 300,), "has the name of a folder of more than 255 bytes: shorten it"),
    (("optimizer=sgd", "optimizer.lr=1e38", "scheduler=constant"), "in epoch 1 at lr 1e.38: lower optimizer.lr"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_what_cannot_be_done_is_one_line_and_an_exit_code(command, arguments, message):
    code, output = command(*TINY, *arguments)
    assert code == 1
    assert re.search(message, output), output
    assert "Traceback" not in output
    assert len([line for line in output.splitlines() if "ERROR" in line]) <= 1
    for folder in run_folders():
        assert result(folder)["status"] == "failed"
        left = {path.name for path in folder.iterdir()} - {"conf", "plots"}  # the data's, if the training failed
        assert left == {".hydra", "train.log", "metrics.csv", "result.json"}
    assert not list(Path().rglob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model=vgg61",), "Could not find 'model/vgg61'"),
        (("colour=red",), "Key 'colour' is not in struct"),
        (("model.colour=red",), "Key 'colour' is not in struct"),
    ],
)
def test_hydras_own_messages_come_through(command, arguments, message):
    code, output = command(*arguments)
    assert code == 1
    assert message in output
    assert "Traceback" not in output


def test_a_finished_run_is_not_overwritten(command):
    command(*TINY, "hydra.run.dir=mine")
    before = result(Path("mine"))
    code, output = command(*TINY, "hydra.run.dir=mine", "seed=1")
    assert code == 1
    assert "mine holds a finished run; choose another name or hydra.run.dir" in output
    assert result(Path("mine")) == before


def test_a_failed_run_can_be_done_again_in_its_folder(command):
    command(*TINY, "hydra.run.dir=mine", "optimizer=sgd", "optimizer.lr=1e38", "scheduler=constant")
    assert result(Path("mine"))["status"] == "failed"
    code, _ = command(*TINY, "hydra.run.dir=mine")
    assert code == 0
    assert result(Path("mine"))["status"] == "complete"


def test_a_run_that_is_killed_is_not_taken_for_the_failed_one_before_it(tmp_path):
    for name in ("result.json", "model.safetensors"):
        (tmp_path / name).write_text('{"status": "failed"}')
    Run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", ".lock"}


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def test_the_command_itself_with_the_users_own_config_and_code(tmp_path):
    """From any folder, with --config-dir: one YAML file and one function add a data set."""
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text("_target_: mine.images.load\nseed: ${seed}\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "images.py").write_text(
        "from tuner.data import synthetic\ndef load(seed): return synthetic.load(classes=3, seed=seed)\n"
    )
    arguments = ("-m", "tuner.train", "--config-dir", "conf", "data=mine", "model=tiny", "epochs=1")
    refused = python(*arguments, cwd=tmp_path)
    assert refused.returncode == 1
    assert "TUNER_TRUST" in refused.stdout + refused.stderr
    done = python(*arguments, cwd=tmp_path, TUNER_TRUST="mine.*")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = run_folders(tmp_path / "outputs")[-1]
    assert len(result(folder)["class_names"]) == 3


def test_a_killed_run_leaves_its_curve_and_no_result(tmp_path):
    arguments = ("-m", "tuner.train", "data=synthetic", "model=tiny", "epochs=100000", "hydra.run.dir=run")
    with subprocess.Popen([sys.executable, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if "epoch 3/" in line:
                process.kill()
                break
    folder = tmp_path / "run"
    assert list(pd.read_csv(folder / "metrics.csv").epoch)[:3] == [1, 2, 3]
    assert not (folder / "result.json").exists()
    assert not (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_the_wheel_holds_all_that_is_needed(tmp_path):
    """Unpacked somewhere else, without the checkout, the installed package trains: configs, weights, images."""
    project = Path(__file__).parent.parent
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(project))
    built = python(*build, cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("tuner-*.whl")
    python("-m", "zipfile", "-e", str(wheel), "site", cwd=tmp_path)
    where = python("-c", "import tuner.train as t; print(t.CONF)", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert where.stdout.strip() == str(tmp_path / "site" / "tuner" / "conf")
    arguments = ("-m", "tuner.train", "model=tiny", "epochs=2")
    done = python(*arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test accuracy" in done.stdout


def test_a_search_needs_no_m(command):
    code, output = command(*TINY, "hparams_search=optuna", "hydra.sweeper.n_trials=1", "final.seeds=0", "study=s")
    assert code == 0, output
    assert Path("multirun/s/trials.csv").exists()
    assert not Path("outputs").exists()


def test_a_run_may_have_a_name_and_the_last_one_has_a_link(command):
    for name in ("first", "second"):
        code, output = command(*TINY, "epochs=1", f"name={name}")
        assert code == 0, output
        assert f"tiny on synthetic: {Path.cwd()}/outputs/{name}" in output.splitlines()[0]
        assert Path("outputs/latest").resolve() == Path.cwd() / "outputs" / name
    assert list(runs.load("outputs").folder) == ["outputs/first", "outputs/second"]  # not the link
    code, output = command(*TINY, "epochs=1", "name=first")
    assert code == 1
    assert "first holds a finished run; choose another name" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name=latest"], "name=latest must be another name: outputs/latest is a link to the last run"),
        (
            ["-m", "optimizer.lr=interval(1e-4,1e-2)"],
            "is a range, which only a search draws from",
        ),
        (["name=a/b"], "name=a/b must be the name of a folder"),
        (["-m", "name=a"], "name=a is for a single run; several have study=a"),
        (["hparams_search=optuna", "name=a"], "name=a is for a single run; several have study=a"),
    ],
)
def test_names_that_a_run_cannot_have(command, arguments, message):
    code, output = command(*TINY, *arguments)
    assert code == 1
    assert message in output


@pytest.mark.parametrize("mistake", ["epochs=0", "optimizer.lr=fast", "model.last_block=block9", "model.head.width=-1"])
def test_a_mistake_leaves_no_folder(command, mistake):
    code, output = command(*TINY, mistake)
    assert code == 1
    assert "Traceback" not in output
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("folder", [".", "elsewhere/empty"])
def test_a_mistake_removes_no_folder_that_was_there(command, folder):
    Path(folder).mkdir(parents=True, exist_ok=True)
    code, _ = command(*TINY, "epochs=0", f"hydra.run.dir={folder}")
    assert code == 1
    assert Path(folder).is_dir()


def test_a_run_does_not_go_into_the_folder_of_a_study(command):
    Path("here").mkdir()
    Path("here/.study").write_text("an id")
    code, output = command(*TINY, "hydra.run.dir=here")
    assert code == 1
    assert "here is the folder of a study; choose another hydra.run.dir" in output
    assert [path.name for path in Path("here").iterdir() if path.suffix != ".log"] == [".study"]
