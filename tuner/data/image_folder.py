"""A folder of images with one folder per class, or with train/, test/ and val/ that have one folder per class."""

import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tuner import InputError
from tuner.data import (
    Data,
    archive,
    check_classes,
    from_splits,
    hold_out_rows,
    image_array,
    layout,
    split,
    without_splits,
)
from tuner.data.csv_table import shortened
from tuner.data.image_array import Files
from tuner.data.image_file import EXTENSIONS, MAX_PIXELS, names

log = logging.getLogger(__name__)


def load(
    root: str | Path,
    *,
    size: int | Sequence[int],
    cache_dir: str | Path,
    fit: str = "crop",
    skip_broken: bool = False,
    max_pixels: int = MAX_PIXELS,
    range: int | None = None,
    splits: str | Mapping[str, str] = "auto",
    divide: bool = True,
    val_share: float = 0.125,
    test_share: float = 0.2,
    seed: int = 0,
) -> Data:
    """Images in folders named after their classes, uint8 [N, C, H, W], memory-mapped from `cache_dir`.

    root: has one folder per class; or has train/ and optionally test/ and val/, each with one folder per class. A
        missing val/ or test/ is drawn from train/. Or a .zip or .tar(.gz, .xz, .bz2) of such a folder.
    splits: what the folders in root are, see tuner.data.layout.find.
    size: side of RGB squares in pixels, or [C, H, W].   fit: see tuner.data.image_file.decode.
    skip_broken: leave files that cannot be decoded out, with a warning.
    max_pixels: of a file; larger ones are refused, or skipped as broken ones are.
    range: the value of 16-bit files that is white; None: 65535.
    divide: False draws no splits, see tuner.data.without_splits.
    val_share: the share of the images outside the test split that `seed` draws for validation.
    test_share: held out, the same images for every seed.
    Raises InputError if the folders do not match this description, or for a broken file.
    """
    root = _existing(root, Path(cache_dir).expanduser())
    folders = layout.find(root, splits)
    classes = _classes(folders["train"], least=2 if divide else 1)
    pool = _files(root, folders["train"], classes)
    val, test = (_files(root, folders[split], classes) if split in folders else None for split in ("val", "test"))
    if divide:
        drawn = [name for name, part in (("validation", val), ("test", test)) if part is None]
        if drawn:
            check_classes(pool.labels, classes, parts=["training", *drawn])
        if test is None:
            rows = hold_out_rows(pool.labels, classes, test_share=test_share, parts=["training", *drawn])
            pool, test = map(pool.rows, rows)
    both = pool if val is None else Files(root, [*pool.names, *val.names], torch.cat([pool.labels, val.labels]))
    files = [both] if test is None else [both, test]
    arrays = image_array.load(
        files,
        size=size,
        fit=fit,
        cache_dir=cache_dir,
        skip_broken=skip_broken,
        max_pixels=max_pixels,
        value_range=range,
    )
    (images, numbers), tests = arrays[0], arrays[-1][0]
    if not divide:
        return without_splits(images, None if test is None else tests, classes, fit)
    if not len(tests):
        raise InputError(f"{folders.get('test', root)} has no readable image to test on: add some")
    if val is None:
        return split(images, tests, classes, val_share=val_share, seed=seed, fit=fit)
    is_val = numbers >= len(pool.names)
    _check_not_empty(folders["train"], images.labels[~is_val], classes)
    _check_not_empty(folders["val"], images.labels[is_val])
    return from_splits(images, tests, (~is_val).nonzero().flatten(), is_val.nonzero().flatten(), classes, fit)


def _existing(root: str | Path, cache_dir: Path) -> Path:
    """The folder, or that of an unpacked archive. Raises InputError if there is none."""
    root = Path(root).expanduser()
    try:
        exists, is_folder = root.exists(), root.is_dir()
    except OSError as error:  # no permission for a folder above it, for example
        raise InputError(f"data.root={root} cannot be read: {error.strerror}") from error
    if is_folder:
        return root
    if root.is_file() and (folder := archive.unpacked(root, cache_dir)):
        return folder
    what = "is a file" if exists else f"does not exist (relative to {Path.cwd()})"
    raise InputError(f"data.root={root} {what}: name a folder that has one folder of images per class")


def _classes(folder: Path, least: int) -> tuple[str, ...]:
    """The names of the class folders, sorted; by value if all are whole numbers."""
    classes = [path.name for path in layout.subfolders(folder)]
    if not classes:
        n = len(names(folder))
        raise InputError(f"{folder} has {f'{n:,} images and ' if n else ''}no folders: {layout.WAY_OUT}")
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    if len(classes) < least:
        raise InputError(
            f"{folder} has only one class, {classes[0]!r}: add a folder of images for each other class; or, if "
            f"{classes[0]}/ has images of several classes, {layout.WAY_OUT}"
        )
    return tuple(classes)


def _files(root: Path, folder: Path, classes: Sequence[str]) -> Files:
    """The image files of a split, sorted, with names relative to root. Warns of classes without images."""
    index_of = {name: i for i, name in enumerate(classes)}
    files, labels = names(folder), []
    for name in files:
        top, slash, _ = name.partition("/")
        if not slash:
            raise InputError(f"{name} lies directly in {folder}: move each image into the folder of its class")
        if top not in index_of:
            raise InputError(_unknown_class(folder / top, classes))
        labels.append(index_of[top])
    if not files:
        raise InputError(f"there is no image in {folder}: image files end in {', '.join(sorted(EXTENSIONS))}")
    if missing := [name for name, i in index_of.items() if i not in {*labels}]:
        log.warning("%s has no images of %d of %d classes: %s", folder, len(missing), len(classes), shortened(missing))
    prefix = "" if folder == root else folder.relative_to(root).as_posix() + "/"
    return Files(root, [prefix + name for name in files], torch.tensor(labels, dtype=torch.int64))


def _unknown_class(folder: Path, classes: Sequence[str]) -> str:
    """The message about a folder in a split that is none of the training split's classes."""
    similar = [name for name in classes if _plain(name) == _plain(folder.name)]
    if similar:
        return (
            f"{folder} differs from the class {similar[0]!r} of the training split only in case, spaces or other "
            "separators: rename one"
        )
    return (
        f"{folder} is not a class folder; the classes are {shortened(classes, 10)}: rename it, add training images of "
        "that class, or leave the split out by naming the others, as in 'data.splits={train: train}'"
    )


def _plain(name: str) -> str:
    """A name without case and separators."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", name)).casefold()


def _check_not_empty(folder: Path, labels: torch.Tensor, classes: Sequence[str] = ()) -> None:
    """Raises InputError if broken files leave no image in a folder or, if classes are given, none of a class."""
    for name, count in zip(classes, torch.bincount(labels, minlength=len(classes)).tolist(), strict=bool(classes)):
        if not count:
            raise InputError(f"class {name!r} has no readable image in {folder}: add some or remove its folder")
    if not len(labels):
        raise InputError(f"{folder} has no readable image: add some")
