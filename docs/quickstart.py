"""Run docs/quickstart.ipynb from top to bottom and write it with its outputs.

    python docs/quickstart.py             # in place; needs nbclient and ipykernel (extra dev)
    python docs/quickstart.py --out FILE

It runs in an empty folder with an empty cache. Outputs do not name that folder.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_suffix(".ipynb")


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run all cells, and keep their outputs. Raises CellExecutionError if one fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        os.environ["TUNER_CACHE"] = str(folder / "cache")  # the kernel inherits it
        paths = os.pathsep.join(filter(None, [str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH")]))
        os.environ["PYTHONPATH"] = paths
        os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, without ipywidgets
        client = NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False)
        client.execute(cwd=str(folder))
        for cell in notebook.cells:
            cell.get("outputs", [])[:] = joined(cell.get("outputs", []))
            for output in cell.get("outputs", []):
                shorten(output, f"{folder}{os.sep}")


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs, with the pieces of a stream that follow each other as one."""
    whole: list[nbformat.NotebookNode] = []
    for output in outputs:
        if whole and output.output_type == whole[-1].output_type == "stream" and output.name == whole[-1].name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def shorten(output: nbformat.NotebookNode, folder: str) -> None:
    """Make paths below the folder relative."""
    texts, names = (output, ["text"]) if output.output_type == "stream" else (output.data, list(output.data))
    for name in names:
        if name == "text" or name.startswith("text/"):
            texts[name] = texts[name].replace(folder, "")


def main() -> None:
    """Run it, then write it."""
    parser = argparse.ArgumentParser(description="Run docs/quickstart.ipynb and write it with its outputs.")
    parser.add_argument("--out", type=Path, default=NOTEBOOK, help="file to write; by default the notebook itself")
    out = parser.parse_args().out
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    execute(notebook)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, out)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB", file=sys.stderr)


if __name__ == "__main__":
    main()
