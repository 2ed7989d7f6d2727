"""Reading a YAML file that somebody else may have written, within bounded time and memory."""

import math
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from tuner import InputError

MOST = 2**20  # bytes of a file, and of a file with its aliases written out
DEEPEST = 50  # levels of nested values


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads what OmegaConf reads: 1e-3 is a number, and a date is text."""

    def construct_document(self, node: yaml.Node) -> Any:
        """The values of a document. Aliases that multiply take no time in YAML, but do where the values are used."""
        if _written_out(node, {}, DEEPEST) > MOST:
            raise yaml.YAMLError(f"with its aliases written out it has more than {MOST:,} bytes")
        return super().construct_document(node)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


def read(path: Path) -> Any:
    """What a YAML file says, in dicts, lists and plain values.

    Raises InputError, which names the file, if it can't be read, is not YAML, or is larger than MOST with its aliases
    written out.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
            raise yaml.YAMLError("it is not a regular file")
        if status.st_size > MOST:
            raise yaml.YAMLError(f"it has {status.st_size:,} bytes, and {MOST:,} are allowed")
        return yaml.load(path.read_bytes(), _Loader)
    except RecursionError as error:
        raise InputError(f"{path} can't be read: its values are nested too deep") from error
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:  # !!timestamp x, for example
        raise InputError(f"{path} can't be read: a value does not fit its tag") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{path} can't be read: {reason}") from error


def mapping(path: Path) -> dict[str, Any]:
    """The same for a file of keys and values. Raises InputError also if it has something else."""
    values = read(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} can't be read: it has no keys")
    return values


def _written_out(node: yaml.Node, sizes: dict[int, float], levels: int) -> float:
    """Bytes of a node with its aliases written out; infinite for a node that contains itself.

    Raises RecursionError if it has more levels than that.
    """
    if not levels:
        raise RecursionError
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # until it is known
        if isinstance(node, yaml.ScalarNode):
            size: float = len(node.value)
        else:
            parts = (
                node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
            )
            size = sum(_written_out(part, sizes, levels - 1) for part in parts)
        sizes[id(node)] = 1 + size
    return sizes[id(node)]
