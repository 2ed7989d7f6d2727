"""Which pruner loses nothing: the curves of trials that were not pruned, run again under each pruner.

    python -m tuner.train -m hparams_search=random hydra.sweeper.n_trials=64 study=curves final.seeds=0
    python benchmarks/pruning.py curves
    python benchmarks/pruning.py                   # instead: whole searches, by pruner and launcher

Each draw is 30 of the study's complete trials in random order, told to a new study epoch by epoch. Figures are means
over the draws: trials pruned, the share of epochs that was not trained, and the value of the best trial that is left,
against the best of the same 30 trials (regret, and how often the best one was pruned).
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import warnings

import optuna
import results
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PatientPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
    WilcoxonPruner,
)
from optuna.trial import FrozenTrial, TrialState

from tuner.sweep import storage


def pruners() -> dict[str, BasePruner]:
    table: dict[str, BasePruner] = {"none": NopPruner()}
    for warmup in (0, 4, 8, 12):
        table[f"median, warm-up {warmup}"] = MedianPruner(n_startup_trials=5, n_warmup_steps=warmup)
    for percentile in (25.0, 75.0):
        table[f"percentile {percentile:.0f}, warm-up 8"] = PercentilePruner(percentile, 5, 8)
    return table | {
        "patient 3 (median, warm-up 4)": PatientPruner(MedianPruner(5, 4), patience=3),
        "successive halving, from epoch 3": SuccessiveHalvingPruner(min_resource=3),
        "hyperband, from epoch 3": HyperbandPruner(min_resource=3, max_resource=25),
        "wilcoxon": WilcoxonPruner(),
    }


def replay(trials: list[FrozenTrial], pruner: BasePruner) -> tuple[int, float, float]:
    """Trials pruned, the share of the epochs saved, the best value that is left."""
    study = optuna.create_study(direction="maximize", pruner=pruner, sampler=optuna.samplers.RandomSampler(0))
    pruned, trained, best = 0, 0, 0.0
    for known in trials:
        trial = study.ask()
        for epoch, value in sorted(known.intermediate_values.items()):
            trained += 1
            trial.report(value, epoch)
            if trial.should_prune():
                pruned += 1
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, known.value)
            best = max(best, known.value or 0.0)
    return pruned, 1 - trained / sum(len(known.intermediate_values) for known in trials), best


def table(header: str) -> None:
    print(f"\n| {header} |\n|{'---|' * (header.count('|') + 1)}")


def curves(options: argparse.Namespace) -> list[FrozenTrial]:
    store = storage.connect(storage.resolve(options.storage))
    return optuna.load_study(study_name=options.study, storage=store).get_trials(states=(TrialState.COMPLETE,))


def small_curves() -> list[FrozenTrial]:
    """Those of a search of synthetic images, run now: --smallest needs no study."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["data=synthetic", "model=tiny", "epochs=4", "hydra.sweeper.n_trials=4", "final.seeds=0", "study=s"]
        return run_search(folder, "random", overrides).get_trials(states=(TrialState.COMPLETE,))


def replays(options: argparse.Namespace) -> None:
    trials = small_curves() if options.smallest else curves(options)
    print(f"{len(trials)} curves of study {options.study}, {options.draws} draws of {options.trials}")
    table("pruner | pruned | epochs saved | best left | regret | best lost")
    for name, pruner in pruners().items():
        random.seed(0)
        rows = []
        for _ in range(options.draws):
            drawn = random.sample(trials, options.trials)
            pruned, saved, best = replay(drawn, pruner)
            rows.append((pruned, saved, best, max(t.value for t in drawn) - best))
        pruned, saved, best, regret = (statistics.mean(column) for column in zip(*rows, strict=True))
        lost = sum(row[3] > 0 for row in rows) / len(rows)
        print(f"| {name} | {pruned:.1f} | {saved:.0%} | {best:.4f} | {regret:.4f} | {lost:.0%} |", flush=True)


SEARCHES = [("basic", pruner) for pruner in ("none", "median", "hyperband")]  # launcher, pruner
SEARCHES += [(launcher, "median") for launcher in ("joblib", "submitit_local", "ray")]


def live(options: argparse.Namespace) -> None:
    """Whole searches on made-up images, one a seed: what is pruned does not depend on the launcher."""
    table("launcher | pruner | pruned, by seed | epochs saved, by seed | best value, by seed")
    for launcher, pruner in SEARCHES[:2] if options.smallest else SEARCHES:
        found = [searched(launcher, pruner, seed, options) for seed in range(options.seeds)]
        pruned, saved, best = (", ".join(column) for column in zip(*found, strict=True))
        print(f"| {launcher} | {pruner} | {pruned} | {saved} | {best} |", flush=True)


def searched(launcher: str, pruner: str, seed: int, options: argparse.Namespace) -> tuple[str, str, str]:
    """Trials pruned, share of epochs saved, best value."""
    overrides = ["data=synthetic", "data.noise=200", f"data.n={options.images}", "model=tiny", f"seed={seed}"]
    overrides += [f"hydra/launcher={launcher}", f"hydra/sweeper/pruner={pruner}", "hydra.sweeper.n_jobs=2"]
    overrides += [f"epochs={options.epochs}", "final.seeds=0", "study=s"]
    overrides += [f"hydra.sweeper.n_trials={options.trials}"]
    search = "optuna" if pruner == "median" else "random"  # as the figures in README.md were taken
    with tempfile.TemporaryDirectory() as folder:
        study = run_search(folder, search, overrides)
        pruned = sum(trial.state == TrialState.PRUNED for trial in study.trials)
        trained = sum(trial.user_attrs["epochs"] for trial in study.trials)
        saved = 1 - trained / options.epochs / options.trials
        return str(pruned), f"{saved:.0%}", f"{study.best_value:.4f}"


def run_search(folder: str, search: str, overrides: list[str]) -> optuna.Study:
    """A search with study=s, started in a folder."""
    command = [sys.executable, "-m", "tuner.train", "-m", f"hparams_search={search}", *overrides]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    store = storage.connect(f"sqlite:///{folder}/multirun/optuna.db")
    return optuna.load_study(study_name="s", storage=store)


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    parser.add_argument("study", nargs="?", help="of curves to replay; without it, whole searches by launcher")
    parser.add_argument("--storage", default="sqlite:///multirun/optuna.db")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--trials", type=int, default=30, help="in each draw or search")
    parser.add_argument("--seeds", type=int, default=2, help="of whole searches")
    parser.add_argument("--epochs", type=int, default=20, help="of each trial of those")
    parser.add_argument("--images", type=int, default=2000, help="of those")
    return parser


def main() -> None:
    options = arguments().parse_args()
    if options.smallest:
        options.trials, options.draws, options.seeds, options.epochs, options.images = 3, 2, 1, 2, 100
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (replays if options.study else live)(options)


if __name__ == "__main__":
    main()
