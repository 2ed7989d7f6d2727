"""What a data set holds, and how finely its validation images tell accuracies apart."""

import math
from collections import Counter
from typing import Any

import torch

from tuner.data import Data, Samples, copies

NAMES = 10  # classes that are named
AT = 0.8  # the accuracy for which the standard error is given
FOLDS = 5  # that are recommended
COARSE = 0.05  # two standard errors; those of 256 images


def summary(data: Data, folds: int | None = None) -> dict[str, Any]:
    """The data set as plain values, for result.json.   folds: with them, the training images judge, too."""
    used = torch.cat([data.pool.labels[torch.cat([data.train, data.val])], data.test.labels])
    counts = torch.bincount(used, minlength=len(data.classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    judged = len(data.val) + (len(data.train) if folds else 0)
    return {
        "classes": len(data.classes),
        "names": list(data.classes[:NAMES]),
        "fewest": {"class": data.classes[least], "images": int(counts[least])},
        "most": {"class": data.classes[most], "images": int(counts[most])},
        "splits": {"train": len(data.train), "validation": len(data.val), "test": len(data.test)},
        "shape": list(data.pool.images.shape[1:]),
        "copies": {
            "test": data.test_duplicates,
            "validation": data.val_duplicates,
            "other_class": copies.conflicts(data),
        },
        "files": files(data.pool, data.test),
        "validation_two_standard_errors": two_standard_errors(judged),
    }


def two_standard_errors(images: int) -> float | None:
    """Two standard errors of an accuracy of AT, measured on so many images (binomial). None without images."""
    return round(2 * math.sqrt(AT * (1 - AT) / images), 4) if images else None


def files(*parts: Samples) -> dict[str, Any] | None:
    """What the image files of these parts are: modes, and the least, median and most of their widths and heights.

    The median is that of the largest part. None if the images are not from files.
    """
    known = [part.files for part in parts if part.files]
    if not known:
        return None
    largest = max(known, key=lambda part: sum(part.modes.values()))
    modes = sum((Counter(part.modes) for part in known), Counter[str]())

    def sizes(name: str) -> list[int]:
        values = [getattr(part, name) for part in known]
        return [min(v[0] for v in values), getattr(largest, name)[1], max(v[2] for v in values)]

    skipped = sum(part.skipped for part in known)
    return {"modes": dict(modes), "widths": sizes("widths"), "heights": sizes("heights"), "skipped": skipped}


def lines(data: Data, folds: int | None = None) -> list[str]:
    """The summary in a few lines, for people.   folds: of a cross-validation, if there is one."""
    s = summary(data)
    fewest, most = s["fewest"], s["most"]
    each = f"{most['images']:,} of each"
    if fewest["images"] != most["images"]:
        each = f"from {fewest['images']:,} ({fewest['class']}) to {most['images']:,} ({most['class']}) of a class"
    names = ", ".join(s["names"]) + (", ..." if s["classes"] > NAMES else "")
    splits = s["splits"]
    c, h, w = s["shape"]
    parts = f"{splits['train']:,} to train, {splits['validation']:,} for validation"
    if folds:
        parts = f"{splits['train'] + splits['validation']:,} in {folds} folds to train and for validation"
    text = [
        f"data: {sum(splits.values()):,} images of {s['classes']:,} classes ({names}), {each}",
        f"splits: {parts}, {splits['test']:,} to test; {'gray' if c == 1 else 'RGB'}, {h} x {w} pixels",
    ]
    if data.excluded:
        images = f"{data.excluded:,} image{'s' * (data.excluded > 1)}"
        text.append(f"data.exclude: {images} left out of training and validation")
    if s["files"]:
        text.append(_files_line(s["files"]))
    return [*text, *_precision_lines(s, folds)]


def _files_line(found: dict[str, Any]) -> str:
    modes = ", ".join(f"{count:,} {mode}" for mode, count in Counter(found["modes"]).most_common())
    (w0, w1, w2), (h0, h1, h2) = found["widths"], found["heights"]
    sizes = f"{w1} x {h1}" if (w0, h0) == (w2, h2) else f"{w0} to {w2} wide (median {w1}) and {h0} to {h2} high ({h1})"
    skipped = f"; {found['skipped']:,} skipped" * bool(found["skipped"])
    return f"files: {modes}; {sizes} pixels{skipped}"


def _precision_lines(s: dict[str, Any], folds: int | None) -> list[str]:
    train, images = s["splits"]["train"], s["splits"]["validation"]
    if not images:
        return []
    images += train if folds else 0
    error = two_standard_errors(images)
    count = f"{images:,} validation image{'s' * (images != 1)}"
    text = f"an accuracy of {AT} on {count} has two standard errors of {error:.3f}"
    if error is None or error <= COARSE:
        return [text]
    return [f"{text}, which is coarse: a smaller difference between two runs says nothing. {_way_out(s, folds)}"]


def _way_out(s: dict[str, Any], folds: int | None) -> str:
    """What gives a finer measure: folds, which score the training images, too, or a larger validation split."""
    train, images = s["splits"]["train"], s["splits"]["validation"]
    all_images, more = two_standard_errors(train + images), round(0.3 * (train + images))
    ways = ["compare several seeds", "or add images"]
    if not folds and s["fewest"]["images"] >= 2 * FOLDS:
        ways.insert(0, f"set data.folds={FOLDS} ({all_images:.3f})")
    elif not folds and more > 1.3 * images:
        ways.insert(0, f"set data.val_share=0.3 ({two_standard_errors(more):.3f})")
    text = ", ".join(ways)
    return text[0].upper() + text[1:]


def examples(data: Data, classes: int, each: int) -> torch.Tensor:
    """Row numbers of training images for a picture: `each` of the first classes, evenly spaced. int64."""
    labels = data.pool.labels[data.train]
    chosen = []
    for label in labels.unique()[:classes]:
        own = data.train[labels == label]
        chosen.append(own[torch.linspace(0, len(own) - 1, min(each, len(own))).round().long()])
    return torch.cat(chosen)
