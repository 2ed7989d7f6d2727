"""Jobs that train together, `hydra/launcher=fused`: each is as it would be alone, and no other one's trouble is its."""

import logging
import re
from pathlib import Path

import optuna
import pandas as pd
import pytest
import torch
import yaml
from helpers import result

from tuner import device, stages
from tuner.runs.run import METRICS
from tuner.training import fit, together

log = logging.getLogger("program")
TINY = ("data=synthetic", "model=tiny", "model.head.width=16", "epochs=3", "batch_size=64", "device=cpu")
TINY += ("precision=fp32", "study=mine")
FUSED = ("-m", "hydra/launcher=fused", "hydra.launcher.stack=8", *TINY)
SWEEP = (*FUSED, "hydra.sweep.dir=fused")
GRID = (*FUSED, "hparams_search=random", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=9", "final.seeds=0")
GRID += ("model.head.dropout=0.1", "optimizer.lr=1e-3")
MINE = Path("multirun/mine")


def statuses(folder: Path) -> list[str]:
    """Of jobs 0, 1, ..."""
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    return [result(folder / str(number))["status"] for number in numbers]


def trials() -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="mine", storage="sqlite:///multirun/optuna.db").trials


def states() -> list[str]:
    return [trial.state.name for trial in trials()]


def curve(folder: Path) -> pd.DataFrame:
    """All columns but `seconds`."""
    return pd.read_csv(folder / "metrics.csv").drop(columns="seconds")


def assert_same_curve(folder: Path, other: Path) -> None:
    pd.testing.assert_frame_equal(curve(folder), curve(other), rtol=1e-3)


class Fits(list):
    """fit(), on a device with memory for `most` heads: how many each call was to train."""

    most = 100

    def __call__(self, specs, *arguments, **options):
        self.append(len(specs))
        if len(specs) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it")
        return fit.fit(specs, *arguments, **options)


@pytest.fixture
def sizes(monkeypatch):
    fits = Fits()
    monkeypatch.setattr(together, "fit", fits)
    return fits


@pytest.mark.parametrize(
    ("swept", "groups"),
    [
        ("optimizer.lr=1e-3,3e-3 model.head.width=16,32 model.head.dropout=0", [4]),
        ("optimizer=adamw,adam,sgd model.head.dropout=0,0.4", [2, 2, 2]),
        ("scheduler=constant,cosine label_smoothing=0,0.2", [4]),
        ("optimizer.weight_decay=0,0.5 +optimizer.betas=[0.9,0.99],[0.8,0.9] grad_clip=0.1", [4]),
        ("optimizer=sgd optimizer.momentum=0.5,0.9 grad_clip=null,0.1", [4]),
        ("model.head.depth=0,1,2 model.head.dropout=0.5", [3]),
        ("model.head.width=[32,8],16 seed=0,1", [4]),
        ("batch_size=32,1000 epochs=2,4", [1] * 4),
        ("model.image_size=32,48 data.n=100", [1, 1]),
        ("data.classes=3,4 data.n=100", [1, 1]),
        ("keep=best patience=1 epochs=8 optimizer.lr=1e-3,1e-2,3e-2", [3]),
        ("model.frozen=block1,null data.n=40 epochs=1 model.head.dropout=0,0.4", [1] * 4),
    ],
)
def test_jobs_leave_what_they_leave_under_the_basic_launcher(command, sizes, swept, groups):
    arguments = [*TINY, *swept.split()]
    code, output = command("-m", "hydra/launcher=basic", "hydra.sweep.dir=basic", *arguments)
    assert code == 0, output
    jobs = len(sizes)
    assert sizes == [1] * jobs
    sizes.clear()
    code, output = command(*SWEEP, *arguments)
    assert code == 0, output
    assert sizes == groups

    names = {path.relative_to("basic") for path in Path("basic").rglob("*")}
    assert {path.relative_to("fused") for path in Path("fused").rglob("*")} == names
    for number in map(str, range(jobs)):
        ours, theirs = Path("fused") / number, Path("basic") / number
        assert_same_curve(ours, theirs)
        r, wanted = result(ours), result(theirs)
        assert r.keys() == wanted.keys()
        for key in wanted.keys() - {"seconds", "seconds_features", "versions"}:
            exact = not isinstance(wanted[key], float)
            assert r[key] == (wanted[key] if exact else pytest.approx(wanted[key], rel=1e-3)), key
        for name in ("config.yaml", "overrides.yaml"):
            assert (ours / ".hydra" / name).read_text() == (theirs / ".hydra" / name).read_text()
        runtime = yaml.safe_load((ours / ".hydra/hydra.yaml").read_text())["hydra"]
        assert (runtime["job"]["num"], runtime["runtime"]["output_dir"]) == (int(number), str(ours.absolute()))

        lines = (ours / "train.log").read_text().splitlines()
        epochs = [int(match[1]) for match in map(re.compile(r" epoch (\d+)/").search, lines) if match]
        assert epochs == list(curve(ours).epoch)
        assert [line for line in lines if "validation accuracy" in line] == lines[-1:]
        assert lines[-1].endswith(str(ours.absolute()))


@pytest.mark.parametrize(("stack", "groups"), [(2, [2, 2, 1]), (9, [5])])
def test_stack_is_how_many_train_together_at_most(command, sizes, stack, groups):
    for search, lrs in ((SWEEP, "{}"), (GRID, "choice({})")):
        sizes.clear()
        lrs = lrs.format("1e-3,2e-3,3e-3,4e-3,5e-3")
        code, output = command(*search, f"hydra.launcher.stack={stack}", "epochs=1", f"optimizer.lr={lrs}")
        assert code == 0, output
        assert sizes == groups
    assert statuses(Path("fused")) == statuses(MINE) == ["complete"] * 5


@pytest.mark.parametrize(("search", "stack"), [(SWEEP, "0"), (SWEEP, "many"), (SWEEP, "2.5"), (GRID, "many")])
def test_a_stack_that_is_no_whole_number_is_refused(command, search, stack):
    code, output = command(*search, f"hydra.launcher.stack={stack}")
    assert code == 1
    assert f"hydra.launcher.stack={stack} must be a whole number of at least 1, or auto" in output
    assert not list(Path().rglob("metrics.csv"))


@pytest.mark.parametrize(
    ("swept", "error"),
    [
        ("model.head.dropout=0,1.5,0.1", "model.head.dropout=1.5 must be"),
        ("optimizer=sgd scheduler=constant optimizer.lr=1e-2,1e38,3e-2", "the loss is not finite"),
    ],
)
def test_a_job_fails_alone(command, sizes, swept, error):
    good = swept.replace("1.5,", "").replace("1e38,", "")
    command("-m", "hydra.sweep.dir=basic", *TINY, *good.split())
    sizes.clear()
    code, output = command(*SWEEP, *swept.split())
    assert code == 1
    assert error in output
    assert sizes == [3 if "1e38" in swept else 2]
    assert statuses(Path("fused")) == ["complete", "failed", "complete"]
    assert error in result(Path("fused/1"))["error"]
    for number, alone in (("0", "0"), ("2", "1")):
        assert_same_curve(Path("fused", number), Path("basic", alone))
        assert error not in Path("fused", number, "train.log").read_text()


@pytest.mark.parametrize(
    ("searched", "bad", "error"),
    [
        ("model.head.dropout=choice(0,1.5,0.1,0.2)", "1.5", "model.head.dropout=1.5 must be"),
        ("optimizer.lr=choice(1e-2,1e38,3e-2)", "1e+38", "the loss is not finite"),
        ("model=choice(tiny,nothing)", "nothing", "nothing"),
    ],
)
def test_a_trial_fails_alone(command, searched, bad, error):
    code, output = command(*GRID, "optimizer=sgd", "scheduler=constant", searched)
    assert code == 0, output
    assert sorted(states()) == ["COMPLETE"] * searched.count(",") + ["FAIL"]
    [failed] = [trial for trial in trials() if trial.state.name == "FAIL"]
    assert [str(value) for value in failed.params.values()] == [bad]
    assert error in failed.user_attrs["error"]


def test_a_pruned_trial_leaves_the_others_as_they_are(command, sizes):
    searched = ("optimizer.lr=choice(1e-7,1e-3,2e-7,3e-3)", "epochs=4")
    code, output = command(*GRID, "study=unpruned", *searched)
    assert code == 0, output
    threshold = ("hydra/sweeper/pruner=threshold", "hydra.sweeper.pruner.lower=0.45")
    code, output = command(*GRID, *searched, *threshold, "hydra.sweeper.pruner.n_warmup_steps=2")
    assert code == 0, output
    assert sizes == [4, 4]
    assert {trial.params["optimizer.lr"] for trial in trials() if trial.state.name == "PRUNED"} == {1e-7, 2e-7}
    for trial in trials():
        folder = MINE / str(trial.number)
        pruned, epochs = trial.state.name == "PRUNED", len(curve(folder))
        assert result(folder)["status"] == ("pruned" if pruned else "complete")
        assert result(folder)["epochs"] == trial.user_attrs["epochs"] == epochs == (2 if pruned else 4)
        assert list(trial.intermediate_values) == list(range(1, epochs + 1))
        unpruned = curve(Path("multirun/unpruned", str(trial.number)))
        ours, theirs = curve(folder), unpruned[:epochs]
        counted = [name for name in ours if "accuracy" in name]  # an image of doubt may fall either way
        pd.testing.assert_frame_equal(ours[counted], theirs[counted], atol=0.02)
        pd.testing.assert_frame_equal(ours.drop(columns=counted), theirs.drop(columns=counted), rtol=1e-3)
        assert ("pruned at step 2" in (folder / "train.log").read_text()) == pruned
        assert (folder / "model.safetensors").exists() == (not pruned)


def test_a_stack_all_of_whose_trials_are_pruned_ends(command):
    pruner = ("hydra/sweeper/pruner=threshold", "hydra.sweeper.pruner.lower=2")
    code, output = command(*GRID, *pruner, "optimizer.lr=choice(1e-3,2e-3,3e-3)")
    assert code == 1
    assert "no trial was completed; all were pruned: loosen hydra.sweeper.pruner" in output
    assert states() == ["PRUNED"] * 3
    assert [len(curve(MINE / n)) for n in "012"] == [1, 1, 1]


def test_a_stack_that_is_too_large_for_the_memory_is_split(command, sizes):
    sizes.most = 2
    lrs = "optimizer.lr=1e-3,2e-3,3e-3,4e-3,5e-3"
    code, output = command(*SWEEP, lrs)
    assert code == 0, output
    assert sizes == [5, 2, 3, 1, 2]
    assert "5 heads are too many at once: CUDA out of memory. Tried to allocate 2.00 GiB.\n" in output
    assert "training 2, then 3: set hydra.launcher.stack=2" in output
    command("-m", "hydra.sweep.dir=basic", *TINY, lrs)
    for number in "01234":
        assert_same_curve(Path("fused", number), Path("basic", number))


def test_heads_that_have_begun_are_not_begun_again(command, monkeypatch):
    calls = []

    def small(specs, *arguments, on_epoch, **options):
        calls.append(len(specs))
        on_epoch(1, {spec: dict.fromkeys(METRICS, 0.5) for spec in specs})
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(together, "fit", small)
    code, _ = command(*SWEEP, "optimizer.lr=1e-3,2e-3")
    assert code == 1
    assert calls == [2]
    assert statuses(Path("fused")) == ["failed", "failed"]
    assert [len(curve(Path("fused", n))) for n in "01"] == [1, 1]
    assert "OutOfMemoryError: CUDA out of memory." in result(Path("fused/1"))["error"]


def test_an_interrupt_ends_every_job_and_the_study_goes_on(command, monkeypatch):
    real = stages.Prepared.on_epoch

    def interrupted(job, epoch, metrics):
        real(job, epoch, metrics)
        if job.run.folder.name == "1" and epoch == 2:
            raise KeyboardInterrupt

    lrs = "optimizer.lr=choice(1e-3,2e-3,3e-3)"
    with monkeypatch.context() as patch:
        patch.setattr(stages.Prepared, "on_epoch", interrupted)
        code, output = command(*GRID, lrs)
    assert code == 130, output
    assert "continue with: " in output
    assert states()[:3] == ["FAIL"] * 3
    assert "RUNNING" not in states()
    assert statuses(MINE) == ["interrupted"] * 3
    assert [len(curve(MINE / n)) for n in "012"] == [2, 2, 1]

    code, output = command(*GRID, lrs)
    assert code == 0, output
    complete = [trial.params["optimizer.lr"] for trial in trials() if trial.state.name == "COMPLETE"]
    assert sorted(complete) == [1e-3, 2e-3, 3e-3]
    assert set(states()) == {"COMPLETE", "FAIL"}


def test_a_stack_is_finished_before_the_next_one_trains(command, monkeypatch):
    """Jobs of two batch sizes in one launch: an interrupt in the second stack loses nothing of the first."""
    real = stages.Prepared.on_epoch

    def interrupted(job, epoch, metrics):
        real(job, epoch, metrics)
        if job.config.batch_size == 32:
            raise KeyboardInterrupt

    monkeypatch.setattr(stages.Prepared, "on_epoch", interrupted)
    code, output = command(*SWEEP, "batch_size=64,32", "optimizer.lr=1e-3,2e-3")
    assert code == 130, output
    assert statuses(Path("fused")) == ["complete", "complete", "interrupted", "interrupted"]
    assert not list(Path("fused").rglob(".lock"))


def test_programs_without_stages_run_as_under_the_basic_launcher(toy):
    left = {}
    for launcher in ("basic", "fused"):
        folder = Path("multirun", launcher)
        done = toy.run(
            *(f"hydra/launcher={launcher}", f"hydra.sweeper.study_name={launcher}", f"hydra.sweep.dir={folder}"),
            *(f"ran=${{hydra:runtime.cwd}}/{launcher}.txt", "hydra.job.chdir=true", "steps=3", "x=interval(-2,2)"),
            *("does=2-raise 4-nan 5-exit", "hydra/sweeper/pruner=threshold", "hydra.sweeper.pruner.upper=4"),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert Path.cwd() == toy.folder
        order = [int(line.split()[0]) for line in Path(f"{launcher}.txt").read_text().splitlines()]
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".lock")
        ends = [
            (trial.state.name, trial.params, trial.values, trial.intermediate_values, trial.user_attrs.get("error"))
            for trial in toy.study(launcher).trials
        ]
        left[launcher] = order, files, ends
    assert left["fused"] == left["basic"]
    assert left["fused"][0] == list(range(6))


def test_a_head_too_large_for_the_memory_fails_alone(command, monkeypatch):
    def limited(specs, *arguments, **options):
        if any(spec.head.widths[0] > 100 for spec in specs):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return fit.fit(specs, *arguments, **options)

    monkeypatch.setattr(together, "fit", limited)
    _, output = command(*SWEEP, "model.head.width=16,32,64,500")
    assert statuses(Path("fused")) == ["complete"] * 3 + ["failed"]
    assert "CUDA out of memory" in result(Path("fused/3"))["error"], output


@pytest.mark.parametrize(
    ("search", "groups"),
    [
        ("optimizer.lr=1e-3,2e-3,3e-3,4e-3,5e-3,6e-3", [4, 2]),
        ("hparams_search=random hydra.sweeper.n_trials=6", [4, 2]),
        ("hparams_search=random hydra/sweeper/sampler=tpe hydra.sweeper.n_trials=4", [1] * 4),
        ("hparams_search=random hydra/sweeper/sampler=tpe hydra.sweeper.n_trials=10", [2] * 5),
    ],
)
def test_by_itself_it_leaves_a_search_rounds_to_learn_from(command, sizes, monkeypatch, search, groups):
    monkeypatch.setitem(device.STACK_SIZE, "cpu", 4)
    code, output = command(*FUSED, "hydra.launcher.stack=auto", "epochs=1", "final.seeds=0", *search.split())
    assert code == 0, output
    assert sizes == groups
    assert output.count(f"hydra.launcher.stack: {groups[0]} (auto: ") == 1
