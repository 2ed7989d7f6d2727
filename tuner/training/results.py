"""The results of a run: the saved weights are scored, and the model, tables, plots and result.json are written."""

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from tuner import plots
from tuner.bank import baselines as simple
from tuner.bank.copies import copies
from tuner.bank.neighbours import projected
from tuner.config import RunConfig
from tuner.data import Data, summary
from tuner.data.files.pixels import RANGE
from tuner.device import repeatable
from tuner.runs import baselines, calibration, ensemble, readings
from tuner.runs.predictions import Predictions, result_scores
from tuner.runs.report import write_report
from tuner.runs.result import accuracy_interval, on_images
from tuner.runs.run import Run
from tuner.training.fit import validation_columns
from tuner.training.folds import Fold, folds_of, means, standard_error
from tuner.training.merging import merged_fit
from tuner.training.model_choice import Choice
from tuner.training.setup import Setup
from tuner.training.spec import Fitted, Spec
from tuner.training.together import TrainedHead, trained_head

log = logging.getLogger("tuner.train")
SEARCHED = 700  # validation and test images for which a run looks for near copies: about a second of CPU time
AMONG = 15_000  # training and validation images


@dataclass
class _Scores:
    """accuracies: of the first head, by split.   predictions: of the first head, for validation and test.

    tests: test accuracies of all heads; empty if the test split is not read.
    over_folds: the objective's value for each fold of a cross-validation, and their standard error, for result.json.
    """

    temperature: float
    accuracies: dict[str, float] = field(default_factory=dict)
    predictions: list[Predictions] = field(default_factory=list)
    tests: list[float] = field(default_factory=list)
    over_folds: dict[str, Any] = field(default_factory=dict)


def write_results(
    config: RunConfig,
    run: Run,
    setup: Setup,
    specs: Sequence[Spec],
    fitted: Sequence[Fitted],
    *,
    in_sweep: bool,
    folds: Sequence[Fold] = (),
) -> dict[str, Any]:
    """Write the results of a run, result.json last. Returns the scores in it.

    specs, fitted: one, or one for each of `folds`; where a search's best trial is retrained, one for each seed. The
        curve, the tables and the plots are those of the first, or of all folds.
    A cross-validated run keeps the mean of its heads' logits as its model; inside a sweep it has one only to be tested.
    Raises what ended the training of a head.
    """
    keeps_model = not folds or not in_sweep or is_on(config.test, in_sweep)
    if folds:
        scores, specs, fitted = _score_folds(setup, specs, fitted, folds, merge=keeps_model)
    else:
        scores = _score_training_images(config, setup, specs[0], fitted[0])
    first, retrains = fitted[0], config.final.epochs is not None
    for spec, result in zip(specs, fitted, strict=True):
        result.raise_error()
        name = "model.safetensors" if spec is specs[0] else f"model-{spec.seed}.safetensors"
        if keeps_model:
            run.save_model(result.state, _model_metadata(setup, scores.temperature), name)
    read = None
    if retrains or is_on(config.test, in_sweep):  # the test split is read here, once, or not at all
        read = _record_reading(run)
        heads = [trained_head(setup, *pair) for pair in zip(specs, fitted, strict=True)]
        _score_test_images(run, setup, heads, scores)

    if in_sweep and not retrains:  # what an ensemble is chosen by
        [val] = (part for part in scores.predictions if part.split == "validation")
        ensemble.write(run.folder, val.log_p, val.labels)
    draw = is_on(config.plots, in_sweep and not retrains)
    write_report(run, scores.predictions, setup.data.classes, scores.accuracies, first.saved_epoch, draw=draw)
    outcome: dict[str, Any] = result_scores(scores.predictions)
    outcome |= {"val_accuracy": None, "val_loss": None}
    outcome |= {name: value for name, value in first.metrics.items() if name.startswith("val_")}  # as searches see them
    outcome |= {"train_accuracy": scores.accuracies["train"], **scores.over_folds}
    outcome |= {"test_accuracy": statistics.mean(scores.tests) if scores.tests else None}
    if retrains:
        spread = statistics.stdev(scores.tests) if len(scores.tests) > 1 else 0.0  # an ensemble is one model
        outcome |= {"test_accuracy_std": spread, "test_accuracies": scores.tests}
    outcome |= {"test_readings": asdict(read) if read else None}
    for split, n in (("val", run.result["n_val"]), ("test", len(setup.data.test))):
        accuracy = outcome[f"{split}_accuracy"]
        outcome |= {f"{split}_accuracy_interval": None if accuracy is None else accuracy_interval(accuracy, n)}
    outcome |= {"temperature": scores.temperature, "epochs": first.epochs, "saved_epoch": first.saved_epoch}
    if retrains or not in_sweep:
        outcome |= {"baselines": _baselines(setup, config)}
    if not (in_sweep or retrains):
        outcome |= {"near_copies": _near_copies(setup, tested=bool(scores.tests))}
    run.finish("complete", **outcome, reported_split=scores.predictions[-1].split)
    _log_summary(run, setup.data, outcome)
    return outcome


def draw_data(run: Run, setup: Setup) -> None:
    """plots/data.png: training images as the network gets them, and augmented if they are."""
    data, changes = setup.data, setup.augment.changes_images
    h, w = data.pool.images.shape[2:]
    rows = summary.examples(data, summary.NAMES, 4 if changes else 8)
    labels = [data.classes[i] for i in data.pool.labels[rows]]
    images, marks = setup.fed(rows, augmented=False), [""] * len(rows)
    if changes:
        images = torch.cat([images, setup.fed(rows, augmented=True)])
        labels, marks = labels * 2, marks + ["augmented"] * len(rows)
    size, shown, known = setup.backbone.image_size, len(set(labels)), len(data.classes)
    title = f"What the network is given: {size} x {size} pixels"
    note = f"Training images of {'all' if shown == known else f'{shown} of'} {known} classes."
    if (h, w) != (size, size):
        note += f" The data set has them in {h} x {w} pixels (data.fit: {data.fit})."
    note += " Mixup and cutmix are not shown." * setup.augment.mixes
    run.save_plot("data", plots.images(images.permute(0, 2, 3, 1), labels, marks, title, note))  # [N, H, W, C]


def draw_choice(run: Run, choice: Choice) -> None:
    """plots/model.png: what model=auto chose from."""
    rows = [vars(candidate) | {"name": candidate.name} for candidate in choice.candidates]
    run.save_plot("model", plots.model_choice(rows, choice.images))


def features(run: Run, setup: Setup, name: str) -> torch.Tensor:
    """`x` or `x_test` of the setup. The time to compute or read features is added to the run's result."""
    start = time.perf_counter()
    inputs: torch.Tensor = getattr(setup, name)
    if setup.backbone.frozen is not None:
        seconds = run.result.get("seconds_features", 0) + time.perf_counter() - start
        run.result["seconds_features"] = round(seconds, 2)
    return inputs


def is_on(choice: bool | str, in_sweep: bool) -> bool:
    """Whether `test` or `plots` is on: auto means in a single run, not inside a sweep."""
    return not in_sweep if choice == "auto" else bool(choice)


def _record_reading(run: Run) -> readings.Readings | None:
    result = run.result
    return readings.record(result["split_hashes"]["test"], run.folder, result["study"], result["storage"])


def _score_training_images(config: RunConfig, setup: Setup, spec: Spec, fitted: Fitted) -> _Scores:
    """Score the training and the validation split. The temperature is fitted on the latter, or given by the config."""
    head = trained_head(setup, spec, fitted)
    x, labels = setup.x, setup.data.pool.labels
    scores = _Scores(config.final.temperature or 1.0)
    _, scores.accuracies["train"] = head.score(x, labels, spec.train)
    if spec.val is not None:
        log_p, _ = head.score(x, labels, spec.val)
        scores.accuracies["validation"] = fitted.metrics["val_accuracy"]
        scores.temperature = calibration.temperature(log_p, labels[spec.val])
        scores.predictions.append(Predictions("validation", setup.data.pool, spec.val, log_p, scores.temperature))
    return scores


def _score_folds(
    setup: Setup, specs: Sequence[Spec], fitted: Sequence[Fitted], folds: Sequence[Fold], *, merge: bool
) -> tuple[_Scores, list[Spec], list[Fitted]]:
    """Score each image by the head that was not trained on it. The temperature is fitted on these predictions.

    Also returns a head with the means over the folds as its metrics: with `merge` the mean of the heads' logits, else
    the first.
    """
    x, labels = setup.x, setup.data.pool.labels
    log_p = torch.zeros(len(labels), len(setup.data.classes))
    trained, metrics = [], []
    for spec, result, fold in zip(specs, fitted, folds, strict=True):
        head = trained_head(setup, spec, result)
        trained.append(head.score(x, labels, spec.train)[1])
        log_p[fold.images], _ = head.score(x, labels, fold.images)
        columns = validation_columns(log_p[fold.images][None], labels[fold.images], [spec.objective])
        metrics.append({name: values[0] for name, values in columns.items()})
    rows = torch.cat([fold.images for fold in folds]).sort().values
    scores = _Scores(calibration.temperature(log_p[rows], labels[rows]))
    scores.predictions.append(Predictions("validation", setup.data.pool, rows, log_p[rows], scores.temperature))
    validation, values = means(metrics), [specs[0].value(fold) for fold in metrics]
    scores.accuracies |= {"train": statistics.fmean(trained), "validation": validation["val_accuracy"]}
    scores.over_folds |= {"fold_values": values, "standard_error": standard_error(values)}
    spec, head_of_run = specs[0], fitted[0]
    if merge:
        spec, head_of_run = merged_fit(specs, fitted, [1 / len(folds)] * len(folds))
    return scores, [spec], [replace(head_of_run, metrics=validation)]


def _score_test_images(run: Run, setup: Setup, heads: Sequence[TrainedHead], scores: _Scores) -> None:
    test = setup.data.test
    rows, x = torch.arange(len(test)), features(run, setup, "x_test")
    log_ps, scores.tests = map(list, zip(*(head.score(x, test.labels, rows) for head in heads), strict=True))
    scores.accuracies["test"] = scores.tests[0]
    scores.predictions.append(Predictions("test", test, rows, log_ps[0], scores.temperature))


def _near_copies(setup: Setup, *, tested: bool) -> int | None:
    """The number of validation and test images with a near copy among the training images; None if that takes long.

    tested: whether the test split has been read.
    """
    data = setup.data
    seen = [data.pool, data.test] if tested else [data.pool]
    others = len(data.val) + sum(map(len, seen[1:]))
    if setup.backbone.frozen is None or others > SEARCHED or len(data.pool) > AMONG:
        return None
    vectors = projected([setup.x, setup.x_test][: len(seen)], [len(samples) for samples in seen])
    digests = torch.cat([samples.digests for samples in seen])
    queries = torch.cat([data.val, torch.arange(len(data.pool), len(digests))])
    near = copies([samples.images for samples in seen], digests, vectors, queries)
    pairs = near.pairs[near.residual > 0]
    in_training, evaluated = (torch.zeros(len(digests), dtype=torch.bool) for _ in range(2))
    in_training[data.train], evaluated[queries] = True, True
    forth, back = (in_training[pairs[:, i]] & evaluated[pairs[:, 1 - i]] for i in (0, 1))
    return len(torch.cat([pairs[forth, 1], pairs[back, 0]]).unique())


def _baselines(setup: Setup, config: RunConfig) -> dict[str, Any] | None:
    """What classifiers that need no tuning make of the same features; None if blocks are trained.

    A search computes them once, for the features of its best trial: with the splits or folds of the trials, where the
    head is retrained on all.
    """
    if not setup.trains_heads_alone:
        return None
    data, labels, start = setup.data, setup.data.pool.labels, time.perf_counter()
    splits = [(data.train, data.val)]
    if config.data.folds:
        splits = [(fold.train, fold.images) for fold in folds_of(data, config.data.folds, config.seed)]
    with torch.inference_mode(), repeatable(setup.device):
        predictions, used = simple.of_splits(setup.x, setup.views, labels, splits, setup.device)
    val = torch.cat([validated for _, validated in splits])
    scores = baselines.record(config.objective, predictions, labels[val], len(data.classes))
    seconds = round(time.perf_counter() - start, 2)
    return scores | {"n_train": used, "n_train_available": len(splits[0][0]), "seconds": seconds}


def _model_metadata(setup: Setup, temperature: float) -> dict[str, Any]:
    """What the saved weights need beside the config to be a model."""
    pool = setup.data.pool
    about: dict[str, Any] = {
        "class_names": setup.data.classes,
        "input_shape": list(pool.images.shape[1:]),
        "fit": setup.data.fit,
    }
    value_range = pool.files.value_range if pool.files else RANGE
    about |= {"range": value_range, "columns": setup.data.columns}
    return about | {"temperature": temperature, "weights": setup.backbone.weights.key}


def _log_summary(run: Run, data: Data, outcome: Mapping[str, Any]) -> None:
    """The last lines of a run."""
    if outcome.get("near_copies"):
        log.info(
            "%d validation and test images have a near copy in training: python -m tuner.audit, with the overrides of "
            "this run, shows them",
            outcome["near_copies"],
        )
    if (found := outcome.get("baselines")) and outcome["val_accuracy"] is not None:
        for line in baselines.lines(found, outcome[f"val_{found['metric']}"], "the trained head"):
            log.info("%s", line)
    if read := outcome["test_readings"]:
        log.info("this test split %s", readings.Readings(**read))
    test = outcome["test_accuracy"]
    if "ensemble" in run.result:
        log.info("test accuracy %.4f (%s), of the ensemble: %s", test, on_images(test, len(data.test)), run.folder)
        return
    if seeds := len(outcome.get("test_accuracies", ())):
        spread = f", standard deviation {outcome['test_accuracy_std']:.4f}" if seeds > 1 else ""
        log.info("test accuracy %.4f%s, of %d seed%s: %s", test, spread, seeds, "s" * (seeds > 1), run.folder)
        return
    validated = on_images(outcome["val_accuracy"], run.result["n_val"])
    if values := outcome.get("fold_values"):
        validated = f"mean of {len(values)} folds, standard error {outcome['standard_error']:.4f}; {validated}"
    text = f"validation accuracy {outcome['val_accuracy']:.4f} ({validated})"
    if test is not None:
        text += f", test accuracy {test:.4f} ({on_images(test, len(data.test))})"
    log.info("%s, %.0f s: %s", text, run.seconds(), run.folder)
    if data.is_uneven:
        keys = {"validation": "val_balanced_accuracy", "test": "test_balanced_accuracy"}
        balanced = [f"{split} {outcome[key]:.4f}" for split, key in keys.items() if outcome[key] is not None]
        log.info("balanced accuracy (mean of the per-class accuracies): %s", ", ".join(balanced))
