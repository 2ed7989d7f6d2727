"""Labels of a CSV table as class names and class indices."""

from collections.abc import Sequence
from decimal import Decimal

import torch

from tuner import InputError
from tuner.data.tables.csv_columns import NUMBER, Layout, shortened


def check_names(classes: Sequence[str]) -> tuple[str, ...]:
    """The names in data.classes. Raises InputError unless it is a list of different names."""
    names = tuple(str(name) for name in classes)
    if isinstance(classes, str) or not names or len(set(names)) < len(names):
        raise InputError(f"data.classes must be a list of different names, such as [cat,dog], got {classes!r}")
    return names


def infer_classes(table: Layout, texts: Sequence[str]) -> tuple[str, ...]:
    """The labels in the table as class names, sorted; whole numbers by value. Raises InputError for a fraction."""
    labels = set(texts)
    if not all(NUMBER.fullmatch(text) for text in labels):
        return tuple(sorted(labels))
    fractional = {text for text in labels if not _whole(text).lstrip("-").isdigit()}
    if fractional:
        raise InputError(
            f"label {_first(table, fractional)} is fractional; labels are text or whole numbers: is data.label the "
            "right column?"
        )
    return tuple(sorted({_whole(text) for text in labels}, key=int))


def encode(table: Layout, texts: Sequence[str], names: Sequence[str], *, by_index: bool) -> torch.Tensor:
    """The labels as indices into `names`, int64 [N]. Raises InputError for a label that is not a class.

    by_index: whether a label may be an index itself. If a name is a number, it never may.
    """
    index_of = {name: i for i, name in enumerate(names)}
    by_index = by_index and not any(NUMBER.fullmatch(name) for name in names)
    if by_index:
        index_of |= {str(i): i for i in range(len(names))}
    index_of |= {text: index_of[_whole(text)] for text in set(texts) - index_of.keys() if _whole(text) in index_of}
    unknown = set(texts) - index_of.keys()
    if unknown:
        rule = f"a number from 0 to {len(names) - 1} or one of" if by_index else "one of"
        raise InputError(
            f"label {_first(table, unknown)} is not a class; it must be {rule} {shortened(names, 10)}: correct it, or "
            "set data.classes to the names of all classes"
        )
    return torch.tensor([index_of[text] for text in texts], dtype=torch.int64)


def _first(table: Layout, labels: set[str]) -> str:
    """The first of these labels and its line, for a message."""
    written = ((line, table.label_of(line, cells)) for line, cells in table.data_rows())
    return next(f"{text} in line {line} of {table.name}" for line, text in written if text in labels)


def _whole(text: str) -> str:
    """A whole number as plain digits ("3.0", "+3" and "03" are "3"); other text unchanged."""
    if not NUMBER.fullmatch(text) or Decimal(text) != Decimal(text).to_integral_value():
        return text
    return str(int(Decimal(text)))
