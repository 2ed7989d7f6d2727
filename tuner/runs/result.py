"""The result of a run, read from its folder. Imports no pandas: a sweep reads results, and must start fast."""

import json
from pathlib import Path
from typing import Any

from tuner import InputError

PREDICTIONS = "predictions.csv"  # in a run's folder


def read_result(folder: Path, *, any_program: bool = False) -> dict[str, Any]:
    """A folder's result.json.

    any_program: accept the result of a program other than tuner, which has no `status`.
    Raises FileNotFoundError if there is none, and InputError if it is damaged or not of a run.
    """
    path = folder / "result.json"
    text = path.read_bytes()
    try:
        result = json.loads(text.decode())
        if not isinstance(result, dict) or not (any_program or isinstance(result.get("status"), str)):
            raise ValueError("not the result of a run: it has no status")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from error
    return result
