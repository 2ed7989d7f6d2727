"""Try a trained model in the browser: `python -m tuner.demo RUN`. Drop an image, see its class and the evidence."""

import base64
import html
import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

from tuner import InputError, arguments, output, terminal
from tuner.data.files.image_file import BrokenImageError
from tuner.inference import model
from tuner.inference.evidence import Explainer
from tuner.inference.model import Model
from tuner.inference.single_image import classified
from tuner.safe_text import printable

log = logging.getLogger("tuner.demo")
HOST = "127.0.0.1"
LARGEST = "100mb"  # of an uploaded file
TOP = 5  # classes that are shown with their probabilities
NAMED = 50  # classes that are named
CSS = """
footer { display: none !important } .gradio-container { max-width: 960px !important; margin: 0 auto !important }
.problem { color: #b34700; font-size: 1.1rem }
"""


def main() -> None:
    """Serve the page on this machine alone, until Ctrl-C."""
    args = arguments.demo().parse_args()
    trained = model.load(args.run, device=args.device)
    with tempfile.TemporaryDirectory() as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}  # read when it is imported
        page = page_of(trained, args.run)
        try:
            address = serve(page, args.port)
        except OSError as error:
            where = "no port from 7860 on is free" if args.port is None else f"port {args.port} is taken"
            raise InputError(f"{where}: give a free one, as in --port 8123, or leave --port out") from error
        output.print_text(f"{address}, on this machine only, until Ctrl-C")
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def classify(explain: Explainer, path: Path | None) -> tuple[dict[str, float] | None, str]:
    """What the page shows for a file: probabilities by class, and HTML of the evidence or of what is wrong with it."""
    if path is None:  # the file was removed
        return None, ""
    try:
        found = classified(explain, path)
    except BrokenImageError as error:
        return None, _problem(f"{path.name} cannot be used as an image: {error.reason}")
    except InputError as error:
        return None, _problem(str(error))
    url = f"data:image/png;base64,{base64.b64encode(found.picture).decode()}"
    return found.probabilities, f'<img src="{url}" alt="The image, and the evidence for its class">'


def _problem(text: str) -> str:
    return f'<p role="alert" class="problem">{html.escape(printable(text))}</p>'


def page_of(trained: Model, name: str) -> Any:
    """The page, as Gradio's Blocks. Raises InputError without Gradio."""
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise InputError("tuner.demo needs gradio: pip install 'tuner[demo]'") from error
    explain = Explainer(trained)
    classes = ", ".join(trained.classes[:NAMED]) + ", ..." * (len(trained.classes) > NAMED)
    lines = (html.escape(printable(line)) for line in (name, f"{len(trained.classes):,} classes: {classes}"))
    with gradio.Blocks(title="tuner demo", analytics_enabled=False) as page:
        gradio.HTML("<h1>{}</h1><p>{}</p>".format(*lines))
        with gradio.Row():
            file = gradio.File(label="Image file", type="filepath", height=220)
            label = gradio.Label(label="Calibrated probabilities", num_top_classes=TOP)
        evidence = gradio.HTML()
        file.change(
            lambda path: classify(explain, Path(path) if path else None),
            file,
            [label, evidence],
            show_progress="minimal",
            api_visibility="private",
        )
    return page


def serve(page: Any, port: int | None) -> str:
    """Start serving in a thread. Returns the address. Raises OSError if the port, or every usual one, is taken.

    Nothing leaves this machine: no analytics, no public link, and fonts of the system instead of a font server's.
    """
    import gradio

    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)  # it asks its own server whether it is up
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, address, _ = page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size=LARGEST,
    )
    return str(address)


if __name__ == "__main__":
    terminal.command(main)
