"""Accuracy over seeds: on each run's own validation and test splits, and on the official 10,000 test images.

python benchmarks/accuracy.py [--seeds 5] [OVERRIDE ...]
python benchmarks/accuracy.py --seeds 3 experiment=fashion_mnist_best
"""

import argparse
import logging
import statistics
import tempfile
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tuner.backbones import Backbone
from tuner.data import fashion_mnist
from tuner.features import bank
from tuner.fit import predict, score
from tuner.heads import Classifier, Head, Stack, widths
from tuner.runs import Run, read_result
from tuner.settings import cache_dir, choose_device, choose_precision
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
            train(cfg, Run(Path(folder)), in_sweep=False)
            result = read_result(Path(folder))
            official = on_official_test(cfg, load_file(Path(folder) / "model.safetensors"), len(result["class_names"]))
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


def on_official_test(cfg, state: dict[str, torch.Tensor], classes: int) -> float:
    """Accuracy of a saved model on the 10,000 test images of Fashion-MNIST."""
    device = choose_device(cfg.device)
    dtype = choose_precision(cfg.precision, device)
    options = OmegaConf.to_container(cfg.model, resolve=True)
    head = options.pop("head")
    backbone = Backbone(**options, seed=cfg.seed)
    spec = Head(widths(head["width"], head["depth"]), head["dropout"], cfg.seed)
    model = Classifier(None, Stack(backbone.feature_size, classes, [spec], device, dtype))
    model.load_state(0, state)
    test = fashion_mnist.load(cache_dir(cfg) / "fashion_mnist").test
    x = bank(test.images, backbone, cache_dir=cache_dir(cfg), device=device, dtype=dtype).to(device)
    log_p = predict(model, x, [torch.arange(len(x))], batch_size=cfg.batch_size)
    return score(log_p, test.labels)["accuracy"][0]


if __name__ == "__main__":
    main()
