"""The Python of docs/ runs, as it stands there."""

import re
from pathlib import Path

from tuner import train

DOCS = Path(train.__file__).parent.parent / "docs"


def test_each_block_of_the_page_on_python_runs(command):
    code, output = command(
        *("-m", "hparams_search=optuna", "study=mine", "hydra.sweeper.n_trials=4", "final.seeds=1"),
        *("data=synthetic", "model=tiny", "epochs=3", "batch_size=32"),
    )
    assert code == 0, output
    assert "look at it: python -m tuner.study " in output
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "inspect.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 8
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/inspect.md", "exec"), names)
    assert len(names["frame"]) == 5
    assert names["both"]["images"] == 64
    assert Path("curves.png").stat().st_size > 10_000
    assert list(names["study"].trials.number) == [0, 1, 2, 3]
