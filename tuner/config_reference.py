"""The reference of config keys: what `conf/` and the dataclasses of the sweeper say about each of them.

`--help KEY` and the documentation show it. Files are read as text, with their comments. Nothing is composed, so Hydra,
which takes a second to import, is not needed.
"""

import ast
import difflib
import functools
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from tuner import InputError

HERE = Path(__file__).resolve().parent
CONF = next(folder for folder in (HERE / "conf", HERE.parent / "conf") if folder.is_dir())  # installed, or a checkout
PLUGIN = HERE / "sweep" / "plugin.py"
DATACLASSES = {"TunerSweeperConf": "hydra.sweeper.", "FusedLauncherConf": "hydra.launcher."}  # in PLUGIN
PRUNERS = "hydra/sweeper/pruner"
NOT_TYPED = ("defaults", "_target_", "_partial_")  # keys that say how an option is built
ONE_VALUE = "hydra.sweeper.params"  # its keys are those of other values, with dots
FROM_PLUGINS = {  # options that other packages bring, with what they are
    "hydra/sweeper/sampler": {
        "tpe": "TPE with Optuna's defaults.",
        "random": "Independent random draws.",
        "grid": "Every point of a grid; for choices and for ranges with a step.",
        "gp": "A Gaussian process: good with few trials.",
        "cmaes": "CMA-ES, for numbers and one objective.",
        "qmc": "Quasi-random draws, which fill the space evenly.",
        "nsgaii": "NSGA-II, for several objectives.",
        "nsgaiii": "NSGA-III, for three objectives or more.",
    },
    "hydra/launcher": {
        "fused": "Trials with the same features train together, as one stack of heads.",
        "basic": "One trial at a time.",
        "joblib": "Several processes on this machine (extra `joblib`).",
        "ray": "A Ray cluster, or processes on this machine (extra `ray`).",
        "submitit_local": "Several processes on this machine, by submitit (extra `submitit`).",
        "submitit_slurm": "Jobs in Slurm's queue (extra `submitit`).",
    },
}
USAGE = """\
usage: tuner train [GROUP=OPTION ...] [KEY=VALUE ...]     one run
       tuner sweep [GROUP=OPTION ...] [KEY=VALUE ...]     a search; without hparams_search=NAME, hparams_search=optuna
       --cfg job prints the composed config; --config-dir FOLDER adds configs; --hydra-help has Hydra's options"""
WIDTH = 100  # columns of the text for a terminal
SIMILAR = 5  # suggestions for an unknown word


@dataclass(frozen=True)
class Entry:
    """A config key in one file.

    key: as it is typed on the command line. default: its value there, as YAML. file: below the folder of the package or
    of the repository.
    """

    key: str
    default: str
    comment: str
    file: str


@dataclass(frozen=True)
class Option:
    """An option of a config group, typed as GROUP=NAME. comment: lines; indented ones are commands."""

    group: str
    name: str
    comment: str
    file: str
    default: bool = False

    @property
    def typed(self) -> str:
        """As it is typed on the command line."""
        return f"{self.group}={self.name}"

    @property
    def summary(self) -> str:
        """The first paragraph of the comment, without commands, in one line."""
        lines = [line for line in self.comment.splitlines() if not is_command(line)]
        return re.split(r"(?<=[.]) ", " ".join(" ".join(lines).split()))[0]


def is_command(line: str) -> bool:
    """Whether a line of a comment is a command, and not text."""
    return line.startswith(("    ", "python "))


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Each key of conf/train.yaml, of each option of each group, and of the sweeper.

    A key without a comment of its own has that of the first file that comments it.
    """
    found = [entry for path in _files() for entry in _of_file(path)]
    found += [entry for name, prefix in DATACLASSES.items() for entry in _of_class(name, prefix)]
    found += [entry for name in _pruners().values() for entry in _of_class(name, "hydra.sweeper.pruner.")]
    comments: dict[str, str] = {}
    for entry in found:
        if entry.comment:
            comments.setdefault(entry.key, entry.comment)
    return tuple(replace(entry, comment=entry.comment or comments.get(entry.key, "")) for entry in found)


@functools.cache
def options() -> tuple[Option, ...]:
    """The options of all config groups, in the order of their names."""
    found: dict[str, Option] = {}
    for group, others in FROM_PLUGINS.items():
        for name, comment in others.items():
            option = Option(group, name, comment, "", default=name == "fused")
            found[option.typed] = option
    for name, class_name in _pruners().items():
        option = Option(PRUNERS, name, ast.get_docstring(_classes()[class_name]) or "", _relative(PLUGIN))
        found[option.typed] = option
    defaults = _defaults()
    for path in _files():
        group = path.parent.relative_to(CONF).as_posix()
        if group != "." and not path.stem.startswith("_"):
            lines = path.read_text().splitlines()
            option = Option(group, path.stem, _header(lines), _relative(path), defaults.get(group) == path.stem)
            found[option.typed] = option
    return tuple(sorted(found.values(), key=lambda option: (option.group.startswith("hydra"), option.typed)))


def entries_of(option: Option) -> list[Entry]:
    """The keys that an option sets; none for an option of another package."""
    if option.file == _relative(PLUGIN):
        return _of_class(_pruners()[option.name], "hydra.sweeper.pruner.")
    return [entry for entry in entries() if entry.file == option.file]


def explain(words: Sequence[str]) -> str:
    """What is known of each word: a key, a group, GROUP=OPTION, or a part of keys. Without words, an overview.

    Raises InputError, with similar names, for a word that is in none of them.
    """
    return "\n\n".join(_explained(word) for word in words) if words else _overview()


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether a command line has -h or --help."""
    return not {"-h", "--help"}.isdisjoint(words)


def print_help(words: Sequence[str]) -> None:
    """Print what is known of the words beside --help, or how the command is used. Exits if one is not known."""
    asked = [word for word in words if not word.startswith("-")]
    try:
        text = explain(asked)
    except InputError as error:
        sys.exit(str(error))
    print(text if asked else f"{USAGE}\n\n{text}")


def _explained(word: str) -> str:
    name = word.strip().removeprefix("+").rstrip("=")
    key = name.partition("=")[0]
    exact = [entry for entry in entries() if entry.key == name] or [entry for entry in entries() if entry.key == key]
    chosen = [option for option in options() if option.typed == name]
    if chosen:
        return _option_text(chosen[0])
    if any(option.group == key for option in options()):
        if key != name:
            raise InputError(f"{name}: {key} has no such option; known: {', '.join(_names(key))}")
        return _group_text(name)
    if exact:
        return _key_text(exact)
    text = name.casefold()
    keys = {entry.key: entry for entry in reversed(entries()) if text in entry.key.casefold()}
    if text and keys:
        return "\n".join([f"Keys that contain {name}:", "", *(_row(keys[key]) for key in sorted(keys))])
    known = list(dict.fromkeys([*(entry.key for entry in entries()), *(o.group for o in options()), *_typed()]))
    ends = {key.rpartition(".")[2]: key for key in reversed(known)}  # dropuot is close to model.head.dropout
    similar = [ends.get(match, match) for match in difflib.get_close_matches(name, [*known, *ends], SIMILAR, 0.5)]
    hint = f"similar: {', '.join(dict.fromkeys(similar))}; " if similar else ""
    raise InputError(f"{name} is no config key, group or option; {hint}--help without a word lists them all")


def _typed() -> list[str]:
    return [option.typed for option in options()]


def _names(group: str) -> list[str]:
    return [option.name for option in options() if option.group == group]


def _overview() -> str:
    groups = dict.fromkeys(option.group for option in options())
    lines = ["Config groups (GROUP=OPTION):", ""]
    for group in groups:
        lines += _wrapped(f"{group}: {', '.join(_names(group))}", hanging=4)
    root = [entry for entry in entries() if entry.file == "conf/train.yaml" and not entry.key.startswith("hydra.")]
    lines += ["", "Config keys (KEY=VALUE), with their defaults:", "", *(_row(entry) for entry in root)]
    return "\n".join(
        [*lines, "", "--help WORD explains a key, a group or an option, or lists the keys that contain WORD."]
    )


def _key_text(found: Sequence[Entry]) -> str:
    first = found[0]
    lines = [f"{first.key}={first.default}" if first.default else first.key, *_wrapped(first.comment)]
    if len(found) == 1:
        return "\n".join([*lines, f"    {first.file}"])
    return "\n".join([*lines, *(f"    {entry.file}: {entry.default}" for entry in found)])


def _group_text(group: str) -> str:
    lines = [f"{group}=", ""]
    for option in options():
        if option.group == group:
            mark = " (default)" if option.default else ""
            lines += [f"{option.name}{mark}", *_wrapped(option.summary)]
    return "\n".join([*lines, "", f"--help {group}=OPTION shows the keys of an option."])


def _option_text(option: Option) -> str:
    lines = [option.typed + (" (default)" if option.default else "")]
    lines += [f"    {line}" for line in option.comment.splitlines()]
    rows = [_row(entry) for entry in entries_of(option)]
    return "\n".join([*lines, *(["", *rows] if rows else []), *([f"    {option.file}"] if option.file else [])])


def _row(entry: Entry) -> str:
    """A key in one line, or more if its comment is long."""
    start = f"{entry.key}={entry.default}"
    width = 36
    comment = textwrap.wrap(entry.comment, WIDTH - width - 4)
    if len(start) >= width and comment:
        return "\n".join([f"  {start}", *(f"  {'':{width}}  {line}" for line in comment)])
    return "\n".join(f"  {start if not n else '':{width}}  {line}".rstrip() for n, line in enumerate(comment or [""]))


def _wrapped(text: str, hanging: int = 0) -> list[str]:
    indent = " " * 4
    return textwrap.wrap(text, WIDTH, initial_indent=indent if not hanging else "  ", subsequent_indent=indent)


# Files of YAML


def _files() -> list[Path]:
    """train.yaml, then the options that it takes by default, then the others: the first comment of a key is the one."""
    paths = sorted(CONF.rglob("*.yaml"))
    defaults = _defaults()
    return sorted(paths, key=lambda path: (path.parent != CONF, defaults.get(path.parent.name) != path.stem, path))


@functools.cache
def _defaults() -> dict[str, str]:
    """The option of each group that train.yaml takes."""
    root = yaml.safe_load((CONF / "train.yaml").read_text())
    return {group: str(name) for item in root["defaults"] if isinstance(item, dict) for group, name in item.items()}


def _relative(path: Path) -> str:
    return path.relative_to(CONF.parent if path.is_relative_to(CONF) else HERE.parent).as_posix()


def _header(lines: Sequence[str]) -> str:
    """The comment that a file opens with."""
    found = []
    for line in lines:
        if not line.startswith("#"):
            break
        if "@package" not in line:
            found.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return "\n".join(found)


def _of_file(path: Path) -> list[Entry]:
    text = path.read_text()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return []
    group = path.parent.relative_to(CONF)
    is_global = path.parent == CONF or "# @package _global_" in text
    prefix = "" if is_global else "".join(f"{part}." for part in group.parts)
    lines = text.splitlines()
    after_header = len(list(_leading_comments(lines)))
    return list(_of_mapping(root, prefix, lines, after_header, _relative(path)))


def _leading_comments(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("#"):
            return
        yield line


def _of_mapping(node: yaml.MappingNode, prefix: str, lines: Sequence[str], start: int, file: str) -> Iterator[Entry]:
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        if name.value in NOT_TYPED:
            continue
        if isinstance(value, yaml.MappingNode) and not value.flow_style and key != ONE_VALUE:
            yield from _of_mapping(value, f"{key}.", lines, start, file)
            continue
        is_block = isinstance(value, yaml.MappingNode)
        end = name.end_mark if is_block else value.end_mark
        comment = _comment(lines, name.start_mark, end.line, end.column, start)
        yield Entry(key, _flow(value) if is_block else _source(lines, value), comment, file)


def _source(lines: Sequence[str], node: yaml.Node) -> str:
    """A value as its file has it, in one line."""
    first, last = node.start_mark, node.end_mark
    if first.line == last.line:
        return lines[first.line][first.column : last.column] if first.line < len(lines) else ""
    parts = [lines[first.line][first.column :], *lines[first.line + 1 : last.line], lines[last.line][: last.column]]
    return " ".join(part.strip() for part in parts)


def _flow(node: yaml.MappingNode) -> str:
    return "{" + ", ".join(f"{key.value}: {value.value}" for key, value in node.value) + "}"


def _comment(lines: Sequence[str], key: yaml.Mark, last: int, column: int, start: int) -> str:
    """The comment of a key: lines above it from `start` on, what follows its value, and aligned lines below that."""
    above: list[str] = []
    for line in reversed(lines[start : key.line]):
        if line.find("#") != key.column or line.strip()[0] != "#":
            break
        above.insert(0, line)
    rest = lines[last][column:] if last < len(lines) else ""
    beside = [rest] if rest.lstrip(" :").startswith("#") else []
    if beside:
        place = lines[last].index("#", column)
        for line in lines[last + 1 :]:
            if line.lstrip()[:1] != "#" or line.index("#") != place:
                break
            beside.append(line)
    return " ".join(line.lstrip(" :").removeprefix("#").strip() for line in [*above, *beside])


# Dataclasses


@functools.cache
def _classes() -> dict[str, ast.ClassDef]:
    """The classes of the sweeper's plugin by name."""
    return {node.name: node for node in ast.parse(PLUGIN.read_text()).body if isinstance(node, ast.ClassDef)}


@functools.cache
def _pruners() -> dict[str, str]:
    """The dataclass of each pruner that no file of conf/ replaces, by its name as an option."""
    for node in ast.parse(PLUGIN.read_text()).body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "PRUNERS"
            and isinstance(node.value, ast.Dict)
        ):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            names = {ast.literal_eval(key): ast.unparse(value) for key, value in pairs if key}
            return {name: value for name, value in names.items() if not (CONF / PRUNERS / f"{name}.yaml").exists()}
    return {}


def _of_class(name: str, prefix: str) -> list[Entry]:
    """The fields of a dataclass, with the comments above or beside them."""
    lines = PLUGIN.read_text().splitlines()
    found = []
    for node in _classes()[name].body:
        if not isinstance(node, ast.AnnAssign) or node.value is None or node.end_lineno is None:
            continue
        key = ast.unparse(node.target)
        if key in NOT_TYPED or ast.unparse(node.value) == "MISSING":
            continue
        above: list[str] = []
        for line in reversed(lines[: node.lineno - 1]):
            if not line.lstrip().startswith("#"):
                break
            above.insert(0, line.strip().removeprefix("#").strip())
        beside = lines[node.lineno - 1].partition("  # ")[2] if node.lineno == node.end_lineno else ""
        found.append(Entry(prefix + key, _default(node.value), " ".join([*above, beside]).strip(), _relative(PLUGIN)))
    return found


def _default(node: ast.expr) -> str:
    """A default as YAML: null, true, text without quotes, or a list."""
    if isinstance(node, ast.Constant):
        return (
            "null"
            if node.value is None
            else str(node.value).lower()
            if isinstance(node.value, bool)
            else str(node.value)
        )
    words = {word.arg: word.value for word in node.keywords} if isinstance(node, ast.Call) else {}
    if isinstance(factory := words.get("default_factory"), ast.Lambda):
        return f"[{', '.join(str(part.value) for part in ast.walk(factory) if isinstance(part, ast.Constant))}]"
    return "[]"
