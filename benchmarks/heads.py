"""Heads per second: K trained together, K one after another on the same device, and one process per head.

    python benchmarks/heads.py [--device cpu|cuda] [--most 128] [--features 4096] [--images 4200] [--repeats 3]

Each head has one hidden layer of 512, 256 or 1,024 units and its own learning rate and dropout. The data are random
numbers. Times are of whole epochs with validation, in the device's best precision. A turn trains K heads together, then
one head of each width; the time of K single heads is the sum of these. Processes: two at a time on a CPU, with one
thread each, without the time to start Python and torch.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial

import results
import torch

from tuner.device import choose_device, choose_precision
from tuner.training.fit import fit
from tuner.training.heads import Head
from tuner.training.schedules import onecycle
from tuner.training.spec import Metrics, Spec

WIDTHS = (512, 256, 1024)
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--most", type=int, default=128, help="the largest K")
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--images", type=int, default=4200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--alone", type=int, help=argparse.SUPPRESS
    )  # for a separate process: train so many heads one by one
    return parser


def main() -> None:
    args = arguments().parse_args()
    if args.smallest:
        args.most, args.features, args.images, args.batch_size, args.repeats = 4, 64, 64, 32, 1
    device = choose_device(args.device)
    trainer = Trainer(args, device)
    if args.alone:
        print(trainer.one_by_one(args.alone))
        return
    rows = [["K", "heads together, heads/s", "one after another, heads/s", "ratio", "peak memory"]]
    counts = itertools.takewhile(lambda k: k <= args.most, (2**i for i in range(20)))
    for k in counts:
        runs = {"together": partial(trainer.together, k), "one by one": partial(trainer.one_by_one, k)}
        rates = results.turns(runs, args.repeats)
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device.type == "cuda" else ""
        rows.append(
            [str(k), *(results.spread(r, ".3g") for r in rates.values()), results.ratio(*rates.values()), memory]
        )
        print(" | ".join(rows[-1]), flush=True)
    note = f"Heads/s: heads times epochs of {args.images:,} images, {args.features:,} features, a second."
    if device.type == "cpu":
        rates = [processes(args) for _ in range(args.repeats)]
        note += f" One process a trial, two at a time: {results.spread(rates, '.3g')} heads/s."
    results.write("heads", device, rows, note)


class Trainer:
    def __init__(self, args: argparse.Namespace, device: torch.device):
        torch.set_flush_denormal(True)  # as in a run
        generator = torch.Generator().manual_seed(0)
        n = args.images * 8 // 7  # 1/8 for validation
        self.precision, self.device, self.batch_size = choose_precision("auto", device), device, args.batch_size
        self.x = torch.randn(n, args.features, generator=generator).to(device, self.precision)
        self.labels = torch.randint(0, 10, (n,), generator=generator)
        self.rows = torch.arange(n).split([args.images, n - args.images])

    def together(self, k: int) -> float:
        return k / self._epoch([self.spec(i) for i in range(k)])

    def one_by_one(self, k: int) -> float:
        """Heads per second of single heads, from one head of each width among the first k."""
        seconds = [self._epoch([self.spec(i)]) for i in range(min(k, len(WIDTHS)))]
        return k / sum(seconds[i % len(WIDTHS)] for i in range(k))

    def spec(self, k: int) -> Spec:
        head = Head((WIDTHS[k % 3],), 0.1 + 0.005 * (k % 100), k)
        optimizer = partial(torch.optim.AdamW, lr=1e-3 / (1 + k % 7), weight_decay=1e-2, fused=True)
        train, val = self.rows
        options = {"epochs": 4, "batch_size": self.batch_size, "label_smoothing": 0.1}
        return Spec(head, optimizer, onecycle, 0, train, val, **options)

    def _epoch(self, specs: Sequence[Spec]) -> float:
        """Seconds per epoch of these heads: the median without the first epoch, in which a GPU captures its graph."""
        seconds: list[float] = []

        def on_epoch(_epoch: int, metrics: Mapping[Spec, Metrics]) -> tuple[Spec, ...]:
            seconds.append(metrics[specs[0]]["seconds"])
            return ()

        sizes = {"num_classes": 10, "feature_size": self.x.shape[1], "device": self.device}
        fit(specs, self.x, self.labels, on_epoch=on_epoch, precision=self.precision, **sizes)
        return statistics.median(seconds[1:])


def processes(args: argparse.Namespace) -> float:
    """Heads per second of two processes at the same time, each with one thread."""
    command = [sys.executable, __file__, "--alone", str(len(WIDTHS)), "--device", "cpu"]
    command += ["--features", str(args.features), "--images", str(args.images), "--batch-size", str(args.batch_size)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ONE_THREAD) for _ in range(2)]
    return sum(float(process.communicate()[0].splitlines()[-1]) for process in both)


if __name__ == "__main__":
    main()
