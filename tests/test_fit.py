import gc
import math
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import record
from hydra import compose, initialize_config_dir
from torch import nn

from tuner.config import CONF, parse
from tuner.networks.blocks import Blocks, Pool
from tuner.runs.metrics import scores
from tuner.training.fit import fit, predict
from tuner.training.heads import Classifier, Head, Stack
from tuner.training.schedules import constant, cosine, onecycle
from tuner.training.spec import Spec

CPU, F32 = torch.device("cpu"), torch.float32


def problem(n: int = 600, features: int = 40, classes: int = 5):
    """Points around class centres, not quite separable."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (n,), generator=g)
    x = torch.randn(n, features, generator=g) + torch.randn(classes, features, generator=g)[labels] * 0.6
    rows = torch.randperm(n, generator=g)
    return x, labels, rows[: n * 3 // 4], rows[n * 3 // 4 :]


def run(specs, *, make=torch.optim.AdamW, schedule=onecycle, on_epoch=None, seeds=None, device=CPU, **options):
    """Train heads given as (Head, lr, weight decay, label smoothing); returns (results, metrics of each head)."""
    x, labels, train, val = problem()
    given = {name: options.pop(name) for name in ("trunk", "precision") if name in options}
    defaults = {"batch_size": 32, "epochs": 3, "seed": 0, "train": train, "val": val}
    curves = [[] for _ in specs]

    specs = [
        Spec(
            **defaults
            | {"head": head, "schedule": schedule, "label_smoothing": smoothing}
            | {"optimizer": partial(make, lr=lr, weight_decay=weight_decay)}
            | ({"seed": seeds[k]} if seeds else {})
            | options
        )
        for k, (head, lr, weight_decay, smoothing) in enumerate(specs)
    ]
    fixed = {"num_classes": 5, "feature_size": 40, "precision": F32} | given
    return fit(specs, x.to(device), labels, device=device, on_epoch=on_epoch or record(*curves), **fixed), curves


SPECS = [
    (Head((32,), 0.0, 1), 3e-3, 0.0, 0.0),
    (Head((16, 8), 0.0, 2), 1e-2, 0.1, 0.1),
    (Head((), 0.0, 3), 3e-2, 0.01, 0.05),
    (Head((64,), 0.0, 4), 1e-4, 1.0, 0.0),
]


def config(group, option):
    with initialize_config_dir(str(CONF)):
        config = parse(compose("train", [f"{group}={option}"]))
    return (config.optimizer.target if group == "optimizer" else config.scheduler).build()


NUMBERS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr")


def assert_alike(ours, theirs):
    """Two curves, to float tolerance."""
    assert len(ours) == len(theirs) > 0
    for epoch, other in zip(ours, theirs, strict=True):
        assert {n: epoch[n] for n in NUMBERS} == pytest.approx({n: other[n] for n in NUMBERS}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("option", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("seeds", [None, [0, 1, 0, 2]], ids=["one seed", "their own seeds"])
def test_heads_in_a_stack_are_trained_as_if_alone(option, schedule, seeds):
    options = {"make": config("optimizer", option), "schedule": config("scheduler", schedule), "grad_clip": 1.0}
    _, stacked = run(SPECS, seeds=seeds, **options)
    for k, spec in enumerate(SPECS):
        _, [alone] = run([spec], seeds=seeds and [seeds[k]], **options)
        assert_alike(stacked[k], alone)


@pytest.mark.parametrize("option", ["adamw", "adam", "sgd"])
def test_heads_that_leave_do_not_change_the_others(option):
    options = {"make": config("optimizer", option), "epochs": 6, "seeds": [0, 1, 1, 0]}
    _, whole = run(SPECS, **options)
    for leaving in (0, 1, 3):
        curves = [[] for _ in SPECS]

        note = record(*curves)

        def on_epoch(epoch, metrics, note=note, leaving=leaving):
            note(epoch, metrics)
            return [list(metrics)[leaving]] if epoch == 2 else ()

        results, _ = run(SPECS, on_epoch=on_epoch, **options)
        assert [len(curve) for curve in curves] == [2 if k == leaving else 6 for k in range(4)]
        assert [result.epochs for result in results] == [2 if k == leaving else 6 for k in range(4)]
        for k in range(4):
            assert_alike(curves[k], whole[k][: len(curves[k])])


def test_dropout_is_each_heads_own_whoever_is_beside_it():
    """On the CPU, where its random numbers come from its own seed: the same numbers, and not only the distribution."""
    specs = [(Head((32,), 0.5, 1), 3e-3, 0.0, 0.0), (Head((33, 7), 0.3, 2), 3e-3, 0.0, 0.0)]
    _, stacked = run([SPECS[0], *specs])
    for spec, curve in zip(specs, stacked[1:], strict=True):
        assert_alike(curve, run([spec])[1][0])
    without = [(Head(head.widths, 0.0, head.seed), *rest) for head, *rest in specs]
    for curve, other in zip(stacked[1:], run(without)[1], strict=True):
        assert curve[-1]["train_loss"] > other[-1]["train_loss"]


def test_training_is_what_a_plain_torch_loop_does():
    x, labels, train, _ = problem()
    head = Head((32,), 0.0, 7)
    net = nn.Sequential(nn.LayerNorm(40, elementwise_affine=False), nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 5))
    for ours, theirs in zip(Stack(40, 5, [head], CPU).parameters_of(0), net.parameters(), strict=True):
        theirs.data.copy_(ours)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.1)
    order, losses = torch.Generator().manual_seed(0), []
    for _ in range(3):
        total = 0.0
        for rows in train[torch.randperm(len(train), generator=order)].split(32):
            logits = net(x[rows])
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[rows], label_smoothing=0.1).backward()
            optimizer.step()
            total += F.cross_entropy(logits, labels[rows], reduction="sum").item()
        losses.append(total / len(train))
    _, [curve] = run([(head, 3e-3, 0.1, 0.1)], schedule=constant)
    assert [epoch["train_loss"] for epoch in curve] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_weights_that_are_kept_have_the_accuracy_that_is_given(keep):
    spec = (Head((64,), 0.0, 1), 1e-1, 0.0, 0.0)
    [kept], [curve] = run([spec], epochs=8, schedule=constant, keep=keep)
    accuracies = [epoch["val_accuracy"] for epoch in curve]
    latest_best = max(range(8), key=lambda i: (accuracies[i], i))
    assert kept.epochs == 8
    assert kept.saved_epoch == (8 if keep == "last" else latest_best + 1)
    assert latest_best < 7  # or this test would not tell the two apart
    x, labels, _, val = problem()
    model = Classifier(None, Stack(40, 5, [spec[0]], CPU))
    model.load_state(0, kept.state)
    [accuracy] = scores(predict(model, x, [val], batch_size=32), labels[val])["accuracy"]
    assert accuracy == kept.metrics["val_accuracy"] == accuracies[kept.saved_epoch - 1]


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    spec = (Head((32,), 0.5, 1), 3e-3, 0.0, 0.0)
    curves = [[epoch["train_loss"] for epoch in run([spec], seed=seed)[1][0]] for seed in (0, 0, 1)]
    assert curves[0] == curves[1] != curves[2]


def test_patience_ends_a_head_that_no_longer_improves():
    fast = (Head((64,), 0.0, 1), 1e-1, 0.0, 0.0)  # at its best early
    options = {"epochs": 20, "patience": 3, "keep": "best", "schedule": constant}
    [early], [curve] = run([fast], **options)
    assert early.epochs == len(curve) == early.best_epoch + 3 < 20
    stuck = (Head((), 0.0, 1), 1e-9, 0.0, 0.0)  # equal is not better
    assert run([stuck], **options)[0][0].epochs == 4
    slow = (Head((64,), 0.0, 1), 1e-5, 0.0, 0.0)
    results, curves = run([fast, slow], **options)
    assert (results[0].saved_epoch, results[0].epochs) == (early.saved_epoch, early.epochs)
    assert results[1].epochs == len(curves[1]) > early.epochs == len(curves[0])  # the other went on


@pytest.mark.parametrize("lr", [1e30, math.inf])
def test_a_loss_that_is_not_finite_is_an_error_of_its_head_alone(lr):
    options = {"make": torch.optim.SGD, "schedule": constant}
    [broken, whole], _ = run([(Head((16,), 0.0, 1), lr, 0.0, 0.0), SPECS[0]], **options)
    [alone], _ = run([SPECS[0]], **options)
    assert "in epoch 1 at lr" in str(broken.error)
    assert "lower optimizer.lr, or set grad_clip" in str(broken.error)
    assert whole.error is None
    assert whole.metrics["val_loss"] == pytest.approx(alone.metrics["val_loss"])


def test_clipping_bounds_the_step():
    head = Head((), 0.0, 1)

    def moved(clip):
        [fitted], _ = run([(head, 1.0, 0.0, 0.0)], make=torch.optim.SGD, schedule=constant, epochs=1, grad_clip=clip)
        return (fitted.state["head.0.weight"] - Stack(40, 5, [head], CPU).parameters_of(0)[0]).norm().item()

    steps = math.ceil(450 / 32)
    assert moved(1e-3) <= steps * 1e-3 * 1.001
    assert moved(None) > 0.1


def test_bf16_is_close_to_float32():
    full, half = (run([SPECS[0]], precision=p, epochs=5)[1][0][-1] for p in (F32, torch.bfloat16))
    assert half["val_loss"] == pytest.approx(full["val_loss"], rel=0.02)
    assert half["val_loss"] != full["val_loss"]


def test_a_trunk_is_trained_with_its_head():
    torch.manual_seed(0)
    trunk = Blocks(None, [nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40))], Pool(None, False))
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    [fitted], _ = run([SPECS[0]], trunk=trunk)
    assert fitted.metrics["val_accuracy"] > 0.5
    assert all(not torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())
    assert {"trunk.0.weight", "trunk.1.running_mean", "head.0.weight"} <= set(fitted.state)


def test_nothing_of_a_training_outlives_it(monkeypatch):
    """Without waiting for Python to look for cycles: in a sweep, each trial's weights must go when it ends."""
    stacks = []
    monkeypatch.setattr("tuner.training.fit.Stack", lambda *args: stacks.append(Stack(*args)) or stacks[-1])
    gc.collect()
    gc.disable()
    try:
        run(SPECS)
        stack, weight = weakref.ref(stacks[0]), weakref.ref(stacks[0].firsts[0].weight)
        stacks.clear()
        assert stack() is None
        assert weight() is None
    finally:
        gc.enable()


def test_what_on_epoch_raises_ends_the_training():
    seen = []

    def stop(epoch, metrics):
        seen.append(epoch)
        if epoch == 2:
            raise KeyboardInterrupt
        return ()

    with pytest.raises(KeyboardInterrupt):
        run([SPECS[0]], epochs=5, on_epoch=stop)
    assert seen == [1, 2]


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (onecycle, {0.0: 0.04, 0.15: 0.52, 0.3: 1.0, 0.65: 0.5, 1.0: 0.0}),
        (cosine, {0.0: 1.0, 0.5: 0.5, 1.0: 0.0}),
        (constant, {0.0: 1.0, 1.0: 1.0}),
    ],
)
def test_schedules(schedule, points):
    assert {at: schedule(at) for at in points} == pytest.approx(points)
