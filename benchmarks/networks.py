"""Networks compared on the bundled images: a head on cached features, and one block fine-tuned below it.

    python benchmarks/networks.py [--seeds 3] [--epochs 10] [--tuned-epochs 2] [OVERRIDE ...]

Only VGG16's weights are bundled. The other networks have random weights, so their accuracy shows that they work, but
not which one is better; --download uses the pretrained weights in their configs. Nothing is cached between networks.
Rates and seconds are of the first seed; for a head they include the extraction.
"""

import argparse
import logging
import statistics
import tempfile
from pathlib import Path
from typing import Any

import results
from hydra import compose, initialize_config_dir

from tuner.config import CONF, parse
from tuner.device import choose_device
from tuner.runs.result import read_result
from tuner.runs.run import Run
from tuner.stages import train
from tuner.training.setup import backbone_of

NETWORKS = (
    ["model=vgg16", "model.image_size=32"],
    ["model=vgg16_bn", "model.image_size=32"],
    ["model=resnet18", "model.image_size=64"],
    ["model=efficientnet_b0", "model.image_size=64"],
    ["model=timm", "model.name=timm/regnetx_002", "model.image_size=64", "model.last_block=s3", "model.pool=null"],
)
HEADER = ["network", "weights", "trained", "image size", "features", "GMACs", "extraction, images/s"]
HEADER += ["epochs", "test accuracy", "seconds"]


# For --smallest: two networks that need no download, one with bundled and one with random weights.
SMALLEST = ["data=synthetic", "batch_size=32", "model.image_size=32", "model.pool=1"]


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--tuned-epochs", type=int, default=2)
    parser.add_argument("--download", action="store_true", help="pretrained weights for all")
    parser.add_argument("overrides", nargs="*")
    return parser


def main() -> None:
    args = arguments().parse_args()
    networks = NETWORKS
    if args.smallest:
        networks, args.seeds, args.epochs, args.tuned_epochs = NETWORKS[:3:2], 2, 1, 1
        args.overrides = [*SMALLEST, *args.overrides]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = [HEADER]
    for network in networks:  # at image sizes that take minutes on two cores
        overrides = network if args.download or "model=vgg16" in network else [*network, "model.weights=null"]
        with tempfile.TemporaryDirectory() as cache:
            overrides = [*overrides, *args.overrides, f"cache_dir={cache}"]
            below = block_below(overrides)
            rows.append(row([*overrides, f"epochs={args.epochs}"], args.seeds))
            tuned = [*overrides, f"model.frozen={below}", f"epochs={args.tuned_epochs}"]
            rows.append(row(tuned, args.seeds))
        print(*(" | ".join(row) for row in rows[-2:]), sep="\n", flush=True)
    cfg = composed(args.overrides)
    count = len(parse(cfg).data.target.build().test)
    note = f"Test accuracy: {count:,} images, mean of {args.seeds} seeds (standard deviation)."
    results.write("networks", choose_device(cfg.device), rows, note)


def composed(overrides: list[str]) -> Any:
    with initialize_config_dir(str(CONF)):
        return compose("train", [*overrides, "plots=false"])


def block_below(overrides: list[str]) -> str:
    backbone = backbone_of(parse(composed(overrides)))
    names = list(backbone.blocks)
    return names[names.index(backbone.last_block) - 1]


def row(overrides: list[str], seeds: int) -> list[str]:
    """The table row of one network and cut."""
    runs = []
    for seed in range(seeds):
        cfg = composed([*overrides, f"seed={seed}"])
        with tempfile.TemporaryDirectory() as folder:
            train(parse(cfg), Run(Path(folder)))
            runs.append(read_result(Path(folder)))
    first, backbone, model = runs[0], backbone_of(parse(cfg)), cfg.model
    images = first["n_train"] + first["n_val"] + first["n_test"]
    accuracies = [run["test_accuracy"] for run in runs]
    spread = f" ({statistics.stdev(accuracies):.4f})" if seeds > 1 else ""
    return [
        model.name,
        "random" if model.weights is None else model.weights,
        f"head on {model.last_block}"
        if model.frozen == model.last_block
        else f"{model.last_block} and head, on {model.frozen}",
        str(model.image_size),
        f"{backbone.feature_size:,}",
        f"{first['gmacs']:.3f}",
        f"{images / first['seconds_features']:,.0f}",
        str(first["epochs"]),
        f"{statistics.mean(accuracies):.4f}{spread}",
        f"{first['seconds']:.0f}",
    ]


if __name__ == "__main__":
    main()
