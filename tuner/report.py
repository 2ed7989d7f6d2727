"""A web page and a model card of a finished run: `python -m tuner.report RUN`."""

import logging

from tuner import InputError, arguments, artifacts, output, terminal
from tuner.analysis import finished_run, model_card, run_page
from tuner.runs.layout import MODEL_CARD, REPORT

log = logging.getLogger("tuner.report")


def main() -> None:
    """Write report.html and MODEL_CARD.md, and print where they are. A card that exists is kept."""
    args = arguments.report().parse_args()
    if args.html is None and artifacts.is_url(args.run):
        raise InputError(f"{args.run} is a copy of a run: say where to write the report, --html FILE")
    folder = artifacts.run_folder(args.run)
    if folder.suffix == ".safetensors" and folder.is_file():
        folder = folder.parent
    page = args.html or folder / REPORT
    if page.is_dir():
        raise InputError(f"--html {page} is a folder: name a file, as in --html {page / REPORT}")
    run = finished_run.read(folder, args.run if artifacts.is_url(args.run) else output.near(folder))
    run_page.write(page, run)
    output.print_text(f"report: {output.near(page)}")
    card = page.with_name(MODEL_CARD)
    if card.exists() and not args.force:
        output.print_text(f"kept {output.near(card)}, which exists: --force writes a new one over it")
        return
    model_card.write(card, run)
    output.print_text(f"model card: {output.near(card)}; complete what is marked for the owner")


if __name__ == "__main__":
    terminal.command(main)
