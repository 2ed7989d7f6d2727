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


def replays(options: argparse.Namespace) -> None:
    store = storage.connect(storage.absolute(options.storage))
    trials = optuna.load_study(study_name=options.study, storage=store).get_trials(states=(TrialState.COMPLETE,))
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


def live(options: argparse.Namespace) -> None:
    """Whole searches on made-up images, one a seed: what is pruned does not depend on the launcher."""
    table("launcher | pruner | pruned, by seed | epochs saved, by seed | best value, by seed")
    for launcher, pruner in [("basic", p) for p in ("none", "median", "hyperband")] + [
        (name, "median") for name in ("joblib", "submitit_local", "ray")
    ]:
        found = [searched(launcher, pruner, seed, options.trials) for seed in range(options.seeds)]
        pruned, saved, best = (", ".join(column) for column in zip(*found, strict=True))
        print(f"| {launcher} | {pruner} | {pruned} | {saved} | {best} |", flush=True)


def searched(launcher: str, pruner: str, seed: int, n_trials: int) -> tuple[str, str, str]:
    epochs = 20
    arguments = ["data=synthetic", "data.noise=200", "data.n=2000", "model=tiny", f"epochs={epochs}", f"seed={seed}"]
    arguments += [f"hydra/launcher={launcher}", f"hydra/sweeper/pruner={pruner}", "hydra.sweeper.n_jobs=2"]
    arguments += [f"hydra.sweeper.n_trials={n_trials}", "final.seeds=0", "study=s"]
    search = "optuna" if pruner == "median" else "random"  # as the figures in README.md were taken
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tuner.train", "-m", f"hparams_search={search}", *arguments]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        store = storage.connect(f"sqlite:///{folder}/multirun/optuna.db")
        study = optuna.load_study(study_name="s", storage=store)
        pruned = sum(trial.state == TrialState.PRUNED for trial in study.trials)
        trained = sum(trial.user_attrs["epochs"] for trial in study.trials)
        return str(pruned), f"{1 - trained / epochs / n_trials:.0%}", f"{study.best_value:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", help="of curves to replay; without it, whole searches by launcher")
    parser.add_argument("--storage", default="sqlite:///multirun/optuna.db")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--trials", type=int, default=30, help="in each draw or search")
    parser.add_argument("--seeds", type=int, default=2, help="of whole searches")
    options = parser.parse_args()
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (replays if options.study else live)(options)


if __name__ == "__main__":
    main()
