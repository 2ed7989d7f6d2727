"""Data sets of Hugging Face's `datasets` saved to disk, and Parquet files, with a column of encoded images.

Both are files of Arrow tables, which pyarrow reads: nothing is downloaded, and no code of a data set runs.
"""

import bisect
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from tuner import InputError
from tuner.cache_files import Cache
from tuner.data import Data
from tuner.data.files import image_array, image_splits
from tuner.data.files.image_array import Content, Files
from tuner.data.files.image_file import MAX_PIXELS, BrokenImageError
from tuner.data.tables import table_files
from tuner.data.tables.csv_columns import shortened
from tuner.rules import shown

log = logging.getLogger(__name__)

GROUPS_IN_MEMORY = 4  # row groups of Parquet files: threads decode rows of neighbouring ones
DAMAGE = (OSError, ValueError, KeyError, TypeError, NotImplementedError)  # and pyarrow's own


def load(
    path: str | Path,
    *,
    size: int | Sequence[int],
    cache_dir: str | Path,
    cache_limit: str | None = None,
    image: str | None = None,
    label: str | None = None,
    splits: str | Mapping[str, str] = "auto",
    fit: str = "crop",
    skip_broken: bool = False,
    max_pixels: int = MAX_PIXELS,
    range: int | None = None,
    divide: bool = True,
    val_share: float = 0.125,
    test_share: float = 0.2,
    seed: int = 0,
) -> Data:
    """Labelled images from Arrow or Parquet files, uint8 [N, C, H, W], memory-mapped from `cache_dir`.

    path: a folder that save_to_disk wrote, a .parquet file, or a folder of these.
    image: the column of encoded images (bytes, or a struct of bytes and path); None: the only such column.
    label: the column of labels: a ClassLabel, text or whole numbers; None: the only ClassLabel, otherwise "label".
    splits: see tuner.data.tables.table_files.find. A missing val or test split is drawn from train.
    The other arguments are as in tuner.data.image_folder.load.
    Raises InputError if the files do not match this description, and without pyarrow.
    """
    path = Path(path).expanduser()
    groups = table_files.find(path, splits)
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError("data=huggingface needs pyarrow: pip install 'tuner[datasets]'")
    tables = {split: _table(files) for split, files in groups.items()}
    with _damage(path):  # names and texts in a damaged table need not be text
        image = _image_column(path, tables["train"], image)
        label = _label_column(path, tables["train"], image, label)
        for split, table in tables.items():
            if image not in table.schema.names:
                raise InputError(f"the {split} split of {path} has no column {image!r}, which the train split has")
        texts = {split: table.labels(label) for split, table in tables.items()}
    classes = _classes(tables["train"], label, texts["train"])
    content = Content(partial(_content, path, tables, image), table_files.stamp(groups))
    files = {}
    for split, labels in texts.items():
        if split != "train" and set(labels) == {None}:
            log.warning("the %s split of %s has no labels: it is left out", split, path)
            continue
        names = [f"{split}/{row}" for row, _ in enumerate(labels)]
        files[split] = Files(path, names, _encoded(path, split, labels, classes), content)
    read = partial(
        image_array.load,
        size=size,
        fit=fit,
        cache=Cache.of(cache_dir, cache_limit, "data."),
        skip_broken=skip_broken,
        max_pixels=max_pixels,
        value_range=range,
    )
    if not divide:
        return image_splits.undivided(files, classes, read, fit)
    places = {split: f"the {split} split of {path}" for split in files}
    return image_splits.divided(
        files, classes, read, fit, places=places, val_share=val_share, test_share=test_share, seed=seed
    )


@dataclass(frozen=True)
class _Table:
    """The rows of some files, one after another, in chunks.

    schema: of the first file.   starts: the row number of each chunk.   read: (chunk, column) -> its values.
    """

    schema: Any
    starts: list[int] = field(default_factory=list)
    chunks: list[Callable[[str], Any]] = field(default_factory=list)
    length: int = 0

    def value(self, row: int, column: str) -> Any:
        """A value as a Python object."""
        chunk = bisect.bisect_right(self.starts, row) - 1
        return self.chunks[chunk](column)[row - self.starts[chunk]].as_py()

    def labels(self, column: str) -> list[str | None]:
        """The values of a column of labels as text, or the names of a ClassLabel; None for a missing one."""
        if column not in self.schema.names:
            return [None] * self.length
        names = self.class_names(column)
        labels: list[str | None] = []
        for chunk in self.chunks:
            for value in chunk(column).to_pylist():
                if names is None or value is None:
                    labels.append(None if value is None else str(value))
                elif type(value) is not int or not -1 <= value < len(names):
                    raise InputError(f"label {shown(value)} of column {column} is not one of its {len(names)} classes")
                else:
                    labels.append(None if value == -1 else str(names[value]))  # -1: a test split without labels
        return labels

    def class_names(self, column: str) -> list[str] | None:
        """The names of a ClassLabel, a column of their numbers; None for other columns."""
        try:  # what `datasets` wrote about the columns
            about = json.loads((self.schema.metadata or {})[b"huggingface"])["info"]["features"][column]
            names = about["names"] if about["_type"] == "ClassLabel" else None
        except (ValueError, KeyError, TypeError):
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return None
        return names if len({*names}) == len(names) else None


def _table(files: Sequence[Path]) -> _Table:
    """Open files. Their rows are read later: those of Arrow files are memory-mapped."""
    table: _Table | None = None
    for path in files:
        with _damage(path):
            schema, chunks = _arrow(path) if path.suffix.lower() == ".arrow" else _parquet(path)
            if table is None:
                table = _Table(schema)
            if schema != table.schema:
                raise InputError(f"{path} has other columns than {files[0]}: data.path must name files of one kind")
            starts, length = [], table.length
            for count, _ in chunks:
                starts.append(length)
                length += count
            table = _Table(table.schema, table.starts + starts, table.chunks + [column for _, column in chunks], length)
    assert table is not None  # there is a file
    return table


def _arrow(path: Path) -> tuple[Any, list[tuple[int, Callable[[str], Any]]]]:
    """The schema, and for each chunk its number of rows and a function from a column's name to its values."""
    import pyarrow as pa

    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        if file.read() != b"\xff\xff\xff\xff" + bytes(4):  # the end of a stream, which pyarrow does not insist on
            raise ValueError("it ends too early")
    reader = pa.ipc.open_stream(pa.memory_map(str(path)))
    batches = [batch for batch in reader if batch.num_rows]
    for batch in batches:
        batch.validate(full=True)  # or a damaged file could end the process
    return reader.schema, [(batch.num_rows, batch.column) for batch in batches]


def _parquet(path: Path) -> tuple[Any, list[tuple[int, Callable[[str], Any]]]]:
    import pyarrow.parquet as pq

    file, lock = pq.ParquetFile(path), Lock()

    @lru_cache(GROUPS_IN_MEMORY)
    def read(group: int, column: str) -> Any:
        with _damage(path):
            return file.read_row_group(group, columns=[column]).column(column)

    def one_at_a_time(group: int, column: str) -> Any:  # or two threads would read the same group
        with lock:
            return read(group, column)

    groups = [(file.metadata.row_group(i).num_rows, partial(one_at_a_time, i)) for i in range(file.num_row_groups)]
    return file.schema_arrow, [group for group in groups if group[0]]


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except InputError:
        raise
    except (pa.ArrowException, *DAMAGE) as error:
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())[:300]}): get it again") from error


def _image_column(path: Path, table: _Table, given: str | None) -> str:
    """The name of the column of images."""
    import pyarrow.types as kinds

    def is_encoded(kind: Any) -> bool:
        if kinds.is_struct(kind):
            return any(field.name == "bytes" and is_encoded(field.type) for field in kind)
        return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind))

    columns = [field.name for field in table.schema if is_encoded(field.type)]
    if given is None and len(columns) == 1:
        return columns[0]
    if given is None or given not in columns:
        value = f"data.image={shown(given)} " if given is not None else ""
        raise InputError(
            f"{value}{'must be' if value else 'data.image must name'} a column of {path} that holds image files: "
            f"{shortened(columns) or 'it has none'}; its columns are {shortened(table.schema.names)}"
        )
    return given


def _label_column(path: Path, table: _Table, image: str, given: str | None) -> str:
    """The name of the column of labels."""
    import pyarrow.types as kinds

    def is_label(kind: Any) -> bool:
        if kinds.is_dictionary(kind):
            return is_label(kind.value_type)
        known = (kinds.is_string, kinds.is_large_string, kinds.is_integer, kinds.is_boolean)
        return any(is_kind(kind) for is_kind in known)

    columns = [field.name for field in table.schema if is_label(field.type)]
    class_labels = [name for name in columns if table.class_names(name)]
    default = class_labels[0] if len(class_labels) == 1 else "label"
    chosen = default if given is None else given
    if chosen not in columns or (given is None and len(class_labels) > 1):
        others = [name for name in columns if name != image]
        value = "data.label must name" if given is None else f"data.label={shown(given)} must be"
        raise InputError(
            f"{value} a column of {path} with classes, text or whole numbers: {shortened(others) or 'it has none'}"
        )
    return chosen


def _classes(table: _Table, column: str, labels: Sequence[str | None]) -> tuple[str, ...]:
    """The class names: those of a ClassLabel in its order, others sorted, whole numbers by value."""
    present = {label for label in labels if label is not None}
    names = table.class_names(column)
    if names is not None:
        if absent := [name for name in names if name not in present]:
            log.warning("no training image is of %d of the %d classes: %s", len(absent), len(names), shortened(absent))
        return tuple(name for name in names if name in present)
    return tuple(sorted(present, key=int if all(map(_is_whole, present)) else None))


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _encoded(path: Path, split: str, labels: Sequence[str | None], classes: Sequence[str]) -> torch.Tensor:
    """The labels as indices into `classes`, int64 [N]."""
    index_of = {name: i for i, name in enumerate(classes)}
    for row, label in enumerate(labels):
        if label is None:
            raise InputError(f"row {row} of the {split} split of {path} has no label: fill it in or remove the row")
        if label not in index_of:
            raise InputError(
                f"row {row} of the {split} split of {path} has the label {shown(label)!r}, which no training image "
                f"has: the classes are {shortened(classes, 10)}"
            )
    return torch.tensor([index_of[str(label)] for label in labels], dtype=torch.int64)


def _content(path: Path, tables: Mapping[str, _Table], column: str, name: str) -> bytes:
    """The bytes of an image. name: SPLIT/ROW. Raises BrokenImageError if there are none."""
    split, _, row = name.partition("/")
    with _damage(path):
        value = tables[split].value(int(row), column)
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(content, bytes):
        raise BrokenImageError(path / name, "the table has no bytes of it, and files elsewhere are not read")
    return content
