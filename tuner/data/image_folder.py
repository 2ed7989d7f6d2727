"""A folder of images: a folder a class in it or, in train/, test/ and maybe val/, in each of these."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from tuner import InputError
from tuner.data import Data, check_classes, held_out, image_array, joined, split, undivided
from tuner.data.csv_table import shortened
from tuner.data.image_array import Files
from tuner.data.image_file import EXTENSIONS, check_name, names

log = logging.getLogger(__name__)

PARTS = {  # folder -> split
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val"},
}


def load(
    root: str | Path,
    *,
    size: int | Sequence[int],
    cache_dir: str | Path,
    fit: str = "crop",
    skip_broken: bool = False,
    divide: bool = True,
    val_share: float = 0.125,
    test_share: float = 0.2,
    seed: int = 0,
) -> Data:
    """Images below the folders of their classes, uint8 [N, C, H, W], memory-mapped from `cache_dir`.

    root: holds a folder for each class or, for each split, train/, test/ and val/ (training/, testing/, valid/,
        validation/), with a folder for each class in it. Of what isn't there val is drawn from train, and test held out
        of train.
    size: of RGB squares, in pixels; or [C, H, W].   fit: how a file gets that shape, see tuner.data.image_file.read.
    skip_broken: files that are no image, or none that is whole, are left out with a warning.
    divide: False: nothing is drawn or held out, see tuner.data.undivided.
    val_share: the share of the images that are not test which `seed` draws for validation.
    test_share: held out, the same images for every seed.
    Raises InputError where the folders are not as said here, or a file is broken.
    """
    root = Path(root).expanduser()
    splits = _splits(root)
    train_folder = splits.get("train", root)
    classes = _classes(train_folder, least=2 if divide else 1)
    pool = _files(root, train_folder, classes)
    val, test = (_files(root, splits[part], classes) if part in splits else None for part in ("val", "test"))
    if divide:
        drawn = [name for name, given in (("validation", val), ("test", test)) if given is None]
        if drawn:
            check_classes(pool.labels, classes, parts=["training", *drawn])
        if test is None:
            rows = held_out(pool.labels, classes, test_share=test_share, parts=["training", *drawn])
            pool, test = map(pool.rows, rows)
    both = pool if val is None else Files(root, [*pool.names, *val.names], torch.cat([pool.labels, val.labels]))
    files = [both] if test is None else [both, test]
    arrays = image_array.load(files, size=size, fit=fit, cache_dir=cache_dir, skip_broken=skip_broken)
    (images, numbers), tests = arrays[0], arrays[-1][0]
    if not divide:
        return undivided(images, None if test is None else tests, classes, fit)
    if not len(tests):
        raise InputError(f"no image to test on is whole in {splits.get('test', root)}: add some")
    if val is None:
        return split(images, tests, classes, val_share=val_share, seed=seed, fit=fit)
    is_val = numbers >= len(pool.names)
    _check_whole(train_folder, images.labels[~is_val], classes)
    _check_whole(splits["val"], images.labels[is_val])
    return joined(images, tests, (~is_val).nonzero().flatten(), is_val.nonzero().flatten(), classes, fit)


def _splits(root: Path) -> dict[str, Path]:
    """The folders of the splits, or nothing where the folders in root are the classes themselves."""
    try:
        exists, is_folder = root.exists(), root.is_dir()
    except OSError as error:  # such as a folder above it that others may not enter
        raise InputError(f"data.root={root} cannot be read: {error.strerror}") from error
    if not is_folder:
        what = "is a file" if exists else f"does not exist (seen from {Path.cwd()})"
        raise InputError(f"data.root={root} {what}: name a folder with a folder of images for each class")
    folders = _folders(root)
    train = next((path for path in folders if PARTS.get(path.name.lower()) == "train"), None)
    if train is None or not _folders(train):
        if len(folders) > 1 and all(path.name.lower() in PARTS for path in folders):
            lacks = "none is train/, which" if train is None else f"{train.name}/ has no folders: it"
            raise InputError(
                f"{root} has the folders {', '.join(path.name for path in folders)}, by their names splits and no "
                f"classes, and {lacks} needs one for each class"
            )
        return {}
    splits: dict[str, Path] = {}
    for path in folders:
        part = PARTS.get(path.name.lower())
        if part is None or part in splits:
            why = f"is none of {', '.join(PARTS)}" if part is None else f"is {part}, as {splits[part].name} is"
            raise InputError(
                f"{root} has {train.name}/ with folders of classes, and beside it {path.name}/, which {why}: move it"
            )
        splits[part] = path
    log.info("%s has folders of splits: %s", root, ", ".join(f"{path.name} ({part})" for part, path in splits.items()))
    return splits


def _folders(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}") from error
    for path in found:
        check_name(path)
    return found


def _classes(folder: Path, least: int) -> tuple[str, ...]:
    """The names of its folders, sorted; where all are whole numbers, by their value."""
    found = [path.name for path in _folders(folder)]
    if not found:
        n = len(names(folder))
        has = f"has {n:,} images and no folders" if n else "has no folders"
        raise InputError(f"{folder} {has}: it needs a folder for each class, with that class's images")
    if all(name.isdecimal() for name in found):
        found.sort(key=int)
    if len(found) < least:
        raise InputError(f"{folder} has one class only, {found[0]!r}: give images of at least two, a folder each")
    return tuple(found)


def _files(root: Path, folder: Path, classes: Sequence[str]) -> Files:
    """The image files of a split, sorted, their names seen from root."""
    places = {name: i for i, name in enumerate(classes)}
    found, labels, prefix = names(folder), [], folder.relative_to(root).as_posix() + "/"
    for name in found:
        top, slash, _ = name.partition("/")
        if not slash:
            raise InputError(f"{name} lies directly in {folder}: move each image into the folder of its class")
        if top not in places:
            raise InputError(
                f"{folder / top} is the folder of no class; the classes are {shortened(classes, 10)}: rename it, or "
                "give that class images to train on"
            )
        labels.append(places[top])
    if not found:
        raise InputError(f"there is no image below {folder}: known by their names are {', '.join(sorted(EXTENSIONS))}")
    prefix = "" if folder == root else prefix
    return Files(root, [prefix + name for name in found], torch.tensor(labels, dtype=torch.int64))


def _check_whole(folder: Path, labels: torch.Tensor, classes: Sequence[str] = ()) -> None:
    """That broken files have left some image and, where classes are given, some of each."""
    for name, count in zip(classes, torch.bincount(labels, minlength=len(classes)).tolist(), strict=bool(classes)):
        if not count:
            raise InputError(f"class {name!r} has no image in {folder} that is whole: add some or remove its folder")
    if not len(labels):
        raise InputError(f"no image in {folder} is whole: add some")
