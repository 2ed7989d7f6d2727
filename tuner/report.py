"""A web page and a model card of a finished run: `python -m tuner.report RUN`."""

import argparse
import logging
from pathlib import Path

from tuner import InputError, artifacts, output, terminal
from tuner.analysis import finished_run, model_card, run_page

log = logging.getLogger("tuner.report")
PAGE, CARD = "report.html", "MODEL_CARD.md"


def main() -> None:
    """Write report.html and MODEL_CARD.md, and print where they are. A card that exists is kept."""
    args = _arguments().parse_args()
    if args.html is None and artifacts.is_url(args.run):
        raise InputError(f"{args.run} is a copy of a run: say where to write the report, --html FILE")
    folder = artifacts.run_folder(args.run)
    if folder.suffix == ".safetensors" and folder.is_file():
        folder = folder.parent
    page = args.html or folder / PAGE
    if page.is_dir():
        raise InputError(f"--html {page} is a folder: name a file, as in --html {page / PAGE}")
    run = finished_run.read(folder, args.run if artifacts.is_url(args.run) else output.near(folder))
    run_page.write(page, run)
    output.print_text(f"report: {output.near(page)}")
    card = page.with_name(CARD)
    if card.exists() and not args.force:
        output.print_text(f"kept {output.near(card)}, which exists: --force writes a new one over it")
        return
    model_card.write(card, run)
    output.print_text(f"model card: {output.near(card)}; complete what is marked for the owner")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tuner.report",
        description="Write a web page about a finished run, in one file, and a model card in Markdown.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, a search's best/, a .safetensors file in one, or the URL of a copy")
    add("--html", type=Path, metavar="FILE", help=f"the page; default: RUN/{PAGE}. {CARD} is written beside it")
    add("--force", action="store_true", help=f"overwrite {CARD}")
    return parser


if __name__ == "__main__":
    terminal.command(main)
