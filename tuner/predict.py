"""Use a trained model: `python -m tuner.predict RUN FILE|FOLDER...`, or `... RUN TABLE.csv`."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tuner import InputError, arguments, output, plots, terminal
from tuner.data.files import image_file
from tuner.data.tables import csv_unlabelled
from tuner.data.tables.csv_images import Place
from tuner.data.tables.csv_unlabelled import Inputs
from tuner.inference import model
from tuner.inference.evidence import Explainer
from tuner.inference.model import Model

log = logging.getLogger("tuner.predict")
READERS = min(8, os.cpu_count() or 1)  # threads that decode files; each holds one image in full size


class Batch(NamedTuple):
    """N images: their names, their probabilities, float32 [N, classes], and the errors of further files."""

    names: pd.DataFrame
    probabilities: torch.Tensor
    broken: list[image_file.BrokenImageError]


def predicted(models: Sequence[Model], inputs: Inputs) -> Iterator[Batch]:
    """The mean of the models' probabilities for each image, in batches. Only one batch of files is in memory."""
    size = min(model.batch_size for model in models)
    kinds = [(model.input_shape, model.fit, model.range) for model in models]  # of inputs: each is read once
    model_of = dict(zip(kinds, models, strict=True))

    def read(path: Path) -> dict[tuple, torch.Tensor] | image_file.BrokenImageError:
        try:
            return {kind: model.read(path) for kind, model in model_of.items()}
        except image_file.BrokenImageError as error:
            return error

    all_names = pd.DataFrame(inputs.names)
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(inputs), size):
            names = all_names.iloc[start : start + size]
            if inputs.images is not None:
                read_images = [dict.fromkeys(model_of, image) for image in inputs.images[start : start + size]]
                broken = []
            else:
                results = list(pool.map(read, inputs.paths[start : start + size]))
                names = names[[isinstance(image, dict) for image in results]]
                read_images = [image for image in results if isinstance(image, dict)]
                broken = [error for error in results if isinstance(error, image_file.BrokenImageError)]
            each = [
                model.predict(torch.stack([image[kind] for image in read_images]))
                for kind, model in (zip(kinds, models, strict=True) if read_images else ())
            ]
            yield Batch(names, torch.stack(each).mean(0) if each else torch.empty(0, len(models[0].classes)), broken)


def load(runs: Sequence[str | Path], device: str, precision: str) -> list[Model]:
    """Load models for use together. Raises InputError if their classes differ."""
    models = [model.load(run, device=device, precision=precision) for run in runs]
    for run, other in zip(runs[1:], models[1:], strict=True):
        if other.classes != models[0].classes:
            raise InputError(
                f"an ensemble's runs must have the same classes: those of {runs[0]} are "
                f"{', '.join(models[0].classes)}; those of {run} are {', '.join(other.classes)}"
            )
    return models


def table(batch: Batch, classes: Sequence[str], top: int) -> pd.DataFrame:
    """`top` rows per image, the most probable class first.

    Columns: those of the names, rank if top > 1, class, probability.
    """
    p, which = batch.probabilities.topk(top, dim=1)
    predictions = {
        "rank": list(range(1, top + 1)) * len(batch.names),
        "class": [classes[i] for i in which.flatten().tolist()],
        "probability": [round(value, 6) for value in p.flatten().tolist()],
    }
    rows = batch.names.loc[batch.names.index.repeat(top)].reset_index(drop=True)
    return pd.concat([rows, pd.DataFrame(predictions)], axis=1).drop(columns=[] if top > 1 else ["rank"])


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - removes .., keeps links


class Maps:
    """Evidence maps as PNG files in `folder`, with the paths that the images have below their common folder."""

    def __init__(self, model: Model, folder: Path, paths: Sequence[Path]):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--maps {folder} can't be a folder: {error.strerror}") from error
        self.model, self.explain, self.folder = model, Explainer(model), folder
        self.above = Path(os.path.commonpath([_absolute(path).parent for path in paths]))

    def draw(self, batch: Batch) -> None:
        """Write the map of each image's most probable class as FOLDER/NAME.png."""
        for path, probabilities in zip(map(Path, batch.names["file"]), batch.probabilities, strict=True):
            label, image = int(probabilities.argmax()), self.model.read(path)
            heat = self.explain(image, label)
            name, predicted = _absolute(path).relative_to(self.above), self.model.classes[label]
            pixels = image.permute(1, 2, 0).numpy()
            figure = plots.attention(
                pixels, heat.numpy(), str(name), predicted, float(probabilities[label]), self.explain.method
            )
            plots.save(figure, self.folder / f"{name}.png")


def main() -> None:
    """Print the classes of image files with their probabilities. Exits with code 1 if a file can't be read."""
    args = arguments.predict().parse_intermixed_args()  # options may come anywhere
    if args.maps and args.others:
        raise InputError("--maps works with one run only: leave --with out")
    models = load([args.run, *args.others], args.device, args.precision)
    image_file.check_max_pixels(args.max_pixels)
    for one in models:
        one.max_pixels = args.max_pixels
    classes = models[0].classes
    if not 1 <= args.top <= len(classes):
        raise InputError(f"--top {args.top} must be a number from 1 to {len(classes)}, the number of classes")
    inputs = _inputs(args, models)
    if args.maps and inputs.images is not None:
        raise InputError("--maps is for image files: a table of pixels has none")
    maps = Maps(models[0], args.maps, inputs.paths) if args.maps else None
    tables, broken = _predict(args, models, inputs, maps)
    if args.json:
        output.print_json(output.records(pd.concat(tables)))
    elif not args.csv:
        output.terminal(pd.concat(tables))
    if maps:
        log.info("maps: %s", args.maps)
    if broken:
        sys.exit(f"{broken:,} of {len(inputs):,} files can't be read, and have no prediction")


def _inputs(args: argparse.Namespace, models: Sequence[Model]) -> Inputs:
    """The images that the arguments name: files, or the rows of a table."""
    tables = [path for path in args.inputs if csv_unlabelled.is_table(path)]
    if not tables:
        if given := [name for name in ("image", "folder", "suffix") if getattr(args, name) is not None]:
            raise InputError(f"--{given[0]} is for a CSV file of image files: name one")
        return csv_unlabelled.of_files(image_file.expand(args.inputs))
    if len(args.inputs) > 1:
        raise InputError(f"{tables[0]} is a table: predict it alone, without further files")
    shapes = {model.input_shape for model in models}
    place = Place(args.folder, args.suffix, option="--")
    return csv_unlabelled.read(tables[0], shapes, models[0].columns, args.image, place)


def _predict(
    args: argparse.Namespace, models: Sequence[Model], inputs: Inputs, maps: Maps | None
) -> tuple[list[pd.DataFrame], int]:
    """Predict all files under a progress bar: a table per batch, and the number of files that can't be read.

    With --csv each batch is printed at once, as 100,000 files take a while, and there are no tables.
    """
    tables: list[pd.DataFrame] = []
    broken, header = 0, True
    with logging_redirect_tqdm(), tqdm(total=len(inputs), desc="predicting", unit="image", disable=None) as bar:
        for batch in predicted(models, inputs):
            for error in batch.broken:
                log.error("%s", error)
            rows = table(batch, models[0].classes, args.top)
            if args.csv:
                output.cells(rows).to_csv(sys.stdout, index=False, header=header)
                header = False
            else:
                tables.append(rows)
            if maps:
                maps.draw(batch)
            broken += len(batch.broken)
            bar.update(len(batch.names) + len(batch.broken))
    return tables, broken


if __name__ == "__main__":
    terminal.command(main)
