"""Who may import whom. Imports run one way, and a library appears only in the rooms that it belongs to."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tuner"
MAY_IMPORT = {  # room -> the other rooms that it may import
    "__init__": {"model"},
    "device": set(),
    "files": set(),
    "stored": {"files"},
    "data": {"files", "stored"},
    "networks": set(),
    "weights": {"networks"},
    "blocks": set(),
    "backbones": {"blocks", "device", "networks", "weights"},
    "augment": set(),
    "features": {"augment", "backbones", "data", "device", "stored"},
    "heads": {"blocks", "device"},
    "graph": {"device"},
    "plan": {"augment", "heads"},
    "fit": {"blocks", "device", "graph", "heads", "plan"},
    "metrics": set(),
    "calibration": set(),
    "plots": {"files"},
    "trackers": set(),
    "runs": {"files", "plots", "trackers"},
    "settings": set(),
    "sweep": {"device", "files"},
    "scoring": {"calibration", "data", "metrics", "plan", "plots", "runs"},
    "parts": {"augment", "backbones", "data", "device", "features", "settings"},
    "trainer": {"blocks", "device", "fit", "heads", "parts", "plan"},
    "recipe": {"heads", "model", "parts", "plan", "runs", "settings", "trainer"},
    "train": {
        "calibration",
        "checkpoint",
        "data",
        "device",
        "files",
        "fit",
        "parts",
        "plan",
        "recipe",
        "runs",
        "scoring",
        "settings",
        "sweep",
        "trackers",
        "trainer",
    },
    "checkpoint": {"files", "runs"},
    "resume": {"runs"},
    "paired": set(),
    "inspection": {"plots", "resume", "sweep"},
    "advice": {"inspection", "paired", "plots", "sweep"},
    "present": {"files"},
    "model": {"data", "device", "parts", "settings"},
    "maps": {"blocks", "model"},
    "predict": {"data", "device", "maps", "model", "plots", "present"},
    "export": {"blocks", "files", "model", "predict", "present", "settings"},
    "evaluate": {
        "calibration",
        "data",
        "device",
        "metrics",
        "model",
        "plots",
        "present",
        "runs",
        "scoring",
        "settings",
    },
    "compare": {"paired", "plots", "present", "runs"},
    "study": {"advice", "inspection", "plots", "present", "sweep"},
}
ONLY_IN = {
    "hydra": {"evaluate", "settings", "sweep", "train"},
    "omegaconf": {"evaluate", "model", "parts", "recipe", "runs", "settings", "sweep", "train"},
    "optuna": {"advice", "inspection", "study", "sweep"},
    "optuna_dashboard": {"study"},
    "psutil": {"sweep"},
    "greenlet": {"sweep"},
    "pandas": {"advice", "compare", "evaluate", "inspection", "paired", "plots", "predict", "present", "runs", "study"},
    "matplotlib": {"plots", "runs", "scoring", "study"},
    "plotly": {"compare", "present"},
    "rich": {"present", "study"},
    "sklearn": {"metrics"},
    "scipy": {"calibration"},
    "PIL": {"data"},
    "onnxruntime": {"export"},
    "torchvision": {"augment", "backbones", "networks", "weights", "data"},
    "timm": {"networks"},
    "huggingface_hub": {"weights"},
    "tensorboard": {"trackers"},
    "mlflow": {"trackers"},
    "wandb": {"trackers"},
}


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


def test_rooms_import_one_way():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    for room, module in imported():
        parts = module.split(".")
        if parts[0] == "tuner" and len(parts) > 1 and parts[1] in rooms and parts[1] != room:
            assert parts[1] in MAY_IMPORT[room], f"{room} imports {module}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_in_its_rooms(library):
    rooms = {room for room, module in imported() if module.split(".")[0] == library}
    assert rooms <= ONLY_IN[library]
