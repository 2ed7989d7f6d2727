"""What the experiment trackers have of runs and searches, read back with their own packages."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import result

from tuner.runs.trackers import Tracker

TINY = ("data=synthetic", "model=tiny", "epochs=4", "batch_size=32", "plots=false")
SEARCH = (  # a trial that is completed, one that is pruned, one that diverges; then the best
    *("-m", "hparams_search=optuna", "study=mine", *TINY, "optimizer=sgd", "scheduler=constant"),
    *("optimizer.lr=choice(1e-2,1e-7,1e38)", "model.head.width=32", "model.head.dropout=0"),
    "hydra.sweeper.enqueue=[{optimizer.lr:1e-2},{optimizer.lr:1e-7},{optimizer.lr:1e38}]",
    *("hydra.sweeper.n_trials=3", "hydra.sweeper.baseline=false", "hydra.sweeper.max_failure_rate=1"),
    *("hydra.sweeper.pruner.n_startup_trials=1", "hydra.sweeper.pruner.n_warmup_steps=1", "final.seeds=1"),
)
STATUS = {"0": "complete", "1": "pruned", "2": "failed", "best": "complete"}
MINE = Path("multirun/mine")
no_mapper_warning = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def numbers(folder: Path) -> dict[str, float]:
    """What the trackers are to have of a result."""
    given = ("seed", "trial", "n_train", "n_val", "n_test", "test_duplicates")
    found = {key: v for key, v in result(folder).items() if isinstance(v, int | float) and key not in given}
    assert found.keys() >= {"complete": {"train_accuracy"}, "pruned": {"val_accuracy"}}.get(STATUS[folder.name], set())
    return {f"final/{key}": value for key, value in found.items()}


def epochs(folder: Path) -> list[int]:
    return [int(line.split(",")[0]) for line in (folder / "metrics.csv").read_text().splitlines()[1:]]


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_has_the_trials_by_folder(command):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    code, output = command(*SEARCH, "logger=tensorboard")
    assert code == 0, output
    assert {path.parent.name for path in MINE.rglob("events.out.*")} == STATUS.keys()
    for name, status in STATUS.items():
        folder, read = MINE / name, events(MINE / name)
        assert [event.step for event in read.Scalars("train_loss")] == epochs(folder)
        finals = {tag: read.Scalars(tag)[-1].value for tag in read.Tags()["scalars"] if tag.startswith("final/")}
        assert finals == pytest.approx(numbers(folder), rel=1e-5)
        [text] = read.Tensors("status/text_summary")
        assert text.tensor_proto.string_val[0].decode().startswith(status)
        summaries = {tag: HParamsPluginData.FromString(c) for tag, c in read.PluginTagToContent("hparams").items()}
        assert set(summaries) >= {"_hparams_/experiment", "_hparams_/session_start_info"}
        assert ("_hparams_/session_end_info" in summaries) == (status != "failed")
        given = summaries["_hparams_/session_start_info"].session_start_info.hparams
        assert given["optimizer.lr"].number_value == {"1": 1e-7, "2": 1e38}.get(name, 1e-2)
        assert not any(key.startswith("logger") for key in given)


@no_mapper_warning
def test_mlflow_has_an_experiment_for_the_study_and_a_run_for_each_trial(command):
    code, output = command(*SEARCH, "logger=mlflow")
    assert code == 0, output
    command(*TINY, "logger=mlflow", "hydra.run.dir=outputs/single")

    from mlflow import MlflowClient

    client = MlflowClient("sqlite:///mlflow.db")
    assert {found.name for found in client.search_experiments()} == {"Default", "tuner", "mine"}
    mine = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert {run.info.run_name: run.data.tags["status"].split(":")[0] for run in mine} == STATUS
    assert [run.info.status for run in sorted(mine, key=lambda run: run.info.run_name)] == [
        *("FINISHED", "KILLED", "FAILED", "FINISHED"),
    ]
    for run in mine:
        folder = MINE / run.info.run_name
        assert run.data.tags["folder"] == str(folder.absolute())
        assert run.data.params["optimizer.lr"] == {"1": "1e-07", "2": "1e+38"}.get(folder.name, "0.01")
        assert {key: v for key, v in run.data.metrics.items() if "/" in key} == pytest.approx(numbers(folder))
        assert [m.step for m in client.get_metric_history(run.info.run_id, "train_loss")] == epochs(folder)
    [single] = client.search_runs([client.get_experiment_by_name("tuner").experiment_id])
    assert single.info.run_name == "single"
    assert single.data.metrics["final/test_accuracy"] == result(Path("outputs/single"))["test_accuracy"]


def records(path: Path):
    """The records of an offline run's file, which is a log as LevelDB has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def items(of) -> dict:
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in of}


def test_wandb_has_a_group_for_the_study_and_a_run_for_each_trial(command):
    code, output = command(*SEARCH, "logger=wandb")
    assert code == 0, output
    names = set()
    for path in Path("wandb").glob("offline-run-*/*.wandb"):
        found = list(records(path))
        [run] = [record.run for record in found if record.HasField("run")][:1]
        names.add(run.display_name)
        folder, status = MINE / run.display_name, STATUS[run.display_name]
        assert (run.project, run.run_group) == ("tuner", "mine")
        config = items(run.config.update)
        assert config["optimizer"]["lr"] == {"1": 1e-7, "2": 1e38}.get(folder.name, 1e-2)
        assert config["folder"] == str(folder.absolute())
        history = [items(record.history.item) for record in found if record.HasField("history")]
        assert [row["_step"] for row in history if "train_loss" in row] == epochs(folder)
        summary = {}
        for record in found:
            summary |= items(record.summary.update)
        assert summary["status"].split(":")[0] == status
        assert {key: v for key, v in summary.items() if "/" in key} == pytest.approx(numbers(folder))
        [code] = [record.exit.exit_code for record in found if record.HasField("exit")]
        assert code == (status == "failed")
    assert names == STATUS.keys()


@pytest.mark.parametrize("package", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_told_before_images_are_read(command, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package or "torch.utils.tensorboard" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, output = command("data=csv", "data.path=none.csv", "model=tiny", f"logger={package}")
    assert code == 1
    assert f"logger={package} needs the package {package}: pip install 'tuner[{package}]'" in output
    assert "none.csv" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("logger=mlflow", "logger.uri=http://127.0.0.1:9"),
            "logger=mlflow cannot start: MlflowException: API request",
        ),
        (("logger=mlflow", "logger.uri=ftp://here"), "got unsupported URI 'ftp://here'"),
        (("logger=mlflow", "logger.uri=sqlite:////proc/none/mlflow.db"), "logger=mlflow cannot start: "),
        (("logger=mlflow", "+logger.url=here"), "unexpected keyword argument 'url'"),
        (("logger=wandb", "logger.mode=online"), "logger=wandb cannot start: UsageError: No API key configured"),
        (("logger=wandb", "logger.mode=sometimes"), "Input should be 'online', 'offline'"),
    ],
)
def test_a_tracker_that_cannot_start_ends_the_run_with_one_line(command, arguments, message):
    code, output = command(*TINY, *arguments)
    assert code == 1
    assert message in output
    assert "Traceback" not in output
    assert not Path("outputs").exists()


class Broken:
    """A tracker whose server goes away with the second epoch."""

    errors = (ConnectionError,)

    def __init__(self):
        self.calls = []

    def log_epoch(self, epoch, metrics):
        self.calls.append(epoch)
        if epoch > 1:
            raise ConnectionError("it is gone")

    def finish(self, result):
        self.calls.append(result["status"])


def test_a_tracker_that_fails_later_is_a_warning_and_the_run_goes_on(tmp_path, caplog):
    broken = Broken()
    tracker = Tracker(broken, tmp_path)
    for epoch in (1, 2, 3):
        tracker.log_epoch(epoch, {"train_loss": 1.0})
    tracker.finish({"status": "complete"})
    assert broken.calls == [1, 2, "complete"]
    [message] = caplog.messages
    expected = f"Broken did not receive epoch 2 and later ones; metrics.csv in {tmp_path} is complete: "
    assert message == expected + "ConnectionError: it is gone"


def test_what_is_no_failure_of_the_tracker_is_not_hidden(tmp_path):
    tracker = Tracker(Broken(), tmp_path)
    with pytest.raises(KeyError):
        tracker.finish({})


@no_mapper_warning
def test_several_processes_open_a_new_mlflow_store_at_once(tmp_path):
    code = f"""if True:
        import sys, warnings
        warnings.simplefilter("ignore")
        from pathlib import Path
        from tuner.runs.trackers import MLflow
        name, uri = sys.argv[1], "sqlite:///{tmp_path}/mlflow.db"
        tracker = MLflow(Path(name), "mine", name, {{"lr": 0.1}}, uri=uri)
        tracker.log_epoch(1, {{"train_loss": 1.0}})
        tracker.finish({{"status": "complete", "val_accuracy": 0.5}})
    """
    started = [subprocess.Popen([sys.executable, "-c", code, str(n)], stderr=subprocess.PIPE) for n in range(3)]
    assert [(process.communicate()[1][-2000:], process.returncode)[1] for process in started] == [0, 0, 0]

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert {run.info.run_name for run in runs} == {"0", "1", "2"}


def test_without_a_tracker_none_is_imported(tmp_path):
    code = "import sys; from tuner.train import main; main(); "
    code += "assert not {'tensorboard', 'mlflow', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, *TINY, "epochs=1"], cwd=tmp_path, check=True, capture_output=True)


def test_a_sweep_goes_on_without_a_tracker_that_cannot_be_reached(command):
    code, output = command("-m", "seed=0,1", "logger=mlflow", "logger.uri=sqlite:////proc/none/mlflow.db", *TINY)
    assert code == 0
    assert "logger=mlflow cannot start: " in output
    assert "trial 1 continues without it" in output
    assert {json.loads(path.read_text())["status"] for path in Path().rglob("result.json")} == {"complete"}
