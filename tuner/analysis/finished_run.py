"""A finished run, read back from its folder: what its report and its model card say."""

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tuner import InputError, plots
from tuner.config import of_run
from tuner.data import exclusion
from tuner.networks.weights import LICENCES
from tuner.output import shown
from tuner.rules import is_number
from tuner.runs import baselines, metrics, readings, table
from tuner.runs.layout import BEST
from tuner.runs.model_file import RULES
from tuner.runs.result import accuracy_interval, read_result
from tuner.safe_text import from_cell

log = logging.getLogger("tuner.report")

SPLITS = {"val": "validation", "test": "test"}  # the prefix of a score, and the split in predictions.csv
METRIC_NAMES = {
    "macro_f1": "macro F1 score",
    "top5_accuracy": "top-5 accuracy",
    "auroc": "area under the ROC curve",
    "ece": "calibration error before calibration",
    "ece_calibrated": "calibration error",
}
HUGE = 1e15  # no number of a run is larger
FEW = 100  # images of a class, in all splits
WEAK = 3  # classes that are named as the weakest
MISTAKES = 24  # that are shown


@dataclass(frozen=True)
class FinishedRun:
    """A complete run.

    name: its folder as commands name it.   result: its result.json.   config: the applied config, by dotted keys.
    classes: their names.   split: validation or test, what its tables are of.
    """

    folder: Path
    name: str
    result: Mapping[str, Any]
    config: Mapping[str, Any]
    classes: Sequence[str]
    split: str

    def number(self, key: str) -> float | None:
        """A finite number of result.json; None if it has none."""
        value: Any = self.result.get(key)
        return value if is_number(value) and abs(value) < HUGE else None  # False for NaN

    def count(self, key: str) -> int | None:
        """A number of images of result.json; None if it has none."""
        value = self.result.get(key)
        return value if type(value) is int and 0 <= value < HUGE else None

    def group(self, key: str) -> Mapping[str, Any]:
        """A group of values of result.json; empty if it has none."""
        value = self.result.get(key)
        return value if isinstance(value, dict) else {}

    @property
    def seeds(self) -> int:
        """How many models its test accuracy is the mean of."""
        accuracies = self.result.get("test_accuracies")
        return max(1, len(accuracies)) if isinstance(accuracies, list) else 1

    @cached_property
    def metrics(self) -> pd.DataFrame | None:
        """metrics.csv; None if it cannot be drawn."""
        try:
            frame = table.read_metrics(self.folder)
            columns = [f"{split}_{name}" for split in ("train", "val") for name in ("accuracy", "loss")]
            frame = frame[["epoch", "lr", *columns]].apply(pd.to_numeric, errors="raise")
            if self.result.get("saved_epoch") not in frame["epoch"].tolist():
                raise ValueError("it lacks the epoch whose weights were saved")
            if frame[["epoch", "lr"]].isna().any(axis=None) or frame.abs().max(axis=None) >= plots.HUGE:
                raise ValueError("it has values that cannot be drawn")
            return frame
        except (OSError, ValueError, KeyError) as error:
            log.warning("left out the curves, as metrics.csv cannot be used: %s", " ".join(str(error).split()))
            return None

    @cached_property
    def predictions(self) -> pd.DataFrame | None:
        """The predictions for the split, the classes also as numbers; None without predictions.csv."""
        frame = table.read_predictions(self.folder)
        if frame is None:
            return None
        frame = frame[frame["split"] == self.split]
        known = {name: number for number, name in enumerate(self.classes)}
        numbers = {f"{column}_number": frame[column].map(known) for column in ("label", "predicted")}
        frame = frame.assign(**numbers)
        usable = frame["confidence"].between(0, 1) & frame["label_number"].notna() & frame["predicted_number"].notna()
        if frame.empty or not usable.all():
            log.warning("left out predictions.csv: it is not of this run's %s images and classes", self.split)
            return None
        return frame.astype(dict.fromkeys(numbers, int))

    @cached_property
    def confusion_matrix(self) -> np.ndarray | None:
        """Counts, int64 [C, C]: rows are true classes, columns predicted ones. None without predictions."""
        p = self.predictions
        if p is None:
            return None
        return metrics.confusion_matrix(
            p["label_number"].to_numpy(), p["predicted_number"].to_numpy(), len(self.classes)
        )

    @cached_property
    def per_class(self) -> pd.DataFrame | None:
        """per_class.csv, the weakest class first; None without it."""
        try:
            frame = pd.read_csv(self.folder / "per_class.csv", dtype={"class": str}, keep_default_na=False)
            numbers = ["accuracy", "precision", "f1", "support"]
            frame = frame[["class", *numbers]]
            frame[numbers] = frame[numbers].apply(pd.to_numeric, errors="raise")
            frame["class"] = frame["class"].map(from_cell)
            return frame.sort_values(["accuracy", "class"], kind="stable", ignore_index=True)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            log.warning("left out the table of classes, as per_class.csv cannot be used: %s", reason)
            return None

    @property
    def mistakes(self) -> pd.DataFrame | None:
        """The predictions that are wrong, the most confident first; None without predictions."""
        p = self.predictions
        return None if p is None else p[p["label"] != p["predicted"]].sort_values("confidence", ascending=False)


def read(folder: Path, name: str) -> FinishedRun:
    """The run in a folder.   name: what commands call it. Raises InputError if it is no finished run."""
    try:
        result = read_result(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(_why_not(folder)) from error
    if result["status"] != "complete":
        raise InputError(f"{folder} is a run that is {result['status']}: only a complete run has a report")
    classes: Any = result.get("class_names")
    RULES["class_names"].check(f"class_names in {folder / 'result.json'}", classes)
    try:
        config, _ = table.read_config(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"the config of {folder} cannot be used: {error}") from error
    split = "test" if result.get("test_accuracy") is not None else "validation"
    row = table.resolved(pd.DataFrame([config], dtype=object)).to_dict("records")[0]
    return FinishedRun(folder, name, result, {str(key): value for key, value in row.items()}, list(classes), split)


def _why_not(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist; runs are in outputs/ and multirun/, where they were started"
    if (folder / BEST / "result.json").is_file():
        return f"{folder} is a sweep, not a run; its retrained best is {folder / BEST}"
    if not folder.is_dir() or not ((folder / "metrics.csv").exists() or (folder / "conf").is_dir()):
        return f"{folder} is not a run folder: it has no result.json; python -m tuner.compare lists runs"
    return f"{folder} has no result.json: the run is still going, or was killed; python -m tuner.resume {folder}"


# Sentences


def purpose(run: FinishedRun) -> str:
    """What the model does."""
    shape = run.group("data").get("shape")
    of_size = ""
    if isinstance(shape, list) and len(shape) == 3 and all(type(size) is int for size in shape):
        of_size = f" {'gray' if shape[0] == 1 else 'RGB'} images of {shape[1]} x {shape[2]} pixels"
    probabilities = f"calibrated probabilities of {len(run.classes):,} classes"
    return f"An image classifier:{of_size or ' images'} in, {probabilities} out."


def network(run: FinishedRun) -> str:
    """The network, and what of it was trained."""
    get = run.config.get
    name, last, frozen = get("model.name"), get("model.last_block"), get("model.frozen")
    if name is None:
        return "The network is not recorded."
    weights, size = get("model.weights") or "random", get("model.image_size")
    text = f"{name} up to {last}, weights {weights}, images at {size} pixels; "
    if frozen is None:
        return text + "all of it was trained"
    return text + ("a head on the frozen features was trained" if frozen == last else f"all above {frozen} was trained")


def interval(run: FinishedRun, prefix: str) -> tuple[float, int, tuple[float, float]] | None:
    """The accuracy on a split (a prefix of SPLITS), the number of images, and the 95% interval. None if unknown."""
    accuracy, images = run.number(f"{prefix}_accuracy"), run.count(f"n_{prefix}")
    if accuracy is None or not images or not 0 <= accuracy <= 1:
        return None
    return accuracy, images, accuracy_interval(accuracy, images)


def best_baseline(run: FinishedRun) -> tuple[str, str, float, float | None] | None:
    """The best classifier without tuning: metric, name, score, and the model's own score; None if unknown."""
    found = baselines.of_result(run.result)
    if found is None:
        return None
    scores = baselines.by_name(found)
    best = max(scores, key=lambda name: scores[name])
    return baselines.METRICS[found["metric"]], best, scores[best], run.number(f"val_{found['metric']}")


def comparison(run: FinishedRun) -> str | None:
    """Whether the model beats the classifiers that need no tuning."""
    found = best_baseline(run)
    if found is None:
        return None
    metric, name, score, own = found
    if own is None:
        return f"The best classifier without tuning, {name}, has a validation {metric} of {score:.4f}."
    verb, text = "beats" if own > score else "does not beat", f"validation {metric} {own:.4f} against {score:.4f}"
    measured = interval(run, "val")
    if own > score and metric == "accuracy" and measured and score > measured[2][0]:
        text += ", a difference within the 95% interval"
    return f"It {verb} the best classifier without tuning, {name}: {text}."


def test_use(run: FinishedRun) -> str:
    """How the test split was used."""
    if run.number("test_accuracy") is None:
        return "The test split was not read for this model."
    read, then = readings.of_result(run.result), run.group("test_readings")
    if read is None and type(then.get("times")) is int and type(then.get("studies")) is int:
        read = readings.Readings(then["times"], then["studies"])
    chosen = "The test split chose nothing: validation images come out of the training data."
    return chosen if read is None else f"{chosen} This test split {read}."


def limitations(run: FinishedRun) -> list[str]:
    """What can be computed about the limits of the model, a sentence each."""
    text = ["It gives one of its classes to every image, also to an image of something else."]
    text += _weak_classes(run)
    fewest = _images_of_class(run.group("data").get("fewest"))
    if fewest and fewest[0] < FEW:
        text.append(f"The class {fewest[1]} has only {fewest[0]:,} images, in all splits.")
    if measured := interval(run, "test") or interval(run, "val"):
        low, high = measured[2]
        text.append(f"The 95% interval of its accuracy is {100 * (high - low):.1f} points wide.")
    if run.number("test_accuracy") is None:
        text.append("It was not tested. If its validation images have chosen it, their score is optimistic.")
    copies, near = run.count("test_duplicates"), run.count("near_copies")
    if copies:
        text.append(f"{copies:,} test images have an exact copy among the training or validation images.")
    if near:
        text.append(f"{near:,} validation and test images have a near copy among the training images.")
    found = best_baseline(run)
    if found and found[3] is not None and found[3] <= found[2]:
        text.append(str(comparison(run)))
    return text


def _weak_classes(run: FinishedRun) -> list[str]:
    if run.per_class is None:
        return []
    weak = run.per_class[(run.per_class["support"] > 0) & (run.per_class["accuracy"] < 1)].head(WEAK)
    text = []
    if len(weak):
        rows = ", ".join(f"{row['class']} {row['accuracy']:.3f}" for row in weak.to_dict("records"))
        text.append(f"The lowest {run.split} accuracy by class: {rows}.")
    counts = run.confusion_matrix
    if counts is not None and (wrong := counts - np.diag(np.diag(counts))).any():
        row, column = np.unravel_index(wrong.argmax(), wrong.shape)
        share = f"{wrong[row, column]:,} of {counts[row].sum():,} images"
        text.append(f"Its most frequent mistake: {run.classes[row]} taken for {run.classes[column]}, {share}.")
    return text


def licence(run: FinishedRun) -> str:
    """The licence of the pretrained weights, as far as it is known."""
    name, weights = run.config.get("model.name"), run.config.get("model.weights")
    if weights == "bundled" and name in LICENCES:
        return f"The pretrained weights of {name} were {LICENCES[name]}."
    if weights is None:
        return "No pretrained weights were used."
    return f"The pretrained weights ({name}, {weights}) have a licence of their own: look it up where they come from."


# Tables


def scores(run: FinishedRun) -> pd.DataFrame:
    """A row for each metric, with its value on validation and on test images as text."""
    names = [*metrics.METRICS, "ece", "ece_calibrated"]
    values = {split: [run.number(f"{prefix}_{name}") for name in names] for prefix, split in SPLITS.items()}
    frame = pd.DataFrame({"metric": [METRIC_NAMES.get(name, name.replace("_", " ")) for name in names]} | values)
    frame = frame.dropna(how="all", subset=list(values)).dropna(axis=1, how="all")
    return frame.map(lambda value: shown(value, "accuracy"))


def data_facts(run: FinishedRun) -> dict[str, str]:
    """The data set, as far as result.json has it."""
    data = run.group("data")
    facts = {"data set": data_name(run), "classes": f"{len(run.classes):,}"}
    for name, key in (("training images", "n_train"), ("validation images", "n_val"), ("test images", "n_test")):
        if images := run.count(key):
            facts[name] = f"{images:,}"
    if folds := run.config.get("data.folds"):
        facts["folds"] = str(folds)
    fewest, most = (_images_of_class(data.get(key)) for key in ("fewest", "most"))
    if fewest and most and fewest[0] == most[0]:
        facts["images of each class"] = f"{fewest[0]:,}"
    elif fewest and most:
        facts["images of a class"] = f"{fewest[0]:,} ({fewest[1]}) to {most[0]:,} ({most[1]})"
    for name, key in (
        ("left out by data.exclude", "n_excluded"),
        ("test images with an exact copy in training or validation", "test_duplicates"),
        ("validation and test images with a near copy in training", "near_copies"),
    ):
        if (images := run.count(key)) is not None:
            facts[name] = f"{images:,}"
    return facts


def _images_of_class(value: Any) -> tuple[int, str] | None:
    """`fewest` or `most` in the summary of the data: the number of images, and the class."""
    known = isinstance(value, dict) and type(value.get("images")) is int
    return (value["images"], str(value.get("class"))) if known else None


def data_name(run: FinishedRun) -> str:
    """The name of the data set: of its config, and of its folder or file."""
    config = str(run.config.get("data._target_", "unknown")).removesuffix(".load").rpartition(".")[2]
    places = (run.config.get(f"data.{key}") for key in ("root", "path", "folder"))
    return " ".join([config, *(Path(str(place)).name for place in places if place)][:2])


def training_facts(run: FinishedRun) -> dict[str, str]:
    """How and with what the model was trained."""
    result, facts = run.result, {"network": network(run)}
    seeds = result.get("seeds")
    if isinstance(seeds, list):
        facts["seeds"] = ", ".join(map(str, seeds))
    elif run.count("seed") is not None:
        facts["seed"] = str(result["seed"])
    if isinstance(result.get("study"), str):
        trial = run.count("trial")
        facts["search"] = result["study"] + ("" if trial is None else f", trial {trial}")
    if run.number("epochs"):
        facts["epochs"] = f"{run.number('epochs'):g}, weights of epoch {run.number('saved_epoch') or 0:g}"
    facts |= {key: result[key] for key in ("device", "precision") if isinstance(result.get(key), str)}
    if size := run.count("trained_parameters"):
        facts["trained parameters"] = f"{size:,}"
    if cost := run.number("gmacs"):
        facts["multiply-adds of an image"] = f"{cost:.3g} billion"
    if (model := run.folder / "model.safetensors").is_file():
        facts["size of model.safetensors"] = f"{model.stat().st_size / 1e6:.1f} MB"
    if seconds := run.number("seconds"):
        facts["time of the run"] = f"{seconds:,.0f} s"
    return facts


def versions(run: FinishedRun) -> dict[str, str]:
    """The versions of the packages that trained the model."""
    return {str(name): str(version) for name, version in run.group("versions").items()}


def usage(run: FinishedRun) -> tuple[str, str] | None:
    """How to use the model, in Python and as commands, from the folder where the report was made. None without one."""
    if not (run.folder / "model.safetensors").is_file():
        return None
    python = (
        f"import tuner\n\nmodel = tuner.load({json.dumps(run.name, ensure_ascii=False)})\n"
        'probabilities = model.predict(["photo.jpg"])  # [images, classes], calibrated\n'
        "print(model.classes[probabilities[0].argmax()], probabilities[0].max().item())"
    )
    name = shlex.quote(run.name)
    commands = (
        f"python -m tuner.predict {name} photo.jpg\n"
        f"python -m tuner.evaluate {name}\n"
        f"python -m tuner.export {name} --format onnx"
    )
    return python, commands


# Images


def thumbnails(run: FinishedRun, names: Sequence[str]) -> list[bytes | None]:
    """A PNG for each of these images of the split; None for one that is not found.

    Raises InputError or OSError if the data set cannot be read, or has changed since.
    """
    data = exclusion.load(of_run(run.folder, "data").data)
    samples, key = (data.test, "test") if run.split == "test" else (data.pool, "val")
    if run.group("split_hashes").get(key) != data.hashes[key]:
        raise InputError(f"the {run.split} images of its data set have changed since")
    rows = {samples.name(row): row for row in range(len(samples))}
    found = (rows.get(name) for name in names)
    return [None if row is None else plots.thumbnail(samples.images[row]) for row in found]
