"""Which pruner loses nothing: the curves of trials that were not pruned, run again under each pruner.

    python -m tuner.train -m hparams_search=random hydra.sweeper.n_trials=64 study=curves final.seeds=0
    python benchmarks/pruning.py curves

Each draw is 30 of the study's complete trials in random order, told to a new study epoch by epoch. Figures are means
over the draws: trials pruned, the share of epochs that was not trained, and the value of the best trial that is left,
against the best of the same 30 trials (regret, and how often the best one was pruned).
"""

import argparse
import random
import statistics
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--storage", default="sqlite:///multirun/optuna.db")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--trials", type=int, default=30, help="in each draw")
    options = parser.parse_args()
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    store = storage.connect(storage.absolute(options.storage))
    trials = optuna.load_study(study_name=options.study, storage=store).get_trials(states=(TrialState.COMPLETE,))
    print(f"{len(trials)} curves of study {options.study}, {options.draws} draws of {options.trials}\n")
    print("| pruner | pruned | epochs saved | best left | regret | best lost |")
    print("|---|---|---|---|---|---|")
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


if __name__ == "__main__":
    main()
