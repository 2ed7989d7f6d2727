"""What a search costs beyond its training, and a whole search against what people do today. Times are medians of turns.

    python benchmarks/sweep.py overhead [--trials 100] [--turns 3] [--profile]
    python benchmarks/sweep.py search [--trials 30] [--turns 1] [--plain-trials 1] [--plain-epochs 1] [OVERRIDE ...]

overhead   milliseconds a trial of an objective that does nothing (one float, TPE, one job at a time in the sweep's own
           process), by Optuna alone, by hydra-optuna-sweeper and by tuner. Each measurement is a process in an empty
           folder. The clock runs from the objective's 11th call to its last, so that imports, the sweep's end and the
           10 trials that TPE draws at random are left out.
search     the default search, python -m tuner.train -m hparams_search=optuna, from the command to its end: with an
           empty cache; with the features which that left; as the same search under hydra-optuna-sweeper, which neither
           prunes nor retrains the best. And the plain pipeline: a DataLoader with torchvision's transforms, the frozen
           network in the loop, float32. Of that a few epochs are measured, and scaled.
"""

import argparse
import os
import platform
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from bank import InLoop, compare, wait
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from tuner.backbones import Backbone
from tuner.heads import Classifier, Head, Stack
from tuner.runs import read_result
from tuner.settings import build, choose_device, describe
from tuner.sweep.progress import duration
from tuner.train import CONF

WORKERS = 2  # processes of the plain pipeline's DataLoader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("overhead")
    one.set_defaults(run=overhead)
    one.add_argument("--trials", type=int, default=100, help="at least 12, as 10 are not counted")
    one.add_argument("--turns", type=int, default=3)
    one.add_argument("--profile", action="store_true", help="instead: where the time of tuner's sweeper goes")
    two = commands.add_parser("search")
    two.set_defaults(run=search)
    two.add_argument("--trials", type=int, default=30)
    two.add_argument("--turns", type=int, default=1)
    two.add_argument("--plain-trials", type=int, default=1, help="of the plain pipeline that are measured")
    two.add_argument("--plain-epochs", type=int, default=1, help="of each of those")
    two.add_argument("overrides", nargs="*", help="of the config, for all searches")
    args = parser.parse_args()
    versions = (f"{name} {version(name)}" for name in ("hydra-core", "hydra-optuna-sweeper", "optuna", "torch"))
    print(f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}, {', '.join(versions)}")
    args.run(args)


# The overhead of a trial

APP = """
import cProfile, os, sys, time
import hydra, optuna
from optuna.storages.journal import JournalFileBackend, JournalStorage

starts = []

def objective(x):
    starts.append(time.perf_counter())
    return x**2

@hydra.main(config_path=".", config_name="app")
def sweep(cfg):
    return objective(cfg.x)

def plain(n_trials, storage=None):
    if storage == "journal:///study.db":
        storage = JournalStorage(JournalFileBackend("study.db"))
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(lambda trial: objective(trial.suggest_float("x", -2, 2)), n_trials=int(n_trials))

if __name__ == "__main__":
    if sys.argv[1] != "-m":
        plain(*sys.argv[1:])
    elif "PROFILE" in os.environ:
        cProfile.run("sweep()", os.environ["PROFILE"])
    else:
        sweep()
    print((starts[-1] - starts[10]) / (len(starts) - 11))
"""
CONFIG = """
defaults:
  - _self_
  - override hydra/sweeper: {sweeper}
x: 1.0
hydra:
  sweeper:
    params:
      x: interval(-2, 2)
    sampler:
      seed: 0
    n_jobs: 1
    n_trials: {trials}
    storage: {storage}
    study_name: study
"""
SWEEPERS = {"study.optimize": "", "hydra-optuna-sweeper": "optuna", "tuner": "tuner"}
STORAGES = {"in memory": "null", "SQLite": "sqlite:///study.db", "journal": "journal:///study.db"}


def overhead(args: argparse.Namespace) -> None:
    if args.profile:
        profile(args.trials)
        return
    times: dict[str, dict[str, list[float]]] = {where: {name: [] for name in SWEEPERS} for where in STORAGES}
    del times["journal"]["hydra-optuna-sweeper"]  # which takes URLs alone
    for _ in range(args.turns):
        for where, of in times.items():
            for name, values in of.items():  # in turns, so that the machine's moods hit all alike
                values.append(1000 * seconds_a_trial(SWEEPERS[name], STORAGES[where], args.trials))
    print(f"ms a trial, of trials 10 to {args.trials - 1}, median and range of {args.turns} turns\n")
    rows = [["", *SWEEPERS, "tuner / hydra-optuna-sweeper"]]
    for where, of in times.items():
        ratio = compare(of, "tuner", "hydra-optuna-sweeper") if "hydra-optuna-sweeper" in of else "-"
        rows.append([where, *(spread(of[name]) if name in of else "-" for name in SWEEPERS), ratio])
    print_table(rows)


def seconds_a_trial(sweeper: str, storage: str, trials: int, **environment: str) -> float:
    """In a process and a folder of its own. sweeper: the hydra/sweeper, or "" for Optuna alone."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "app.py").write_text(APP)
        (Path(folder) / "app.yaml").write_text(CONFIG.format(sweeper=sweeper, storage=storage, trials=trials))
        arguments = ["-m"] if sweeper else [str(trials), *([] if storage == "null" else [storage])]
        out = command(["app.py", *arguments], Path(folder), **environment)
    return float(out.splitlines()[-1])


def profile(trials: int) -> None:
    """Print where the time of tuner's sweeper goes, with SQLite."""
    without = seconds_a_trial("tuner", STORAGES["SQLite"], trials)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "profile")
        seconds_a_trial("tuner", STORAGES["SQLite"], trials, PROFILE=path)
        stats = pstats.Stats(path).stats  # type: ignore[attr-defined]

    def of(file: str, name: str) -> float:
        """Milliseconds a trial in a function and all that it calls."""
        return sum(s[3] for key, s in stats.items() if key[0].endswith(file) and key[2] == name) * 1000 / trials

    job = of("sweep/trial.py", "__call__")
    parts = {
        "load_sweep_config: Hydra composes the job's config": of("config_loader_impl.py", "load_sweep_config"),
        "run_job: Hydra's copies, logging and .hydra folder": of("core/utils.py", "run_job") - job,
        "the job: what it writes into the study": job - of("app.py", "sweep"),
        "ask: the budget, and the new trial": of("sweep/account.py", "ask"),
        "suggest: the sampler": of("sweep/sweeper.py", "_overrides"),
        "tell: with the line that says so": of("sweep/account.py", "tell"),
    }
    whole = of("sweep/sweeper.py", "_run_trials")
    parts["rest"] = whole - sum(parts.values())
    print(f"tuner's sweeper, SQLite: {1000 * without:.1f} ms a trial without the profiler, {whole:.1f} with it\n")
    rows = [[name, f"{ms:.1f}", f"{ms / whole:.0%}"] for name, ms in parts.items()]
    print_table([["", "ms a trial, profiled", "share"], *rows])


# A whole search

UPSTREAM = """
from hydra.core.config_store import ConfigStore
from hydra_plugins.hydra_optuna_sweeper.config import OptunaSweeperConf
from tuner.train import main

if __name__ == "__main__":
    ConfigStore.instance().store(group="hydra/sweeper", name="upstream", node=OptunaSweeperConf)
    main()
"""


def search(args: argparse.Namespace) -> None:
    with initialize_config_dir(str(CONF)):
        cfg = compose("train", ["hparams_search=optuna", *args.overrides], return_hydra_config=True)
    common = [f"hydra.sweeper.n_trials={args.trials}", *args.overrides]
    ours = ["-m", "tuner.train", "-m", "hparams_search=optuna", *common]
    theirs = ["upstream.py", "-m", *same_search(cfg.hydra), *common]
    reference = "tuner, features cached"
    searches = [("tuner, from nothing", ours), (reference, ours), ("hydra-optuna-sweeper, features cached", theirs)]
    times: dict[str, list[float]] = defaultdict(list)
    found: dict[str, list[str]] = {}
    for _ in range(args.turns):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            (folder / "upstream.py").write_text(UPSTREAM)
            (folder / "multirun").mkdir()
            for i, (name, arguments) in enumerate(searches):
                print(name, file=sys.stderr)
                start = time.perf_counter()
                command([*arguments, f"study=study{i}"], folder, TUNER_CACHE=str(folder / "cache"))
                times[name].append(time.perf_counter() - start)
                found[name] = what_was_found(folder / "multirun" / f"study{i}")

    print("plain pipeline", file=sys.stderr)
    device = choose_device(cfg.device)
    epochs = [seconds for seed in range(args.plain_trials) for seconds in plain_epochs(cfg, seed, device, args)]
    whole, pruned = cfg.epochs * args.trials, int(found[reference][1])
    for name, count in (("plain pipeline, scaled", whole), ("plain pipeline, scaled to as many epochs", pruned)):
        times[name] = [statistics.median(epochs) * count] * args.turns
        found[name] = ["-", str(count), "-"]

    print(f"{describe(device)}, {args.trials} trials, {' '.join(args.overrides) or 'the default config'}")
    print(f"plain pipeline: {args.plain_trials} x {args.plain_epochs} epochs measured, {spread(epochs)} s an")
    print(
        f"epoch with validation; scaled to {cfg.epochs} epochs x {args.trials} trials, and to the {pruned} epochs that"
    )
    print(f"tuner's search trained, as it prunes. The other rows are measured whole, medians of {args.turns} turns.\n")
    columns = ["time", "s of it: the last run", "epochs", "best validation accuracy", f"times {reference}"]
    rows = [
        [name, duration(statistics.median(t)), *found[name], compare(times, name, reference)]
        for name, t in times.items()
    ]
    print_table([["search", *columns], *rows])


def same_search(hydra: DictConfig) -> list[str]:
    """The overrides that make of `hydra/sweeper=upstream` the search in a composed config, without its pruner."""
    sampler = {key: value for key, value in hydra.sweeper.sampler.items() if key[0] != "_" and value is not None}
    same = {key: hydra.sweeper[key] for key in ("direction", "storage", "n_jobs", "max_failure_rate")}
    same |= {f"sampler.{key}": value for key, value in sampler.items()} | {"study_name": "${study}"}
    groups = {"hydra/sweeper": "upstream", "hydra/sweeper/sampler": hydra.runtime.choices["hydra/sweeper/sampler"]}
    values = groups | {f"hydra.sweeper.{key}": value for key, value in same.items()} | dict(hydra.sweeper.params)
    return [f"{key}={value}" for key, value in values.items()]


def what_was_found(folder: Path) -> list[str]:
    """Of a sweep's folder: seconds of the last run (the best retrained), epochs trained before it, best value."""
    results = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    epochs = sum(len(path.read_text().splitlines()) - 1 for path in folder.glob("[0-9]*/metrics.csv"))
    last = read_result(folder / "best")["seconds"] if (folder / "best").exists() else "-"
    return [str(last), str(epochs), f"{results['best_value']:.4f}"]


class Images(Dataset):
    """As torchvision's data sets have it: an image and its transforms, one at a time."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, backbone: Backbone):
        self.images, self.labels = images, labels
        steps = [transforms.ToPILImage(), transforms.Grayscale(3), transforms.Resize(backbone.image_size)]
        steps += [transforms.ToTensor(), transforms.Normalize(backbone.mean, backbone.std)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(self.images[i]), self.labels[i]


def plain_epochs(cfg: DictConfig, seed: int, device: torch.device, args: argparse.Namespace) -> list[float]:
    """Seconds of each epoch of a trial, validation included: the same cut, head, loss and optimizer as tuner's."""
    options = {key: cfg.model[key] for key in ("name", "weights", "image_size", "features", "pool")}
    backbone = Backbone(**options, frozen=cfg.model.features)
    data = build("data", cfg)
    trunk = InLoop(backbone, torch.float32, device)
    trunk.network = trunk.network[1:]  # less its preprocessing, which the DataLoader does
    head = Head((cfg.model.head.width,), cfg.model.head.dropout, seed)
    model = Classifier(trunk, Stack(backbone.feature_size, len(data.classes), [head], device))
    optimizer = build("optimizer", cfg)(model.stack.parameters_of(0))
    splits = [Images(data.pool.images[rows], data.pool.labels[rows], backbone) for rows in (data.train, data.val)]
    loaders = [DataLoader(s, cfg.batch_size, shuffle=s is splits[0], num_workers=WORKERS) for s in splits]
    seconds = []
    for _ in range(args.plain_epochs):
        start = time.perf_counter()
        model.train()
        for images, labels in loaders[0]:
            optimizer.zero_grad()
            logits = model(images.to(device))[0]
            F.cross_entropy(logits, labels.to(device), label_smoothing=cfg.label_smoothing).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            for images, labels in loaders[1]:
                (model(images.to(device))[0].argmax(1) == labels.to(device)).sum()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def command(arguments: Sequence[str], folder: Path, **environment: str) -> str:
    """Run Python there; what it printed. Ends this script where it fails."""
    env = os.environ | {"PYTHONPATH": str(CONF.parent)} | environment
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
