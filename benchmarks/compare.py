"""Time and memory of `tuner.compare` for many run folders.

    python benchmarks/compare.py [--runs 10000] [--repeats 3]

Writes run folders like those of a search over lr, dropout and width, and lists them several times, with the files in
the system's cache.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf


def write_runs(folder: Path, runs: int) -> None:
    with initialize_config_dir(str(Path(__file__).resolve().parent.parent / "conf")):
        config = compose("train", overrides=["study=synthetic"])
    header = "epoch,train_loss,train_accuracy,val_loss,val_accuracy,lr,seconds\n"
    curve = header + "".join(f"{epoch},0.5,0.8,0.5,0.8,0.001,0.4\n" for epoch in range(1, 26))
    draw = random.Random(0)
    for number in range(runs):
        run = folder / f"study{number // 1000}" / str(number % 1000)
        (run / ".hydra").mkdir(parents=True)
        config.optimizer.lr, config.model.head.dropout = 10 ** draw.uniform(-4, -2), draw.uniform(0, 0.6)
        config.model.head.width = draw.choice([256, 512, 1024])
        (run / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(config))
        (run / "metrics.csv").write_text(curve)
        result = {"status": "complete", "val_accuracy": draw.random(), "epochs": 25, "seconds": 9.2, "trial": number}
        (run / "result.json").write_text(json.dumps(result, indent=2))


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    return parser


def main() -> None:
    args = arguments().parse_args()
    if args.smallest:
        args.runs, args.repeats = 20, 1
    print(f"{os.cpu_count()} CPU cores, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory() as folder:
        for runs in (1, args.runs):
            write_runs(Path(folder) / str(runs), runs)
            seconds = []
            for _ in range(args.repeats):
                start = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-m", "tuner.compare", str(runs)],
                    cwd=folder,
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                seconds.append(time.perf_counter() - start)
            memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
            spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
            print(f"run folders: {runs:,}, {statistics.median(seconds):.1f} s ({spread}), peak memory {memory:.0f} MB")


if __name__ == "__main__":
    main()
