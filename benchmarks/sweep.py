"""The cost of a search besides training, and a whole search compared with the usual way. Times are medians of turns.

    python benchmarks/sweep.py overhead [--trials 100] [--turns 3] [--profile]
    python benchmarks/sweep.py where [--trials 30] [OVERRIDE ...]
    python benchmarks/sweep.py memory [--trials 10 100 1000] [--overrides OVERRIDE ...]
    python benchmarks/sweep.py search [--trials 30] [--turns 1] [--plain-trials 1] [--plain-epochs 1] [OVERRIDE ...]

overhead   milliseconds per trial of an objective that does nothing (one float, TPE, one job at a time in the sweep's
           process): Optuna alone, hydra-optuna-sweeper and tuner. Each measurement is a process in an empty folder. The
           clock runs from the 11th call of the objective to the last one. This excludes imports, the end of the sweep
           and the 10 trials that TPE draws at random.
where      the default search under py-spy (pip install py-spy): how its time divides. Run it twice: the second time
           the features are cached.
memory     peak memory of a search on synthetic images with one epoch per trial, for growing numbers of trials.
search     the default search, python -m tuner.train -m hparams_search=optuna, from the command to its end: with an
           empty cache; with cached features; and under hydra-optuna-sweeper, which neither prunes nor retrains the
           best configuration. And the plain pipeline: a DataLoader with torchvision's transforms on all cores but two
           (at least two workers), and the frozen network in the loop, channels_last, in float32 and under bf16
           autocast. A few epochs of it are measured and scaled up. `first at`: from the command to the end of the first
           trial that reaches the target accuracy.

All take --smallest and --results FILE.
"""

import argparse
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import joblib
import optuna
import results
import torch
import torch.nn.functional as F
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from tuner.config import CONF, parse
from tuner.data import Data
from tuner.device import choose_device, wait
from tuner.networks.backbone import Backbone
from tuner.runs.result import read_result
from tuner.sweep import plugin
from tuner.sweep.progress import duration
from tuner.training.heads import widths

plugin.register()  # the searches of conf/ are composed in this process, too

WORKERS = max(2, joblib.cpu_count() - 2)  # processes of the plain pipeline's DataLoader
SMALLEST = ["model=tiny", "data=synthetic", "epochs=2", "batch_size=32", "final.seeds=1"]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("overhead")
    sub.set_defaults(run=overhead)
    results.add_options(sub)
    sub.add_argument("--trials", type=int, default=100, help="at least 12, because the first 10 are not counted")
    sub.add_argument("--turns", type=int, default=3)
    sub.add_argument("--profile", action="store_true", help="instead, profile tuner's sweeper")
    sub = commands.add_parser("search")
    sub.set_defaults(run=search)
    results.add_options(sub)
    sub.add_argument("--trials", type=int, default=30)
    sub.add_argument("--turns", type=int, default=1)
    sub.add_argument("--plain-trials", type=int, default=1, help="trials of the plain pipeline to measure")
    sub.add_argument("--plain-epochs", type=int, default=1, help="epochs of each to measure")
    sub.add_argument("--target", type=float, default=0.9, help="a validation accuracy")
    sub.add_argument("overrides", nargs="*", help="config overrides for all searches")
    sub = commands.add_parser("where")
    sub.set_defaults(run=where)
    results.add_options(sub)
    sub.add_argument("--trials", type=int, default=30)
    sub.add_argument("overrides", nargs="*")
    sub = commands.add_parser("memory")
    sub.set_defaults(run=memory)
    results.add_options(sub)
    sub.add_argument("--trials", type=int, nargs="+", default=[10, 100, 1000])
    sub.add_argument("--overrides", nargs="*", default=["model=tiny", "data=synthetic"])
    return parser


def main() -> None:
    args = arguments().parse_args()
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
    if args.smallest:
        args.trials, args.turns = 13, 1
    if args.profile:
        profile(args.trials)
        return
    times: dict[str, dict[str, list[float]]] = {storage: {name: [] for name in SWEEPERS} for storage in STORAGES}
    del times["journal"]["hydra-optuna-sweeper"]  # it takes only URLs
    for _ in range(args.turns):
        for storage, of_storage in times.items():
            for name, values in of_storage.items():  # in turns, which spreads the machine's noise evenly
                values.append(1000 * seconds_per_trial(SWEEPERS[name], STORAGES[storage], args.trials))
    rows = [["", *SWEEPERS, "tuner / hydra-optuna-sweeper"]]
    for storage, of_storage in times.items():
        upstream = of_storage.get("hydra-optuna-sweeper")
        ratio = results.ratio(of_storage["tuner"], upstream) if upstream else "-"
        columns = [results.spread(of_storage[name], ".1f") if name in of_storage else "-" for name in SWEEPERS]
        rows.append([storage, *columns, ratio])
    note = f"ms a trial, of trials 10 to {args.trials - 1}, median and range of {args.turns} turns"
    results.write("overhead of a trial", torch.device("cpu"), rows, note)


def seconds_per_trial(sweeper: str, storage: str, trials: int, **environment: str) -> float:
    """Measured in a separate process and folder. sweeper: the option of hydra/sweeper, or "" for Optuna alone."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "app.py").write_text(APP)
        (Path(folder) / "app.yaml").write_text(CONFIG.format(sweeper=sweeper, storage=storage, trials=trials))
        arguments = ["-m"] if sweeper else [str(trials), *([] if storage == "null" else [storage])]
        out = command(["app.py", *arguments], Path(folder), **environment)
    return float(out.splitlines()[-1])


def profile(trials: int) -> None:
    """Print how the time of tuner's sweeper divides, with SQLite."""
    without = seconds_per_trial("tuner", STORAGES["SQLite"], trials)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "profile")
        seconds_per_trial("tuner", STORAGES["SQLite"], trials, PROFILE=path)
        stats = pstats.Stats(path).stats  # type: ignore[attr-defined]

    def of(file: str, name: str) -> float:
        """Milliseconds per trial in a function and its callees."""
        return sum(s[3] for key, s in stats.items() if key[0].endswith(file) and key[2] == name) * 1000 / trials

    job = of("sweep/trial.py", "__call__")
    parts = {
        "load_sweep_config: Hydra composes the job's config": of("config_loader_impl.py", "load_sweep_config"),
        "run_job: Hydra's copies, logging and .hydra folder": of("core/utils.py", "run_job") - job,
        "the job: what it writes into the study": job - of("app.py", "sweep"),
        "ask: the budget, and the new trial": of("sweep/budget.py", "ask"),
        "suggest: the sampler": of("sweep/trial_loop.py", "_overrides"),
        "tell: with the line that says so": of("sweep/budget.py", "tell"),
    }
    whole = of("sweep/trial_loop.py", "_run_trials")
    parts["rest"] = whole - sum(parts.values())
    print(f"tuner's sweeper, SQLite: {1000 * without:.1f} ms a trial without the profiler, {whole:.1f} with it\n")
    rows = [[name, f"{ms:.1f}", f"{ms / whole:.0%}"] for name, ms in parts.items()]
    for row in rows:
        print("  ".join(row))


# A whole search

UPSTREAM = """
from hydra.core.config_store import ConfigStore
from hydra_plugins.hydra_optuna_sweeper.config import OptunaSweeperConf
from tuner.train import main

if __name__ == "__main__":
    ConfigStore.instance().store(group="hydra/sweeper", name="upstream", node=OptunaSweeperConf)
    main()
"""


NOTHING_CACHED, CACHED = "tuner, from nothing", "tuner, features cached"
UPSTREAM_CACHED = "hydra-optuna-sweeper, features cached"
PLAIN = {"float32": torch.float32, "bf16 autocast": torch.bfloat16}


def search(args: argparse.Namespace) -> None:
    if args.smallest:
        args.trials, args.target, args.overrides = 2, 0.0, [*SMALLEST, *args.overrides]
    with initialize_config_dir(str(CONF)):
        cfg = compose("train", ["hparams_search=optuna", *args.overrides], return_hydra_config=True)
    times, columns_of = searches(cfg, args)

    print("plain pipeline", file=sys.stderr)
    device = choose_device(cfg.device)
    whole, pruned, to_target = cfg.epochs * args.trials, int(columns_of[CACHED][1]), columns_of[UPSTREAM_CACHED][4]
    measured = []
    for name, dtype in PLAIN.items():
        seconds = [s for seed in range(args.plain_trials) for s in plain_epochs(cfg, seed, dtype, device, args)]
        measured.append(f"{results.spread(seconds, '.1f')} s each in {name}")
        epoch = statistics.median(seconds)
        first = duration(epoch * cfg.epochs * to_target) if to_target else "-"
        for scaled, count in (("scaled", whole), ("scaled to as many epochs", pruned)):
            row = f"plain pipeline, channels_last, {name}, {scaled}"
            times[row] = [epoch * count] * args.turns
            columns_of[row] = ["-", str(count), "-", first]

    note = f"{args.trials} trials, {' '.join(args.overrides) or 'the default config'}, medians of {args.turns} turns. "
    note += f"Plain pipeline, {WORKERS} DataLoader workers: {args.plain_trials} x {args.plain_epochs} epochs measured, "
    note += f"{' and '.join(measured)}, with validation; scaled to {cfg.epochs} epochs x {args.trials} trials, and to "
    note += f"the {pruned} epochs that tuner's search trained, as it prunes."
    header = ["time", "s of it: the last run", "epochs", "best validation accuracy", f"first at {args.target}"]
    rows = [["search", *header, f"times {CACHED}"]]
    for name, t in times.items():
        rows.append([name, duration(statistics.median(t)), *columns_of[name][:4], results.ratio(t, times[CACHED])])
    results.write(f"search of {args.trials} trials", device, rows, note)


def searches(cfg: DictConfig, args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """Run each search in turns: (seconds of each turn, search_columns() of the last turn)."""
    common = [f"hydra.sweeper.n_trials={args.trials}", *args.overrides]
    ours = ["-m", "tuner.train", "-m", "hparams_search=optuna", *common]
    theirs = ["upstream.py", "-m", *same_search(cfg.hydra), "hydra/launcher=basic", *common]
    times: dict[str, list[float]] = defaultdict(list)
    columns_of: dict[str, list[Any]] = {}
    for _ in range(args.turns):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            (folder / "upstream.py").write_text(UPSTREAM)
            (folder / "multirun").mkdir()
            for i, (name, words) in enumerate({NOTHING_CACHED: ours, CACHED: ours, UPSTREAM_CACHED: theirs}.items()):
                print(name, file=sys.stderr)
                start = datetime.now()
                command([*words, f"study=study{i}"], folder, TUNER_CACHE=str(folder / "cache"))
                times[name].append((datetime.now() - start).total_seconds())
                columns_of[name] = search_columns(folder / "multirun" / f"study{i}", args.target, start)
    return times, columns_of


PLACES = {  # part of a search's time -> its functions; the innermost one on the stack decides
    "the last run, which retrains the best": ("_launch (tuner/sweep/retraining",),
    "training: steps": ("_step (", "_train (", "fit ("),
    "training: validation": ("predict (",),
    "training: each epoch's row, report and pruning": ("on_epoch (",),
    "images, network, features": ("prepare (", "parts (", "features (", "inputs ("),
    "scores, tables, model file": ("write_report (", "result_scores (", "score (", "save_model (", "finish ("),
    "Hydra: compose, run_job": ("run_job (", "load_sweep_config ("),
    "study: ask, draw, tell": ("ask (", "_overrides (", "tell ("),
    "imports": ("_load_unlocked (",),
}


def where(args: argparse.Namespace) -> None:
    if not shutil.which("py-spy"):
        sys.exit("where needs the program py-spy: pip install py-spy")
    if args.smallest:
        args.trials, args.overrides = 2, [*SMALLEST, *args.overrides]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "stacks.txt"
        spy = ["py-spy", "record", "--format", "raw", "--rate", "50", "--full-filenames", "--output", str(record), "--"]
        trials = f"hydra.sweeper.n_trials={args.trials}"
        sweep = [sys.executable, "-m", "tuner.train", "-m", "hparams_search=optuna", trials, *args.overrides]
        subprocess.run([*spy, *sweep], cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        samples = [line.rsplit(" ", 1) for line in record.read_text().splitlines()]
    seconds: dict[str, float] = defaultdict(float)
    for stack, count in samples:
        seconds[place(stack.replace(f"{CONF.parent}/", "").split(";"))] += int(count) / 50
    whole = sum(seconds.values())
    rows = [[name, f"{s:.1f}", f"{s / whole:.0%}"] for name, s in sorted(seconds.items(), key=lambda item: -item[1])]
    header = ["", "seconds", "share"]
    results.write("where a search's time goes", torch.device("cpu"), [header, *rows, ["all", f"{whole:.1f}", ""]])


def place(frames: Sequence[str]) -> str:
    """The part of PLACES that a stack belongs to. All stacks of the last run count as that part."""
    last_run = next(iter(PLACES))
    if any(frame.startswith(PLACES[last_run]) for frame in frames):
        return last_run
    names = (name for frame in reversed(frames) for name, starts in PLACES.items() if frame.startswith(starts))
    return next(names, "the rest")


def memory(args: argparse.Namespace) -> None:
    if args.smallest:
        args.trials = [2]
    rows = [["trials", "peak memory", "time"]]
    for trials in args.trials:
        arguments = ["-m", "tuner.train", "-m", "hparams_search=random", "epochs=1", "final.seeds=0", *args.overrides]
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            out = command(["-c", PEAK, *arguments, f"hydra.sweeper.n_trials={trials}"], Path(folder))
        rows.append([str(trials), f"{int(out.splitlines()[-1]) / 1e3:.0f} MB", duration(time.perf_counter() - start)])
        print(" | ".join(rows[-1]), flush=True)
    results.write("memory of a search", torch.device("cpu"), rows, f"hparams_search=random {' '.join(args.overrides)}")


# Runs a command and prints its peak memory in kB.
PEAK = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def same_search(hydra: DictConfig) -> list[str]:
    """Overrides that turn `hydra/sweeper=upstream` into the search of a composed config, without its pruner."""
    sampler = {key: value for key, value in hydra.sweeper.sampler.items() if key[0] != "_" and value is not None}
    same = {key: hydra.sweeper[key] for key in ("direction", "storage", "n_jobs", "max_failure_rate")}
    same |= {f"sampler.{key}": value for key, value in sampler.items()} | {"study_name": "${study}"}
    groups = {"hydra/sweeper": "upstream", "hydra/sweeper/sampler": hydra.runtime.choices["hydra/sweeper/sampler"]}
    values = groups | {f"hydra.sweeper.{key}": value for key, value in same.items()} | dict(hydra.sweeper.params)
    return [f"{key}={value}" for key, value in values.items()]


def search_columns(folder: Path, target: float, start: datetime) -> list[Any]:
    """A sweep's columns, from its folder.

    Seconds of the last run (the best one retrained), epochs trained before it, best value, time to the target, and the
    trial that reached it, counted from 1. The last two are "-" and None if no trial reached it.
    """
    outcome = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    epochs = sum(len(path.read_text().splitlines()) - 1 for path in folder.glob("[0-9]*/metrics.csv"))
    last = read_result(folder / "best")["seconds"] if (folder / "best").exists() else "-"
    study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder.parent}/optuna.db")
    reached = [t for t in study.trials if t.value is not None and t.value >= target and t.state.name == "COMPLETE"]
    of_search = [str(last), str(epochs), f"{outcome['best_value']:.4f}"]
    if not reached:
        return [*of_search, "-", None]
    first = min(reached, key=lambda t: t.datetime_complete)
    return [*of_search, duration((first.datetime_complete - start).total_seconds()), first.number + 1]


class Images(Dataset):
    """A data set as in torchvision: one image at a time, with transforms."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, backbone: Backbone):
        self.images, self.labels = images, labels
        steps = [transforms.ToPILImage(), transforms.Grayscale(3), transforms.Resize(backbone.image_size)]
        steps += [transforms.ToTensor(), transforms.Normalize(backbone.mean, backbone.std)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(self.images[i]), self.labels[i]


def plain_model(cfg: DictConfig, backbone: Backbone, classes: int) -> tuple[nn.Module, nn.Module]:
    """The frozen network, for images preprocessed by the DataLoader, and tuner's head in plain torch."""
    _, *frozen = backbone.frozen_part(torch.float32)
    layers: list[nn.Module] = [nn.LayerNorm(backbone.feature_size, elementwise_affine=False)]
    size = backbone.feature_size
    for width in widths(cfg.model.head.width, cfg.model.head.depth):
        layers += [nn.Linear(size, width), nn.ReLU(), nn.Dropout(cfg.model.head.dropout)]
        size = width
    return nn.Sequential(*frozen), nn.Sequential(*layers, nn.Linear(size, classes))


def plain_loaders(cfg: DictConfig, data: Data, backbone: Backbone, device: torch.device) -> list[DataLoader]:
    """Loaders of the training and the validation images."""
    options = {"num_workers": WORKERS, "persistent_workers": True, "pin_memory": device.type == "cuda"}
    return [
        DataLoader(
            Images(data.pool.images[rows], data.pool.labels[rows], backbone), cfg.batch_size, shuffle=shuffle, **options
        )
        for rows, shuffle in ((data.train, True), (data.val, False))
    ]


def plain_epochs(
    cfg: DictConfig, seed: int, dtype: torch.dtype, device: torch.device, args: argparse.Namespace
) -> list[float]:
    """Seconds of each epoch of a trial with validation; cut, head, loss and optimizer are those of tuner.

    dtype: bfloat16 uses autocast, float32 does not.
    """
    torch.manual_seed(seed)
    options = {key: cfg.model[key] for key in ("name", "weights", "image_size", "last_block", "pool")}
    backbone = Backbone(**options, frozen=cfg.model.last_block)
    config = parse(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]))
    data = config.data.target.build()
    frozen, head = (part.to(device) for part in plain_model(cfg, backbone, len(data.classes)))
    frozen = frozen.eval().to(memory_format=torch.channels_last)
    optimizer = config.optimizer.target.build()(head.parameters())
    train, val = plain_loaders(cfg, data, backbone, device)

    def classify(images: torch.Tensor) -> torch.Tensor:
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            with torch.no_grad():
                features = frozen(images)
            return head(features)

    def validate() -> None:
        head.eval()
        hits = torch.zeros((), device=device)
        with torch.no_grad():
            for images, labels in val:
                hits += (classify(images).argmax(1) == labels.to(device, non_blocking=True)).sum()
        wait(device)

    validate()  # warms up the device and the workers
    seconds = []
    for _ in range(args.plain_epochs):
        start = time.perf_counter()
        head.train()
        for images, labels in train:
            optimizer.zero_grad()
            logits, labels = classify(images).float(), labels.to(device, non_blocking=True)
            F.cross_entropy(logits, labels, label_smoothing=cfg.label_smoothing).backward()
            optimizer.step()
        validate()
        seconds.append(time.perf_counter() - start)
    return seconds


def command(arguments: Sequence[str], folder: Path, **environment: str) -> str:
    """Run Python in a folder, with this checkout first on its path. Returns the output; exits if the command fails."""
    paths = [str(CONF.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
