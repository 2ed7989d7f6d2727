"""Cost and benefit of the feature bank for the default recipe. Ratios are within one run; times are medians.

    python benchmarks/bank.py [--device cpu|cuda] [--images 1200] [--repeats 5]

extraction   the bank's path, from uint8 images to a checksummed file. Compared with a bare loop of the same layers of
             torchvision's vgg16.features over preprocessed batches, in the same precision; and with the rate that the
             network would reach at the speed of the machine's best matrix product.
epoch        an epoch of the head's training on cached features. Compared with an epoch with the frozen network in the
             loop, in the same precision and in float32.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import results
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn
from torchvision.models import vgg16

from tuner.bank import features
from tuner.cache_files import Cache
from tuner.config import CONF
from tuner.data import fmnist_small
from tuner.device import choose_device, choose_precision, is_cpu, wait
from tuner.networks.backbone import Backbone
from tuner.networks.blocks import Blocks, Pool, Preprocess
from tuner.training.fit import fit
from tuner.training.heads import Head
from tuner.training.schedules import constant
from tuner.training.spec import Spec

Shape = tuple[int, int, int]  # m, k, n of a product of [m, k] and [k, n]
PRODUCTS = ((512, 4096, 512), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192))


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def main() -> None:
    args = arguments().parse_args()
    overrides, products = [], PRODUCTS
    if args.smallest:
        args.images, args.repeats, overrides, products = 64, 1, ["model=tiny"], PRODUCTS[:1]
    device = choose_device(args.device)
    dtype = choose_precision("auto", device)
    torch.set_flush_denormal(True)  # as in a run
    with initialize_config_dir(str(CONF)):
        cfg = compose("train", overrides)
    options = {key: cfg.model[key] for key in ("name", "weights", "image_size", "last_block", "pool")}
    backbone = Backbone(**options, frozen=cfg.model.last_block)
    pool = fmnist_small.load().pool
    images, labels = pool.images[: args.images], pool.labels[: args.images]

    x = extraction(images, backbone, device, dtype, args.repeats, products)
    epoch(x, images.to(device), labels, backbone, cfg, args.repeats)


def extraction(
    images: torch.Tensor,
    backbone: Backbone,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    products: Sequence[Shape],
) -> torch.Tensor:
    """Print the rates; return the features [N, F]."""
    size = backbone.batch_size(device)
    preprocess = Preprocess(backbone.image_size, backbone.mean, backbone.std, dtype).to(device)
    batches = [preprocess(batch.to(device)) for batch in images.split(size)]
    last_layer = int(str(backbone.blocks[backbone.last_block].node.target).split(".")[1])
    layers = vgg16(weights=None).features[: last_layer + 1]
    layers.load_state_dict({k.removeprefix("features."): v for k, v in backbone.weights.load().items()}, strict=False)
    layers = layers.eval().to(device, dtype).to(memory_format=torch.channels_last)

    def bare_loop() -> None:
        with torch.inference_mode():
            for batch in batches:
                layers(batch)

    def through_bank() -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            return features.bank(images, backbone, cache=Cache(Path(folder)), device=device, dtype=dtype).clone()

    def rate(run: Callable[[], object]) -> Callable[[], float]:
        def timed() -> float:
            start = time.perf_counter()
            run()
            wait(device)
            return len(images) / (time.perf_counter() - start)

        return timed

    peak, shape = best_product(products, device, dtype)
    rates = results.turns({"bare loop": rate(bare_loop), "bank": rate(through_bank)}, repeats)
    rows = [["extraction", "images/s", "TFLOP/s", "of the best product", "of the bare loop"]]
    for name, values in rates.items():
        flops = [2 * backbone.macs() * value for value in values]
        share = results.spread([100 * f / peak for f in flops]) + "%"
        flop_rate = results.spread([f / 1e12 for f in flops], ".3g")
        rows.append([name, results.spread(values), flop_rate, share, results.ratio(values, rates["bare loop"])])
    note = f"{backbone.name} to {backbone.last_block} at {backbone.image_size} px, {len(images):,} images, {dtype}; "
    note += f"best product {peak / 1e12:.3g} TFLOP/s, {shape}."
    results.write("extraction", device, rows, note)
    return through_bank().to(device)


def best_product(products: Sequence[Shape], device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Operations per second of the fastest of several matrix products, and its shape."""
    best = (0.0, "")
    for m, k, n in products:
        if is_cpu(device) and m > 4096:
            continue
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
        for _ in range(10):
            start = time.perf_counter()
            a @ b.t()
            wait(device)
            rate = 2 * m * k * n / (time.perf_counter() - start)
            best = max(best, (rate, f"{m} x {k} by {k} x {n}"))
    return best


class InLoop(Blocks):
    """The frozen part of a network in the training loop: it runs in every step, and its output is not kept.

    trained: the trained blocks above it; None: only a head is trained.
    """

    def __init__(self, frozen: nn.Module, trained: Blocks | None = None):
        if trained is None:
            super().__init__(None, [], Pool(None, channels_last=False))
        else:
            super().__init__(None, trained.blocks, trained.pool)
        self.below = [
            frozen
        ]  # in a list, which does not register a submodule: it stays in eval mode and is not trained

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            x = self.below[0](images)
        return super().forward(x)


def epoch(
    x: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, backbone: Backbone, cfg: DictConfig, repeats: int
) -> None:
    """Print the rates of training the default head. x: features [N, F] of images [N, C, H, W]."""
    head = Head((cfg.model.head.width,), cfg.model.head.dropout, 0)

    def in_loop(dtype: torch.dtype) -> InLoop:
        return InLoop(backbone.frozen_part(dtype).to(x.device))

    def trainer(inputs: torch.Tensor, dtype: torch.dtype, trunk: Blocks | None) -> Callable[[], float]:
        rows = torch.arange(len(inputs))
        target = labels.repeat(len(inputs) // len(labels))
        optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=True)
        sizes = {"num_classes": 10, "feature_size": backbone.feature_size, "device": x.device, "precision": dtype}

        def run() -> float:
            options = {"epochs": 1, "batch_size": cfg.batch_size, "label_smoothing": 0.1}
            spec = Spec(head, optimizer, constant, 0, rows, rows[:1], **options)
            [fitted] = fit([spec], inputs, target, trunk=trunk, **sizes)
            return len(inputs) / fitted.metrics["seconds"]

        return run

    cached = x.repeat(4, 1)  # about as many as the 4,200 training images, which take long enough to time
    runs = {
        f"network in the loop, {dtype}".replace("torch.", ""): trainer(images, dtype, in_loop(dtype))
        for dtype in (torch.float32, x.dtype)
    }
    runs["cached features"] = trainer(cached, x.dtype, None)
    rates = results.turns(runs, repeats)
    rows = [["epoch", "images/s", "cached features are so many times as fast"]]
    for name, values in rates.items():
        rows.append([name, results.spread(values), results.ratio(rates["cached features"], values)])
    results.write("epoch", x.device, rows, f"{backbone.name} to {backbone.last_block} at {backbone.image_size} px.")


if __name__ == "__main__":
    main()
