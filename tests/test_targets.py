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
from tuner.networks.architectures import check_name, create

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


@pytest.mark.parametrize(
    ("trust", "name", "message"),
    [
        ("", "os.system", r"model.name=os.system is code that a config may not call: .* set TUNER_TRUST='os\.\*'"),
        ("collections.*", "collections.nothing", "model.name=collections.nothing cannot be imported"),
        ("collections.*", "collections.OrderedDict", "must return a torch.nn.Module, not OrderedDict"),
    ],
)
def test_a_network_that_a_config_brings_is_called_only_if_it_is_trusted(trust, name, message, monkeypatch):
    monkeypatch.setenv("TUNER_TRUST", trust)

    def checked():
        check_name(name)
        return create(name)

    with pytest.raises(InputError, match=message):
        checked()


LOSSES = """
def mean(log_p, labels):
    return -log_p.gather(1, labels[:, None]).mean()

def other(log_p):
    return log_p
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+loss._target_=losses.mean"], "losses.mean must return a loss for each image, [N]; it returns [] of 2"),
        (["+loss._target_=losses.other"], "other() takes 1 positional argument but 2 were given"),
        (["+loss._target_=losses.other", "+loss.gamma=2"], "other() got an unexpected keyword argument 'gamma'"),
        (["+loss._target_=os.system"], "'os.system' is not on the list of what a config may call; name packages you"),
    ],
)
def test_a_loss_that_does_not_fit_is_one_line(command, tmp_path, monkeypatch, words, message):
    (tmp_path / "losses.py").write_text(LOSSES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TUNER_TRUST", "losses.*")
    code, output = command("data=synthetic", "model=tiny", "+loss._partial_=true", *words)
    assert code == 1
    assert message in output
    assert "Traceback" not in output
