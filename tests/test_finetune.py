"""Blocks of the network that are trained below the head; what a run begins with; how it goes on after a kill."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import optuna
import pandas as pd
import pytest
import torch
from helpers import record, result
from torch import nn

from tuner import InputError, resume, stages
from tuner.bank.features import bank
from tuner.cache_files import Cache
from tuner.config import of_run
from tuner.data import synthetic
from tuner.networks.backbone import Backbone
from tuner.networks.blocks import Blocks, Pool
from tuner.training.fit import fit
from tuner.training.heads import Head
from tuner.training.model_choice import from_json
from tuner.training.schedules import onecycle
from tuner.training.spec import Spec, balanced_weights

CPU, F32 = torch.device("cpu"), torch.float32
TINY = ("data=synthetic", "data.n=120", "model=tiny", "batch_size=32", "precision=fp32", "plots=false")
VGG = {"weights": "bundled", "image_size": 32, "pool": 2}
BATCH_NORM = {"weights": None, "image_size": 32, "pool": 2}


def train(backbone, x, data, trunk, *, precision=F32, **options):
    """The curve of three epochs of a head and the blocks below it, and what came of them."""
    curve = []
    given = {"epochs": 3, "batch_size": 32, "head": Head((16,), 0.0, 0), "seed": 0, "schedule": onecycle} | options
    spec = Spec(
        optimizer=given.pop("optimizer", partial(torch.optim.AdamW, lr=1e-3)),
        train=data.train,
        val=data.val,
        **given,
    )
    sizes = {"num_classes": len(data.classes), "feature_size": backbone.feature_size}
    options = sizes | {"device": CPU, "precision": precision, "trunk": trunk}
    [fitted] = fit([spec], x, data.pool.labels, on_epoch=record(curve), **options)
    return [{name: value for name, value in m.items() if name != "seconds"} for m in curve], fitted


@pytest.fixture(scope="module")
def data():
    return synthetic.load(n=120, seed=0)


@pytest.mark.parametrize(
    ("name", "frozen", "features"), [("vgg16", "block1", "block2"), ("resnet18", "layer1", "layer2")]
)
def test_blocks_on_cached_maps_learn_what_they_learn_with_the_whole_network_in_the_loop(
    tmp_path, data, name, frozen, features
):
    common = VGG if name == "vgg16" else BATCH_NORM
    backbone = Backbone(name, last_block=features, frozen=frozen, **common)
    maps = bank(data.pool.images, backbone, cache=Cache(tmp_path), device=CPU, dtype=F32)
    cached, fitted = train(backbone, maps, data, backbone.trained_part())

    class Whole(Blocks):
        """The frozen part runs each time, in eval mode; it is none of the blocks."""

        def forward(self, x):
            with torch.no_grad():
                x = below[0](x)
            return super().forward(x)

    below = [backbone.frozen_part(F32)]
    trained = backbone.trained_part()
    looped, other = train(backbone, data.pool.images, data, Whole(None, trained.blocks, trained.pool))
    for ours, theirs in zip(cached, looped, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name in fitted.state:
        torch.testing.assert_close(fitted.state[name], other.state[name], rtol=1e-3, atol=1e-4)
    assert cached[0]["train_loss"] > cached[-1]["train_loss"]


@pytest.mark.parametrize(
    ("option", "same"),
    [
        ({"micro_batch": 7}, True),
        ({"micro_batch": 32}, True),
        ({"recompute": True}, True),
        ({"micro_batch": 5, "recompute": True}, True),
        ({"block_lr": (1.0, 1.0)}, True),
        ({"block_lr": (0.1, 1.0)}, False),
        ({"block_lr": (1.0, 0.5)}, False),
        ({"label_smoothing": 0.1}, False),
    ],
    ids=str,
)
def test_what_saves_memory_changes_nothing_but_rounding(data, option, same):
    def run(**options):
        backbone = Backbone("vgg16", last_block="block2", frozen=None, **VGG)
        return train(backbone, data.pool.images, data, backbone.trained_part(), epochs=2, **options)[0]

    ours, theirs = run(**option)[0], run()[0]
    assert (ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)) is same


def test_computing_activations_again_notes_no_statistics_twice(data):
    def run(**options):
        backbone = Backbone("resnet18", last_block="layer2", frozen="layer1", **BATCH_NORM)
        x = backbone.frozen_part(F32)(data.pool.images)
        return train(backbone, x, data, backbone.trained_part(), **options)

    (ours, fitted), (theirs, other) = run(recompute=True), run()
    assert ours == theirs  # validation is by the running mean and variance
    for name, tensor in other.state.items():
        assert torch.equal(fitted.state[name], tensor), name


def test_in_bfloat16_gradients_are_summed_in_float32(data):
    backbone = Backbone("vgg16", last_block="block2", frozen="block1", **VGG)
    x = backbone.frozen_part(F32)(data.pool.images)
    half = {"precision": torch.bfloat16, "epochs": 2}
    one, other = (train(backbone, x, data, backbone.trained_part(), micro_batch=m, **half)[0] for m in (2, None))
    assert one[-1]["train_loss"] == pytest.approx(other[-1]["train_loss"], rel=2e-2)


@pytest.mark.parametrize(
    ("block_lr", "moved"),
    [((1.0, 1.0), (1, 1)), ((0.1, 1.0), (0.1, 0.1)), ((0.5, 0.2), (0.5, 0.1)), ((1e-9, 1.0), (0, 0))],
)
def test_each_block_has_its_own_lr(block_lr, moved):
    """With plain SGD and a loss of which all gradients are known, a weight moves by lr times its gradient."""
    blocks = [nn.Linear(4, 4, bias=False) for _ in range(2)]
    for block in blocks:
        block.weight.data = torch.eye(4)
    x, labels = torch.eye(4), torch.tensor([0, 1, 0, 1])
    spec = Spec(
        Head((), 0.0, 0),
        partial(torch.optim.SGD, lr=1.0),
        lambda progress: 1.0,
        0,
        torch.arange(4),
        None,
        1,
        4,
        block_lr=block_lr,
    )
    options = {"num_classes": 2, "feature_size": 4, "device": CPU, "precision": F32}
    steps = []
    for each in (spec, Spec(**vars(spec) | {"block_lr": (1.0, 1.0)})):
        trunk = Blocks(None, [nn.Linear(4, 4, bias=False) for _ in range(2)], Pool(None, False))
        for block in trunk.blocks:
            block.weight.data = torch.eye(4)
        fit([each], x, labels, trunk=trunk, **options)
        steps.append([(block.weight.data - torch.eye(4)).norm().item() for block in reversed(trunk.blocks)])
    ours, whole = steps
    assert [a / b for a, b in zip(ours, whole, strict=True)] == pytest.approx(list(moved), rel=1e-3, abs=1e-6)


def test_batch_norm_of_frozen_blocks_stays_and_that_of_trained_ones_learns(data):
    backbone = Backbone("resnet18", last_block="layer2", frozen="layer1", **BATCH_NORM)
    before = backbone.frozen_part(F32)(data.pool.images)
    trunk = backbone.trained_part()
    means = {name: t.clone() for name, t in trunk.tensors().items() if name.endswith("running_mean")}
    _, fitted = train(backbone, before, data, trunk)
    assert torch.equal(backbone.frozen_part(F32)(data.pool.images), before)
    assert means
    assert all(not torch.equal(fitted.state[f"trunk.{name}"], mean) for name, mean in means.items())
    assert all(name.startswith(("head.", "trunk.layer2.")) for name in fitted.state)


def test_an_epoch_takes_one_view_of_each_image_and_validation_the_first():
    """Each image is a number, its views are that number and one half: who was seen can be told from the mean."""
    n, views = 64, 4
    labels = torch.arange(n) % 2
    x = torch.arange(n).repeat_interleave(views)[:, None] + torch.arange(views).repeat(n)[:, None] / views
    seen = []

    class Eye(nn.Module):
        def forward(self, x):
            seen.append((self.training, x[:, 0].detach().clone()))
            return x.expand(-1, 3) * torch.tensor([1.0, 0.5, 0.2])

    trunk = Blocks(None, [Eye()], Pool(None, False))
    rows = torch.arange(n)
    spec = Spec(Head((), 0.0, 0), partial(torch.optim.SGD, lr=0.1), onecycle, 0, rows[:48], rows[48:], 2, 16)
    fit([spec], x, labels, num_classes=2, feature_size=3, device=CPU, precision=F32, trunk=trunk, views=views)
    trained = [torch.cat([v for training, v in seen[i : i + 4] if training]) for i in (0, 4)]
    for epoch in trained:
        assert sorted(epoch.floor().int().tolist()) == list(range(48))
        assert len(set((epoch % 1).tolist())) == views
    assert not torch.equal(trained[0].sort().values, trained[1].sort().values)
    assert seen[3][1].tolist() == [*range(48, 64)]


def test_class_weights_give_each_class_the_same_part():
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    weights = balanced_weights(labels, 4)
    parts = [weights[c].item() * (labels == c).sum().item() for c in range(3)]
    assert parts == pytest.approx([parts[0]] * 3)
    assert weights[labels].mean().item() == pytest.approx(3 / 4)


def uneven(**options):
    """Three hundred images of two classes that overlap, one of which has 15."""
    g = torch.Generator().manual_seed(0)
    labels = (torch.arange(300) >= 285).long()
    x = torch.randn(300, 8, generator=g) + 1.2 * labels[:, None]
    rows = torch.randperm(300, generator=g)
    curve = []
    spec = Spec(
        Head((16,), 0.0, 0),
        partial(torch.optim.AdamW, lr=1e-2),
        onecycle,
        0,
        rows,
        rows,
        4,
        32,
        **options,
    )
    options = {"num_classes": 2, "feature_size": 8, "device": CPU, "precision": F32}
    [fitted] = fit([spec], x, labels, on_epoch=record(curve), **options)
    return curve, fitted, labels


def test_class_weights_find_the_few():
    plain, _, labels = uneven()
    weighted, _, _ = uneven(class_weights=balanced_weights(labels, 2))
    assert weighted[-1]["val_balanced_accuracy"] > plain[-1]["val_balanced_accuracy"] + 0.02
    assert plain[-1]["val_accuracy"] >= weighted[-1]["val_accuracy"]


@pytest.mark.parametrize("objective", ["accuracy", "balanced_accuracy", "macro_f1", "auroc", "neg_log_loss"])
def test_the_epoch_that_is_kept_is_the_best_of_the_objective(objective):
    curve, fitted, _ = uneven(keep="best", objective=objective)
    metric = "val_loss" if objective == "neg_log_loss" else f"val_{objective}"
    values = [m[metric] * (-1 if objective == "neg_log_loss" else 1) for m in curve]
    assert fitted.saved_epoch == max(i for i, v in enumerate(values, 1) if v == max(values))
    assert fitted.best_value == max(values)


# --- the command ------------------------------------------------------------------------------------------------------


def runs() -> list[Path]:
    return sorted(path.parent for path in Path().rglob("result.json"))


def curve(folder: Path) -> list:
    return pd.read_csv(folder / "metrics.csv").drop(columns="seconds").to_numpy().tolist()


def test_the_objective_may_be_balanced_accuracy(command):
    code, output = command(*TINY, "-m", "objective=balanced_accuracy", "epochs=1,2", "study=s")
    assert code == 0, output
    code, output = command(*TINY, "objective=recall")
    assert code == 1
    assert "objective=recall must be one of accuracy, balanced_accuracy, macro_f1, top5_accuracy, auroc, " in output


def test_a_search_maximises_any_metric(command):
    search = ("-m", "hparams_search=random", "study=mine", "hydra.sweeper.n_trials=2", "final.seeds=0", "epochs=2")
    code, output = command(*search, *TINY, "objective=neg_log_loss", "keep=best")
    assert code == 0, output
    study = optuna.load_study(study_name="mine", storage="sqlite:///multirun/optuna.db")
    assert study.metric_names == ["neg_log_loss"]
    for trial in study.trials:
        losses = pd.read_csv(Path("multirun/mine", str(trial.number), "metrics.csv")).val_loss
        assert list(trial.intermediate_values.values()) == pytest.approx([-loss for loss in losses], rel=1e-5)
        assert trial.value == pytest.approx(-losses.min(), rel=1e-5)
    code, output = command(*TINY, "objective=top5_accuracy")
    assert code == 1
    assert "objective=top5_accuracy needs at least 6 classes; there are 4" in output


def test_a_warm_start_begins_where_the_other_run_ended(command):
    command(*TINY, "epochs=6", "optimizer.lr=3e-3")
    [first] = runs()
    code, output = command(
        *TINY, f"warm_start={first}", "model.frozen=block1", "epochs=1", "optimizer.lr=1e-9", "scheduler=constant"
    )
    assert code == 0, output
    [second] = set(runs()) - {first}
    assert result(second)["val_accuracy"] == pytest.approx(result(first)["val_accuracy"], abs=0.03)
    assert result(second)["val_accuracy"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["seed=1"],
            "now in validation or test (its val images differ); use a run with the same data and seed=1",
        ),
        (["data.val_share=0.4"], "now in validation or test (its val images differ)"),
        (["data.test_share=0.5"], "now in validation or test (its val and test images differ)"),
        (["data.noise=81"], "(its val and test images differ)"),
        (["model.weights=null"], "was trained on other pretrained weights: use that run's model.weights"),
        (["model.head.width=32"], "does not fit: "),
        (["head_first=1"], "brings a trained head: leave head_first=1 at 0"),
        (["warm_start=nowhere"], "warm_start=nowhere is not the folder of a finished run: it has no model.safetensors"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_a_warm_start_that_can_not_be_says_why(command, arguments, says):
    command(*TINY, "epochs=1")
    [first] = runs()
    code, output = command(*TINY, f"warm_start={first}", "model.frozen=block1", "epochs=1", *arguments)
    assert code == 1
    assert says in output


def test_the_head_is_trained_first_on_cached_features(command):
    code, output = command(*TINY, "model.frozen=block1", "head_first=5", "epochs=1", "optimizer.lr=3e-3")
    assert code == 0, output
    assert "the head alone, epoch 5/5" in output
    [first] = runs()
    command(*TINY, "model.frozen=block1", "epochs=1", "optimizer.lr=3e-3")
    [second] = set(runs()) - {first}
    assert curve(first)[0][1] < curve(second)[0][1]  # its loss begins lower


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["augment=light"], "augment would have no effect on cached features: set data.views above 1"),
        (["data.views=2"], "data.views=2 would be identical"),
        (["augment=light", "data.views=2", "model.frozen=null"], "data.views=2 is for cached features"),
        (["augment=mix", "data.views=2"], "augment.mixup and cutmix need model.frozen=null"),
        (["data.test_views=2"], "data.test_views=2 adds mirror images: set augment.flip"),
        (["data.test_views=3"], "data.test_views=3 must be 1, or 2"),
        (["augment=light", "augment.flip=2", "model.frozen=null"], "augment.flip=2 must be a probability"),
        (["optimizer.backbone_lr_scale=0"], "optimizer.backbone_lr_scale=0 must be a number of more than 0"),
        (["optimizer.backbone_lr_decay=2"], "optimizer.backbone_lr_decay=2 must be more than 0 and at most 1"),
        (["head_first=3"], "head_first=3 is for blocks that are trained: set model.frozen below model.last_block"),
        (["recompute=true"], "recompute=true is for blocks that are trained"),
        (["micro_batch=0"], "micro_batch=0 must be a whole number of at least 1 and at most 1,000,000, or null"),
        (["class_weights=some"], "class_weights=some must be balanced, or null"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_would_have_no_effect_is_refused(command, arguments, says):
    code, output = command(*TINY, *arguments)
    assert code == 1
    assert says in output


@pytest.mark.parametrize(
    "arguments",
    [
        ("model.frozen=null", "augment=strong", "data.test_views=2"),
        ("model.frozen=null", "augment=mix", "class_weights=balanced"),
        ("augment=light", "data.views=3", "data.test_views=2"),
        ("model.frozen=block1", "augment=light", "data.views=2", "micro_batch=10", "recompute=true"),
    ],
    ids=str,
)
def test_the_same_seed_gives_the_same_numbers_with_augmentation(command, arguments):
    for _ in range(2):
        code, output = command(*TINY, "epochs=2", *arguments)
        assert code == 0, output
    first, second = runs()
    assert curve(first) == curve(second)
    assert result(first)["test_accuracy"] == result(second)["test_accuracy"]


def killed(folder: Path, arguments: tuple, epoch: int) -> None:
    """Start a run, and kill -9 it while it is in that epoch."""
    words = [sys.executable, "-m", "tuner.train", *arguments, f"hydra.run.dir={folder}"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = folder / "metrics.csv"
    for _ in range(1200):
        if metrics.exists() and metrics.read_text().count("\n") >= epoch:
            break
        assert process.poll() is None, "it has ended by itself"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("model.frozen=block1", "optimizer=sgd"),
        pytest.param(("model.frozen=null", "augment=mix", "keep=best"), marks=pytest.mark.slow),
        pytest.param(("model.head.depth=2", "data.views=2", "augment=light"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_that_was_killed_goes_on_to_the_same_numbers(tmp_path, monkeypatch, arguments):
    """kill -9 in epoch 3 of 5, then tuner.resume from another folder."""
    monkeypatch.chdir(tmp_path)
    arguments = (*TINY, "data.n=400", "epochs=5", "test=true", *arguments)
    whole = tmp_path / "whole"
    subprocess.run([sys.executable, "-m", "tuner.train", *arguments, f"hydra.run.dir={whole}"], check=True)
    folder = tmp_path / "its own"
    killed(folder, (*arguments[:-1], arguments[-1], "hydra.job.name=train"), 3)
    assert (folder / "checkpoint.pt").exists()
    again = subprocess.run(
        [sys.executable, "-m", "tuner.resume", str(folder)], cwd="/", text=True, capture_output=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert "resuming after epoch" in again.stdout
    assert curve(folder) == curve(whole)
    for key in ("val_accuracy", "test_accuracy", "epochs", "saved_epoch"):
        assert result(folder)[key] == result(whole)[key]
    assert not (folder / "checkpoint.pt").exists()


def interrupted(command, *arguments, by=KeyboardInterrupt):
    """A run that ends in its second epoch, in here/."""
    from tuner import stages

    def interrupt(job, epoch, metrics):
        if epoch == 2:
            raise by
        real(job, epoch, metrics)

    real = stages.Prepared.on_epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Prepared, "on_epoch", interrupt)
        try:
            return command(*arguments, "hydra.run.dir=here")
        except KeyboardInterrupt:
            assert by is KeyboardInterrupt


def test_a_full_disk_is_one_line_that_says_how_to_go_on(command, tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    code, output = interrupted(command, *TINY, "epochs=3", by=full)
    assert code == 1
    resume = f"change that, then resume with: python -m tuner.resume {tmp_path / 'here'}"
    assert f"a disk is full or cannot be written ({full}): {resume}" in output
    assert "Traceback" not in output
    code, output = command(*TINY, "epochs=3", "hydra.run.dir=here")
    assert code == 0, output
    assert "resuming after epoch 1" in output


def test_ctrl_c_is_two_lines_that_says_how_to_go_on(command, tmp_path):
    code, output = interrupted(command, *TINY, "epochs=3")
    assert code == 130
    stands, resume = output.splitlines()[-2:]
    assert re.search(rf"interrupted after epoch 1, val accuracy 0\.\d{{4}}: {tmp_path / 'here'}$", stands)
    assert resume.endswith(f"resume with: python -m tuner.resume {tmp_path / 'here'}")
    assert result(tmp_path / "here")["status"] == "interrupted"
    assert "Traceback" not in output


def test_a_resumed_run_that_is_interrupted_again_says_so(command, call, monkeypatch):
    interrupted(command, *TINY, "epochs=4")
    real = stages.Prepared.on_epoch

    def interrupt(job, epoch, metrics):
        if epoch == 3:
            raise KeyboardInterrupt
        real(job, epoch, metrics)

    monkeypatch.setattr(stages.Prepared, "on_epoch", interrupt)
    code, out, err = call("resume", "here")
    assert code == 130
    assert "interrupted after epoch 2" in out + err
    assert result(Path("here"))["status"] == "interrupted"


def test_a_checkpoint_of_a_gpu_is_gone_on_from_on_the_cpu_with_a_warning(command):
    interrupted(command, *TINY, "epochs=3", "device=cpu")
    path = Path("here/checkpoint.pt")
    kept = torch.load(path, weights_only=True)
    kept["config"] = kept["config"].replace('"device": "cpu"', '"device": "cuda:0"')
    kept["state"]["device"] = "cuda"
    kept["state"]["random"][1] = torch.zeros(16, dtype=torch.uint8)  # as torch.cuda.get_rng_state() gives it
    torch.save(kept, path)
    code, output = command(*TINY, "epochs=3", "device=cpu", "hydra.run.dir=here")
    assert code == 0, output
    assert "resuming after epoch 1" in output
    said = "resuming on cpu in torch.float32 a run that was on cuda in torch.float32: the numbers will differ from an"
    assert output.count(said) == 1


def test_a_refused_resume_leaves_the_run_as_it_was(command, call):
    interrupted(command, *TINY, "epochs=3", "device=cpu")
    before = {path: path.read_bytes() for path in (*Path("here").glob("[.c]*/*.yaml"), Path("here/result.json"))}
    assert len(before) == 5
    for line, reason in (
        ("batch_size=7", "is of a run with batch_size="),
        ("precisoin=fp32", "precisoin=fp32: Key 'precisoin' is not in struct"),
        ("~seed", "~seed must be KEY=VALUE, with a key of the run's config"),
    ):
        code, out, err = call("resume", "here", line)
        assert code, (line, out, err)
        assert reason in out + err
        assert before == {path: path.read_bytes() for path in before}
    code, out, err = call("resume", "here", "device=cpu")
    assert code == 0, err
    assert "resuming after epoch 1" in out


def test_a_resumed_run_keeps_the_table_of_what_was_chosen(command, call):
    interrupted(
        command, "model=auto", "model.name=vgg11", "model.weights=null", "model.image_size=32", *TINY[:2], "epochs=3"
    )
    code, out, err = call("resume", "here")
    assert code == 0, err
    assert "resuming after epoch 1" in out
    assert "candidates, scored on" not in out
    choice = from_json(result(Path("here"))["model_choice"])
    assert of_run(Path("here")).model.last_block == choice.chosen.values["last_block"]


def test_a_log_that_is_a_link_is_not_followed(command, call):
    """The folder may be somebody else's, and the link lead to a file of the user."""
    interrupted(command, *TINY, "epochs=3")
    Path("precious").write_text("text")
    Path("here/train.log").unlink()
    Path("here/train.log").symlink_to(Path("precious").absolute())
    code, out, err = call("resume", "here")
    assert code == 1
    assert "here/train.log cannot be used: Too many levels of symbolic links" in out + err
    assert Path("precious").read_text() == "text"


def test_a_checkpoint_of_other_images_is_not_gone_on_from(command, tmp_path):
    lines = ["label,a,b,c,d", *(f"{'xy'[i % 2]},{i},{2 * i},{3 * i},{i % 2 * 200}" for i in range(60))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    arguments = (*TINY[2:], "data=csv", "data.path=t.csv", "epochs=3")
    interrupted(command, *arguments)
    (tmp_path / "t.csv").write_text("\n".join([*lines, "x,9,9,9,9"]))
    code, output = command(*arguments, "hydra.run.dir=here")
    assert code == 1
    assert "checkpoint.pt is of a run on other images: restore the images, or delete" in output
    (tmp_path / "t.csv").write_text("\n".join(lines))
    code, output = command(*arguments, "hydra.run.dir=here")
    assert code == 0, output


def test_a_damaged_checkpoint_is_one_line(command, tmp_path):
    interrupted(command, *TINY, "epochs=3")
    checkpoint = tmp_path / "here" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    code, output = command(*TINY, "epochs=3", "hydra.run.dir=here")
    assert code == 1
    assert "here/checkpoint.pt is damaged (" in output
    assert "delete it to start again" in output


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"", "No columns"),
        (b"\xff\x00", "decode"),
        (b"epoch,train_loss\nx,1\n", "could not convert string to float"),
        (b"epoch,train_loss\n2,1\n", "it must have the epochs 1 to 1"),
    ],
)
def test_a_curve_that_is_damaged_is_not_gone_on_from(command, tmp_path, content, says):
    interrupted(command, *TINY, "epochs=3")
    metrics = tmp_path / "here" / "metrics.csv"
    metrics.unlink() if content is None else metrics.write_bytes(content)
    code, output = command(*TINY, "epochs=3", "hydra.run.dir=here")
    assert code == 1
    assert re.search(rf"metrics\.csv is damaged \(.*{says}.*\): delete it and checkpoint\.pt to start again", output)
    assert "Traceback" not in output


def test_a_checkpoint_whose_state_is_of_another_run_is_one_line(command):
    interrupted(command, *TINY, "epochs=3")
    path = Path("here/checkpoint.pt")
    kept = torch.load(path, weights_only=True)
    del kept["state"]["optimizer"]
    torch.save(kept, path)
    code, output = command(*TINY, "epochs=3", "hydra.run.dir=here")
    assert code == 1
    assert "the checkpoint is not of this run (KeyError: 'optimizer'): delete it to start again" in output
    assert "Traceback" not in output


def test_a_checkpoint_of_another_config_is_not_gone_on_from(command, tmp_path):
    interrupted(command, *TINY, "epochs=3")
    assert (tmp_path / "here" / "checkpoint.pt").exists()
    code, output = command(*TINY, "epochs=4", "hydra.run.dir=here")
    assert code == 1
    assert "is of a run with epochs=3: use the same values, or another hydra.run.dir, or delete" in output
    code, output = command(*TINY, "epochs=3", "hydra.run.dir=here")
    assert code == 0, output
    assert "resuming after epoch 1" in output
    assert [row[0] for row in curve(tmp_path / "here")] == [1, 2, 3]


def test_resume_says_why_it_can_not(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        resume.killed_run(tmp_path / "nowhere")
    words = [sys.executable, "-m", "tuner.resume", str(tmp_path)]
    done = subprocess.run(words, text=True, capture_output=True, check=False)
    assert done.returncode == 1
    assert "has no checkpoint.pt" in done.stderr
