"""Shared by the benchmarks: turns, spreads, and RESULTS.md with one section per table.

This module does not import torch, because compare.py measures the memory of processes that it starts, and the system
counts the memory of the starting process as theirs.
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

The command named in a section writes it. README.md explains the results.
"""


class _Results(argparse.Action):
    """--results FILE: write() then writes its tables there, without an argument in each benchmark."""

    def __call__(self, _parser: object, _namespace: object, values: object, _option_string: object = None) -> None:
        global RESULTS
        RESULTS = Path(str(values))


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smallest", action="store_true", help="run only enough to show that the benchmark works")
    parser.add_argument(
        "--results", action=_Results, metavar="FILE", help="write the tables to FILE instead of RESULTS.md"
    )


def machine(device: "torch.device") -> str:
    """The hardware and versions of a measurement."""
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
    """The values of each run, measured in turns, which spreads the machine's noise evenly. The first turn warms up."""
    values: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            value = run()
            if turn:
                values[name].append(value)
    return values


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Median and range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median and range of the ratios per turn."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)], ".3g")


def write(name: str, device: "torch.device", rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Print a table and write it to RESULTS.md, or --results FILE; it replaces the section with the same heading.

    rows: the first one is the header.
    """
    heading = f"## {name}, {device.type}"
    table = "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    parts = [heading, f"`{command}`, {time.strftime('%Y-%m-%d')}; {machine(device)}.", table, note]
    section = "\n\n".join(part for part in parts if part)
    print(section, end="\n\n")
    sections = RESULTS.read_text().split("\n## ")[1:] if RESULTS.exists() else []
    others = [f"## {text.strip()}" for text in sections if not f"## {text}".startswith(f"{heading}\n")]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("\n".join([TITLE, "\n\n".join(sorted([*others, section])), ""]))
