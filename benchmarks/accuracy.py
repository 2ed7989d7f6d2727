"""Accuracy over seeds: on each run's own validation and test splits, and on the official 10,000 test images.

python benchmarks/accuracy.py [--seeds 5] [OVERRIDE ...]
python benchmarks/accuracy.py --seeds 3 experiment=fashion_mnist_best
"""

import argparse
import logging
import statistics
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import tuner
from tuner.data import fashion_mnist
from tuner.runs import Run, read_result
from tuner.settings import cache_dir
from tuner.train import CONF, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for seed in range(args.seeds):
        with initialize_config_dir(str(CONF)):
            cfg = compose("train", [*args.overrides, f"seed={seed}", "plots=false"])
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder))
            run.save_config(cfg)
            train(cfg, run, in_sweep=False)
            run.close()
            result = read_result(run.folder)
            official = on_official_test(run.folder, cfg)
        rows.append(
            [result["val_accuracy"], result["test_accuracy"], official, result["saved_epoch"], result["seconds"]]
        )
    print("seed  validation    test  official test       epoch  seconds")
    for seed, (val, test, official, best, seconds) in enumerate(rows):
        print(f"{seed:>4} {val:>11.4f} {test:>7.4f} {official:>14.4f} {best:>11} {seconds:>8.1f}")
    columns = list(zip(*rows, strict=True))[:3]
    print("mean {:>11.4f} {:>7.4f} {:>14.4f}".format(*map(statistics.mean, columns)))
    if args.seeds > 1:
        print(" std {:>11.4f} {:>7.4f} {:>14.4f}".format(*map(statistics.stdev, columns)))


def on_official_test(run: Path, cfg: DictConfig) -> float:
    """Accuracy of a run's model on the 10,000 test images of Fashion-MNIST."""
    test = fashion_mnist.load(cache_dir(cfg) / "fashion_mnist").test
    said = tuner.load(run, device=cfg.device).predict(test.images).argmax(1)
    return float((said == test.labels).double().mean())


if __name__ == "__main__":
    main()
