"""together(): what jobs do at once, seen from a program that uses it itself; each job keeps its own scene."""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback

from tuner.sweep.fused import together

log = logging.getLogger("program")


PROGRAM = f"""
x: 0
key: same
hydra:
  output_subdir: null
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
        seen.append(("end", config.x, HydraConfig.get().job.num))


@dataclass(frozen=True)
class Plan:
    x: int
    on_epoch: Callable[[int], bool | None] = lambda epoch: None


class Squares:
    """Work of two epochs, that notes the plans of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, plans):
        self.calls.append([plan.x for plan in plans])
        wanted = list(plans)
        for epoch in (1, 2):
            wanted = [plan for plan in wanted if plan.on_epoch(epoch) is not False]
        return [plan.x**2 for plan in plans]


@pytest.fixture
def program(tmp_path, monkeypatch, capfd):
    """Sweep a job over arguments, in an empty folder; gives the exit code and what it printed."""
    (tmp_path / "program.yaml").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    seen.clear()

    def run(job, *arguments, launcher="fused"):
        main = hydra.main(config_path=str(tmp_path), config_name="program", execution_whitelist=(f"{__name__}.*",))
        monkeypatch.setattr(sys, "argv", ["program", "-m", f"hydra/launcher={launcher}", *arguments])
        try:
            main(job)()
            code = 0
        except SystemExit as stop:
            code = stop.code
        output = capfd.readouterr()
        return code, output.out + output.err

    return run


def test_a_job_has_its_own_scene_whatever_ran_in_between(program, tmp_path):
    def job(cfg):
        def note(moment):
            seen.append((moment, cfg.x, HydraConfig.get().job.num, Path.cwd().name, os.environ["PROGRAM_X"]))
            log.info("%s of x=%d", moment, cfg.x)

        note("before")
        together(Plan(cfg.x, lambda epoch: note(f"epoch {epoch}")), key=cfg.key, work=Squares())
        note("after")

    code, output = program(job, "x=5,6,7")
    assert code == 0, output
    moments = ["before", "epoch 1", "epoch 2", "after"]
    assert [entry[:2] for entry in seen] == [
        *((moment, x) for x in (5, 6, 7) for moment in ("start", "before")),
        *((moment, x) for moment in ("epoch 1", "epoch 2") for x in (5, 6, 7)),
        *((moment, x) for x in (5, 6, 7) for moment in ("after", "end")),
    ]
    for moment, x, number, *rest in seen:
        assert number == x - 5
        assert rest == ([] if moment in ("start", "end") else [str(number), f"x is {x}"])
    for number, x in enumerate((5, 6, 7)):
        lines = Path("swept", str(number), "program.log").read_text().splitlines()
        assert [line.rpartition(" - ")[2] for line in lines] == [f"{moment} of x={x}" for moment in moments]
    assert output.count(" of x=") == 12
    assert Path.cwd() == tmp_path
    assert "PROGRAM_X" not in os.environ


@pytest.mark.parametrize(
    ("launcher", "swept", "calls"),
    [
        ("fused", "x=1,2,3", [[1, 2, 3]]),
        ("fused", "x=1,2,3 key=a,b", [[1, 2, 3], [1, 2, 3]]),
        ("fused", "x=1,2,3 key=null", [[1], [2], [3]]),
        ("fused", "x=1,2,3 hydra.launcher.stack=2", [[1, 2], [3]]),
        ("basic", "x=1,2,3", [[1], [2], [3]]),
    ],
)
def test_results_go_to_the_jobs_that_asked(program, launcher, swept, calls):
    squares, answers = Squares(), []
    code, output = program(
        lambda cfg: answers.append((cfg.x, together(Plan(cfg.x), key=cfg.key, work=squares))),
        *swept.split(),
        launcher=launcher,
    )
    assert code == 0, output
    assert squares.calls == calls
    assert sorted(answers) == sorted((x, x**2) for call in calls for x in call)


def test_jobs_may_ask_again_each_as_often_as_it_likes(program):
    squares, answers = Squares(), []

    def job(cfg):
        value = cfg.x
        for _ in range(cfg.x):
            value = together(Plan(value), key="same", work=squares)
        answers.append(value)

    code, output = program(job, "x=0,1,2,3")
    assert code == 0, output
    assert answers == [0, 1, 2**4, 3**8]
    assert squares.calls == [[1, 2, 3], [4, 9], [81]]


def test_what_work_raises_every_job_of_it_gets_and_no_other(program):
    squares, answers = Squares(), []

    def broken(plans):
        raise ValueError(f"no work for {[plan.x for plan in plans]}")

    def job(cfg):
        try:
            answers.append(together(Plan(cfg.x), key=cfg.key, work=broken if cfg.key == "bad" else squares))
        except ValueError as error:
            answers.append(str(error))
            log.info("%d has heard: %s", cfg.x, error)

    code, output = program(job, "x=1,2", "key=bad,good")
    assert code == 0, output
    assert sorted(answers, key=str) == [1, 4, "no work for [1, 2]", "no work for [1, 2]"]
    assert "1 has heard: no work for [1, 2]" in Path("swept/0/program.log").read_text()
    assert "2 has heard: no work for [1, 2]" in Path("swept/2/program.log").read_text()


def test_what_on_epoch_raises_ends_that_job_alone(program):
    squares, epochs, answers = Squares(), [], []

    def job(cfg):
        def on_epoch(epoch):
            epochs.append((cfg.x, epoch))
            if cfg.x == 2:
                raise ValueError("two is enough")

        answers.append(together(Plan(cfg.x, on_epoch), key=cfg.key, work=squares))

    code, output = program(job, "x=1,2,3")
    assert code == 1
    assert "two is enough" in output
    assert epochs == [(1, 1), (2, 1), (3, 1), (1, 2), (3, 2)]
    assert answers == [1, 9]
    assert [x for moment, x, _ in seen if moment == "end"] == [2, 1, 3]


@pytest.mark.parametrize("launcher", ["basic", "fused"])
def test_on_epoch_ends_its_own_part_by_false(program, launcher):
    epochs = []

    def job(cfg):
        def on_epoch(epoch):
            epochs.append((cfg.x, epoch))
            return cfg.x != 1

        together(Plan(cfg.x, on_epoch), key=cfg.key, work=Squares())

    assert program(job, "x=1,2", launcher=launcher)[0] == 0
    assert sorted(epochs) == [(1, 1), (2, 1), (2, 2)]


@pytest.mark.parametrize("launcher", ["basic", "fused"])
@pytest.mark.parametrize(
    "logging_config",
    [
        "+hydra.job_logging.handlers.file.mode=w",
        "+hydra.job_logging.loggers.program={handlers:[file],propagate:false}",
    ],
)
def test_logs_that_the_user_set_up_have_the_jobs_lines(program, launcher, logging_config):
    def job(cfg):
        log.info("before")
        together(Plan(cfg.x, lambda epoch: log.info("epoch")), key=cfg.key, work=Squares())
        log.info("after")

    code, output = program(job, "x=1,2", logging_config, launcher=launcher)
    assert code == 0, output
    for number in "01":
        lines = Path("swept", number, "program.log").read_text().splitlines()
        assert [line.rpartition(" - ")[2] for line in lines] == ["before", "epoch", "epoch", "after"]


def test_what_a_job_puts_into_the_environment_stays_as_without_the_launcher(program, monkeypatch):
    monkeypatch.setenv("SET_BY_A_LIBRARY", "")
    heard = []

    def work(plans):
        heard.append(os.environ["SET_BY_A_LIBRARY"])
        return [0 for _ in plans]

    def job(cfg):
        os.environ["SET_BY_A_LIBRARY"] = "1"
        together(Plan(cfg.x), key=cfg.key, work=work)

    assert program(job, "x=1,2")[0] == 0
    assert [*heard, os.environ["SET_BY_A_LIBRARY"]] == ["1", "1"]
