"""The labels of a CSV table: which classes they name."""

from collections.abc import Sequence
from decimal import Decimal

import torch

from tuner import InputError
from tuner.data.csv_table import NUMBER, Layout, data_rows, shortened


def given(classes: Sequence[str]) -> tuple[str, ...]:
    """The names of data.classes. Raises InputError where they are none."""
    names = tuple(str(name) for name in classes)
    if isinstance(classes, str) or not names or len(set(names)) < len(names):
        raise InputError(f"data.classes must be a list of different names, such as [cat,dog], got {classes!r}")
    return names


def found(table: Layout, texts: Sequence[str]) -> tuple[str, ...]:
    """The labels as class names, sorted; whole numbers by their value."""
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


def encode(table: Layout, texts: Sequence[str], names: Sequence[str], *, by_place: bool) -> torch.Tensor:
    """The labels as places in `names`, int64 [N].

    by_place: whether a label may be such a place itself; it never may where a name is a number.
    """
    places = {name: i for i, name in enumerate(names)}
    by_place = by_place and not any(NUMBER.fullmatch(name) for name in names)
    if by_place:
        places |= {str(i): i for i in range(len(names))}
    places |= {text: places[_whole(text)] for text in set(texts) - places.keys() if _whole(text) in places}
    unknown = set(texts) - places.keys()
    if unknown:
        rule = f"a number from 0 to {len(names) - 1} or one of" if by_place else "one of"
        raise InputError(
            f"label {_first(table, unknown)} is no class; it must be {rule} {shortened(names, 10)}: correct it, or set "
            "data.classes to the names of all classes"
        )
    return torch.tensor([places[text] for text in texts], dtype=torch.int64)


def _first(table: Layout, labels: set[str]) -> str:
    """Where the first of these labels stands."""
    cells = ((line, cells[table.label].strip()) for line, cells in data_rows(table))
    return next(f"{text} in line {line} of {table.name}" for line, text in cells if text in labels)


def _whole(text: str) -> str:
    """A whole number as plain digits ("3.0", "+3" and "03" are "3"); any other text as it is."""
    if not NUMBER.fullmatch(text) or Decimal(text) != Decimal(text).to_integral_value():
        return text
    return str(int(Decimal(text)))
