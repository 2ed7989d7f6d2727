"""For the tests of what tuner relies on in other packages without their documentation's promise."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def contract(sentence: str) -> Iterator[None]:
    """Fail with this sentence, whichever way the block fails."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - an assertion, or whatever a changed package raises
        pytest.fail(f"{sentence} ({type(error).__name__}: {error})", pytrace=False)
