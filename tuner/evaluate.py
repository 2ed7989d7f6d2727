"""Score a trained model on a data set: `python -m tuner.evaluate RUN [data=NAME] [data.KEY=VALUE...]`."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
import torch.nn.functional as F
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from tuner import InputError, arguments, output, plots, terminal
from tuner.config import CONF, RunConfig, parse_part, written
from tuner.data import Data, Samples, copies, exclusion
from tuner.device import Batches, send
from tuner.inference import model
from tuner.inference.model import Model
from tuner.runs import metrics, readings
from tuner.runs.predictions import Predictions, concatenated
from tuner.runs.predictions import summary as scores_of
from tuner.runs.report import figures, tables
from tuner.runs.result import read_result
from tuner.runs.run import write_table
from tuner.sweep.hydra_private import parse_overrides

log = logging.getLogger("tuner.evaluate")

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in gray: ITU-R BT.601, as Pillow has it
FILE_LOADERS = {  # these resize the images they read; the arguments that they take from the model
    "tuner.data.image_folder.load": ("size", "fit", "range", "divide"),
    "tuner.data.huggingface.load": ("size", "fit", "range", "divide"),
    "tuner.data.csv_file.load": ("size", "fit", "range", "divide", "columns"),
}


def config_with_data(
    cfg: DictConfig, overrides: Sequence[str], folder: Path | None = None, files: Mapping[str, Any] | None = None
) -> RunConfig:
    """A run's config with the `data` group changed by overrides.

    overrides: data=NAME, for another option of the group, and data.KEY=VALUE.
    folder: of the user's own configs, as of --config-dir.
    files: keys and values for data from files, used where the overrides do not set them.
    Raises InputError for another override, an unknown option or key, or a value that is missing.
    """
    if foreign := [line for line in overrides if not line.lstrip("+~").startswith(("data=", "data."))]:
        raise InputError(f"{foreign[0]}: a run is evaluated as it is; only data=NAME and data.KEY=VALUE may be given")
    if ours := [line for line in overrides if line.startswith(("data.views=", "data.test_views=", "data.exclude="))]:
        raise InputError(f"{ours[0]} is fixed by the model: leave it out")
    options = [line.removeprefix("data=") for line in overrides if line.startswith("data=")]
    values = [line for line in overrides if not line.startswith("data=")]
    config = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "data" or not options])
    try:
        if options:
            _check_known(options[-1], folder)
            name = f"data/{options[-1]}"
            own = folder is not None and (folder / f"{name}.yaml").is_file()
            with hydra.initialize_config_dir(str(folder.absolute() if folder and own else CONF)):
                config.data = hydra.compose(name, values).data
        else:
            OmegaConf.set_struct(config, True)
            for override in parse_overrides(values):
                OmegaConf.update(config, override.key_or_group, override.value(), force_add=override.is_add())
        for key in FILE_LOADERS.get(config.data.get("_target_"), ()):
            if files and not any(line.lstrip("+").startswith(f"data.{key}=") for line in values):
                OmegaConf.update(config, f"data.{key}", files[key], force_add=True)
        if missing := sorted(key for key in OmegaConf.missing_keys(config) if key.startswith("data.")):
            raise InputError(f"{missing[0]} has no default; give it, as in {missing[0]}=VALUE")
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(" ".join(str(error).split())) from error
    return parse_part(config, "data", "final")


def _check_known(name: str, folder: Path | None) -> None:
    known = {path.stem for above in (CONF, folder) if above for path in (above / "data").glob("*.yaml")}
    if name not in known:
        raise InputError(f"data={name} is not a data set; choose one of {', '.join(sorted(known))}")


def check_unchanged(data: Data, split: str, folder: Path) -> None:
    """Raises InputError if a split of the run's data has changed: the model may have been trained on some."""
    result = read_result(folder) if (folder / "result.json").exists() else {}
    hashes = result.get("split_hashes")
    before = hashes.get(split) if isinstance(hashes, dict) else None
    if before != data.hashes[split]:
        raise InputError(
            f"the {split} images of the run's data have changed since, or it did not record them: the model may "
            "have been trained on some; name new data, as in data=image_folder data.root=FOLDER, or use --split all"
        )


def chosen(data: Data, split: str) -> list[tuple[str, Samples, torch.Tensor]]:
    """A name, samples and their rows for a split; for "all", the pool and the test images. Empty parts are left out."""
    everything = {
        "train": ("training", data.pool, data.train),
        "val": ("validation", data.pool, data.val),
        "test": ("test", data.test, torch.arange(len(data.test))),
        "pool": ("training and validation", data.pool, torch.arange(len(data.pool))),
    }
    parts = [everything[name] for name in (("pool", "test") if split == "all" else (split,))]
    return [part for part in parts if len(part[2])]


def renumbered(data: Data, classes: Sequence[str]) -> torch.Tensor:
    """The model's number of each class of a data set, int64. Raises InputError for a class that the model lacks."""
    if strangers := [name for name in data.classes if name not in classes]:
        raise InputError(
            f"the model does not know the class {strangers[0]!r}: the data has {', '.join(data.classes)}; the model "
            f"has {', '.join(classes)}; rename or remove what differs (data.classes renames those of a CSV file)"
        )
    return torch.tensor([list(classes).index(name) for name in data.classes])


def shaped(images: torch.Tensor, shape: Sequence[int], fit: str) -> torch.Tensor:
    """uint8 [B, C, H, W] -> uint8 [B, *shape], as image_file.read does for a file: to gray or RGB, then `fit`."""
    if list(images.shape[1:]) == list(shape):
        return images
    channels, *size = shape
    x = images.float()
    if x.shape[1] != channels:
        x = x.expand(-1, 3, -1, -1) if channels == 3 else (x * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if list(x.shape[2:]) != size:
        scales = [wanted / side for wanted, side in zip(size, x.shape[2:], strict=True)]
        scale = {"crop": max(scales), "pad": min(scales)}.get(fit)
        inner = size if scale is None else [max(1, round(side * scale)) for side in x.shape[2:]]
        x = F.interpolate(x, inner, mode="bilinear", antialias=True)
        missing = [(wanted - side) for wanted, side in zip(size, inner, strict=True)]  # negative: cropped
        top, left = (m // 2 for m in missing)
        x = F.pad(x, [left, missing[1] - left, top, missing[0] - top], value=0.0)
    return x.round().clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def scored(trained: Model, data: Data, split: str) -> list[Predictions]:
    """The model's predictions for a split. Labels are renumbered in the order of the model's classes."""
    numbers = renumbered(data, trained.classes)
    parts = chosen(data, split)
    predictions = []
    with tqdm(total=sum(len(rows) for *_, rows in parts), desc="evaluating", unit="image", disable=None) as bar:
        for name, samples, rows in parts:

            def log_p(batch: torch.Tensor, samples: Samples = samples) -> torch.Tensor:
                images = shaped(samples.images[batch], trained.input_shape, trained.fit)
                return trained.log_p(send(images, trained.device)).cpu()

            log_ps = []
            for batch in Batches(trained.batch_size, trained.device)(log_p, rows):
                log_ps.append(batch)
                bar.update(len(batch))
            ours = Samples(samples.images, numbers[samples.labels], names=samples.names)
            predictions.append(Predictions(name, ours, rows, torch.cat(log_ps), trained.temperature))
    return predictions


def summary(parts: Sequence[Predictions], classes: Sequence[str]) -> dict[str, Any]:
    """The number of images, the scores of all images together, and a row for each class that has images."""
    labels, predicted, _ = concatenated(parts)
    rows = [row for row in metrics.per_class(labels, predicted, classes) if row["support"]]
    return {"images": len(labels), **scores_of(parts), "per_class": rows}


def _possibly_seen(config: RunConfig, overrides: Sequence[str], split: str) -> str | None:
    """Why the model may have been trained on images of another split; None if there is no reason to think so."""
    others = ("data=", "data.root=", "data.path=", "data.test_path=")
    if overrides and not any(line.lstrip("+").startswith(others) for line in overrides):
        return "this is the run's own data set, split or processed differently"
    retrained = config.final.epochs is not None
    return "the last run of a search also trains on validation images" if retrained and split == "val" else None


def _record_reading(data: Data, split: str, folder: Path) -> None:
    """Record that a run's model is scored on a test split, if it is, and log how often that happened."""
    if split in ("test", "all") and len(data.test) and (read := readings.record(data.hashes["test"], folder)):
        log.info("this test split %s", read)


def write(parts: Sequence[Predictions], classes: Sequence[str], folder: Path) -> None:
    """Write per_class.csv, confusion_matrix.csv, predictions.csv and plots, of all parts together."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder} can't be a folder: {error.strerror}") from error
    for name, rows in tables(parts, parts, classes).items():
        write_table(folder / name, rows)
    for name, figure in figures(parts, classes, parts[0].split if len(parts) == 1 else "all").items():
        plots.save(figure, folder / f"{name}.png")
    log.info("tables and pictures: %s", folder)


def main() -> None:
    """Print the scores of a run on its own test split or on other data; --out writes tables and plots."""
    args = arguments.evaluate().parse_intermixed_args()  # options stand anywhere
    trained = model.load(args.run, device=args.device, precision=args.precision)
    folder = model.file_of(args.run).parent
    split = args.split or ("all" if args.overrides else "test")
    if args.split is None:
        log.info("split: %s (%s)", split, "of other data than the run's" if args.overrides else "of the run's own data")
    files = {
        "size": list(trained.input_shape),
        "fit": trained.fit,
        "range": trained.range,
        "divide": split != "all",
        "columns": trained.columns,
    }
    config = config_with_data(written(folder), args.overrides, args.config_dir, files if args.overrides else None)
    data: Data = config.data.target.build() if args.overrides else exclusion.load(config.data)
    if args.overrides:
        copies.report(data)
    if not args.overrides and split != "all":
        check_unchanged(data, split, folder)
    if reason := _possibly_seen(config, args.overrides, split):
        log.warning("%s: the model may have been trained on some of these images", reason)
    theirs, ours = (list(shape) for shape in (data.pool.images.shape[1:], trained.input_shape))
    if theirs != ours:
        log.info("images are converted from %s to %s, as files would be: fit=%s", theirs, ours, trained.fit)
    _record_reading(data, split, folder)
    parts = scored(trained, data, split)
    results = {"run": str(args.run), "split": split} | summary(parts, trained.classes)
    if args.out:
        write(parts, trained.classes, args.out)
    if args.json:
        output.print_json(results)
        return
    rows = pd.DataFrame(results.pop("per_class"))
    output.terminal(rows, "By class")
    print()
    for key, value in results.items():
        if value is None:  # a metric that needs more classes
            continue
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else value
        output.print_text(f"{key.replace('_', ' '):<18} {text}")


if __name__ == "__main__":
    terminal.command(main)
