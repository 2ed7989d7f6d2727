"""Who may import whom: imports run one way, and a library appears only in the rooms that it belongs to."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tuner"
COMMANDS = {"train", "study", "worker", "server", "compare", "predict"}
COMMANDS |= {"evaluate", "export", "resume", "cache", "audit", "report", "demo"}
ROOMS = (  # a module or a package, each above all that it may import
    *("safe_text", "yaml_file", "files", "terminal", "targets", "rules", "config_reference", "earlier", "device"),
    *("cache_files", "output", "config", "data", "networks", "plots", "bank", "runs", "artifacts"),
    *("training", "sweep", "stages", "inference", "analysis", "calls", "arguments", "completion"),
)
ONLY_IN = {
    "fsspec": {"artifacts"},
    "gradio": {"demo"},
    "hydra": {"audit", "config", "evaluate", "sweep", "train"},
    "omegaconf": {"audit", "config", "evaluate", "sweep", "train"},
    "optuna": {"analysis", "artifacts", "server", "study", "sweep", "worker"},
    "optuna_dashboard": {"study"},
    "psutil": {"sweep"},
    "pandas": {"analysis", "audit", "calls", "compare", "evaluate", "output", "plots", "predict", "runs", "study"},
    "matplotlib": {"plots", "runs", "study"},
    "plotly": {"compare", "output"},
    "rich": {"output", "study"},
    "sklearn": {"runs"},
    "scipy": {"analysis", "plots", "runs"},
    "PIL": {"data"},
    "pyarrow": {"data"},
    "onnxruntime": {"export", "inference"},
    "torchvision": {"data", "networks"},
    "timm": {"networks"},
    "huggingface_hub": {"networks"},
    "tensorboard": {"runs"},
    "mlflow": {"runs"},
    "wandb": {"runs"},
}


def rank(room: str) -> int:
    return len(ROOMS) if room in {*COMMANDS, "__main__"} else ROOMS.index(room)


def imported() -> list[tuple[str, str]]:
    """(room, module) for each import in the package, with tuner.x.y for what comes from the package itself."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [(room, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                names = [f"tuner.{alias.name}" for alias in node.names] if node.module == "tuner" else [node.module]
                found += [(room, str(name)) for name in names]
    return found


def test_the_page_on_design_lists_the_layers_from_the_top_down():
    listed = re.findall(r"^\| `(\w+)` \|", (PACKAGE.parent / "docs" / "design.md").read_text(), flags=re.MULTILINE)
    assert tuple(reversed(listed)) == ROOMS


def test_every_room_has_its_place():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms == {*ROOMS, *COMMANDS, "__init__", "__main__"}


def test_imports_run_downwards_and_no_command_is_imported():
    for room, module in imported():
        name = module.split(".")[1] if module.startswith("tuner.") else ""
        if (
            name not in (*ROOMS, *COMMANDS) or name == room or room == "__init__"
        ):  # its load() imports when it is called
            continue
        assert rank(name) < rank(room), f"{room} imports {module}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_in_its_rooms(library):
    rooms = {room for room, module in imported() if module.split(".")[0] == library}
    assert rooms <= ONLY_IN[library]
