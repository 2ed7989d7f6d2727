"""Accuracy over seeds, on each run's validation and test splits and on the official 10,000 test images.

    python benchmarks/accuracy.py [--seeds 5] [OVERRIDE ...]
    python benchmarks/accuracy.py --seeds 3 experiment=fashion_mnist_best

--smallest trains on synthetic images and skips the official test images.
"""

import argparse
import logging
import statistics
import tempfile
from pathlib import Path

import results
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import tuner
from tuner.config import CONF, RunConfig, parse
from tuner.data import fashion_mnist
from tuner.runs.result import read_result
from tuner.runs.run import Run
from tuner.stages import train

SMALLEST = ["model=tiny", "data=synthetic", "epochs=2", "batch_size=32"]


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    return parser


def main() -> None:
    args = arguments().parse_args()
    if args.smallest:
        args.seeds, args.overrides = 2, [*SMALLEST, *args.overrides]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    accuracies: list[list[float]] = []
    runs = []
    for seed in range(args.seeds):
        with initialize_config_dir(str(CONF)):
            cfg = compose("train", [*args.overrides, f"seed={seed}", "plots=false"])
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder))
            run.save_config({"conf/config.yaml": OmegaConf.to_yaml(cfg)})
            config = parse(cfg)
            train(config, run)
            result = read_result(run.folder)
            accuracies.append([result["val_accuracy"], result["test_accuracy"]])
            if not args.smallest:
                accuracies[-1].append(on_official_test(run.folder, config))
        runs.append(f"{result['saved_epoch']:>8} {result['seconds']:>8.1f}")
    if args.smallest:
        print("official test: skipped, because --smallest trains on synthetic images")
    header = ["validation", "test", "official test"][: len(accuracies[0])]
    print("seed", *(f"{name:>13}" for name in header), "   epoch  seconds")
    for seed, (values, rest) in enumerate(zip(accuracies, runs, strict=True)):
        print(f"{seed:>4}", *(f"{value:>13.4f}" for value in values), rest)
    columns = list(zip(*accuracies, strict=True))
    print("mean", *(f"{statistics.mean(column):>13.4f}" for column in columns))
    if args.seeds > 1:
        print(" std", *(f"{statistics.stdev(column):>13.4f}" for column in columns))


def on_official_test(run: Path, config: RunConfig) -> float:
    """Accuracy of a run's model on the 10,000 test images of Fashion-MNIST."""
    test = fashion_mnist.load(config.cache.folder / "fashion_mnist").test
    predicted = tuner.load(run, device=config.device).predict(test.images).argmax(1)
    return float((predicted == test.labels).double().mean())


if __name__ == "__main__":
    main()
