"""The `tuner` command: it dispatches, helps and completes, at once."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY
from test_rooms import COMMANDS as MODULES

import tuner
from tuner import __main__ as command
from tuner import arguments, completion


def run(*words, cwd=None, **more):
    return subprocess.run(
        [sys.executable, "-m", "tuner", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        check=False,
        **more,
    )


def test_each_command_is_listed():
    assert command.COMMANDS.keys() == MODULES | {"sweep"} == arguments.OF_COMMAND.keys() | {"train", "sweep"}
    for words in ([], ["--help"]):
        done = run(*words)
        assert done.returncode == 0
        assert all(re.search(rf"^  {name} ", done.stdout, re.MULTILINE) for name in command.COMMANDS)


@pytest.mark.parametrize(
    ("words", "out"),
    [
        (["--version"], f"tuner {tuner.__version__}\n"),
        (["train", "--help", "dropout"], "model.head.dropout=0.3"),
        (["train", "--help", "optimizer"], "adamw (default)"),
        (["sweep", "--help"], "usage: tuner train"),
        *(([name, "--help"], f"usage: python -m tuner.{name}") for name in sorted(arguments.OF_COMMAND)),
        (["--complete", "tuner tr"], "train\n"),
        (["--complete", "tuner study --w"], "--watch\n"),
        (["--complete", "tuner train optimizer="], "optimizer=adam\noptimizer=adamw\noptimizer=sgd\n"),
    ],
)
def test_help_and_completion_import_no_library(words, out):
    program = f"import sys; sys.argv = ['tuner', *{words!r}]; from tuner.__main__ import main; main()"
    slow = "{'torch', 'pandas', 'matplotlib', 'optuna', 'hydra', 'omegaconf'}"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; assert not {slow} & set(sys.modules)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert out in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "trian is not a command of tuner: did you mean train?"),
        (["train", "--help", "dropuot"], "similar: model.head.dropout"),
        (["completion", "csh"], "usage: tuner completion SHELL"),
    ],
)
def test_a_mistake_is_a_line(words, message):
    done = run(*words)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_it_runs_a_command_as_python_m_does(tmp_path):
    done = run("sweep", *TINY, "epochs=1", "study=s", "hydra.sweeper.n_trials=1", "final.seeds=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "multirun" / "s" / "trials.csv").exists()
    assert "continue with: python -m tuner.train -m hparams_search=optuna data=synthetic" in done.stdout + done.stderr
    done = run("study", "s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "study s in multirun/s: 1 trial" in done.stdout
    done = run("compare", "nowhere", cwd=tmp_path)
    assert done.returncode == 1
    assert "there is no folder nowhere" in done.stderr


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tuner co", ["compare ", "completion "]),
        ("tuner train optimizer=ad", ["adam ", "adamw "]),
        ("tuner train model.head.dr", ["model.head.dropout="]),
    ],
)
def test_bash_completes_a_line(line, found, tmp_path):
    (tmp_path / "tuner").write_text(f'#!/bin/sh\nexec {sys.executable} -m tuner "$@"\n')
    (tmp_path / "tuner").chmod(0o755)
    program = f"""
PATH={tmp_path}:$PATH
compopt() {{ NOSPACE=1; }}  # it works only while readline completes
{completion.SCRIPTS["bash"]}
COMP_LINE={line!r} COMP_POINT={len(line)}
_tuner
for reply in "${{COMPREPLY[@]}}"; do if [ "$NOSPACE" ]; then echo "$reply"; else echo "$reply "; fi; done
"""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(tuner.__file__).parents[1])}
    bash = shutil.which("bash")
    done = subprocess.run([bash, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == found, done.stderr
