import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from tuner.fit import constant, cosine, fit, onecycle, predict, score
from tuner.heads import Classifier, Head, Stack
from tuner.train import CONF, TRUSTED

CPU, F32 = torch.device("cpu"), torch.float32


def problem(n: int = 600, features: int = 40, classes: int = 5):
    """Points around class centres, not quite separable."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (n,), generator=g)
    x = torch.randn(n, features, generator=g) + torch.randn(classes, features, generator=g)[labels] * 0.6
    rows = torch.randperm(n, generator=g)
    return x, labels, rows[: n * 3 // 4], rows[n * 3 // 4 :]


def run(specs, *, make=torch.optim.AdamW, schedule=onecycle, epochs=3, on_epoch=None, x=None, trunk=None, **options):
    """Train heads given as (Head, lr, weight decay, label smoothing); returns (results, metrics by epoch, model)."""
    default_x, labels, train, val = problem()
    x = default_x if x is None else x
    model = Classifier(trunk, Stack(40, 5, [spec[0] for spec in specs], CPU))
    groups = [{"params": model.parameters_of(k), "lr": s[1], "weight_decay": s[2]} for k, s in enumerate(specs)]
    history = []
    defaults = {"batch_size": 32, "grad_clip": None, "keep": "last", "patience": None, "precision": F32, "seed": 0}
    results = fit(
        model,
        make(groups),
        [schedule] * len(specs),
        x,
        labels,
        train,
        val,
        epochs=epochs,
        label_smoothing=[spec[3] for spec in specs],
        on_epoch=on_epoch or (lambda epoch, metrics: history.append(metrics)),
        **(defaults | options),
    )
    return results, history, model


SPECS = [
    (Head((32,), 0.0, 1), 3e-3, 0.0, 0.0),
    (Head((16, 8), 0.0, 2), 1e-2, 0.1, 0.1),
    (Head((), 0.0, 3), 3e-2, 0.01, 0.05),
    (Head((64,), 0.0, 4), 1e-4, 1.0, 0.0),
]


def config(group, option):
    with initialize_config_dir(str(CONF)):
        return instantiate(compose("train", [f"{group}={option}"])[group], _execution_whitelist_=TRUSTED)


@pytest.mark.parametrize("option", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_heads_in_a_stack_are_trained_as_if_alone(option, schedule):
    options = {"make": config("optimizer", option), "schedule": config("scheduler", schedule), "grad_clip": 1.0}
    _, stacked, _ = run(SPECS, **options)
    for k, spec in enumerate(SPECS):
        _, alone, _ = run([spec], **options)
        for epoch in range(3):
            for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"):
                assert stacked[epoch][k][name] == pytest.approx(alone[epoch][0][name], rel=1e-4, abs=1e-5), name


def test_dropout_in_a_stack_has_the_distribution_it_has_alone():
    """Mean training loss over seeds: the same alone and stacked, within the spread of the mean."""
    spec = (Head((32,), 0.5, 1), 3e-3, 0.0, 0.0)
    losses = {"alone": [], "stacked": []}
    for seed in range(12):
        losses["alone"].append(run([spec], seed=seed)[1][-1][0]["train_loss"])
        losses["stacked"].append(run([SPECS[0], spec], seed=seed)[1][-1][1]["train_loss"])
    alone, stacked = torch.tensor(losses["alone"]), torch.tensor(losses["stacked"])
    assert abs(alone.mean() - stacked.mean()) < 4 * math.sqrt((alone.var() + stacked.var()) / 12)
    assert alone.mean() > run([(Head((32,), 0.0, 1), 3e-3, 0.0, 0.0)])[1][-1][0]["train_loss"]  # dropout does something


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
    _, history, _ = run([(head, 3e-3, 0.1, 0.1)], schedule=constant)
    assert [epoch[0]["train_loss"] for epoch in history] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_weights_that_are_kept_have_the_accuracy_that_is_given(keep):
    [kept], history, model = run([(Head((64,), 0.0, 1), 1e-1, 0.0, 0.0)], epochs=8, schedule=constant, keep=keep)
    accuracies = [epoch[0]["val_accuracy"] for epoch in history]
    latest_best = max(range(8), key=lambda i: (accuracies[i], i))
    assert kept.epochs == 8
    assert kept.epoch == (8 if keep == "last" else latest_best + 1)
    assert latest_best < 7  # or this test would not tell the two apart
    x, labels, _, val = problem()
    model.load_state(0, kept.state)
    _, [accuracy] = score(predict(model, x, val, batch_size=32, precision=F32), labels[val])
    assert accuracy == kept.metrics["val_accuracy"] == accuracies[kept.epoch - 1]


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    spec = (Head((32,), 0.5, 1), 3e-3, 0.0, 0.0)
    curves = [[epoch[0]["train_loss"] for epoch in run([spec], seed=seed)[1]] for seed in (0, 0, 1)]
    assert curves[0] == curves[1] != curves[2]


def test_patience_ends_a_head_that_no_longer_improves():
    fast = (Head((64,), 0.0, 1), 1e-1, 0.0, 0.0)  # at its best early
    options = {"epochs": 20, "patience": 3, "keep": "best", "schedule": constant}
    [early], history, _ = run([fast], **options)
    assert early.epochs == len(history) == early.best_epoch + 3 < 20
    stuck = (Head((), 0.0, 1), 1e-9, 0.0, 0.0)  # equal is not better
    assert run([stuck], **options)[0][0].epochs == 4
    slow = (Head((64,), 0.0, 1), 1e-5, 0.0, 0.0)
    results, history, _ = run([fast, slow], **options)
    assert (results[0].epoch, results[0].epochs) == (early.epoch, early.epochs)
    assert results[1].epochs == len(history) > early.epochs  # the other went on


@pytest.mark.parametrize("lr", [1e30, math.inf])
def test_a_loss_that_is_not_finite_is_an_error_of_its_head_alone(lr):
    options = {"make": torch.optim.SGD, "schedule": constant}
    [broken, whole], _, _ = run([(Head((16,), 0.0, 1), lr, 0.0, 0.0), SPECS[0]], **options)
    [alone], _, _ = run([SPECS[0]], **options)
    assert "in epoch 1 at lr" in str(broken.error)
    assert "lower optimizer.lr, or set grad_clip" in str(broken.error)
    assert whole.error is None
    assert whole.metrics["val_loss"] == pytest.approx(alone.metrics["val_loss"])


def test_clipping_bounds_the_step():
    def moved(clip):
        _, _, model = run(
            [(Head((), 0.0, 1), 1.0, 0.0, 0.0)], make=torch.optim.SGD, schedule=constant, epochs=1, grad_clip=clip
        )
        start = Stack(40, 5, [Head((), 0.0, 1)], CPU).parameters_of(0)[0]
        return (model.parameters_of(0)[0] - start).norm().item()

    steps = math.ceil(450 / 32)
    assert moved(1e-3) <= steps * 1e-3 * 1.001
    assert moved(None) > 0.1


def test_bf16_is_close_to_float32():
    full, half = (run([SPECS[0]], precision=p, epochs=5)[1][-1][0] for p in (F32, torch.bfloat16))
    assert half["val_loss"] == pytest.approx(full["val_loss"], rel=0.02)
    assert half["val_loss"] != full["val_loss"]


def test_a_trunk_is_trained_with_its_head():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40))
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    [fitted], _, _ = run([SPECS[0]], trunk=trunk)
    assert fitted.metrics["val_accuracy"] > 0.5
    assert all(not torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())
    assert {"trunk.0.weight", "trunk.1.running_mean", "head.0.weight"} <= set(fitted.state)


def test_nothing_of_a_training_outlives_it():
    """Without waiting for Python to look for cycles: in a sweep, each trial's weights must go when it ends."""
    gc.collect()
    gc.disable()
    try:
        result = run([SPECS[0]])
        model, weight = weakref.ref(result[2]), weakref.ref(result[2].stack.weight)
        del result
        assert model() is None
        assert weight() is None
    finally:
        gc.enable()


def test_what_on_epoch_raises_ends_the_training():
    seen = []

    def stop(epoch, metrics):
        seen.append(epoch)
        if epoch == 2:
            raise KeyboardInterrupt

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
