"""A hook of mkdocs: the pages on config keys and commands, written at each build, so they are never stale."""

import contextlib
import importlib
import io
import sys
from collections.abc import Iterable, Iterator
from unittest.mock import patch

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from tuner import config_reference
from tuner.__main__ import COMMANDS
from tuner.config_reference import Entry, Option

ROOT = "conf/train.yaml"
COMMON = (ROOT, "conf/hparams_search/_head.yaml", "conf/hparams_search/_study.yaml", "tuner/sweep/plugin.py")
OF_SEARCHES = ("hydra.sweeper.", "hydra.launcher.", "hydra.run.", "hydra.sweep.")
OF_OPTIONS = ("hydra.sweeper.pruner.", "hydra.sweeper.sampler.")  # shown with the option
CONFIG = """# Config keys

    python -m tuner.train [GROUP=OPTION ...] [KEY=VALUE ...]

A group such as `optimizer` has options, each a file of `conf/`; a key has a value. This page has the comments of these
files. A reference such as `${seed}` stands for the value of that key. In a shell, quote values with brackets, braces or
spaces.
"""
TRAIN = """# Commands

Each is run as `python -m tuner.NAME`; `tuner NAME` is the same, and prints its help at once. `tuner sweep` is `tuner
train -m hparams_search=optuna`, or another search if one is given. `tuner --version` has the version. For completion
of commands, keys and options with the tab key, put this into `~/.bashrc` (`zsh` into `~/.zshrc`, after `compinit`):

    eval "$(tuner completion bash)"

and for fish, `tuner completion fish > ~/.config/fish/completions/tuner.fish`.

## train

    python -m tuner.train [GROUP=OPTION ...] [KEY=VALUE ...]
    python -m tuner.train -m hparams_search=optuna [GROUP=OPTION ...] [KEY=VALUE ...]
    python -m tuner.train --help [KEY | GROUP | GROUP=OPTION | WORD]

One run, or a search: `hparams_search=NAME` is one without `-m`, too. A run's folder is `outputs/DATE/TIME`, or
`outputs/NAME` with `name=NAME`; `outputs/latest` links to the last. Several values, as in `-m seed=0,1,2`, are as
many runs, and end with mean and spread. [Config keys](config.md) lists groups and keys; `--config-dir FOLDER` adds
[your own](../how-to/own-parts.md).
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those of the folder."""
    for path, text in (("reference/config.md", config_page()), ("reference/commands.md", commands_page())):
        files.append(File.generated(config, path, content=text))
    return files


def config_page() -> str:
    """The keys of train.yaml and of the sweeper, then each group with its options."""
    entries, options = config_reference.entries(), config_reference.options()
    root = [entry for entry in entries if entry.file == ROOT and not entry.key.startswith("hydra.")]
    sweeper: dict[str, Entry] = {}
    for entry in entries:
        if entry.file in COMMON and entry.key.startswith(OF_SEARCHES) and not entry.key.startswith(OF_OPTIONS):
            sweeper.setdefault(entry.key, entry)
    parts = [CONFIG, "## All runs\n", *definitions(root), "\n## Searches\n", *definitions(sweeper.values())]
    for group in dict.fromkeys(option.group for option in options):
        parts += [
            f"\n## {group}\n",
            *(line for option in options if option.group == group for line in of_option(option)),
        ]
    return "\n".join(parts)


def of_option(option: Option) -> Iterator[str]:
    """An option with its comment and its own keys."""
    yield f"\n### {option.typed}{' (default)' if option.default else ''}\n"
    was_command = False
    for line in option.comment.splitlines():
        command = config_reference.is_command(line)
        if command != was_command:
            yield ""
        yield f"    {line.strip()}" if command else escaped(line)
        was_command = command
    yield ""
    yield from definitions([entry for entry in config_reference.entries_of(option) if entry.comment])


def definitions(entries: Iterable[Entry]) -> Iterator[str]:
    """Each key with its default, and its comment below."""
    for entry in entries:
        yield f"\n`{entry.key}={entry.default}`\n:   {escaped(entry.comment)}"


def escaped(text: str) -> str:
    """A comment as Markdown that shows it as it is."""
    for character in "\\*_|<[":
        text = text.replace(character, f"\\{character}" if character != "<" else "&lt;")
    return text


def commands_page() -> str:
    """What each command says for --help."""
    parts = [TRAIN]
    for name in [name for name in COMMANDS if name not in ("train", "sweep")]:
        module, printed = importlib.import_module(f"tuner.{name}"), io.StringIO()
        arguments, width = (
            patch.object(sys, "argv", [f"tuner.{name}", "--help"]),
            patch.dict("os.environ", COLUMNS="90"),
        )
        with arguments, width, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            module.main()
        parts += [f"\n## {name}\n", *(f"    {line}".rstrip() for line in printed.getvalue().splitlines())]
    return "\n".join(parts) + "\n"
