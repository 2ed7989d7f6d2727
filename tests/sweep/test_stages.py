"""hydra/launcher=fused with a program in three stages: jobs are prepared, trained together and finished."""

import logging
import os
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback

from tuner.sweep.trial import Stages, stages_of

log = logging.getLogger("program")


PROGRAM = f"""
x: 0
hydra:
  sweep: {{dir: swept}}
  job:
    name: program
    chdir: true
    env_set: {{PROGRAM_X: "x is ${{x}}"}}
  callbacks:
    seen: {{_target_: {__name__}.Seen}}
"""
seen: list[tuple] = []


class Seen(Callback):
    def on_job_start(self, config, **options):
        seen.append(("start", config.x, HydraConfig.get().job.num))

    def on_job_end(self, config, job_return, **options):
        assert config.hydra.output_subdir == job_return.hydra_cfg.hydra.output_subdir == ".hydra"
        seen.append(("end", config.x, HydraConfig.get().job.num))


class Squares:
    """A program that squares x. `calls`: the arguments of fit_together; `finished`: those of finish."""

    def __init__(self, fail=lambda stage, x: None):
        self.calls, self.finished, self.fail = [], [], fail

    def prepare(self, cfg, trial):
        self.note("prepare", cfg.x)
        return cfg.x

    def fit_together(self, prepared):
        self.calls.append(prepared)
        for index, x in enumerate(prepared):
            self.fail("fit", x)
            yield index, x**2

    def finish(self, x, fitted):
        self.finished.append((x, fitted if isinstance(fitted, int) else repr(fitted)))
        if isinstance(fitted, BaseException):
            raise fitted
        self.note("finish", x)
        return fitted

    def note(self, stage, x):
        here = HydraConfig.get().job.num, Path.cwd().name, os.environ["PROGRAM_X"]
        seen.append((stage, x, *here))
        log.info("%s x=%d", stage, x)
        self.fail(stage, x)

    def task(self):
        def task(cfg):
            return task.stages.run(cfg, None)

        task.stages = Stages(self.prepare, self.fit_together, self.finish)
        return task


@pytest.fixture
def program(tmp_path, monkeypatch, capfd):
    """Sweep a task over arguments, in an empty folder; gives the exit code and what it printed."""
    (tmp_path / "program.yaml").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    seen.clear()

    def run(task, *arguments, launcher="fused"):
        main = hydra.main(config_path=str(tmp_path), config_name="program", execution_whitelist=(f"{__name__}.*",))
        monkeypatch.setattr(sys, "argv", ["program", "-m", f"hydra/launcher={launcher}", *arguments])
        try:
            main(task)()
            code = 0
        except SystemExit as stop:
            code = stop.code
        output = capfd.readouterr()
        return code, output.out + output.err

    return run


def test_each_stage_of_a_job_runs_in_that_jobs_context(program, tmp_path):
    squares = Squares()
    code, output = program(squares.task(), "x=5,6,7")
    assert code == 0, output
    assert [entry[:2] for entry in seen] == [
        *((moment, x) for x in (5, 6, 7) for moment in ("start", "prepare")),
        *((moment, x) for x in (5, 6, 7) for moment in ("finish", "end")),
    ]
    for moment, x, number, *rest in seen:
        assert number == x - 5
        assert rest == ([] if moment in ("start", "end") else [str(number), f"x is {x}"])
    for number, x in enumerate((5, 6, 7)):
        lines = Path("swept", str(number), "program.log").read_text().splitlines()
        assert [line.rpartition(" - ")[2] for line in lines] == [f"prepare x={x}", f"finish x={x}"]
        assert {path.name for path in Path("swept", str(number), ".hydra").iterdir()} == {
            *("config.yaml", "hydra.yaml", "overrides.yaml")
        }
    assert Path.cwd() == tmp_path
    assert "PROGRAM_X" not in os.environ


@pytest.mark.parametrize(
    ("launcher", "swept", "calls"),
    [
        ("fused", "x=1,2,3", [[1, 2, 3]]),
        ("fused", "x=1,2,3 hydra.launcher.stack=2", [[1, 2], [3]]),
        ("basic", "x=1,2,3", [[1], [2], [3]]),
    ],
)
def test_results_go_to_their_jobs(program, launcher, swept, calls):
    squares = Squares()
    code, output = program(squares.task(), *swept.split(), launcher=launcher)
    assert code == 0, output
    assert squares.calls == calls
    assert squares.finished == [(x, x**2) for x in (1, 2, 3)]


def failing(stage, x, error=ValueError):
    """Raises in that stage of the job with that x."""

    def fail(at, of):
        if (at, of) == (stage, x):
            raise error(f"no {stage} of {x}")

    return fail


@pytest.mark.parametrize(
    ("stage", "calls", "finished", "ends"),
    [
        ("prepare", [[1, 3]], [(1, 1), (3, 9)], [2, 1, 3]),
        ("fit", [[1, 2, 3]], [(1, 1), *((x, "ValueError('no fit of 2')") for x in (2, 3))], [1, 2, 3]),
        ("finish", [[1, 2, 3]], [(1, 1), (2, 4), (3, 9)], [1, 2, 3]),
    ],
)
def test_an_error_ends_the_jobs_that_it_concerns(program, stage, calls, finished, ends):
    squares = Squares(failing(stage, 2))
    code, output = program(squares.task(), "x=1,2,3")
    assert code == 1
    assert f"no {stage} of 2" in output
    assert (squares.calls, squares.finished) == (calls, finished)
    assert [x for moment, x, *_ in seen if moment == "end"] == ends


@pytest.mark.parametrize(
    ("stage", "finished"),
    [
        ("prepare", [(1, "KeyboardInterrupt('no prepare of 2')")]),
        ("fit", [(1, 1), *((x, "KeyboardInterrupt('no fit of 2')") for x in (2, 3))]),
        ("finish", [(1, 1), (2, 4), (3, "KeyboardInterrupt('no finish of 2')")]),
    ],
)
def test_an_interrupt_ends_every_job_that_is_not_finished_and_no_other(program, stage, finished):
    squares = Squares(failing(stage, 2, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        program(squares.task(), "x=1,2,3")
    assert squares.finished == finished
    started, ended = ([x for moment, x, *_ in seen if moment == name] for name in ("start", "end"))
    assert sorted(ended) == started


@pytest.mark.parametrize("launcher", ["basic", "fused"])
@pytest.mark.parametrize(
    "logging_config",
    [
        "+hydra.job_logging.handlers.file.mode=w",
        "+hydra.job_logging.loggers.program={handlers:[file],propagate:false}",
    ],
)
def test_a_log_that_the_user_set_up_has_all_lines_of_the_job(program, launcher, logging_config):
    assert program(Squares().task(), "x=1,2", logging_config, launcher=launcher)[0] == 0
    for number, x in enumerate((1, 2)):
        lines = Path("swept", str(number), "program.log").read_text().splitlines()
        assert [line.rpartition(" - ")[2] for line in lines] == [f"prepare x={x}", f"finish x={x}"]
    if "mode=w" in logging_config:
        assert "mode: w" in Path("swept/0/.hydra/hydra.yaml").read_text()


def test_a_task_without_stages_runs_one_job_after_another(program):
    def task(cfg):
        seen.append(("task", cfg.x))

    assert stages_of(task) is None
    assert program(task, "x=1,2")[0] == 0
    assert [entry[:2] for entry in seen] == [(moment, x) for x in (1, 2) for moment in ("start", "task", "end")]


def test_each_job_must_get_a_result(program):
    squares = Squares()
    squares.fit_together = lambda prepared: iter([(0, prepared[0] ** 2)])
    code, _ = program(squares.task(), "x=1,2")
    assert code == 1
    assert squares.finished == [(1, 1), (2, "RuntimeError('fit_together must yield a result for each job')")]


def test_what_is_prepared_may_be_none(program):
    squares = Squares()
    squares.prepare, squares.fit_together = lambda cfg, trial: None, lambda prepared: iter([(0, 4), (1, 9)])
    squares.fail = lambda stage, x: None
    squares.note = lambda stage, x: None
    assert program(squares.task(), "x=2,3")[0] == 0
    assert squares.finished == [(None, 4), (None, 9)]
