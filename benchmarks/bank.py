"""What the feature bank costs and what it saves, for the default recipe. Ratios within one run; times are medians.

    python benchmarks/bank.py [--device cpu|cuda] [--images 1200] [--repeats 5]

extraction   the bank's own path (uint8 images to a checksummed file) against a bare loop of the same layers of
             torchvision's vgg16.features over batches that were preprocessed beforehand, in the same precision.
epoch        an epoch of the head's training on cached features against one with the frozen network in the loop, in the
             same precision and in float32.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn
from torchvision.models import vgg16

from tuner import features
from tuner.backbones import Backbone, Preprocess
from tuner.data import fmnist_small
from tuner.fit import Plan, constant, fit
from tuner.heads import Head
from tuner.train import CONF, choose_device, choose_precision, describe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = choose_device(args.device)
    dtype = choose_precision("auto", device)
    torch.set_flush_denormal(True)  # as in a run
    with initialize_config_dir(str(CONF)):
        cfg = compose("train")
    options = {key: cfg.model[key] for key in ("name", "weights", "image_size", "features", "pool")}
    backbone = Backbone(**options, frozen=cfg.model.features)
    pool = fmnist_small.load().pool
    images, labels = pool.images[: args.images], pool.labels[: args.images]

    print(f"{describe(device)}, {platform.machine()}, torch {torch.__version__}, {dtype}")
    print(f"{backbone.name} to {backbone.features}, {backbone.image_size} px, {len(images):,} images")
    x = extraction(images, backbone, device, dtype, args.repeats)
    epoch(x, images.to(device), labels, backbone, cfg, args.repeats)


def extraction(
    images: torch.Tensor, backbone: Backbone, device: torch.device, dtype: torch.dtype, repeats: int
) -> torch.Tensor:
    """Prints the rates; returns the features, [N, F]."""
    size = features.batch_size(backbone.image_size, device)
    preprocess = Preprocess(backbone.image_size, backbone.mean, backbone.std, dtype).to(device)
    batches = [preprocess(batch.to(device)) for batch in images.split(size)]
    layers = vgg16(weights=None).features[: int(str(backbone.blocks[backbone.features].node.target).split(".")[1]) + 1]
    layers.load_state_dict({k.removeprefix("features."): v for k, v in backbone.weights.load().items()}, strict=False)
    layers = layers.eval().to(device, dtype).to(memory_format=torch.channels_last)

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                layers(batch)

    def banked() -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            return features.bank(images, backbone, cache_dir=Path(folder), device=device, dtype=dtype).clone()

    def rate(run: Callable[[], object]) -> Callable[[], float]:
        def timed() -> float:
            start = time.perf_counter()
            run()
            wait(device)
            return len(images) / (time.perf_counter() - start)

        return timed

    rates = alternate({"bare loop": rate(bare), "bank": rate(banked)}, repeats)
    print(f"extraction: bank / bare loop = {compare(rates, 'bank', 'bare loop')} of the rate")
    return banked().to(device)


class InLoop(nn.Module):
    """The frozen network as people put it into the training loop: without gradients, its output not kept."""

    def __init__(self, backbone: Backbone, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.network = backbone.frozen_part(dtype).to(device)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.network(images)


def epoch(
    x: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, backbone: Backbone, cfg: DictConfig, repeats: int
) -> None:
    """Prints the rates of the default head's training, x features [N, F] of images [N, C, H, W]."""
    head = Head((cfg.model.head.width,), cfg.model.head.dropout, 0)

    def trainer(inputs: torch.Tensor, dtype: torch.dtype, trunk: nn.Module | None) -> Callable[[], float]:
        rows = torch.arange(len(inputs))
        target = labels.repeat(len(inputs) // len(labels))
        optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=True)
        fixed = {"num_classes": 10, "feature_size": backbone.feature_size, "device": x.device, "precision": dtype}

        def run() -> float:
            seconds: list[float] = []
            note = lambda _, metrics: seconds.append(metrics["seconds"])  # noqa: E731
            options = {"epochs": 1, "batch_size": cfg.batch_size, "label_smoothing": 0.1, "on_epoch": note}
            plan = Plan(head, optimizer, constant, 0, rows, rows[:1], **options)
            fit([plan], inputs, target, trunk=trunk, **fixed)
            return len(inputs) / seconds[0]

        return run

    cached = x.repeat(4, 1)  # the training part's 4,200 or so, for an epoch that is long enough to time
    runs = {
        "network in the loop, float32": trainer(images, torch.float32, InLoop(backbone, torch.float32, x.device)),
        f"network in the loop, {x.dtype}".replace("torch.", ""): trainer(
            images, x.dtype, InLoop(backbone, x.dtype, x.device)
        ),
        "cached features": trainer(cached, x.dtype, None),
    }
    rates = alternate(runs, repeats)
    for name in list(runs)[:2]:
        ratio = compare(rates, "cached features", name)
        print(f"epoch: cached features / {name} = {ratio} times as fast")


def alternate(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Images/s of each run, taken in turns so that the machine's moods hit all alike; the first turn warms up."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            rate = run()
            if turn:
                rates[name].append(rate)
    for name, values in rates.items():
        low, high = min(values), max(values)
        print(f"  {name:<30} {statistics.median(values):>9,.0f} images/s   (of {repeats}: {low:,.0f} to {high:,.0f})")
    return rates


def compare(rates: dict[str, list[float]], ours: str, theirs: str) -> str:
    """The median of the turns' ratios, with their range."""
    ratios = [a / b for a, b in zip(rates[ours], rates[theirs], strict=True)]
    return f"{statistics.median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
