"""data.exclude: a CSV list of images that are left out of training and validation."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tuner import InputError
from tuner.config import DataConfig
from tuner.data import Data, copies
from tuner.data.tables.csv_text import dialect, existing, rows
from tuner.rules import shown
from tuner.safe_text import from_cell


def load(config: DataConfig) -> Data:
    """The data set of a config, without the images that data.exclude lists."""
    data: Data = config.target.build()
    if config.exclude is not None:
        data = without(data, config.exclude)
    copies.report(data)
    return data


def without(data: Data, file: str | Path) -> Data:
    """A data set whose train and val lack the listed images. The pool, and so its features, and the test split stay.

    file: a CSV file with a column `file` (or `image`), `digest` or both; a row with both means the image with that name
        and content.
    If it has a column `exclude`, only the rows with "yes" there count: audit.csv of tuner.audit has one.
    Raises InputError for a listed image that is not in train or val, and if a class loses all its training images.
    """
    path = existing(file, "data.exclude")
    excluded = torch.zeros(len(data.pool), dtype=torch.bool)
    find = _Finder(data, path.name)
    faults = []
    for line, cells in _listed(path):
        try:
            excluded[find(line, cells.get("file") or cells.get("image", ""), cells.get("digest", ""))] = True
        except InputError as error:
            faults.append(str(error))
    if faults:
        more = f" ({len(faults) - 1} more such line{'s' * (len(faults) > 2)})" if len(faults) > 1 else ""
        raise InputError(faults[0] + more)
    train, val = (split[~excluded[split]] for split in (data.train, data.val))
    left = torch.bincount(data.pool.labels[train], minlength=len(data.classes))
    had = torch.bincount(data.pool.labels[data.train], minlength=len(data.classes))
    if lost := [name for name, now, before in zip(data.classes, left, had, strict=True) if before and not now]:
        raise InputError(
            f"data.exclude={shown(file)} leaves class {lost[0]!r} without training images: keep some of them"
        )
    if len(data.val) and not len(val):
        raise InputError(f"data.exclude={shown(file)} leaves no validation images: keep some of them")
    return replace(data, train=train, val=val, excluded=int(excluded.sum()))


def digest_text(digest: int) -> str:
    """A digest as written in a list: hexadecimal, and never a number for a spreadsheet."""
    return f"{digest % 2**64:#018x}"


def _listed(path: Path) -> list[tuple[int, Mapping[str, str]]]:
    """The rows that exclude an image: (line, cells by column). Raises InputError for a file of another form."""
    table = list(rows(path, dialect(path)))
    columns = [cell.strip() for cell in table[0][1]] if table else []
    if not {"file", "image", "digest"} & set(columns):
        names = shown(", ".join(columns)) or "none"
        raise InputError(f"{path.name} must have a column `file`, `image` or `digest`; it has {names}")
    listed: list[tuple[int, Mapping[str, str]]] = []
    for line, cells in table[1:]:
        row = dict(zip(columns, (from_cell(cell.strip()) for cell in cells), strict=False))
        choice = row.get("exclude", "yes").lower()
        if choice not in ("yes", "no"):
            raise InputError(f"line {line} of {path.name}: exclude={shown(choice)} must be yes or no")
        if choice == "yes":
            listed.append((line, row))
    return listed


class _Finder:
    """Finds the rows of the pool that a line of the list means."""

    def __init__(self, data: Data, list_name: str):
        self.data, self.list_name = data, list_name
        self.by_name: dict[str, list[int]] = {}
        self.by_digest: dict[int, list[int]] = {}
        for row, digest in enumerate(data.pool.digests.tolist()):
            self.by_name.setdefault(data.pool.name(row), []).append(row)
            self.by_digest.setdefault(digest % 2**64, []).append(row)

    def __call__(self, line: int, name: str, digest: str) -> list[int]:
        where = f"line {line} of {self.list_name}"
        if not name and not digest:
            raise InputError(f"{where}: names no image: give its file or its digest, or remove the line")
        if not digest:
            found = self.by_name.get(name, [])
        else:
            try:
                number = int(digest, 16)
            except ValueError as error:
                text = f"{where}: the digest {shown(digest)} must be a hexadecimal number, as audit.csv has it"
                raise InputError(text) from error
            found = [row for row in self.by_digest.get(number, []) if not name or self.data.pool.name(row) == name]
        if not found:
            raise InputError(f"{where}: {shown(name or digest)} {self._why(name, digest)}")
        return found

    def _why(self, name: str, digest: str) -> str:
        if name in self.by_name and digest:
            return "has other pixels than the list says: audit again at this image size, or remove the column `digest`"
        if moved := self.by_digest.get(int(digest, 16)) if digest else None:
            return f"is now {self.data.pool.name(moved[0])}: correct the line or, if its label is right now, remove it"
        if name in [self.data.test.name(row) for row in range(len(self.data.test))]:
            return "is a test image, and only training and validation images can be excluded: remove the line"
        like = self.data.pool.name(0)
        return f"is not among the training and validation images, which have names such as {like}: correct or remove it"
