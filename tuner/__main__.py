"""The `tuner` command: `tuner train` is `python -m tuner.train`, and so on. Imports no more than it needs."""

import difflib
import runpy
import signal
import sys
from pathlib import Path

from tuner import __version__, arguments, completion, config_reference

COMMANDS = {
    "train": "fine-tune a network: one run",
    "sweep": "search hyperparameters: hparams_search=optuna, unless another is given",
    "study": "inspect a search: best trials, which parameters mattered, how sure that is",
    "compare": "compare runs",
    "predict": "classify images with a trained model",
    "evaluate": "score a trained model on a test split, or on other data",
    "export": "write a trained model as ONNX or torch.export",
    "report": "write a run as one web page, and its model card",
    "demo": "classify images that are dropped on a web page (extra demo)",
    "resume": "resume a single run that was killed",
    "audit": "find wrong labels, copies and outliers in a data set",
    "cache": "list or delete cached features and images",
    "worker": "run trials of a search that another machine has started",
    "server": "share a database between many workers",
}


def main() -> None:
    """Run the command that the first word names."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # quiet until tuner.terminal.command runs
    first, *words = sys.argv[1:] or ["--help"]
    if first in ("-h", "--help", "help"):
        print(overview())
    elif first in ("-V", "--version"):
        print(f"tuner {__version__}")
    elif first == "completion":
        print(completion.script(words))
    elif first == completion.OPTION:
        print("\n".join(completion.candidates(" ".join(words), COMMANDS)))
    elif first not in COMMANDS:
        close = difflib.get_close_matches(first, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
        sys.exit(f"{first} is not a command of tuner: {hint}")
    elif config_reference.asks_for_help(words):
        print_help(first, words)
    else:
        run(first, words)


def print_help(command: str, words: list[str]) -> None:
    """What --help prints, without the command's own imports."""
    if command in arguments.OF_COMMAND:
        arguments.OF_COMMAND[command]().print_help()
    else:
        config_reference.print_help(words)


def run(command: str, words: list[str]) -> None:
    """Run a command in this process, as python -m does."""
    if command == "sweep":
        from tuner import calls  # more than help needs

        command, words = "train", ["-m", *calls.default_search(words), *words]
    sys.argv[1:] = words
    sys.orig_argv[:] = [sys.executable, "-m", f"tuner.{command}", *words]  # which workers and messages repeat
    sys.path.insert(0, str(Path.cwd()))  # the user's own parts, as python -m finds them
    runpy.run_module(f"tuner.{command}", run_name="__main__", alter_sys=True)


def overview() -> str:
    """The commands, one a line."""
    lines = [f"  {name:10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tuner COMMAND ...",
            "",
            *lines,
            "",
            "tuner COMMAND --help explains a command, tuner train --help KEY a key of the config.",
            "tuner completion bash (zsh, fish) prints a script that completes commands, keys and options.",
            "tuner --version",
        ]
    )


if __name__ == "__main__":
    main()
