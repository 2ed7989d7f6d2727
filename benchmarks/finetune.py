"""Blocks trained on cached maps, compared with the frozen network in the loop; time and memory of saving memory.

    python benchmarks/finetune.py [--images 1000] [--repeats 3] [OVERRIDE ...]

The default trains VGG16's block5 on cached maps of block4, at 64 pixels. Epochs are measured in turns, and the losses
of both ways are compared. Memory: the peak of a process that trains all blocks on 128 images of 128 pixels at once.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path

import results
import torch
from bank import InLoop
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tuner.bank import features
from tuner.cache_files import Cache
from tuner.config import CONF
from tuner.data import Samples, fmnist_small
from tuner.device import choose_device, choose_precision, is_cpu
from tuner.networks.backbone import Backbone
from tuner.networks.blocks import Blocks
from tuner.training.fit import fit
from tuner.training.heads import Head
from tuner.training.schedules import onecycle
from tuner.training.spec import Spec

SAVING = {"as it is": {}, "micro_batch=16": {"micro_batch": 16}, "recompute=true": {"recompute": True}}


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory-images", type=int, default=128, help="per step, in the memory table")
    parser.add_argument("--memory-size", type=int, default=128, help="side in pixels, in the memory table")
    parser.add_argument("--memory", choices=SAVING, help=argparse.SUPPRESS)  # the process that measures this row
    parser.add_argument("overrides", nargs="*")
    return parser


def main() -> None:
    args = arguments().parse_args()
    if args.smallest:
        args.images, args.repeats, args.memory_images, args.memory_size = 32, 1, 32, 32
        args.overrides = ["model.image_size=32", *args.overrides]
    device = choose_device(args.device)
    overrides = ["model.last_block=block5", "model.frozen=block4", "model.pool=null", *args.overrides]
    with initialize_config_dir(str(CONF)):
        model = OmegaConf.to_container(compose("train", overrides).model, resolve=True)
    for key in ("head", "budget", "screen"):
        del model[key]
    if args.memory:
        whole = Backbone(**model | {"frozen": None, "image_size": args.memory_size})
        images, precision = pool().images[: args.memory_images], choose_precision("auto", device)
        seconds, _ = train(whole, whole.trained_part(), images, device, precision, **SAVING[args.memory])
        print(seconds)
        print(peak_memory())
        return
    compare(Backbone(**model), pool().images[: args.images], device, args.repeats)
    memory(device, args)


@cache
def pool() -> Samples:
    """The bundled images that are not held out, read once."""
    return fmnist_small.load().pool


def peak_memory() -> float:
    """Peak memory of this process in MB. getrusage would include the process that started this one."""
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) / 1000


def train(
    backbone: Backbone, trunk: Blocks, x: torch.Tensor, device: torch.device, precision: torch.dtype, **options: object
) -> tuple[float, list[float]]:
    """Seconds of the second epoch, and the training losses of both epochs."""
    rows, curve = torch.arange(len(x)), []
    spec = Spec(
        Head((512,), 0.0, 0),
        partial(torch.optim.AdamW, lr=1e-4, fused=True),
        onecycle,
        0,
        rows,
        None,
        2,
        128,
        **options,
    )
    labels = pool().labels[: len(x)]
    sizes = {"num_classes": 10, "feature_size": backbone.feature_size, "device": device, "precision": precision}
    fit([spec], x, labels, on_epoch=lambda _, m: curve.append(m[spec]) or (), trunk=trunk.to(device), **sizes)
    return curve[1]["seconds"], [metrics["train_loss"] for metrics in curve]


def compare(backbone: Backbone, images: torch.Tensor, device: torch.device, repeats: int) -> None:
    rows = [["precision", "cached maps, s an epoch", "in the loop, s", "times as fast", "largest difference of losses"]]
    for name in ("fp32", "bf16"):
        dtype = choose_precision(name, device)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            cached = features.bank(images, backbone, cache=Cache(Path(folder)), device=device, dtype=dtype)
            maps = cached.clone().to(device)
            filling = time.perf_counter() - start
        losses: dict[str, list[float]] = {}

        def cached(dtype=dtype, maps=maps, losses=losses) -> float:
            seconds, losses["cached"] = train(backbone, backbone.trained_part(), maps, device, dtype)
            return seconds

        def in_loop(dtype=dtype, losses=losses) -> float:
            trunk = InLoop(backbone.frozen_part(dtype).to(device), backbone.trained_part())
            seconds, losses["loop"] = train(backbone, trunk, images.to(device), device, dtype)
            return seconds

        seconds = results.turns({"cached": cached, "loop": in_loop}, repeats)
        difference = max(abs(a - b) for a, b in zip(losses["cached"], losses["loop"], strict=True))
        columns = [results.spread(seconds[k], ".2f") for k in ("cached", "loop")]
        rows.append([name, *columns, results.ratio(seconds["loop"], seconds["cached"]), f"{difference:.1g}"])
    note = f"{backbone.name}, trained behind {backbone.frozen} up to {backbone.last_block}, {backbone.image_size} px, "
    note += f"{len(images):,} images; filling the cache takes {filling:.1f} s once (bf16)."
    results.write("blocks on cached maps", device, rows, note)


def memory(device: torch.device, args: argparse.Namespace) -> None:
    if not is_cpu(device):
        return
    rows = [["", f"s a step of {args.memory_images} images, {args.memory_size} px", "peak memory, MB"]]
    for name in SAVING:
        words = [sys.executable, __file__, "--device", "cpu", "--memory", name, *args.overrides]
        words += ["--memory-images", str(args.memory_images), "--memory-size", str(args.memory_size)]
        measured = [
            [float(v) for v in subprocess.run(words, check=True, text=True, capture_output=True).stdout.split()[-2:]]
            for _ in range(args.repeats)
        ]
        seconds, peaks = zip(*measured, strict=True)
        rows.append([name, results.spread(seconds, ".1f"), f"{statistics.median(peaks):,.0f}"])
    results.write("memory of fine-tuning all blocks", device, rows)


if __name__ == "__main__":
    main()
