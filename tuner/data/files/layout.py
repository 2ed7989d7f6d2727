"""Which folders of an image folder are its splits: found by their names, or given in `data.splits`."""

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from tuner import InputError
from tuner.data.files.image_file import check_name, has_image, is_folder, is_image
from tuner.data.tables.csv_columns import shortened
from tuner.rules import shown

log = logging.getLogger(__name__)

SPLITS = {  # split -> words that name it
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validate", "validation", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation", "holdout"),
}
CONTENT = {  # words that say nothing: train_images, seg_train, raw-img
    *("set", "sets", "split", "data", "dataset", "folder", "seg", "raw", "resized", "cropped", "full", "final", "new"),
    *("image", "images", "img", "imgs", "photo", "photos", "pic", "pics", "picture", "pictures", "jpg", "jpeg", "png"),
}
UNLABELLED = {"pred", "predict", "prediction", "predictions", "unlabeled", "unlabelled", "submission"}
SPLIT_OF = {
    word + ending: split
    for split, words in SPLITS.items()
    for word in words
    for ending in ("", "set", "data", "images")
}
WAY_OUT = (
    "put its images into one folder per class, or list them in a CSV file with columns image,label and use data=csv"
)


def find(root: Path, splits: Any) -> dict[str, Path]:
    """The folder of each split, each with one folder per class; "train" alone if the data are not divided.

    root: a folder.
    splits: auto, by their names; none, every folder in root is a class; or split -> folder relative to root.
    Raises InputError if the folders do not match, or if it is not clear what they are.
    """
    if isinstance(splits, Mapping):
        return _given(root, splits)
    if splits not in ("auto", "none"):
        raise InputError(f"data.splits={shown(splits)} must be auto, none, or folders, as in {{train: A, test: B}}")
    return {"train": root} if splits == "none" else _by_name(_unwrapped(root))


def split_names(names: Sequence[str]) -> dict[str, str]:
    """Name -> split, for the names that look like one: train, Training_set, seg_test, images-val, test1.

    Other words are allowed if they are those of another split, as in cars_train and cars_test: test_tube is no split.
    """
    parsed = {name: found for name in names if (found := _parse(name))}
    return {
        name: split
        for name, (split, rest) in parsed.items()
        if not rest or any(other == rest and another != split for another, other in parsed.values())
    }


def _parse(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The split that one word of a name stands for, and its other words without CONTENT."""
    words = _words(name)
    splits = {SPLIT_OF[word] for word in words if word in SPLIT_OF}
    rest = tuple(word for word in words if word not in SPLIT_OF and word not in CONTENT)
    return (splits.pop(), rest) if len(splits) == 1 else None


def _words(name: str) -> list[str]:
    """The words of a name, in lower case: TrainSet_2 has train and set."""
    spaced = re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return re.findall(r"[^\W\d_]+", re.sub(r"hold[\W_]out", "holdout", spaced))


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and those that macOS adds to archives.

    Raises InputError if it cannot be read, and for a name that is not valid UTF-8.
    """
    names = [entry.name for entry in _entries(folder) if is_folder(entry)]
    for name in names:
        check_name(folder / name)
    return [folder / name for name in sorted(names)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as scan:
            return [entry for entry in scan if not entry.name.startswith((".", "__MACOSX"))]
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}") from error


def _given(root: Path, splits: Mapping[Any, Any]) -> dict[str, Path]:
    """The folders that data.splits names."""
    for split, name in splits.items():
        if split not in SPLITS:
            raise InputError(f"data.splits has the split {shown(split)}; the splits are train, val and test")
        path = PurePosixPath(name) if isinstance(name, str) and name and "\0" not in name else PurePosixPath("..")
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"data.splits.{split}={shown(name)} must be a folder in {root}, relative to it")
        if not (root / path).is_dir():
            raise InputError(f"data.splits.{split}={shown(name)}: there is no folder {root / path}")
        if not subfolders(root / path):
            raise InputError(f"data.splits.{split}={shown(name)} has no class folders: {WAY_OUT}")
    if "train" not in splits:
        raise InputError("data.splits has no train: name the folder to train on, as in {train: A, test: B}")
    folders = {split: root / splits[split] for split in SPLITS if split in splits}
    for split, folder in folders.items():
        for other, another in folders.items():
            if split != other and folder.resolve() in (another.resolve(), *another.resolve().parents):
                raise InputError(f"data.splits.{split} and data.splits.{other} must not share a folder, got {folder}")
    return folders


def _unwrapped(root: Path) -> Path:
    """The folder below root that has the classes or splits, if there is nothing else on the way to it."""
    folder = root
    while (only := _only_folder(folder)) and only.name not in split_names([only.name]):
        folder = only
    if folder == root or (not only and len(subfolders(folder)) < 2):
        return root  # a single class, which may have folders
    inside = folder.relative_to(root)
    log.info("only %s/ in %s has images, so its folders are used (data.splits=none: it is a class)", inside, root)
    return folder


def _only_folder(folder: Path) -> Path | None:
    """The only folder in a folder that has images, if no image lies beside it."""
    if any(is_image(entry.name) and not is_folder(entry) for entry in _entries(folder)):
        return None
    with_images = list(islice(filter(has_image, subfolders(folder)), 2))
    return with_images[0] if len(with_images) == 1 else None


def _by_name(root: Path) -> dict[str, Path]:
    folders = subfolders(root)
    split_of = split_names([path.name for path in folders])
    inner_of = {path: _inner(path) for path in folders}
    train = [path for path in folders if split_of.get(path.name) == "train" and subfolders(inner_of[path])]
    if not train:
        _check_classes(root, folders, split_of)
        return {"train": root}
    found: dict[str, Path] = {}
    for path, inner in inner_of.items():
        split = split_of.get(path.name)
        if (_has_such_words(path.name) and not subfolders(inner)) or (split is None and not has_image(path)):
            _leave_out(path)
        elif split is None or split in found:
            why = f"is not named like a split ({', '.join(SPLITS)})" if split is None else f"is a second {split} split"
            raise InputError(
                f"{train[0].name}/ divides {root} into splits, but {path.name}/ {why}: move it elsewhere, or name the "
                f"splits, as in 'data.splits={{train: {train[0].name}}}'"
            )
        else:
            found[split] = inner
    names = ", ".join(f"{path.relative_to(root)} ({split})" for split, path in found.items())
    log.info("%s is divided into splits: %s", root, names)
    return found


def _has_such_words(name: str) -> bool:
    """Whether a word stands for a split or for images without labels, as in seg_pred and test-multiple_fruits."""
    return any(word in SPLIT_OF or word in UNLABELLED for word in _words(name))


def _inner(folder: Path) -> Path:
    """A folder nested once, as in seg_train/seg_train or test/images; otherwise the folder itself."""
    only = _only_folder(folder)
    if only and (only.name.casefold() == folder.name.casefold() or CONTENT.issuperset(_words(only.name))):
        return only
    return folder


def _leave_out(folder: Path) -> None:
    """Say that a folder beside the splits has no labelled images."""
    if has_image(folder):
        log.warning(
            "%s has no class folders, so its images have no labels: it is left out; `python -m tuner.predict RUN %s` "
            "predicts them",
            folder,
            folder,
        )
    else:
        log.info("%s has no images and is left out", folder)


def _check_classes(root: Path, folders: Sequence[Path], split_of: Mapping[str, str]) -> None:
    """Raises InputError if folders that would be classes may be splits or the like."""
    alike = [path.name for path in folders if path.name in split_of]
    if alike and (len(alike) > 1 or len(folders) == 1 or subfolders(root / alike[0])):
        train = [name for name in alike if split_of[name] == "train"]
        fault = (
            f"{train[0]}/ has no class folders: {WAY_OUT}"
            if train
            else (
                "there is no training split: add one, or name its folder, as in "
                f"'data.splits={{train: FOLDER, {split_of[alike[0]]}: {alike[0]}}}'"
            )
        )
        raise InputError(
            f"in {root}, {', '.join(alike)} {'are' if len(alike) > 1 else 'is'} named like splits, but {fault}; or set "
            "data.splits=none if every folder is a class"
        )
    if alike:
        log.warning(
            "%s/ in %s is taken for a class, as it has no class folders and no other folder is named like a split "
            "(data.splits=none: without this warning)",
            alike[0],
            root,
        )
    _check_levels(root, folders)


def _check_levels(root: Path, folders: Sequence[Path]) -> None:
    """Raises InputError if the folders in root, or in two classes, have the same names: they may be other splits."""
    first_with: dict[str, Path] = {}
    shared = Counter[tuple[Path, Path]]()
    for folder in (root, *folders):
        for path in subfolders(folder):
            first = first_with.setdefault(path.name, folder)
            shared[first, folder] += first != folder
    for (first, folder), count in shared.items():
        if count > 1:
            names = [path.name for path in subfolders(folder) if first_with[path.name] == first]
            raise InputError(
                f"{first} and {folder} both have the folders {shortened(names, 3)}: if these are the classes, name one "
                f"as data.root, or both as splits, as in 'data.splits={{train: A, test: B}}'; if the folders in {root} "
                "are the classes, set data.splits=none"
            )
