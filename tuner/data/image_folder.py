"""A folder of images with one folder per class, or with train/, test/ and val/ that have one folder per class."""

import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from tuner import InputError
from tuner.cache_files import Cache
from tuner.data import Data
from tuner.data.files import archive, image_array, image_splits, layout
from tuner.data.files.image_array import Files
from tuner.data.files.image_file import EXTENSIONS, MAX_PIXELS, has_image, names
from tuner.data.tables import table_files
from tuner.data.tables.csv_columns import shortened

log = logging.getLogger(__name__)


def load(
    root: str | Path,
    *,
    size: int | Sequence[int],
    cache_dir: str | Path,
    cache_limit: str | None = None,
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
    splits: what the folders in root are, see tuner.data.files.layout.find.
    size: side of RGB squares in pixels, or [C, H, W].   fit: see tuner.data.files.image_file.decode.
    cache_limit: the size that the cache may have, such as 20GB, see tuner.cache_files.Cache; None: any.
    skip_broken: leave files that cannot be decoded out, with a warning.
    max_pixels: of a file; larger ones are refused, or skipped as broken ones are.
    range: the value of 16-bit files that is white; None: 65535.
    divide: False draws no splits, see tuner.data.without_splits.
    val_share: the share of the images outside the test split that `seed` draws for validation.
    test_share: held out, the same images for every seed.
    Raises InputError if the folders do not match this description, or for a broken file.
    """
    cache = Cache.of(cache_dir, cache_limit, "data.")
    root = _existing(root, cache)
    folders = layout.find(root, splits)
    classes = _classes(folders["train"], least=2 if divide else 1)
    files = {split: _files(root, folder, classes) for split, folder in folders.items()}
    read = partial(
        image_array.load,
        size=size,
        fit=fit,
        cache=cache,
        skip_broken=skip_broken,
        max_pixels=max_pixels,
        value_range=range,
    )
    places = {split: str(folder) for split, folder in folders.items()}
    if not divide:
        return image_splits.undivided(files, classes, read, fit)
    return image_splits.divided(
        files, classes, read, fit, places=places, val_share=val_share, test_share=test_share, seed=seed
    )


def _existing(root: str | Path, cache: Cache) -> Path:
    """The folder, or that of an unpacked archive. Raises InputError if there is none."""
    root = Path(root).expanduser()
    try:
        exists, is_folder = root.exists(), root.is_dir()
    except OSError as error:  # no permission for a folder above it, for example
        raise InputError(f"data.root={root} cannot be read: {error.strerror}") from error
    if exists and not (is_folder and has_image(root)) and table_files.is_table(root):
        raise InputError(f"data.root={root} has tables instead of image files: use data=huggingface data.path={root}")
    if is_folder:
        return root
    if root.is_file() and (folder := archive.unpacked(root, cache)):
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
    alike: dict[str, str] = {}
    for name in classes:
        if (first := alike.setdefault(_plain(name), name)) != name:
            log.warning(
                "the classes %r and %r in %s differ only in case or separators: are they one?", first, name, folder
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
    present = set(labels)
    if missing := [name for name, i in index_of.items() if i not in present]:
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
        "that class, or leave the split out by naming the others in data.splits, as in '{train: FOLDER}'"
    )


def _plain(name: str) -> str:
    """A name without case and separators; the name itself if nothing is left."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", name)).casefold() or name
