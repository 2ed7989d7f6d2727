"""What the benchmarks here share: turns, spreads, and RESULTS.md, where each table has its section."""

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

import torch

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = """# What the benchmarks printed

Each section is written by the command it names. README.md says what to make of it.
"""


def machine(device: torch.device) -> str:
    """What the figures were measured on, and with."""
    names = ("torch", "torchvision", "hydra-core", "optuna")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    processor = next(iter(re.findall(r"model name\s*: (.*)", _cpuinfo())), platform.machine())
    where = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
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


def write(name: str, device: torch.device, rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Print a table, the first row of which is its header, and put it into RESULTS.md in place of the one before."""
    heading = f"## {name}, {device.type}"
    table = "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    parts = [heading, f"`{command}`, {time.strftime('%Y-%m-%d')}; {machine(device)}.", table, note]
    section = "\n\n".join(part for part in parts if part)
    print(section)
    sections = RESULTS.read_text().split("\n## ")[1:] if RESULTS.exists() else []
    kept = [f"## {text.strip()}" for text in sections if not f"## {text}".startswith(f"{heading}\n")]
    RESULTS.write_text("\n".join([TITLE, "\n\n".join(sorted([*kept, section])), ""]))
