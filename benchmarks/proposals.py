"""Whether a search finds more if its trials are drawn one after another, and learn from each other.

    python benchmarks/proposals.py [--seeds 8] [--trials 30] [OVERRIDE ...]

The trials of a stack are drawn together: none learns from the others. `one at a time` is the other extreme, and shows
how much could be gained at most by giving the place of a trial that ends to a new one at once. Each search is the
default one, on synthetic images that depend on the seed, in this process: the seconds are without imports.

`best after n` is the best value of the first n trials that were started; `against rounds` the difference after the last
one, with its standard error, paired by seed. Means over the seeds; seconds are medians of whole searches.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import optuna
import results
import torch

from tuner import train
from tuner.sweep import storage

ROUNDS = "rounds of a fifth (auto)"
VARIANTS = {  # proposals -> overrides; {n}: the number of trials
    ROUNDS: ["hydra.launcher.stack=auto"],
    "one at a time": ["hydra.launcher.stack=1"],
    "all at once": ["hydra.launcher.stack={n}"],
    "rounds, without constant liar": ["hydra.sweeper.sampler.constant_liar=false"],
    "rounds, Gaussian process": ["hydra/sweeper/sampler=gp"],
    "rounds, at random": ["hydra/sweeper/sampler=random"],
}


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    return parser


def search(folder: Path, overrides: list[str]) -> tuple[list[float], float]:
    """The best value after each trial in the order of their starts, and the seconds that the search took."""
    sys.argv = ["tuner.train", "-m", "hparams_search=optuna", "study=s", "final.seeds=0", *overrides]
    start = time.perf_counter()
    with contextlib.chdir(folder), Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        train.main()
    seconds = time.perf_counter() - start
    store = storage.connect(f"sqlite:///{folder}/multirun/optuna.db")
    best, curve = 0.0, []
    for trial in optuna.load_study(study_name="s", storage=store).get_trials(deepcopy=False):
        best = max(best, trial.value if trial.state == optuna.trial.TrialState.COMPLETE else 0.0)
        curve.append(best)
    return curve, seconds


def main() -> None:
    options, command = arguments().parse_args(), sys.argv
    size = [
        "data=synthetic",
        "data.noise=200",
        "data.n=2000",
        "model=tiny",
        "epochs=6",
        "plots=false",
        *options.overrides,
    ]
    if options.smallest:
        options.seeds, options.trials = 1, 3
        size = ["data=synthetic", "model=tiny", "epochs=2", "batch_size=32"]
    places = sorted({max(1, options.trials // 3), max(1, 2 * options.trials // 3), options.trials})
    found: dict[str, list[tuple[list[float], float]]] = {name: [] for name in VARIANTS}
    for seed in range(options.seeds):  # in turns
        for name, overrides in VARIANTS.items():
            own = [override.format(n=options.trials) for override in overrides]
            own += [f"seed={seed}", f"hydra.sweeper.sampler.seed={seed}", f"hydra.sweeper.n_trials={options.trials}"]
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(search(Path(folder), [*size, *own]))
            curve, seconds = found[name][-1]
            print(f"seed {seed}, {name}: {curve[-1]:.4f}, {seconds:.0f} s", flush=True)
    sys.argv = command  # which is written beside the table
    rows = [["proposals", *(f"best after {n}" for n in places), "against rounds", "search, s"]]
    for name, searches in found.items():
        bests = [statistics.fmean(curve[n - 1] for curve, _ in searches) for n in places]
        pairs = zip(searches, found[ROUNDS], strict=True)
        differences = [ours[0][-1] - theirs[0][-1] for ours, theirs in pairs]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
        against = "" if name == ROUNDS else f"{statistics.fmean(differences):+.4f} ({error:.4f})"
        seconds = statistics.median(time for _, time in searches)
        rows.append([name, *(f"{best:.4f}" for best in bests), against, f"{seconds:.0f}"])
    note = f"{options.seeds} seeds of {options.trials} trials; `{' '.join(size)}`."
    results.write("proposals of a search", torch.device("cpu"), rows, note)


if __name__ == "__main__":
    main()
