"""What a search costs beyond its training, and a whole search against what people do today. Times are medians of turns.

    python benchmarks/sweep.py overhead [--trials 100] [--turns 3] [--profile]
    python benchmarks/sweep.py where [--trials 30] [OVERRIDE ...]
    python benchmarks/sweep.py memory [--trials 10 100 1000] [--overrides OVERRIDE ...]
    python benchmarks/sweep.py search [--trials 30] [--turns 1] [--plain-trials 1] [--plain-epochs 1] [OVERRIDE ...]

overhead   milliseconds a trial of an objective that does nothing (one float, TPE, one job at a time in the sweep's own
           process), by Optuna alone, by hydra-optuna-sweeper and by tuner. Each measurement is a process in an empty
           folder. The clock runs from the objective's 11th call to its last, so that imports, the sweep's end and the
           10 trials that TPE draws at random are left out.
where      the same search under py-spy (pip install py-spy), features cached: where its time goes.
memory     peak memory of a search of made-up images, one epoch a trial, as its trials grow.
search     the default search, python -m tuner.train -m hparams_search=optuna, from the command to its end: with an
           empty cache; with the features which that left; as the same search under hydra-optuna-sweeper, which neither
           prunes nor retrains the best. And the plain pipeline: a DataLoader with torchvision's transforms, the frozen
           network in the loop, float32. Of that a few epochs are measured, and scaled. `first at`: from the command
           to the end of the first trial that has the target accuracy.
"""

import argparse
import os
import pstats
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

import optuna
import results
import torch
import torch.nn.functional as F
import yaml
from bank import InLoop, wait
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from tuner.backbones import Backbone
from tuner.heads import Classifier, Head, Stack
from tuner.runs import read_result
from tuner.settings import build, choose_device
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
    two.add_argument("--target", type=float, default=0.9, help="a validation accuracy")
    two.add_argument("overrides", nargs="*", help="of the config, for all searches")
    four = commands.add_parser("where")
    four.set_defaults(run=where)
    four.add_argument("--trials", type=int, default=30)
    four.add_argument("overrides", nargs="*")
    three = commands.add_parser("memory")
    three.set_defaults(run=memory)
    three.add_argument("--trials", type=int, nargs="+", default=[10, 100, 1000])
    three.add_argument("--overrides", nargs="*", default=["model=tiny", "data=synthetic"])
    args = parser.parse_args()
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
    rows = [["", *SWEEPERS, "tuner / hydra-optuna-sweeper"]]
    for where, of in times.items():
        ratio = results.ratio(of["tuner"], of["hydra-optuna-sweeper"]) if "hydra-optuna-sweeper" in of else "-"
        rows.append([where, *(results.spread(of[name], ".1f") if name in of else "-" for name in SWEEPERS), ratio])
    note = f"ms a trial, of trials 10 to {args.trials - 1}, median and range of {args.turns} turns"
    results.write("overhead of a trial", torch.device("cpu"), rows, note)


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


def search(args: argparse.Namespace) -> None:
    with initialize_config_dir(str(CONF)):
        cfg = compose("train", ["hparams_search=optuna", *args.overrides], return_hydra_config=True)
    common = [f"hydra.sweeper.n_trials={args.trials}", *args.overrides]
    ours = ["-m", "tuner.train", "-m", "hparams_search=optuna", *common]
    theirs = ["upstream.py", "-m", *same_search(cfg.hydra), "hydra/launcher=basic", *common]
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
                start = datetime.now()
                command([*arguments, f"study=study{i}"], folder, TUNER_CACHE=str(folder / "cache"))
                times[name].append((datetime.now() - start).total_seconds())
                found[name] = what_was_found(folder / "multirun" / f"study{i}", args.target, start)

    print("plain pipeline", file=sys.stderr)
    device = choose_device(cfg.device)
    epochs = [seconds for seed in range(args.plain_trials) for seconds in plain_epochs(cfg, seed, device, args)]
    whole, pruned = cfg.epochs * args.trials, int(found[reference][1])
    to_target = found["hydra-optuna-sweeper, features cached"].pop()
    for name, count in (("plain pipeline, scaled", whole), ("plain pipeline, scaled to as many epochs", pruned)):
        times[name] = [statistics.median(epochs) * count] * args.turns
        found[name] = ["-", str(count), "-", duration(statistics.median(epochs) * cfg.epochs * to_target)]
    for name in times:
        found[name] = [str(value) for value in found[name][:4]]
    note = f"{args.trials} trials, {' '.join(args.overrides) or 'the default config'}, medians of {args.turns} turns. "
    measured = f"{args.plain_trials} x {args.plain_epochs} epochs measured, {results.spread(epochs, '.1f')} s each with"
    note += f"Plain pipeline: {measured} validation; scaled to {cfg.epochs} epochs x {args.trials} trials, and to the "
    note += f"{pruned} epochs that tuner's search trained, as it prunes."
    columns = ["time", "s of it: the last run", "epochs", "best validation accuracy", f"first at {args.target}"]
    rows = [["search", *columns, f"times {reference}"]]
    for name, t in times.items():
        rows.append([name, duration(statistics.median(t)), *found[name], results.ratio(times[name], times[reference])])
    results.write(f"search of {args.trials} trials", device, rows, note)


PLACES = {  # of a search's time -> functions, of which the innermost on the stack decides
    "the last run, which retrains the best": ("retrain (",),
    "training: steps": ("_step (", "_train (", "fit ("),
    "training: validation": ("predict (",),
    "training: each epoch's row, report and pruning": ("on_epoch (",),
    "images, network, features": ("prepare (", "parts (", "features (", "inputs ("),
    "scores, tables, model file": ("report (tuner/scoring", "score (", "save_model (", "finish ("),
    "Hydra: compose, run_job": ("run_job (", "load_sweep_config ("),
    "study: ask, draw, tell": ("ask (", "_overrides (", "tell ("),
    "imports": ("_load_unlocked (",),
}


def where(args: argparse.Namespace) -> None:
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
    """Which of the PLACES a stack is at; the last run's are all one."""
    of_last = next(iter(PLACES))
    if any(frame.startswith(PLACES[of_last]) for frame in frames):
        return of_last
    names = (name for frame in reversed(frames) for name, starts in PLACES.items() if frame.startswith(starts))
    return next(names, "the rest")


def memory(args: argparse.Namespace) -> None:
    rows = [["trials", "peak memory", "time"]]
    for trials in args.trials:
        arguments = ["-m", "tuner.train", "-m", "hparams_search=random", "epochs=1", "final.seeds=0", *args.overrides]
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            out = command(["-c", PEAK, *arguments, f"hydra.sweeper.n_trials={trials}"], Path(folder))
        rows.append([str(trials), f"{int(out.splitlines()[-1]) / 1e3:.0f} MB", duration(time.perf_counter() - start)])
        print(" | ".join(rows[-1]), flush=True)
    results.write("memory of a search", torch.device("cpu"), rows, f"hparams_search=random {' '.join(args.overrides)}")


# Runs a command, and prints the most kB that it had.
PEAK = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def same_search(hydra: DictConfig) -> list[str]:
    """The overrides that make of `hydra/sweeper=upstream` the search in a composed config, without its pruner."""
    sampler = {key: value for key, value in hydra.sweeper.sampler.items() if key[0] != "_" and value is not None}
    same = {key: hydra.sweeper[key] for key in ("direction", "storage", "n_jobs", "max_failure_rate")}
    same |= {f"sampler.{key}": value for key, value in sampler.items()} | {"study_name": "${study}"}
    groups = {"hydra/sweeper": "upstream", "hydra/sweeper/sampler": hydra.runtime.choices["hydra/sweeper/sampler"]}
    values = groups | {f"hydra.sweeper.{key}": value for key, value in same.items()} | dict(hydra.sweeper.params)
    return [f"{key}={value}" for key, value in values.items()]


def what_was_found(folder: Path, target: float, start: datetime) -> list[Any]:
    """Of a sweep's folder: seconds of the last run (the best retrained), epochs trained before it, best value, when the
    target was reached, and in which trial, counted from 1."""
    found = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    epochs = sum(len(path.read_text().splitlines()) - 1 for path in folder.glob("[0-9]*/metrics.csv"))
    last = read_result(folder / "best")["seconds"] if (folder / "best").exists() else "-"
    study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder.parent}/optuna.db")
    reached = [t for t in study.trials if t.value is not None and t.value >= target and t.state.name == "COMPLETE"]
    first = min(reached, key=lambda t: t.datetime_complete)
    when = duration((first.datetime_complete - start).total_seconds())
    return [str(last), str(epochs), f"{found['best_value']:.4f}", when, first.number + 1]


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


if __name__ == "__main__":
    main()
