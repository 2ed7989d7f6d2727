"""Fine-tune pretrained image networks and tune their hyperparameters."""

import signal
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tuner.safe_text import legible

if TYPE_CHECKING:
    from tuner.inference.model import Model

__version__ = "0.1.0"


# A command takes seconds to import; until tuner.terminal.command runs, Ctrl-C ends it quietly.
if any(option == "-m" and name.startswith("tuner.") for option, name in pairwise(sys.orig_argv)) and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: the rule, the value got, the way out."""

    def __str__(self) -> str:
        return legible(super().__str__())  # it may quote a file of others


class DivergedError(ArithmeticError):
    """A loss is not finite."""


class CallableModule(ModuleType):
    """A module with the name of a function: `tuner.train` is a command, and `tuner.train(...)` runs it."""

    def __call__(self, *overrides: str) -> Any:
        """See `tuner.calls`."""
        from tuner import calls

        return getattr(calls, self.__name__.removeprefix("tuner."))(*overrides)


def __getattr__(name: str) -> Any:
    """Import tuner.train and tuner.sweep when they are used."""
    if name not in ("train", "sweep"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"tuner.{name}")


def load(run: str | Path, *, device: str = "auto", precision: str = "auto") -> "Model":
    """The model that a run has trained: see `tuner.inference.model.load`."""
    from tuner.inference.model import load  # imports torch, which takes seconds

    return load(run, device=device, precision=precision)
