"""A command on a terminal: how it ends, its progress bars, and log lines above them. Imports little: it comes first."""

import io
import logging
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

from tuner import InputError
from tuner.files import disk_error
from tuner.safe_text import Formatter

CLOSED = 128 + 13  # exit code if the reader of a pipe has gone, as shells report SIGPIPE
INTERRUPTED = 128 + 2  # after Ctrl-C
CALLER = "TUNER_CALLER"  # in the environment: the process that has called a command from Python
COMMAND = "-m tuner."  # of python, python3 or a path


class Console(logging.StreamHandler[TextIO]):
    """Writes log lines above the progress bars, instead of into them; on a terminal it breaks lines between words."""

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging."""
        with tqdm.external_write_mode(self.stream):
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """Called by `emit`. Tracebacks are left alone."""
        text = super().format(record)
        if record.exc_info or not self.stream.isatty():
            return text
        return wrapped(text)


def end_with_caller() -> None:
    """Interrupt this process when the one that has called it from Python is gone, such as a notebook's kernel."""
    caller = os.environ.pop(CALLER, None)
    if caller is None or int(caller) != os.getppid():
        return

    def watch() -> None:
        while os.getppid() == int(caller):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, name="caller", daemon=True).start()


def wrapped(text: str) -> str:
    """Text for a terminal, its long lines broken between words; lines with a command are left whole, to be copied."""
    width = shutil.get_terminal_size().columns
    lines = text.split("\n")
    return "\n".join(line if len(line) <= width or COMMAND in line else _broken(line, width) for line in lines)


def _broken(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def epochs_bar(epochs: int, done: int = 0, *, hidden: bool = False) -> tqdm:
    """A progress bar that fits the terminal: its description comes first. There is none outside of a terminal.

    done: epochs that an earlier process has trained; the time left does not count them.
    """
    bar_format = "{desc} |{bar}| {remaining} left"
    disable = True if hidden else None
    return tqdm(total=epochs, initial=done, bar_format=bar_format, dynamic_ncols=True, disable=disable)


def command(main: Callable[[], None], *, log: bool = True) -> None:
    """Run a command. A mistake, or a file that can't be used, ends it with a line; Ctrl-C ends it quietly.

    log: the log goes to standard error. False: the command sets up its own.
    If standard output can't be written, the exit code is 1, or CLOSED after `| head`, whose reader has gone. A log that
    can't be written ends nothing.
    """
    _prepare_streams()
    if log:
        logging.basicConfig(level=logging.INFO)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(Formatter("%(message)s"))
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except InputError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # SIGPIPE's default action would also apply to sockets
        _drop_output()
        sys.exit(CLOSED)
    except OSError as error:
        if error.filename is None and disk_error(error) is None:
            raise
        _drop_output()
        sys.exit(f"{error.filename or 'the output'} cannot be used: {error.strerror or error}")


def _prepare_streams() -> None:
    """Make standard output and error safe to write: closed ones go nowhere, unknown characters are escaped."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set in tuner/__init__.py until imports are done
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would take its number, which is the lowest
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - a number, until the process ends
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.raiseExceptions = False  # a log that can't be written prints no traceback, and ends nothing


def _drop_output() -> None:
    """If standard output can't be written, lose what is left of it, or the interpreter would report that at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
