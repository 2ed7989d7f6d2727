"""What the benchmarks here share: turns, spreads, and RESULTS.md, where each table has its section.

It does not import torch: compare.py starts processes and measures their memory, which the system counts from the memory
of the process that starts them.
"""

import argparse
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = """# What the benchmarks printed

Each section is written by the command it names. README.md says what to make of it.
"""


class _Results(argparse.Action):
    """--results FILE: from then on write() puts its tables there, so that no benchmark has to pass the path on."""

    def __call__(self, parser: object, namespace: object, values: object, option_string: object = None) -> None:
        global RESULTS
        RESULTS = Path(str(values))


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smallest", action="store_true", help="run as little as shows that the benchmark works")
    parser.add_argument("--results", action=_Results, metavar="FILE", help="write the tables here, not to RESULTS.md")


def machine(device: "torch.device") -> str:
    """What the figures were measured on, and with."""
    names = ("torch", "torchvision", "hydra-core", "optuna")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    processor = next(iter(re.findall(r"model name\s*: (.*)", _cpuinfo())), platform.machine())
    where = ""
    if device.type == "cuda":
        import torch

        where = f"{torch.cuda.get_device_name(device)}, "
    return f"{where}{os.cpu_count()} x {processor}, Python {platform.python_version()}, {versions}"


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def turns(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each run gives, in turns so that the machine's moods hit all alike; a first turn warms up."""
    values: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            value = run()
            if turn:
                values[name].append(value)
    return values


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Median, and range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the turns' ratios, and their range."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)], ".3g")


def write(name: str, device: "torch.device", rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Print a table and put it into RESULTS.md, or --results FILE, in place of the section with the same heading.

    The first row is the header.
    """
    heading = f"## {name}, {device.type}"
    table = "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    parts = [heading, f"`{command}`, {time.strftime('%Y-%m-%d')}; {machine(device)}.", table, note]
    section = "\n\n".join(part for part in parts if part)
    print(section, end="\n\n")
    sections = RESULTS.read_text().split("\n## ")[1:] if RESULTS.exists() else []
    kept = [f"## {text.strip()}" for text in sections if not f"## {text}".startswith(f"{heading}\n")]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("\n".join([TITLE, "\n\n".join(sorted([*kept, section])), ""]))
