"""What tuner relies on in Hydra, OmegaConf and their plugins without a promise of their documentation.

Each failure says what tuner would do wrong.
"""

import dataclasses
import inspect
import logging
import sys
from pathlib import Path

import pytest
from contract import contract
from hydra import compose, initialize_config_dir
from hydra._internal import utils as internal_utils
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobStatus
from hydra.types import HydraContext
from hydra_plugins.hydra_optuna_sweeper.config import OptunaSweeperConf
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from tuner.sweep import hydra_private, plugin
from tuner.sweep.sweeper import AsyncSweeper

CONFIG = """
x: 1
time: ${now:%Y}
hydra:
  sweep: {dir: out, subdir: "${hydra:job.num}"}
  job: {num: 7, id: "7", name: job, chdir: true}
"""


@pytest.fixture
def hydra(tmp_path, monkeypatch):
    """A context and the config of a job, of a program in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/config.yaml").write_text(CONFIG)
    with initialize_config_dir(str(tmp_path / "conf"), job_name="job"):
        config = compose("config", return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        yield HydraContext(config_loader=loader, callbacks=Callbacks(config)), config


def test_a_job_runs_in_its_folder(hydra, tmp_path, monkeypatch):
    context, config = hydra

    def task(cfg):
        logging.getLogger("mine").info("said by the job")
        return cfg.x

    with contract("Hydra: run_job runs otherwise: jobs of the fused launcher would lose folders, logs or results"):
        job = hydra_private.run_job(context, task, config)
        assert (job.status, hydra_private.job_result(job)) == (JobStatus.COMPLETED, 1)
        assert (tmp_path / "out/7/.hydra/config.yaml").exists()
        assert "said by the job" in (tmp_path / "out/7/job.log").read_text()


def test_the_error_of_a_job_is_its_result(hydra, capsys):
    context, config = hydra

    def task(cfg):
        raise ValueError("no")

    with contract("Hydra: JobReturn keeps its error elsewhere: failed trials would count as complete"):
        job = hydra_private.run_job(context, task, config)
        assert job.status == JobStatus.FAILED
        capsys.readouterr()
        assert repr(hydra_private.job_result(job)) == "ValueError('no')"
        assert capsys.readouterr().err == ""


def test_the_log_of_the_sweep_replaces_that_of_a_job(hydra, tmp_path):
    context, config = hydra
    with contract("Hydra: configure_log has other arguments: after a job the sweep would log into that job's file"):
        hydra_private.run_job(context, lambda cfg: None, config)
        files = [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]
        assert [handler.baseFilename for handler in files] == [str(tmp_path / "out/7/job.log")]
        hydra_private.configure_log(context, config)
        assert not [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]


def test_resolvers_are_registered(monkeypatch):
    with contract("Hydra: setup_globals registers no resolvers: the fused launcher could not compose ${now:...}"):
        OmegaConf.clear_resolver("now")
        hydra_private.setup_globals()
        assert OmegaConf.has_resolver("now")
        assert OmegaConf.has_resolver("hydra")


def test_overrides_of_hydra_are_left_out():
    with contract("Hydra: filter_overrides filters otherwise: log lines of jobs would be long"):
        assert hydra_private.filter_overrides(["x=1", "hydra.sweep.dir=out", "+y=2"]) == ["x=1", "+y=2"]


def test_the_basic_launcher_has_a_logger_by_this_name():
    with contract("Hydra: the basic launcher logs elsewhere: a sweep would print two lines more for each trial"):
        assert sys.modules[hydra_private.BASIC_LAUNCHER_LOG].log.name == hydra_private.BASIC_LAUNCHER_LOG


def test_overrides_are_parsed_and_set(hydra):
    context, _ = hydra
    with contract("Hydra: parsed overrides are set otherwise: trials would get other values than were drawn"):
        config = OmegaConf.create({"x": 1, "y": {"z": [1]}})
        OmegaConf.set_struct(config, True)
        overrides = hydra_private.parse_overrides(["x=2", "y.z=[1,a]"], context.config_loader)
        hydra_private.set_values(config, overrides)
        assert config == {"x": 2, "y": {"z": [1, "a"]}}
        with pytest.raises(Exception, match="nowhere"):
            hydra_private.set_values(config, hydra_private.parse_overrides(["nowhere=1"]))


def test_elements_of_a_sweep_are_values_and_text():
    with contract("Hydra: the elements of a sweep are read otherwise: choices would reach trials as other values"):
        [override] = hydra_private.parse_overrides(["x=choice(1,'a, b',[c,'d'],{e: null},true)"])
        elements = override.value().list
        values = [1, "a, b", ["c", "d"], {"e": None}, True]
        assert [hydra_private.element_value(element) for element in elements] == values
        for element, value in zip(elements, values, strict=True):
            [back] = hydra_private.parse_overrides([f"x={hydra_private.element_text(element)}"])
            assert back.value() == value
        assert [hydra_private.element_text(value) for value in (None, 0.5, True)] == ["null", "0.5", "True"]


def test_a_part_of_a_config_knows_where_it_is():
    with contract("OmegaConf: a config no longer knows its key: errors would not say which one to change"):
        config = OmegaConf.create({"hydra": {"sweeper": {"pruner": {"upper": None}}}})
        assert hydra_private.full_key(config.hydra.sweeper.pruner) == "hydra.sweeper.pruner"


@pytest.mark.parametrize(
    ("line", "distribution", "points"),
    [
        ("x=choice(a,b)", CategoricalDistribution(["a", "b"]), ["a", "b"]),
        ("x=range(0,6,2)", IntDistribution(0, 4, step=2), [0, 2, 4]),
        ("x=range(0.0,1.0,0.5)", FloatDistribution(0.0, 0.5, step=0.5), [0.0, 0.5]),
        ("x=tag(log,int(interval(1,10)))", IntDistribution(1, 10, log=True), list(range(1, 11))),
        ("x=interval(0.5,1)", FloatDistribution(0.5, 1), ValueError),
    ],
)
def test_a_sweep_is_a_distribution(line, distribution, points):
    with contract("hydra-optuna-sweeper: sweeps are read otherwise: a study would search another space than was typed"):
        [override] = hydra_private.parse_overrides([line])
        searched = hydra_private.distribution(override)
        assert searched == distribution
        if points is ValueError:
            with pytest.raises(ValueError, match="discrete"):
                hydra_private.grid_points(searched)
        else:
            assert list(hydra_private.grid_points(searched)) == points


def test_the_sweeper_takes_all_options_of_hydra_optuna_sweeper():
    with contract("hydra-optuna-sweeper: its options have changed: no sweep could start"):
        upstream = {field.name for field in dataclasses.fields(OptunaSweeperConf)} - {"_target_", "defaults"}
        ours = {field.name for field in dataclasses.fields(plugin.TunerSweeperConf)} - {"_target_", "defaults"}
        assert upstream == {
            *("sampler", "direction", "storage", "study_name", "n_trials", "n_jobs"),
            *("max_failure_rate", "params", "custom_search_space"),
        }
        assert upstream < ours == inspect.signature(AsyncSweeper).parameters.keys()


def test_joblibs_workers_end():
    from joblib import Parallel, delayed
    from joblib.externals.loky import reusable_executor

    with contract("joblib: its pool of workers lies elsewhere: they would outlive the sweep"):
        Parallel(n_jobs=2)(delayed(abs)(-1) for _ in range(2))
        executor = reusable_executor._executor
        assert executor is not None
        hydra_private.stop_joblib_workers()
        assert executor._flags.shutdown


def test_hydra_reports_errors_in_a_function_that_can_be_replaced(capsys):
    def missing():
        Path("/nowhere/x").read_text()

    with hydra_private.files_in_one_line(), contract("a folder that can't be made is a traceback"):
        with pytest.raises(SystemExit):
            internal_utils.run_and_report(missing)
        assert capsys.readouterr().err == "/nowhere/x cannot be used: No such file or directory\n"
    with pytest.raises(SystemExit):
        internal_utils.run_and_report(missing)
    assert "Traceback" in capsys.readouterr().err
