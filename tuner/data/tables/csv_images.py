"""A CSV table of labels and image files."""

import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from tuner import InputError
from tuner.data import hold_out_rows
from tuner.data.files.image_array import Files
from tuner.data.files.image_file import EXTENSIONS
from tuner.data.tables import csv_labels
from tuner.data.tables.csv_columns import NUMBER, Layout, shortened

log = logging.getLogger(__name__)

FEW = 16  # columns: a table with more may hold pixels
PROBE = 100  # rows whose files are looked for, to explain where they are


def column_of(table: Layout, image: str | int | None, option: str = "data.") -> int | None:
    """The index of the column of image files; None if the columns are pixels.

    image: its name, or its number if there is no header. None: in a table of few columns, the only one whose first cell
        ends as image files do; or the only one besides the label and the id, or besides the label, if it does not hold
        numbers.
    option: what stands before the names of options in messages.
    Raises InputError for a column that does not exist.
    """
    others = [i for i in range(len(table.columns)) if i not in table.label]
    if image is not None:
        index_of = {table.columns[i]: i for i in others}
        if str(image) not in index_of:
            raise InputError(
                f"{option}image={image} must be a column of {table.name} other than the label: {shortened([*index_of])}"
            )
        return index_of[str(image)]
    _, first = next(table.data_rows(), (0, []))
    if len(first) != len(table.columns):
        return None
    named = [i for i in others if Path(first[i].strip()).suffix.lower() in EXTENSIONS and i != table.id]
    candidates, why = named, "its first cell ends as image files do"
    if len(named) != 1 or len(others) > FEW:
        candidates, why = list(table.pixels) or others, "it is the only other column and holds no numbers"
    if len(candidates) != 1 or not first[candidates[0]].strip() or NUMBER.fullmatch(first[candidates[0]].strip()):
        return None
    log.info("%s: column %r names image files (%s)", table.name, table.columns[candidates[0]], why)
    return candidates[0]


class Place:
    """Where the files of a table lie.

    folder: that the names are relative to; None: the table's own.   suffix: of names that have none, as ".jpg".
    option: what stands before the names of these options in messages.
    """

    def __init__(self, folder: str | Path | None = None, suffix: str | None = None, option: str = "data."):
        if folder is not None and not isinstance(folder, str | Path):
            raise InputError(f"{option}folder={folder} must be the path of a folder")
        if suffix is not None and (not isinstance(suffix, str) or suffix.lower() not in EXTENSIONS):
            raise InputError(f"{option}suffix={suffix} must be one of {', '.join(sorted(EXTENSIONS))}")
        self.option = option
        self.suffix = suffix or ""
        self.folder = Path(folder).expanduser() if folder else None

    def root(self, table: Layout) -> Path:
        """The folder that the names are relative to. Raises InputError if it was given and there is none."""
        if self.folder is None:
            return table.path.parent
        if not _exists(self.folder):
            raise InputError(
                f"there is no folder {self.folder} (relative to {Path.cwd()}): {self.option}folder names it"
            )
        return self.folder

    def has(self, table: Layout, name: str) -> bool:
        """Whether a name is that of a file."""
        suffix = "" if Path(name).suffix.lower() in EXTENSIONS else self.suffix
        return bool(name) and _is_file(self.root(table) / (name + suffix))

    def names(self, table: Layout, names: list[str]) -> list[str]:
        """The paths relative to the folder that these names stand for.

        Raises InputError for addresses, and if none of the first names is a file, with what would find them.
        """
        if web := next((name for name in names if name.lower().startswith(("http://", "https://"))), None):
            raise InputError(
                f"{table.name} names addresses ({web[:80]}): download the images into a folder, and set "
                f"{self.option}folder to it"
            )
        root = self.root(table)
        if any("\\" in name for name in names) and not any(_exists(root / name) for name in names[:PROBE]):
            log.info(r"%s: \ in the names of files is read as /", table.name)
            names = [name.replace("\\", "/") for name in names]
        names = [name if Path(name).suffix.lower() in EXTENSIONS else name + self.suffix for name in names]
        if not any(_exists(root / name) for name in islice(names, PROBE)):
            raise InputError(self._lost(table, root, names[0]))
        return names

    def _lost(self, table: Layout, root: Path, name: str) -> str:
        """Why a file is not found, and which options find it."""
        where = f"{table.name} names {name[:200]!r}, but there is no file {str(root / name)[:400]}"
        suffixes = ["", *(s for suffix in sorted(EXTENSIONS) for s in (suffix, suffix.upper()))]
        for folder in (root, *_folders(root), root.parent):
            for candidate in (name, Path(name).name):
                for suffix in suffixes if Path(name).suffix.lower() not in EXTENSIONS else ("",):
                    if _exists(found := folder / (candidate + suffix)):
                        options = [f"{self.option}folder={folder}"] * (folder != table.path.parent)
                        options += [f"{self.option}suffix={suffix.lower()}"] * bool(suffix)
                        cut = ["leave the folders out of the names"] * (candidate != name)
                        steps = [f"set {' '.join(options)}"] * bool(options) + cut
                        return f"{where}; there is {found}: {' and '.join(steps)}"
        folder_option, suffix_option = (self.option + name for name in ("folder", "suffix"))
        return (
            f"{where}: set {folder_option} to the folder that the names are relative to, and {suffix_option} if they "
            "lack .jpg"
        )


def parts(
    table: Layout,
    test_table: Layout | None,
    column: int,
    classes: Sequence[str] | None,
    test_share: float | None,
    place: Place,
) -> tuple[list[Files], tuple[str, ...]]:
    """([files of the pool, files of the test split], class names). Raises InputError, which names the line.

    test_share: held out if there is no test_table; None holds nothing out, and there is no test split.
    """
    texts, files = read(table, column, place)
    names = csv_labels.infer_classes(table, texts) if classes is None else csv_labels.check_names(classes)
    by_index = classes is not None
    pool = Files(place.root(table), files, csv_labels.encode(table, texts, names, by_index=by_index))
    if test_table is None:
        if test_share is None:
            return [pool], names
        rows, test_rows = hold_out_rows(pool.labels, names, test_share=test_share)
        return [pool.rows(rows), pool.rows(test_rows)], names
    texts, files = read(test_table, _same_column(table, test_table, column), place)
    labels = csv_labels.encode(test_table, texts, names, by_index=by_index)
    return [pool, Files(place.root(test_table), files, labels)], names


def _same_column(table: Layout, test_table: Layout, column: int) -> int:
    if table.columns[column] not in test_table.columns:
        raise InputError(
            f"{test_table.name} has no column {table.columns[column]!r}, but {table.name} has: rename the column"
        )
    return test_table.columns.index(table.columns[column])


def read(table: Layout, column: int, place: Place) -> tuple[list[str], list[str]]:
    """The labels as written, if the table has them, and the file names relative to the folder."""
    texts, files = [], []
    for line, cells in table.full_rows():
        if table.label:
            texts.append(table.label_of(line, cells))
        file = cells[column].strip()
        if not file:
            raise InputError(f"line {line} of {table.name} names no file: fill it in or remove the line")
        files.append(file)
    return texts, place.names(table, files)


def _is_file(path: Path) -> bool:
    return _exists(path) and path.is_file()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or has a null byte: reading it says so
        return False


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        return []
