"""Labelled image files, some of them in splits of their own, as a data set. The missing splits are drawn."""

from collections.abc import Callable, Mapping, Sequence

import torch

from tuner import InputError
from tuner.data import Data, Samples, check_classes, from_splits, hold_out_rows, split, without_splits
from tuner.data.files.image_array import Files

Read = Callable[[Sequence[Files]], list[tuple[Samples, torch.Tensor]]]  # tuner.data.files.image_array.load


def undivided(files: Mapping[str, Files], classes: Sequence[str], read: Read, fit: str) -> Data:
    """A data set without a validation split, see tuner.data.without_splits.

    files: of the splits train and, if they have images of their own, val and test.   read: decodes files.
    """
    pool = _together(files)
    parts = [pool, files["test"]] if "test" in files else [pool]
    (images, _), *tests = read(parts)
    return without_splits(images, tests[0][0] if tests else None, classes, fit=fit)


def divided(
    files: Mapping[str, Files],
    classes: Sequence[str],
    read: Read,
    fit: str,
    *,
    places: Mapping[str, str],
    val_share: float,
    test_share: float,
    seed: int,
) -> Data:
    """A data set whose missing splits are drawn from the training files: test by a fixed seed, validation by `seed`.

    places: the names of the splits in messages.   The other arguments are as in `undivided`.
    Raises InputError for a class with too few images, and for a split in which no readable image is left.
    """
    train = files["train"]
    drawn = [name for name, key in (("validation", "val"), ("test", "test")) if key not in files]
    if drawn:
        check_classes(train.labels, classes, parts=["training", *drawn])
    files = dict(files)
    if "test" not in files:
        rows = hold_out_rows(train.labels, classes, test_share=test_share, parts=["training", *drawn])
        files["train"], files["test"] = map(train.rows, rows)
    (images, numbers), (tests, _) = read([_together(files), files["test"]])
    if not len(tests):
        raise InputError(f"{places.get('test', places['train'])} has no readable image to test on: add some")
    if "val" not in files:
        return split(images, tests, classes, val_share=val_share, seed=seed, fit=fit)
    is_val = numbers >= len(files["train"].names)
    _check_not_empty(places["train"], images.labels[~is_val], classes)
    _check_not_empty(places["val"], images.labels[is_val])
    return from_splits(images, tests, (~is_val).nonzero().flatten(), is_val.nonzero().flatten(), classes, fit=fit)


def _together(files: Mapping[str, Files]) -> Files:
    """The training files, followed by those for validation."""
    train = files["train"]
    if "val" not in files:
        return train
    labels = torch.cat([train.labels, files["val"].labels])
    return Files(train.root, [*train.names, *files["val"].names], labels, train.content)


def _check_not_empty(place: str, labels: torch.Tensor, classes: Sequence[str] = ()) -> None:
    """Raises InputError if broken files leave no image in a split or, if classes are given, none of a class."""
    for name, count in zip(classes, torch.bincount(labels, minlength=len(classes)).tolist(), strict=bool(classes)):
        if not count:
            raise InputError(f"class {name!r} has no readable image in {place}: add some or remove its folder")
    if not len(labels):
        raise InputError(f"{place} has no readable image: add some")
