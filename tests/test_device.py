"""Decisions about devices, and code for GPUs, as far as torch's fake tensors allow.

A fake tensor has a shape, a type and a device, but no values: under FakeTensorMode this machine has tensors on cuda:0.
Backward passes (which need a CUDA context), streams, graphs and values are tested in tests/test_gpu.py.
"""

import ast
import os
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import tuner
from tuner import InputError, device
from tuner.bank import features
from tuner.device import Batches, choose_device, choose_precision, exact_float32, free_memory, repeatable, send
from tuner.networks.backbone import Backbone
from tuner.networks.blocks import average_pool
from tuner.training.fit import fit, predict
from tuner.training.heads import Classifier, Head, Stack
from tuner.training.schedules import constant
from tuner.training.spec import Spec

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GB = 2**30


@pytest.fixture
def gpus(monkeypatch):
    """Make torch report two GPUs, with the second one as the current device."""

    def pin(tensor):
        if tensor.device.type != "cpu":  # as on a real GPU
            raise RuntimeError("cannot pin 'CUDABFloat16Type' only dense CPU tensors can be pinned")
        return tensor

    reports = {
        "current_device": lambda: 1,
        "current_stream": lambda *_: None,
        "get_device_name": lambda *_: "NVIDIA H200",
        "is_bf16_supported": lambda **_: True,
        "mem_get_info": lambda *_: (10 * GB, 140 * GB),
        "memory_reserved": lambda *_: 30 * GB,
        "memory_allocated": lambda *_: 20 * GB,
        "empty_cache": lambda: None,
        "synchronize": lambda *_: None,
        "is_current_stream_capturing": lambda: False,
    }
    monkeypatch.setattr(device, "_count_gpus", lambda: 2)  # not torch's own count, which torch uses itself
    for name, answer in reports.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return monkeypatch


@pytest.fixture
def fake(gpus):
    """Two GPUs with fake tensors; functions that need values or a CUDA context do nothing."""

    class Event:
        def record(self, stream):
            pass

        def synchronize(self):
            pass

    gpus.setattr(torch.cuda, "Event", Event)
    gpus.setattr(FakeTensor, "tolist", lambda tensor: _zeros(tensor.shape))
    gpus.setattr(torch.Tensor, "backward", lambda tensor: None)
    for optimizer in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        gpus.setattr(optimizer, "step", lambda *_: None)
    gpus.setattr("tuner.training.fit.has_graphs", lambda device: False)
    gpus.setattr(Spec, "batches", lambda spec: spec.seed)
    return FakeTensorMode(allow_non_fake_inputs=True)


def _zeros(shape):
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0.0


@pytest.mark.parametrize(
    ("choice", "expected"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1")]
)
def test_a_gpu_always_has_an_index(gpus, caplog, choice, expected):
    caplog.set_level("INFO")
    chosen = choose_device(choice)
    assert str(chosen) == expected
    assert chosen == torch.device(expected)
    message = "device: cuda:1 (auto: NVIDIA H200, of 2 CUDA GPUs)"
    assert (message in caplog.text) == (choice == "auto")


def test_auto_takes_cuda_then_mps_then_the_cpu_and_logs_why(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(device, "_count_gpus", lambda: 0)
    for is_available, expected in ((True, torch.device("mps", 0)), (False, CPU)):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda is_available=is_available: is_available)
        assert choose_device("auto") == expected
    assert re.search(r"device: mps:0 \(auto: torch .* CUDA.*, but there is MPS\)", caplog.text)
    assert re.search(r"device: cpu \(auto: torch .* CUDA.*, and no MPS\)", caplog.text)


@pytest.mark.parametrize("choice", ["cuda", "cuda:0", "mps", "cuda:77"])
def test_a_missing_device_is_refused_with_a_way_out(monkeypatch, choice):
    monkeypatch.setattr(device, "_count_gpus", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=rf"device={choice}, but .*; use device=cpu or device=auto"):
        choose_device(choice)


@pytest.mark.parametrize("choice", ["tpu", "gpu", "cuda:", "cuda:x", "cuda:²", "cpu:0", "", "None"])
def test_an_unknown_kind_of_device_is_refused(gpus, choice):
    if choice == "cuda:":
        assert choose_device(choice) == torch.device("cuda", 1)
        return
    with pytest.raises(InputError, match=f"device={choice} must be auto, cpu, cuda, cuda:N or mps"):
        choose_device(choice)


def test_a_gpu_number_too_large_is_refused_with_a_list(gpus):
    with pytest.raises(InputError, match="device=cuda:2, but this machine has cuda:0, cuda:1"):
        choose_device("cuda:2")


def _last(node):
    return getattr(node, "attr", getattr(node, "id", None))


def test_no_other_module_names_a_kind_of_device():
    """Except cuda_graph.py, which makes CUDA's own calls for graphs."""
    places = []
    for path in Path(tuner.__file__).parent.rglob("*.py"):
        if path.name in ("device.py", "cuda_graph.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = getattr(node, "value", None) in ("cuda", "mps") or _last(node) in ("cuda", "mps")
            compared = isinstance(node, ast.Compare) and any(
                _last(side) == "device" or _last(getattr(side, "value", side)) == "device"  # x.device, x.device.type
                for side in (node.left, *node.comparators)
            )
            if named or compared:
                places.append(f"{path.name}:{node.lineno}")
    assert places == []


# With fake tensors


@pytest.mark.parametrize("choice", ["auto", "cuda", "cuda:0", "cuda:1"])
def test_send_moves_only_tensors_that_are_elsewhere(fake, choice):
    with fake:
        chosen = choose_device(choice)
        on_gpu = torch.zeros(4, 3, dtype=torch.bfloat16, device=chosen)
        assert send(on_gpu, chosen) is on_gpu
        assert send(torch.zeros(4), chosen).device == on_gpu.device
        assert send(torch.zeros(4, device="cuda:0"), torch.device("cuda", 1)).device == torch.device("cuda", 1)


@pytest.mark.parametrize("choice", ["auto", "cuda", "cuda:0", "cuda:1"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_stack_trains_and_predicts(fake, choice, heads, on_gpu):
    reported, rows = [], [(torch.arange(40), torch.arange(40, 50)) for _ in range(heads)]
    with fake:
        chosen = choose_device(choice)
        precision = choose_precision("auto", chosen)
        assert precision == torch.bfloat16
        x = torch.zeros(50, 64, dtype=precision, device=chosen if on_gpu else CPU)
        labels = torch.zeros(50, dtype=torch.int64)
        specs = [
            Spec(
                Head((8,) * (k + 1), 0.5, k),
                partial(torch.optim.AdamW, lr=1e-3, fused=True),
                constant,
                k % 2,
                *rows[k],
                epochs=2,
                batch_size=16,
                label_smoothing=0.1,
                class_weights=torch.ones(3),
            )
            for k in range(heads)
        ]
        options = {"num_classes": 3, "feature_size": 64, "device": chosen, "precision": precision}
        options["on_epoch"] = lambda epoch, metrics: reported.extend(metrics) or ()
        fitted = fit(specs, x, labels, **options)
        assert len(reported) == 2 * heads
        assert all(tensor.device == chosen for head in fitted for tensor in head.state.values())
        stack = Stack(64, 3, [spec.head for spec in specs], chosen, precision)
        log_p = predict(Classifier(None, stack), x, [torch.arange(20)], batch_size=8)
        assert (log_p.device, log_p.shape) == (chosen, (heads, 20, 3))


@pytest.mark.parametrize("choice", ["auto", "cuda:0"])
def test_features_are_extracted(fake, monkeypatch, choice):
    backbone = Backbone("vgg16", weights=None, image_size=32, last_block="block2", frozen="block2", pool=2)
    network = backbone.frozen_part(torch.bfloat16)
    monkeypatch.setattr(backbone, "frozen_part", lambda dtype: network)
    monkeypatch.setattr(Backbone, "batch_size", lambda *_: 8)
    with fake:
        images = torch.zeros(20, 1, 28, 28, dtype=torch.uint8)
        batches = list(features.extract(images, backbone, device=choose_device(choice), dtype=torch.bfloat16))
    assert [tuple(batch.shape) for batch in batches] == [(8, 512), (8, 512), (4, 512)]
    assert all(batch.device == CPU for batch in batches)


def test_a_model_predicts(fake, trained):
    model = tuner.load(trained("device=cpu"), device="cpu")
    with fake:
        model.to(GPU).device = GPU
        probabilities = model.predict(torch.zeros(5, *model.input_shape, dtype=torch.uint8))
    assert (probabilities.device, probabilities.shape) == (CPU, (5, len(model.classes)))


def test_choosing_a_device_changes_no_settings_of_the_process(gpus):
    """tuner.load() chooses a device in its caller's process."""
    gpus.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    choose_precision("auto", choose_device("auto"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


# Memory


def test_cached_blocks_count_as_free(gpus):
    assert free_memory(GPU) == (10 + 30 - 20) * GB
    assert free_memory(CPU) is None


def test_features_go_to_a_gpu_that_has_twice_their_size_free(fake):
    with fake:
        for size, where in ((9 * GB, GPU), (11 * GB, CPU)):
            assert features.to_device_if_it_fits(torch.empty(size, dtype=torch.uint8), GPU).device == where


def test_the_batch_size_depends_on_the_largest_layer(gpus):
    def size(name, image_size, block, on=CPU):
        cut = {"last_block": block, "frozen": block, "pool": None, "weights": None}
        return Backbone(name, image_size=image_size, **cut).batch_size(on)

    assert [size("vgg16", side, "block3") for side in (32, 64, 224)] == [256, 64, 5]
    assert size("vgg16", 64, "block5") == 64
    assert size("resnet18", 64, "layer3") == 256
    assert [size("vgg16", side, "block3", GPU) for side in (64, 224)] == [640, 52]  # a sixteenth of 20 GiB
    gpus.setattr(torch.cuda, "mem_get_info", lambda *_: (130 * GB, 140 * GB))
    assert [size("vgg16", side, "block3", GPU) for side in (64, 224)] == [2048, 167]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: out of memory\nmore"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
    ],
)
def test_batches_that_do_not_fit_are_halved(gpus, caplog, error):
    sizes = []

    def most_three(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise error
        return batch.sum().item()

    batches = Batches(10, GPU)
    sums = list(batches(most_three, torch.arange(11)))
    assert sum(sums) == 55
    assert sizes == [10, 5, 3, 3, 3, 2]
    assert list(batches(most_three, torch.arange(6))) == [3, 12]  # the size stays
    assert len(re.findall("out of memory on cuda:0 with batches of (10|5): continuing with (5|3)", caplog.text)) == 2


def test_an_item_that_does_not_fit_and_other_errors_raise(gpus):
    def fails(error, batch):
        raise error

    with pytest.raises(torch.OutOfMemoryError):
        list(Batches(8, GPU)(partial(fails, torch.OutOfMemoryError("no room")), range(5)))
    with pytest.raises(RuntimeError, match="shape"):
        list(Batches(8, GPU)(partial(fails, RuntimeError("shape")), range(5)))


# Numbers


def test_exact_float32_applies_inside_the_context_only():
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    assert before[0] == "tf32"  # torch's default, which the context overrides
    with exact_float32(GPU):
        assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
    assert (conv.fp32_precision, matmul.fp32_precision) == before
    with exact_float32(CPU):
        assert conv.fp32_precision == "tf32"


def test_repeatable_applies_inside_the_context_without_warnings(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with repeatable(GPU):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert not torch.utils.deterministic.fill_uninitialized_memory
            warnings.warn("upsample_backward does not have a deterministic implementation, but ...", stacklevel=1)
            warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another"]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


@pytest.mark.parametrize(("h", "w", "k"), [(8, 8, 4), (7, 7, 4), (5, 7, 3), (9, 9, 1), (14, 14, 14), (3, 3, 5)])
def test_average_pool_equals_adaptive_pooling(h, w, k):
    x = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(0))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = average_pool(ours, k), torch.nn.functional.adaptive_avg_pool2d(theirs, k)
    assert a.allclose(b, rtol=1e-6, atol=1e-6)
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    assert ours.grad.allclose(theirs.grad, rtol=1e-5, atol=1e-6)
    assert average_pool(x, k).equal(torch.nn.functional.adaptive_avg_pool2d(x, k))


def test_sums_use_float64_except_on_mps():
    assert device.widest_float(CPU) == device.widest_float(GPU) == torch.float64
    assert device.widest_float(torch.device("mps", 0)) == torch.float32
