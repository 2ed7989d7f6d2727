"""Tests on a CUDA GPU: `python -m pytest -m gpu`. test_device.py and test_cuda_graph.py have those that need none."""

import gc
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import record, result
from PIL import Image
from safetensors.torch import load_file
from test_finetune import TINY, interrupted, killed
from test_fit import SPECS, config, problem, run

import tuner
from tuner.bank import features
from tuner.device import choose_device, free_memory
from tuner.networks.backbone import Backbone
from tuner.training import cuda_graph as graph
from tuner.training import fit as fit_module
from tuner.training.cuda_graph import WARM_UP, CapturedSteps
from tuner.training.fit import fit
from tuner.training.heads import Head
from tuner.training.schedules import constant
from tuner.training.spec import Spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"torch {torch.__version__} sees no CUDA GPU"),
]
F32, BF16 = torch.float32, torch.bfloat16
LOSSES, ACCURACIES = ["train_loss", "val_loss", "lr"], ["train_accuracy", "val_accuracy"]


@pytest.fixture(scope="module")
def gpu():
    return choose_device("cuda")


@pytest.fixture
def limited(gpu):
    """A function that limits torch to its current GPU memory plus so many bytes."""
    total = torch.cuda.get_device_properties(gpu).total_memory

    def limit(more: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(gpu) + more) / total, gpu)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0, gpu)
    torch.cuda.empty_cache()


def curve(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "metrics.csv").drop(columns="seconds")


@pytest.fixture
def train(command):
    """Run `python -m tuner.train ARGUMENTS` in an empty folder; returns the output. Warnings are errors in tests."""

    def run(*arguments: str) -> str:
        code, output = command(*arguments)
        assert code == 0, output
        assert "deterministic" not in output
        return output

    return run


# Whole commands


def test_the_default_run(train):
    assert "device: cuda:0 (auto: " in train("hydra.run.dir=run")
    scores = result(Path("run"))
    assert scores["device"].startswith("cuda:0 (")
    assert scores["test_accuracy"] > 0.9


def test_the_network_is_chosen_on_the_gpu(train):
    train("model=auto", "model.budget=20s", "epochs=2", "hydra.run.dir=run")
    candidates = result(Path("run"))["model_choice"]["candidates"]
    assert {candidate["values"]["name"] for candidate in candidates} == {"vgg16", "efficientnet_lite0"}
    assert any(isinstance(candidate["values"]["last_block"], list) for candidate in candidates)


@pytest.mark.parametrize(
    "arguments",
    [("model.pool=2",), ("model.frozen=block1", "head_first=1"), ("model.frozen=null", "augment=mix", "epochs=2")],
    ids=["head", "blocks", "everything"],
)
def test_the_same_seed_gives_the_same_numbers(train, arguments):
    for name in ("a", "b"):
        train(*TINY, "precision=auto", "epochs=3", *arguments, f"hydra.run.dir={name}")
    pd.testing.assert_frame_equal(curve(Path("a")), curve(Path("b")))
    ours, theirs = (load_file(f"{name}/model.safetensors") for name in ("a", "b"))
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_search_trains_its_trials_together(train):
    words = ("-m", "hparams_search=optuna", "hydra.sweeper.n_trials=10", "study=s", *TINY, "epochs=3", "final.seeds=2")
    assert "best value" in train(*words)
    results = [result(path.parent) for path in Path("multirun/s").glob("[0-9]*/result.json")]
    assert len(results) == 10
    assert {trial["status"] for trial in results} <= {"complete", "pruned"}
    assert Path("multirun/s/best/model.safetensors").exists()


@pytest.mark.parametrize("arguments", [("model.frozen=block1",), ("optimizer=sgd", "optimizer.momentum=0.9")], ids=str)
def test_an_interrupted_run_resumes_to_the_same_numbers(command, train, arguments):
    arguments = (*TINY, "data.n=400", "epochs=5", "test=true", *arguments)
    train(*arguments, "hydra.run.dir=whole")
    interrupted(command, *arguments)
    assert "resuming after epoch 1" in train(*arguments, "hydra.run.dir=here")
    pd.testing.assert_frame_equal(curve(Path("here")), curve(Path("whole")))


def test_a_run_killed_on_the_gpu_resumes_on_the_cpu(tmp_path):
    killed(tmp_path / "run", (*TINY, "data.n=400", "epochs=30", "model.frozen=block1", "device=cuda:0"), 3)
    words = [sys.executable, "-m", "tuner.resume", str(tmp_path / "run"), "device=cpu"]
    done = subprocess.run(words, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming on cpu in torch.float32 a run that was on cuda in torch.float32" in done.stdout
    assert result(tmp_path / "run")["device"].startswith("cpu")


@pytest.mark.parametrize("arguments", [(), ("model.frozen=null", "epochs=1")], ids=["head", "everything"])
def test_a_model_trained_on_the_gpu_predicts_on_the_cpu(train, call, arguments):
    train(*TINY, "device=cuda", *arguments, "hydra.run.dir=run", "test=true")
    code, out, err = call("evaluate", "run", "--device", "cpu", "--json")
    assert code == 0, err
    scores = json.loads(out)
    assert scores["accuracy"] == pytest.approx(result(Path("run"))["test_accuracy"], abs=1 / scores["images"])
    shape = tuner.load("run", device="cpu").input_shape
    images = torch.randint(0, 256, (9, *shape), dtype=torch.uint8)
    on_gpu, on_cpu = (tuner.load("run", device=name).predict(images) for name in ("cuda", "cpu"))
    assert on_gpu.allclose(on_cpu, atol=1e-4)
    Image.fromarray(images[0, 0].numpy()).save("image.png")
    for words in (
        ("predict", "run", "image.png", "--device", "cpu"),
        ("predict", "run", "image.png", "--maps", "maps", "--device", "cuda"),
        ("export", "run", "--format", "torchscript"),
    ):
        code, _, err = call(*words)
        assert code == 0, err


def test_loading_a_model_changes_no_settings_of_the_process(trained):
    model = tuner.load(trained(), device="cuda")
    before = torch.backends.cudnn.conv.fp32_precision
    model.predict(torch.zeros(3, *model.input_shape, dtype=torch.uint8))
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.conv.fp32_precision == before


# Stacks and graphs


@pytest.mark.parametrize("precision", [F32, BF16], ids=str)
@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("option", ["adamw", "adam", "sgd"])
def test_heads_of_a_shrinking_stack_train_as_if_alone(gpu, option, schedule, precision):
    optimizer = config("optimizer", option)
    curves, alone = departing(gpu, optimizer, config("scheduler", schedule), precision)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if precision == F32 else {"rtol": 2e-2, "atol": 2e-2}
    for ours, theirs in zip(curves, alone, strict=True):
        assert len(ours) == len(theirs)
        for names, loose in ((LOSSES, tolerance), (ACCURACIES, {"rtol": 0.0, "atol": 0.02})):  # two images may differ
            a, b = (torch.tensor([[m[name] for name in names] for m in curve]) for curve in (ours, theirs))
            assert a.allclose(b, **loose)


def departing(gpu, optimizer, schedule, precision, heads=6):
    """Curves of heads that leave one by one, except the last two; and of each head trained alone."""
    x, labels, train, val = problem()
    x = x.to(gpu, precision)
    curves = [[] for _ in range(2 * heads)]

    def spec(k):
        create = partial(optimizer.func, **optimizer.keywords | {"lr": 1e-3 * (1 + k % heads)})
        options = {"epochs": heads, "batch_size": 32, "label_smoothing": 0.1}
        return Spec(Head((16 + k % heads,), 0.0, k % heads), create, schedule, k % 2, train, val, **options)

    sizes = {"num_classes": 5, "feature_size": 40, "device": gpu, "precision": precision}

    def fit_from(specs, first):
        def on_epoch(epoch, metrics):
            for spec, m in metrics.items():
                curves[first + specs.index(spec)].append(m)
            places = ((spec, (first + k) % heads) for k, spec in enumerate(specs))
            return [spec for spec, k in places if epoch >= min(k + 1, heads - 1)]

        fit(specs, x, labels, on_epoch=on_epoch, **sizes)

    fit_from([spec(k) for k in range(heads)], 0)
    for k in range(heads):
        fit_from([spec(k)], heads + k)
    return curves[:heads], curves[heads:]


@pytest.mark.parametrize("option", ["adamw", "adam", "sgd"])
def test_graphs_give_the_same_losses_as_eager_steps(gpu, monkeypatch, option):
    optimizer = config("optimizer", option)
    options = {"device": gpu, "make": partial(optimizer.func, fused=True), "epochs": 4, "grad_clip": 0.5}
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))[1])
    _, captured = run(SPECS, **options)
    assert replays
    monkeypatch.setattr(fit_module, "has_graphs", lambda device: False)
    _, eager = run(SPECS, **options)
    for ours, theirs in zip(captured, eager, strict=True):
        for epoch, other in zip(ours, theirs, strict=True):
            assert {n: epoch[n] for n in LOSSES} == pytest.approx({n: other[n] for n in LOSSES}, rel=1e-4, abs=1e-5)


def test_a_step_that_cannot_be_captured_runs_eagerly_and_torch_still_works(gpu, caplog):
    total, values = torch.zeros((), device=gpu), []

    def step(x):
        total.add_(x.sum())
        values.append(x.sum().item())  # waits for the GPU, which is forbidden in a capture

    captured, n = CapturedSteps(gpu), WARM_UP + 3
    for i in range(n):
        captured(step, torch.full((4,), float(i), device=gpu))
    assert total.item() == sum(4 * i for i in range(n))
    assert len(caplog.records) == 1
    assert "can't be captured as a CUDA graph" in caplog.text
    torch.rand(3, device=gpu)
    torch.cuda.empty_cache()
    seen, good = torch.zeros((), device=gpu), CapturedSteps(gpu)
    for i in range(n):
        good(lambda x: seen.add_(x.sum() + torch.rand(2, device=gpu).sum() * 0), torch.full((4,), float(i), device=gpu))
    assert not good.failed
    assert len(good.graphs) == 1
    assert seen.item() == total.item()


@pytest.mark.parametrize("may_raise", [True, False])
def test_a_capture_that_runs_out_of_memory_raises_or_runs_eagerly(gpu, limited, caplog, may_raise):
    total = torch.zeros(4, device=gpu)

    def step(x):
        total.add_(x)
        torch.empty(2**28, device=gpu).zero_()  # 1 GiB

    captured, x = CapturedSteps(gpu), torch.ones(4, device=gpu)
    for _ in range(WARM_UP):
        captured(step, x)
    limited(2**27)
    with pytest.raises(torch.OutOfMemoryError):  # the eager step does not fit either
        captured(step, x, may_raise=may_raise)
    assert captured.failed is not may_raise
    assert ("can't be captured" in caplog.text) is not may_raise
    torch.cuda.set_per_process_memory_fraction(1.0, gpu)
    before = total.sum().item()
    for _ in range(WARM_UP + 1):
        captured(step, x)
    assert bool(captured.graphs) is may_raise
    assert total.sum().item() == before + 4 * (WARM_UP + 1)


# Memory and precision


def vgg16(**options):
    defaults = {"weights": "bundled", "image_size": 64, "last_block": "block3", "frozen": "block3", "pool": 4}
    return Backbone("vgg16", **defaults | options)


def extracted(device, dtype, images):
    return torch.cat(list(features.extract(images, vgg16(), device=device, dtype=dtype)))


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (2000, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_extraction_halves_its_batch_when_out_of_memory(gpu, limited, images, caplog):
    expected = extracted(gpu, BF16, images)
    limited(2**29)
    halved = extracted(gpu, BF16, images)
    assert "out of memory on cuda:0 with " in caplog.text
    assert (halved - expected).float().norm() / expected.float().norm() < 1e-2


def test_a_stack_is_halved_when_out_of_memory(command, limited):
    words = ("-m", "optimizer.lr=1e-3,2e-3,3e-3,4e-3", "hydra.launcher.stack=4", "model.head.width=16384")
    limited(1950 * 2**20)  # four heads of 2,048 x 16,384 weights with gradient and two moments take 2,048 MiB
    code, output = command(*words, *TINY, "model.pool=4", "epochs=2")
    assert code == 0, output
    assert "heads are too many at once" in output
    assert len(list(Path("multirun").rglob("result.json"))) == 4
    assert all(result(path.parent)["status"] == "complete" for path in Path("multirun").rglob("result.json"))


def test_cached_blocks_count_as_free(gpu):
    torch.cuda.empty_cache()
    before = free_memory(gpu)
    block = torch.empty(2**30, dtype=torch.uint8, device=gpu)
    assert before - free_memory(gpu) >= 2**30 * 0.9
    del block
    assert abs(free_memory(gpu) - before) < 2**28


def test_fp32_does_not_use_tf32(gpu, images):
    """TF32 would be off by 1e-3."""
    few = images[:64]
    ours, exact = extracted(gpu, F32, few), extracted(torch.device("cpu"), F32, few)
    assert (ours - exact).norm() / exact.norm() < 1e-4


def test_gradients_of_pooling_are_repeatable(gpu):
    assert graph.capturable(torch.optim.AdamW([torch.zeros(1, device=gpu, requires_grad=True)], fused=True))
    from tuner.networks.blocks import average_pool

    x = torch.randn(64, 32, 14, 14, device=gpu, requires_grad=True)
    weights = torch.randn(64, 32, 4, 4, device=gpu)
    gradients = [torch.autograd.grad((average_pool(x, 4) * weights).sum(), x)[0] for _ in range(3)]
    assert all(gradient.equal(gradients[0]) for gradient in gradients)


def test_dropout_in_a_graph_differs_between_steps(gpu):
    """A graph with a fixed random state would drop the same units in each step."""
    x, labels, train, val = problem()
    losses = []
    options = {"epochs": 6, "batch_size": len(train)}
    spec = Spec(Head((32,), 0.5, 0), partial(torch.optim.SGD, lr=1e-9, fused=True), constant, 0, train, val, **options)
    sizes = {"num_classes": 5, "feature_size": 40, "device": gpu, "precision": F32}
    fit([spec], x.to(gpu), labels, on_epoch=record(losses), **sizes)
    assert len({round(metrics["train_loss"], 7) for metrics in losses}) == 6
