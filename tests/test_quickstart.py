"""The notebook docs/quickstart.ipynb."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOK = DOCS / "quickstart.ipynb"


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def pictures(cells):
    return [output for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", {})]


def test_the_notebook_has_the_outputs_of_one_run_and_is_small():
    cells = code_cells(NOTEBOOK)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert len(pictures(cells)) == 5
    assert NOTEBOOK.stat().st_size < 500_000
    assert str(Path.home()) not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    pytest.importorskip("nbclient", reason="needs nbclient")
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    out = tmp_path / "quickstart.ipynb"
    subprocess.run(
        [sys.executable, str(DOCS / "quickstart.py"), "--out", str(out)],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"), "IPYTHONDIR": str(tmp_path / "ipython")},
    )  # a cell that fails ends it with an error
    cells, recorded = code_cells(out), code_cells(NOTEBOOK)
    assert [cell["source"] for cell in cells] == [cell["source"] for cell in recorded]
    assert len(pictures(cells)) == len(pictures(recorded))
