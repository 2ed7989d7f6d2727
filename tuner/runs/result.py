"""The result of a run, read from its folder. Imports no pandas: a sweep reads results, and must start fast."""

import json
from pathlib import Path
from typing import Any


def read_result(folder: Path, *, any_program: bool = False) -> dict[str, Any]:
    """A folder's result.json.

    any_program: accept the result of a program other than tuner, which has no `status`.
    Raises FileNotFoundError if there is none, and ValueError if it is damaged or not of a run.
    """
    text = (folder / "result.json").read_bytes()
    try:
        result = json.loads(text.decode())
        if not isinstance(result, dict) or not (any_program or isinstance(result.get("status"), str)):
            raise ValueError("not the result of a run: it has no status")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"result.json: {error}") from error
    return result
