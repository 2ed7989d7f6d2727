"""What the pick of a search is worth on other images, beside what is announced.

    python benchmarks/selection.py [--draws 8] [--first 0] [--root FOLDER] [--device auto]
    python benchmarks/selection.py --smallest --results FILE

Draws of 4,800 of Fashion-MNIST's training images, each with 8,000 other ones for the truth. For each draw, 16
configurations at random, the default first: of lr, dropout and width (`heads`), or also of the network and its cut
(`networks`). All of them are trained on one split (4,200 + 600 images), on 5 folds, and on all 4,800 images with two
seeds, whose mean accuracy on the 8,000 images is the truth. So a pick is compared with the default without another
search: by the accuracy on the split, by the mean over the folds, and greedy ensembles of at most 5 picks by either.

announced     accuracy of the pick minus that of the default, on the images that it was chosen by
corrected     tuner.runs.selection.gain(): what a search's last lines say, with its 95% interval
truth         accuracy of the pick minus that of the default on the 8,000 images, both trained on all 4,800
"""

import argparse
import copy
import json
import logging
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
from gpu import ROOT, config, fashion_mnist_files
from omegaconf import OmegaConf

from tuner.cache_files import Cache
from tuner.config import RunConfig, parse
from tuner.data import Data, fashion_mnist, fmnist_small, split
from tuner.device import choose_device, choose_precision, repeatable
from tuner.runs import calibration, selection
from tuner.runs.ensemble import Means
from tuner.training.folds import folds_of
from tuner.training.setup import Setup, backbone_of
from tuner.training.spec import Spec, spec_of
from tuner.training.together import fit_all, trained_head

FOLDS, MOST, SEEDS = 5, 5, 2
HEADS = [["model=vgg16"]]  # overrides; the first is the default
NETWORKS = [
    *HEADS,
    ["model=vgg16", "model.last_block=block4"],
    ["model=vgg16", "model.last_block=[block3,block4]"],
    ["model=vgg16", "model.last_block=block2", "model.pool=4"],
]
SMALLEST = [
    ["model=tiny", "model.last_block=block2", "epochs=2"],
    ["model=tiny", "model.last_block=block1", "epochs=2"],
]


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="number of the first draw: others were made before")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--spaces", nargs="+", choices=("heads", "networks"), default=["heads", "networks"])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the four files of Fashion-MNIST")
    parser.add_argument("--device", default="auto")
    return parser


def main() -> None:
    args = arguments().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_flush_denormal(True)
    device, spaces = choose_device(args.device), {"heads": HEADS, "networks": NETWORKS}
    if args.smallest:
        spaces, args.draws, args.trials = {"heads": SMALLEST[:1], "networks": SMALLEST}, 2, 4
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in args.spaces}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.first, args.first + args.draws):
            data = draw(args, number)
            for name in args.spaces:
                done[name].append(compare(spaces[name], data, args.trials, number, device, Path(folder)))
                print(json.dumps({"space": name, "draw": number} | done[name][-1]), flush=True)
                write(done, args, device)


def draw(args: argparse.Namespace, number: int) -> Data:
    """A data set of 4,800 images; its test split are 8,000 others. Draws may overlap."""
    files = fashion_mnist_files(args.root.expanduser())
    samples = fashion_mnist.read(files, "train") if files and not args.smallest else fmnist_small.load().pool
    count, others = (200, 100) if args.smallest else (4800, min(8000, len(samples) - 4800))
    rows = torch.randperm(len(samples), generator=torch.Generator().manual_seed(1000 + number))
    pool, test = samples.rows(rows[:count]), samples.rows(rows[count : count + others])
    return split(pool, test, fashion_mnist.CLASSES, val_share=0.125, seed=number)


def configs(space: Sequence[Sequence[str]], trials: int, seed: int) -> list[tuple[int, RunConfig]]:
    """The default, then configurations at random: the index of the network in `space`, and the config."""
    generator, drawn = np.random.default_rng(seed), []
    bases: list[Any] = [OmegaConf.to_container(config(*overrides), resolve=True) for overrides in space]
    for trial in range(trials):
        network = int(generator.integers(len(space))) if trial else 0
        values = copy.deepcopy(bases[network])
        values["final"]["epochs"] = values["epochs"]  # for the training on all images
        if trial:
            values["optimizer"]["lr"] = float(np.exp(generator.uniform(np.log(2e-4), np.log(5e-3))))
            values["model"]["head"]["dropout"] = float(generator.uniform(0.1, 0.6))
            values["model"]["head"]["width"] = int(generator.choice([256, 512, 1024]))
        drawn.append((network, parse(values)))
    return drawn


def compare(
    space: Sequence[Sequence[str]],
    data: Data,
    trials: int,
    seed: int,
    device: torch.device,
    folder: Path,
) -> dict[str, Any]:
    """One draw: for each way to choose, the pick, and its announced, corrected and true gain over the default."""
    chosen = configs(space, trials, seed)
    setups = {network: setup_of(cfg, data, device, folder) for network, cfg in dict(chosen).items()}
    with repeatable(device):
        scored = [scores([c for n, c in chosen if n == network], setups[network]) for network in setups]
    places = {network: iter(range(trials)) for network in setups}
    by_network = dict(zip(setups, scored, strict=True))
    rows = [(by_network[network], next(places[network])) for network, _ in chosen]
    one, folds, truth = (torch.stack([found[kind][i] for found, i in rows]) for kind in ("split", "folds", "truth"))
    labels = {"split": data.pool.labels[data.val], "folds": data.pool.labels, "truth": data.test.labels}
    true = right(truth, labels["truth"]).mean((1, 2))  # [trials]; truth: [trials, seeds, N, C]
    figures: dict[str, Any] = {"default": float(true[0]), "best possible": float(true.max() - true[0])}
    figures["spread"] = float(true.std())
    for way, log_p in (("split", one), ("folds", folds)):
        figures[way] = picked(log_p, labels[way], true, FOLDS if way == "folds" else None)
        figures[f"ensemble by {way}"] = combined(log_p, labels[way], truth, labels["truth"], true)
    return figures


def setup_of(cfg: RunConfig, data: Data, device: torch.device, folder: Path) -> Setup:
    precision, cache = choose_precision(cfg.precision, device), Cache(folder / "cache")
    return Setup(device, precision, backbone_of(cfg), data, cache, cfg.augment.build(), 1, 1)


def scores(chosen: Sequence[RunConfig], setup: Setup) -> dict[str, torch.Tensor]:
    """Log-probabilities of each config: `split` [n, 600, C], `folds` [n, 4800, C], `truth` [n, seeds, 8000, C]."""
    data, labels = setup.data, setup.data.pool.labels
    folds = folds_of(data, FOLDS, 0)
    specs: list[Spec] = []
    for cfg in chosen:
        specs.append(spec_of(cfg, setup, 0, data.train, data.val))
        specs += [spec_of(cfg, setup, 0, fold.train, fold.val, folds=FOLDS) for fold in folds]
        specs += [spec_of(cfg, setup, seed, torch.arange(len(labels)), None) for seed in range(SEEDS)]
    each = 1 + FOLDS + SEEDS
    n, classes = len(chosen), len(data.classes)
    one, out = torch.empty(n, len(data.val), classes), torch.empty(n, len(labels), classes)
    truth = torch.empty(n, SEEDS, len(data.test), classes)
    for spec, fitted in fit_all([(setup, spec) for spec in specs], lambda _epoch, _metrics: ()):
        trial, kind = divmod(specs.index(spec), each)
        head = trained_head(setup, spec, fitted)
        if kind == 0:
            one[trial] = head.score(setup.x, labels, data.val)[0]
        elif kind <= FOLDS:
            rows = folds[kind - 1].images
            out[trial, rows] = head.score(setup.x, labels, rows)[0]
        else:
            truth[trial, kind - 1 - FOLDS] = head.score(setup.x_test, data.test.labels, torch.arange(len(data.test)))[0]
    return {"split": one, "folds": out, "truth": truth}


def right(log_p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether the answers are right, 0 or 1: float [..., N]."""
    return (log_p.argmax(-1) == labels).float()


def picked(log_p: torch.Tensor, labels: torch.Tensor, true: torch.Tensor, folds: int | None) -> dict[str, float]:
    """The pick by these predictions, and its gains. true: accuracy of each trial on the other images, [trials]."""
    correct = right(log_p, labels)
    best = int(correct.mean(1).argmax())
    found = selection.gain(correct.bool().numpy(), 0, folds=folds)
    gain = {"announced": found.announced, "corrected": found.corrected, "low": found.low, "high": found.high}
    return gain | {"truth": float(true[best] - true[0])}


def combined(
    log_p: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor, others: torch.Tensor, true: torch.Tensor
) -> dict[str, float]:
    """The greedy ensemble, over the best trial by these predictions: its announced and true gain."""
    temperatures = [calibration.temperature(trial, labels) for trial in log_p]
    calibrated = torch.stack([calibration.calibrated(p, t) for p, t in zip(log_p, temperatures, strict=True)])
    best = int(right(log_p, labels).mean(1).argmax())
    means = Means(calibrated, labels)
    picks = means.greedy(best, MOST)
    gain = means.gain(best, MOST)
    together = torch.stack([truth[i] / temperatures[i] for i in picks]).mean(0).mean(0)  # over members and seeds
    alone = torch.stack([truth[best] / temperatures[best]]).mean(0).mean(0)  # the seeds of the best, likewise
    accuracy, single = (float(right(logits, others).mean()) for logits in (together, alone))
    return {
        "members": float(len(set(picks))),
        **{key: float(gain[key]) for key in ("announced", "corrected", "low", "high")},
        "truth": accuracy - float(true[best]),
        "truth over its seeds": accuracy - single,
        "truth over the default": accuracy - float(true[0]),
    }


def write(done: dict[str, list[dict[str, Any]]], args: argparse.Namespace, device: torch.device) -> None:
    """Write the tables of the draws that are done."""
    table = [["space", "way", "announced", "corrected", "truth", "sd of the truth", "truth within the interval"]]
    for space, draws in done.items():
        for way in ("split", "folds", "ensemble by split", "ensemble by folds"):
            of_way = [figures[way] for figures in draws]
            if not of_way:
                continue
            means = [f"{statistics.fmean(f[key] for f in of_way):.4f}" for key in ("announced", "corrected", "truth")]
            spread = statistics.pstdev([f["truth"] for f in of_way])
            within = sum(f["low"] <= f["truth"] <= f["high"] for f in of_way)
            table.append([space, way, *means, f"{spread:.4f}", f"{within} of {len(of_way)}"])
    note = f"Means over the draws. {args.trials} configurations each. "
    for space, draws in done.items():
        if draws:
            default, best, spread = (
                statistics.fmean(d[key] for d in draws) for key in ("default", "best possible", "spread")
            )
            note += f"{space}: default {default:.4f} on the other images, best of the configurations {best:+.4f}, "
            note += f"standard deviation of the configurations {spread:.4f}. "
    note += "The ensembles' gains are over the best trial, the picks' over the default."
    results.write("what a search's pick is worth", device, table, note)


if __name__ == "__main__":
    main()
