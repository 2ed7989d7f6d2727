"""Which recipe is best on small image sets, and how far model=auto is from it.

    python benchmarks/recipes.py [--seeds 3] [--sets digits letters ...]

The sets are those of small_sets.py, half of each for testing. All backbones are frozen. The baselines see the pixels
at 32 x 32, are trained on the same rows, and their regularisation is chosen on the same validation split.

A seed draws the validation split and the weights. The test images are the same for all seeds and recipes, so the spread
over seeds is not the uncertainty of an accuracy: a comparison of two recipes has a standard error over the test images.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import results
import small_sets
from hydra import compose, initialize_config_dir
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC

from tuner.config import CONF, RunConfig, parse
from tuner.device import choose_device
from tuner.runs.result import read_result
from tuner.runs.run import Run
from tuner.stages import train
from tuner.training.model_choice import from_json

RECIPES = {
    "default: vgg16, block3, 64 px": [],
    "vgg16, block5 averaged, 128 px": ["model.image_size=128", "model.last_block=block5", "model.pool=1"],
    "vgg16, block3 and block4, 64 px": ["model.last_block=[block3,block4]"],
    "efficientnet_lite0, 128 px": ["model=efficientnet_lite0"],
    "efficientnet_lite0, 224 px": ["model=efficientnet_lite0", "model.image_size=224"],
    "default, linear head": ["model.head.depth=0"],
    "default, augment=light, 4 views": ["augment=light", "data.views=4"],
    "auto": ["model=auto"],
}
AUTO = "auto"  # has a cache of its own, so its seconds include every bank that it tries
SMALLEST = {"tiny": ["model=tiny", "epochs=2"], "tiny, linear head": ["model=tiny", "epochs=2", "model.head.depth=0"]}

Classifier = LogisticRegression | SVC
BASELINES: dict[str, Sequence[Callable[[], Classifier]]] = {  # -> the strengths of regularisation to choose from
    "scikit-learn: logistic regression on pixels": [
        lambda c=c: LogisticRegression(C=c, max_iter=2000) for c in (1e-4, 1e-3, 1e-2, 1e-1, 1)
    ],
    "scikit-learn: SVM with RBF kernel on pixels": [lambda c=c: SVC(C=c) for c in (0.3, 1, 3, 10, 30)],
}


@dataclass
class Outcome:
    """A recipe on a set.

    correct: whether each test image was classified correctly, by seed: bool [seeds, N].
    results: result.json of each seed's run; of a baseline only its `seconds`.
    """

    correct: np.ndarray
    results: list[dict[str, Any]]

    @property
    def accuracy(self) -> float:
        """Mean over seeds."""
        return float(self.correct.mean())

    @property
    def cell(self) -> str:
        """Accuracy, and its standard deviation over seeds."""
        accuracies = self.correct.mean(1).tolist()
        spread = f" ({statistics.stdev(accuracies):.3f})" if len(accuracies) > 1 else ""
        return f"{self.accuracy:.3f}{spread}"


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", choices=small_sets.SETS, default=list(small_sets.SETS), metavar="SET")
    return parser


def main() -> None:
    args = arguments().parse_args()
    recipes = RECIPES
    if args.smallest:
        recipes, args.seeds, args.sets = SMALLEST, 2, ["digits"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    outcomes: dict[str, dict[str, Outcome]] = {}  # set -> recipe -> outcome
    sizes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.sets:
            data = ["data=image_folder", f"data.root={small_sets.write(name, Path(folder))}"]
            sizes[name] = size(parsed([*data, "model=tiny", f"cache_dir={folder}/cache"]))
            outcomes[name] = {}
            for recipe, overrides in recipes.items():
                cache = f"cache_dir={folder}/{'auto' if recipe == AUTO else 'cache'}"
                outcomes[name][recipe] = runs([*overrides, *data, cache], args.seeds)
                print(f"{name}, {recipe}: {outcomes[name][recipe].cell}", flush=True)
            for baseline, candidates in BASELINES.items():
                overrides = [*data, "model=tiny", f"cache_dir={folder}/cache"]
                outcomes[name][baseline] = fits(candidates, overrides, args.seeds)
                print(f"{name}, {baseline}: {outcomes[name][baseline].cell}", flush=True)
    device = choose_device(parsed([]).device)
    note = (
        f"Test accuracy, mean of {args.seeds} seeds (standard deviation over seeds); seconds: of the first seed, all "
    )
    note += "sets together. The linear head finds the features of the default in the cache."
    results.write("recipes on small sets", device, table(outcomes), note)
    note = "Behind by: difference of accuracies (standard error, paired over the test images). The best recipe was "
    note += "chosen on these test images, so its accuracy is a little optimistic."
    results.write("recipes on small sets, the best in hindsight", device, distances(outcomes, sizes), note)
    if AUTO in recipes:
        note = "With each seed, which draws the sample: what was chosen, and the seconds that the choice took."
        results.write("recipes on small sets, what auto chose", device, choices(outcomes), note)


def parsed(overrides: list[str]) -> RunConfig:
    with initialize_config_dir(str(CONF)):
        return parse(compose("train", [*overrides, "plots=false"]))


def size(config: RunConfig) -> str:
    data = config.data.target.build()
    return f"{len(data.pool)} + {len(data.test)}, {len(data.classes)} classes"


def runs(overrides: list[str], seeds: int) -> Outcome:
    """A run of tuner with each seed."""
    correct, run_results = [], []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            train(parsed([*overrides, f"seed={seed}"]), Run(Path(folder)))
            predictions = pd.read_csv(Path(folder) / "predictions.csv", dtype=str).query("split == 'test'")
            run_results.append(read_result(Path(folder)))
        correct.append((predictions.label == predictions.predicted).to_numpy())
    return Outcome(np.stack(correct), run_results)


def fits(candidates: Sequence[Callable[[], Classifier]], overrides: list[str], seeds: int) -> Outcome:
    """A classifier on pixels in 0..1 with each seed: that of the candidates with the best validation accuracy."""
    correct, times = [], []
    for seed in range(seeds):
        data = parsed([*overrides, f"seed={seed}"]).data.target.build()
        start = time.perf_counter()
        pixels, test = (samples.images.flatten(1).numpy() / 255 for samples in (data.pool, data.test))
        labels, train_rows, val_rows = data.pool.labels.numpy(), data.train.numpy(), data.val.numpy()
        fitted = [candidate().fit(pixels[train_rows], labels[train_rows]) for candidate in candidates]
        best = max(fitted, key=lambda classifier: classifier.score(pixels[val_rows], labels[val_rows]))
        correct.append(best.predict(test) == data.test.labels.numpy())
        times.append({"seconds": time.perf_counter() - start})
    return Outcome(np.stack(correct), times)


def table(outcomes: Mapping[str, Mapping[str, Outcome]]) -> list[list[str]]:
    """A row for each recipe and baseline, a column for each set."""
    rows = [["recipe", *outcomes, "mean", "seconds"]]
    for recipe in next(iter(outcomes.values())):
        by_set = [of_set[recipe] for of_set in outcomes.values()]
        mean = statistics.mean(outcome.accuracy for outcome in by_set)
        seconds = sum(outcome.results[0]["seconds"] for outcome in by_set)
        rows.append([recipe, *(outcome.cell for outcome in by_set), f"{mean:.3f}", f"{seconds:.0f}"])
    return rows


def distances(outcomes: Mapping[str, Mapping[str, Outcome]], sizes: Mapping[str, str]) -> list[list[str]]:
    """A row for each set: its best recipe, and how far the default and auto are behind it."""
    recipes = [recipe for recipe in next(iter(outcomes.values())) if recipe not in BASELINES]
    judged = [recipes[0], *([AUTO] if AUTO in recipes else [])]
    rows = [["set", "images, training + test", "best recipe in hindsight", "accuracy", "best baseline"]]
    rows[0] += [f"{recipe.partition(':')[0]} is behind by" for recipe in judged]
    rows[0] += [f"{AUTO}, s" for recipe in judged if recipe == AUTO]
    for name, of_set in outcomes.items():
        best = max((recipe for recipe in recipes if recipe != AUTO), key=lambda recipe: of_set[recipe].accuracy)
        best_baseline = max(of_set[baseline].accuracy for baseline in BASELINES)
        row = [name, sizes[name], best, f"{of_set[best].accuracy:.3f}", f"{best_baseline:.3f}"]
        row += [behind(of_set[best], of_set[recipe]) for recipe in judged]
        row += [f"{of_set[recipe].results[0]['seconds']:.0f}" for recipe in judged if recipe == AUTO]
        rows.append(row)
    return rows


def choices(outcomes: Mapping[str, Mapping[str, Outcome]]) -> list[list[str]]:
    """A row for each set: what auto chose with each seed."""
    rows = []
    for name, of_set in outcomes.items():
        chosen = [from_json(result["model_choice"]) for result in of_set[AUTO].results]
        rows.append([name, *(f"{choice.chosen.name} ({choice.seconds:.0f} s)" for choice in chosen)])
    return [["set", *(f"seed {seed}" for seed in range(len(rows[0]) - 1))], *rows]


def behind(best: Outcome, other: Outcome) -> str:
    """The difference of two accuracies, and its standard error over the test images, each averaged over seeds."""
    differences = best.correct.mean(0) - other.correct.mean(0)
    return f"{differences.mean():.3f} ({differences.std(ddof=1) / len(differences) ** 0.5:.3f})"


if __name__ == "__main__":
    main()
