"""What tuner.audit finds of planted faults, and how rare false pairs of copies are.

    python benchmarks/audit.py [--seeds 3] [--images 400] [--epochs 10] [OVERRIDE ...]

Into each data set go, for each seed: 5% of the labels swapped, 20 near copies across splits, and 20 foreign images
(pieces of two photographs of scikit-learn). The thresholds in tuner/bank/copies.py and tuner/analysis/findings.py come
from these tables.
"""

import argparse
import io
import logging
import statistics
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import results
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits, load_sample_images

from tuner.audit import Audit, audit, composed
from tuner.bank.copies import copies
from tuner.bank.extraction import extract
from tuner.bank.neighbours import projected
from tuner.config import RunConfig
from tuner.data import Samples, digests, hold_out, split
from tuner.training.setup import Setup, setup_of

LANCZOS, BICUBIC = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC
SMALLEST = ["model=tiny", "epochs=2", "batch_size=32"]


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=400, help="copies of each kind; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=10, help="of the heads of the folds; default: %(default)s")
    parser.add_argument("overrides", nargs="*")
    return parser


def resized(share: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize([max(1, round(side * share)) for side in image.size], LANCZOS).resize(
        image.size, BICUBIC
    )


def cropped(share: float, place: float) -> Callable[[Image.Image], Image.Image]:
    """A part with this share of each side; place: 0.5 from the middle, 0 from a corner."""

    def change(image: Image.Image) -> Image.Image:
        left, top = (side * (1 - share) * place for side in image.size)
        box = (left, top, left + image.width * share, top + image.height * share)
        return image.resize(image.size, BICUBIC, box=box)

    return change


def compressed(quality: int) -> Callable[[Image.Image], Image.Image]:
    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return change


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resized to 75%": resized(0.75),
    "resized to 50%": resized(0.5),
    "95% of each side, off the middle": cropped(0.95, 0.2),
    "90% of each side, the middle": cropped(0.9, 0.5),
    "90% of each side, a corner": cropped(0.9, 0.0),
    "JPEG, quality 75": compressed(75),
    "JPEG, quality 30": compressed(30),
    "mirror image": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "80% of the brightness": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "120% of the brightness": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
}
PLANTED = [name for name in CHANGES if "50%" not in name and "a corner" not in name]


def changed(images: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Copies of images, uint8 [N, C, H, W]; the changes in turn."""
    copied = []
    for number, image in enumerate(images):
        pixels = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        copy = torch.from_numpy(np.array(CHANGES[names[number % len(names)]](Image.fromarray(pixels))))
        copied.append(copy[None] if copy.ndim == 2 else copy.permute(2, 0, 1))
    return torch.stack(copied)


def features(setup: Setup, images: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(extract(images, setup.backbone, device=setup.device, dtype=setup.precision)))


def recall_of_copies(setup: Setup, count: int) -> list[list[str]]:
    """Copies of each kind that are found, and further pairs that are reported."""
    pool = setup.data.pool
    rows = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:count]
    table = [["copies", "found", "further pairs"]]
    for name in CHANGES:
        copied = changed(pool.images[rows], [name])
        vectors = projected([setup.x, features(setup, copied)], [len(pool), len(copied)])
        joined = torch.cat([pool.digests, digests(copied)])
        found = copies([pool.images, copied], joined, vectors, torch.arange(len(pool), len(joined)))
        pairs = {tuple(pair) for pair in found.pairs.tolist()}
        expected = {(row, len(pool) + number) for number, row in enumerate(rows.tolist())}
        table.append([name, f"{len(pairs & expected) / len(expected):.3f}", str(len(pairs - expected))])
    found = copies([pool.images], pool.digests, projected([setup.x], [len(pool)]))
    table.append([f"none: pairs among the {len(pool):,} images", "-", str(len(found.pairs))])
    return table


def foreign(shape: torch.Size, count: int) -> torch.Tensor:
    """Pieces of photographs, uint8 [count, *shape]."""
    pieces = []
    for photo in load_sample_images().images:
        pixels = torch.from_numpy(photo.copy()).permute(2, 0, 1).float()
        pixels = pixels.mean(0, keepdim=True) if shape[0] == 1 else pixels
        for top in range(0, 400, 100):
            for left in range(0, 600, 120):
                piece = pixels[None, :, top : top + 100, left : left + 100]
                pieces.append(F.interpolate(piece, tuple(shape[1:]), mode="bilinear", antialias=True)[0])
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))[:count]
    return torch.stack(pieces)[order].to(torch.uint8)


def with_faults(setup: Setup, seed: int) -> tuple[Setup, dict[str, set[int]]]:
    """The setup with planted faults, and their rows; copies are rows of pool and then test."""
    generator = torch.Generator().manual_seed(seed)
    data, classes, n = setup.data, len(setup.data.classes), len(setup.data.pool)
    labels = data.pool.labels.clone()
    order = torch.randperm(n, generator=generator)
    swapped, copied = order[: round(n / 20)], order[-20:]
    labels[swapped] = (labels[swapped] + torch.randint(1, classes, (len(swapped),), generator=generator)) % classes
    copied = copied[torch.isin(copied, data.train)]
    to_test = len(copied) // 2
    new = changed(data.pool.images[copied], PLANTED)
    strange = foreign(data.pool.images.shape[1:], 20)
    added = torch.cat([new[to_test:], strange])
    random = torch.randint(classes, (len(strange),), generator=generator)
    added_labels = torch.cat([labels[copied[to_test:]], random])
    pool = Samples(torch.cat([data.pool.images, added]), torch.cat([labels, added_labels]))
    test = Samples(
        torch.cat([data.test.images, new[:to_test]]), torch.cat([data.test.labels, labels[copied[:to_test]]])
    )
    first_strange = n + len(copied) - to_test
    val, train = torch.arange(n, first_strange), torch.arange(first_strange, len(pool))
    ours = replace(data, pool=pool, test=test, val=torch.cat([data.val, val]), train=torch.cat([data.train, train]))
    planted = replace(setup, data=ours)
    planted.x = torch.cat([setup.x, features(setup, added)])
    planted.x_test = torch.cat([setup.x_test, features(setup, new[:to_test])])
    first_test = len(pool) + len(data.test)
    here = set(copied.tolist()) | set(range(n, first_strange)) | set(range(first_test, first_test + to_test))
    return planted, {"label": set(swapped.tolist()), "copy": here, "outlier": set(train.tolist())}


def scored(found: Audit, planted: dict[str, set[int]]) -> dict[str, tuple[float, float]]:
    """Precision and recall of each kind. A foreign image that is reported for its label is left out of that count."""
    table = found.table
    rows = {
        "label": set(table.row[table.kind == "label"]) - planted["outlier"],
        "copy": set(table.row[table.group.notna()]),
        "outlier": set(table.row[table.kind == "outlier"]),
    }
    return {
        kind: (len(rows[kind] & planted[kind]) / max(1, len(rows[kind])), len(rows[kind] & planted[kind]) / len(there))
        for kind, there in planted.items()
    }


def digits(setup: Setup) -> Setup:
    """The setup with scikit-learn's 1,797 digits of 8 x 8 pixels."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images * 15.9).to(torch.uint8)[:, None]
    samples, names = Samples(images, torch.from_numpy(bunch.target).long()), tuple(map(str, range(10)))
    return replace(setup, data=split(*hold_out(samples, names, test_share=0.2), names, val_share=0.125, seed=0))


def planted_faults(name: str, config: RunConfig, setup: Setup, seeds: int) -> list[list[str]]:
    """A row for each kind of fault: mean and standard deviation over seeds."""
    scores = []
    for seed in range(seeds):
        faulty, planted = with_faults(setup, seed)
        found = audit(config, faulty)
        print(f"{name}, seed {seed}: {found.accuracy}")
        scores.append(scored(found, planted))
    rows = []
    for kind, what in (("label", "labels swapped, 5%"), ("copy", "20 near copies"), ("outlier", "20 foreign images")):
        cells = []
        for place in (0, 1):
            values = [score[kind][place] for score in scores]
            spread = f" +- {statistics.stdev(values):.2f}" if seeds > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        rows.append([f"{name}: {what}", *cells])
    return rows


def main() -> None:
    args = arguments().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    more = list(args.overrides)
    if args.smallest:
        args.seeds, args.images, args.epochs, more = 1, 20, 2, [*SMALLEST, *more]
    small = ["model=tiny", "batch_size=32", f"epochs={2 if args.smallest else 20}", *args.overrides]
    sets = {"synthetic": composed(["data=synthetic", *small]), "digits": composed(["data=synthetic", *small])}
    if not args.smallest:
        sets["Fashion-MNIST, 6,000"] = composed([f"epochs={args.epochs}", *more])
    rows = [["planted", "precision", "recall"]]
    for name, config in sets.items():
        setup = setup_of(config, shared=False)
        if name == "digits":
            setup = digits(setup)
        rows += planted_faults(name, config, setup, args.seeds)
    device = setup.device
    results.write("planted faults", device, rows, f"Mean and standard deviation of {args.seeds} seeds.")
    results.write("copies of images", device, recall_of_copies(setup, args.images), f"Of {name}.")


if __name__ == "__main__":
    main()
