"""A config of somebody else is data: what its `_target_`s may name is an exact list."""

import importlib
import inspect
import pkgutil
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import tuner
from tuner import InputError, targets
from tuner.config import Target

LISTED = {name for names in targets.GROUPS.values() for name in names}


def public_names():
    """module.name of each public function and class of the package, wherever it can be reached from."""
    for module in pkgutil.walk_packages(tuner.__path__, "tuner."):
        if module.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if callable(value) and name[0] != "_":
                yield f"{module.name}.{name}"


def test_every_target_on_the_list_exists_and_takes_no_callable():
    for name in (*LISTED, *targets.SAMPLERS, *targets.PRUNERS, *targets.SEARCH_SPACES):
        module, _, attribute = name.rpartition(".")
        function = getattr(importlib.import_module(module), attribute)
        assert callable(function)
        if name.startswith("tuner."):
            assert not {"trusted", "whitelist"} & set(inspect.signature(function).parameters)
            assert "Callable" not in str(inspect.signature(function))


def test_nothing_else_of_the_package_is_called():
    outside = [name for name in public_names() if name not in LISTED]
    assert len(outside) > 500
    assert {"tuner.sweep.sampling.build", "tuner.runs.run.write_table", "tuner.data.csv_file.Path"} <= {*outside}
    for name in outside:
        for group in targets.GROUPS:
            with pytest.raises(InputError, match="is not on the list of what a config may call"):
                Target(group, {"_target_": name}).build()


@pytest.mark.parametrize("group", targets.GROUPS)
def test_a_group_does_not_take_the_targets_of_another(group):
    for other in LISTED.difference(targets.GROUPS[group]):
        with pytest.raises(
            InputError, match=f"^{group}: _target_ '{other}' is not on the list .* packages you trust in TUNER"
        ):
            Target(group, {"_target_": other}).build()


def test_nothing_is_called_within_the_arguments_of_a_target():
    inner = {"_target_": "pathlib.Path", "_args_": ["x"]}
    with pytest.raises(InputError, match=r"scheduler: _target_ 'pathlib\.Path' is not on the list"):
        Target("scheduler", {"_target_": targets.SCHEDULERS[0], "_partial_": True, "start": inner}).build()


def test_the_optimizers_of_the_list_are_those_that_step_on_gradients():
    others = {"LBFGS", "Muon", "Optimizer", "SparseAdam"}
    names = {name for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    assert {f"torch.optim.{name}" for name in names - others} >= set(targets.OPTIMIZERS)


def evil(folder: Path, marker: Path) -> None:
    """Make a run's config write `marker`, in every way that one of an earlier version could."""
    rows = {"_target_": "tuner.runs.run.write_table", "path": str(marker), "rows": [["x"]]}
    handler = {"class": "logging.FileHandler", "filename": str(marker)}
    for path in (folder / "conf/config.yaml", folder / ".hydra/config.yaml"):
        config = yaml.safe_load(path.read_text())
        config["data"] = rows | {"views": 1, "test_views": 1}
        config.setdefault("hydra", {})["callbacks"] = {"mine": rows}
        config["hydra"]["job_logging"] = {"version": 1, "root": {"handlers": ["x"]}, "handlers": {"x": handler}}
        path.write_text(yaml.safe_dump(config))
    path = folder / ".hydra/hydra.yaml"
    config = yaml.safe_load(path.read_text())
    own = folder / "conf"
    config["hydra"]["overrides"]["hydra"] = [
        *(f"+hydra.callbacks.x={{_target_: tuner.runs.run.write_table, path: {marker}, rows: [[x]]}}",),
        f"+hydra.job_logging.handlers.x={{class: logging.FileHandler, filename: {marker}}}",
    ]
    config["hydra"]["runtime"]["config_sources"] = [{"path": str(own), "schema": "file", "provider": "command-line"}]
    path.write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    "words", [("evaluate",), ("export", "--format", "torchscript"), ("resume",), ("predict", "x.png")]
)
def test_a_run_of_somebody_else_runs_no_code(trained, call, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained(), "run")
    marker = tmp_path / "CODE_RAN"
    evil(Path("run"), marker)
    if words[0] == "resume":
        Path("run/checkpoint.pt").write_bytes(b"")
        Path("run/result.json").unlink()
    name, *more = words
    code, out, err = call(name, "run", *more)
    assert not marker.exists()
    if name in ("evaluate", "resume"):
        assert code
        assert "_target_ 'tuner.runs.run.write_table' is not on the list" in out + err
