"""The arguments of each command, apart from `train`. Imports nothing slow: help and completion need them at once."""

import argparse
from collections.abc import Callable
from pathlib import Path

from tuner.rules import MAX_PIXELS
from tuner.runs.layout import MODEL_CARD, REPORT

ROWS = 30  # of tuner.compare on the terminal
RUN = "a run's folder, a search's best/, a .safetensors file in one, or the URL of a copy"
DEVICE = "as the config's key `device` has it; default: %(default)s"
PRECISION = "as the config's key `precision` has it; default: auto, as in the run's config"
CONFIG_DIR = "of your own configs, as for tuner.train"


def study() -> argparse.ArgumentParser:
    """Of tuner.study."""
    parser = argparse.ArgumentParser(
        "python -m tuner.study",
        description="Show a study: its best trials, which parameters mattered, how sure that is, and what to try next.",
    )
    add = parser.add_argument
    add("study", nargs="?", help="a sweep's folder or a study's name; default: the newest in multirun")
    add("--storage", metavar="URL", help="storage of the study; default: that of its folder, or multirun/optuna.db")
    add("--top", type=int, default=10, metavar="N", help="number of trials in the table; default: %(default)s; 0: all")
    add("--plots", action="store_true", help="write plots/*.png")
    add("--html", action="store_true", help="write study.html: interactive figures, and all trials in a sortable table")
    add("--out", type=Path, metavar="FOLDER", help="for --plots and --html; default: the sweep's folder")
    add("--fetch", action="store_true", help="first bring its run folders here that other machines have copied")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--csv", action="store_true", help="print all trials as CSV instead")
    either.add_argument("--json", action="store_true", help="print everything as JSON instead")
    either.add_argument("--best", action="store_true", help="print the overrides that run the best trial again")
    either.add_argument("--watch", action="store_true", help="follow a running sweep until it ends, or Ctrl-C")
    either.add_argument("--dashboard", action="store_true", help="start optuna-dashboard on this machine, read-only")
    add("--port", type=int, default=8080, help="of the dashboard; default: %(default)s")
    return parser


def compare() -> argparse.ArgumentParser:
    """Of tuner.compare."""
    parser = argparse.ArgumentParser(
        "python -m tuner.compare",
        description="A table of runs, the best first, with the config keys in which they differ. For two run folders: "
        "their differences, and whether their accuracies differ by more than chance.",
    )

    def split(text: str) -> list[str]:
        return list(dict.fromkeys(key.strip() for key in text.split(",") if key.strip()))

    add = parser.add_argument
    folders = "searched at any depth, or the URL of a run's copy; default: outputs and multirun"
    add("folders", nargs="*", metavar="FOLDER", help=folders)
    add("--where", action="append", default=[], metavar="COND", help="such as 'optimizer.lr<1e-3'; may be repeated")
    add("--sort", metavar="KEY", help="default: val_accuracy; the best score or latest start first, else the lowest")
    add("--reverse", action="store_true", help="reverse the order")
    add("--top", type=int, metavar="N", help=f"number of rows; 0: all; default: {ROWS} on the terminal, else all")
    add("--columns", type=split, metavar="KEY,...", help="show these columns instead")
    add("--wide", action="store_true", help="one table with all columns, wider than the terminal")
    groups = parser.add_mutually_exclusive_group()
    groups.add_argument("--group-by", type=split, metavar="KEY,...", help="mean, standard deviation and number of runs")
    over = "group by all keys that differ, except these, such as seed"
    groups.add_argument("--over", type=split, metavar="KEY,...", help=over)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--csv", action="store_true", help="print CSV instead")
    either.add_argument("--json", action="store_true", help="print JSON instead")
    add("--plots", action="store_true", help="write curves.png and bars.png")
    add("--html", action="store_true", help="write compare.html: a sortable table with links, and curves")
    add("--out", type=Path, default=Path("comparison"), metavar="FOLDER", help="default: %(default)s/")
    return parser


def predict() -> argparse.ArgumentParser:
    """Of tuner.predict."""
    parser = argparse.ArgumentParser(
        "python -m tuner.predict",
        description="Predict the classes of images, with calibrated probabilities. Files that can't be read are named, "
        "the others are predicted, and the exit code is 1.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help=RUN)
    files = "images of any size and mode; folders at any depth; or one CSV file of pixels or of names of images"
    add("inputs", type=Path, nargs="+", metavar="FILE|FOLDER", help=files)
    add("--image", metavar="COLUMN", help="of a CSV file: the column that names images")
    add("--folder", type=Path, metavar="FOLDER", help="that these names are relative to; default: the CSV file's")
    add("--suffix", metavar=".jpg", help="of these names, if they have none")
    also = "another run with the same classes: probabilities are averaged; may be repeated"
    add("--with", dest="others", action="append", default=[], metavar="RUN", help=also)
    add("--top", type=int, default=1, metavar="K", help="the K most probable classes; default: %(default)s")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--csv", action="store_true", help="print CSV, batch by batch")
    either.add_argument("--json", action="store_true", help="print JSON")
    add("--maps", type=Path, metavar="FOLDER", help="write a picture per file: where the evidence for its class lies")
    larger = "of an image file; a larger one is not read; default: %(default)s"
    add("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=larger)
    add("--device", default="auto", help=DEVICE)
    add("--precision", default="auto", help=PRECISION)
    return parser


def evaluate() -> argparse.ArgumentParser:
    """Of tuner.evaluate."""
    parser = argparse.ArgumentParser(
        "python -m tuner.evaluate",
        description="Score a trained model on the test split of its own data, or on other data whose classes it knows.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help=RUN)
    also = "another data set, as for tuner.train: data=NAME data.KEY=VALUE"
    add("overrides", nargs="*", metavar="DATA", help=also)
    splits = ("train", "val", "test", "all")
    add("--split", choices=splits, help="default: test of the run's own data, all of other data")
    add("--out", type=Path, metavar="FOLDER", help="write tables and pictures there")
    add("--json", action="store_true", help="print JSON")
    add("--config-dir", type=Path, metavar="FOLDER", help=CONFIG_DIR)
    add("--device", default="auto", help=DEVICE)
    add("--precision", default="auto", help=PRECISION)
    return parser


def export() -> argparse.ArgumentParser:
    """Of tuner.export."""
    parser = argparse.ArgumentParser(
        "python -m tuner.export",
        description="Write a trained model as one file: uint8 images [N, C, H, W] in, calibrated probabilities out. It "
        "is first compared with the model, and written only if the probabilities agree.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help=RUN)
    formats = ("onnx", "torchscript", "pt2")
    add("--format", choices=formats, required=True, help="onnx needs the extra onnx; torchscript is deprecated")
    int8 = "with --format onnx: calibrated on training images, and scored on validation images beside the float model"
    add("--quantize", choices=["int8"], help=int8)
    add("--out", type=Path, metavar="FILE", help="default: beside the model")
    check = "images to compare on; default: the run's test images, or random ones if those are not available"
    add("--check", type=Path, nargs="+", default=[], metavar="FILE|FOLDER", help=check)
    return parser


def report() -> argparse.ArgumentParser:
    """Of tuner.report."""
    parser = argparse.ArgumentParser(
        "python -m tuner.report",
        description="Write a web page about a finished run, in one file, and a model card in Markdown.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help=RUN)
    page = f"the page; default: RUN/{REPORT}. {MODEL_CARD} is written beside it"
    add("--html", type=Path, metavar="FILE", help=page)
    add("--force", action="store_true", help=f"overwrite {MODEL_CARD}")
    return parser


def demo() -> argparse.ArgumentParser:
    """Of tuner.demo."""
    parser = argparse.ArgumentParser(
        "python -m tuner.demo",
        description="Serve a page on this machine where an image is dropped, and classified with its evidence.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help=RUN)
    add("--port", type=int, metavar="N", help="default: the first free one from 7860 on")
    add("--device", default="auto", help=DEVICE)
    return parser


def resume() -> argparse.ArgumentParser:
    """Of tuner.resume."""
    parser = argparse.ArgumentParser(
        "python -m tuner.resume",
        description="Resume a single run that was killed or interrupted, in its folder. Of the folder, nothing is read "
        "but its config, the checkpoint, metrics.csv, result.json, and where the run was started.",
    )
    add = parser.add_argument
    add("folder", type=Path, help="the run's folder, as in outputs/2026-11-24/12-00-00-000000")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="such as device=cpu, on another machine")
    return parser


def audit() -> argparse.ArgumentParser:
    """Of tuner.audit."""
    parser = argparse.ArgumentParser(
        "python -m tuner.audit",
        description="Find copies of images, labels that are probably wrong, and outliers, with a frozen network.",
    )
    add = parser.add_argument
    overrides = "as for tuner.train: data=NAME, data.KEY=VALUE, model=NAME ..."
    add("overrides", nargs="*", metavar="KEY=VALUE", help=overrides)
    add("--out", type=Path, metavar="FOLDER", help="for audit.csv and audit.html; default: audit/TIME")
    add("--config-dir", type=Path, metavar="FOLDER", help=CONFIG_DIR)
    add("--summary", action="store_true", help="print what the data set holds, and search nothing")
    add("--json", action="store_true", help="print JSON")
    return parser


def cache() -> argparse.ArgumentParser:
    """Of tuner.cache."""
    parser = argparse.ArgumentParser(
        "python -m tuner.cache", description="List the cached features, images and unpacked archives, or delete some."
    )
    add = parser.add_argument
    add("--cache-dir", metavar="FOLDER", help="default: that in TUNER_CACHE, or ~/.cache/tuner")
    add("--prune", action="store_true", help="delete files instead of listing them")
    add("--days", type=float, default=0, help="only files unused for so many days")
    add("--limit", metavar="SIZE", help="delete the longest unused until the others take at most SIZE, as in 20GB")
    return parser


def worker() -> argparse.ArgumentParser:
    """Of tuner.worker."""
    parser = argparse.ArgumentParser(
        "python -m tuner.worker",
        description="Run trials of a study on this machine, on all of its GPUs, until none are left. A worker may come "
        "and go at any time; it retrains nothing: the command that started the study does.",
    )
    add = parser.add_argument
    add("--storage", metavar="URL", required=True, help="the study's, such as postgresql+psycopg://...")
    add("overrides", nargs="+", metavar="OVERRIDE", help="study=NAME; further ones, such as data.root=...")
    return parser


def server() -> argparse.ArgumentParser:
    """Of tuner.server."""
    parser = argparse.ArgumentParser(
        "python -m tuner.server",
        description="Optuna's storage proxy over a database: searches and workers with "
        "hydra.sweeper.storage=grpc://HOST:PORT share its connections. Whoever reaches the port can read and change "
        "all studies: there is no password.",
    )
    add = parser.add_argument
    add("--storage", metavar="URL", required=True, help="the database, such as postgresql+psycopg://...")
    add("--host", default="localhost", help="where to listen; 0.0.0.0: everywhere; default: %(default)s")
    add("--port", type=int, default=13000, help="default: %(default)s")
    add("--every", type=float, default=60, metavar="SECONDS", help="between two lines; default: %(default)s")
    return parser


OF_COMMAND: dict[str, Callable[[], argparse.ArgumentParser]] = {
    parser.__name__: parser
    for parser in (study, compare, predict, evaluate, export, report, demo, resume, audit, cache, worker, server)
}
