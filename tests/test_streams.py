"""Commands whose standard output or error is closed, full, ASCII, or a pipe whose reader has gone; and Ctrl-C."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_rooms import COMMANDS

import tuner
from tuner.runs.run import Run

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(tuner.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("PYTHONIOENCODING", None)
PROGRAM = """
import logging, sys, pandas as pd
from tuner import InputError, output, terminal
def main():
    logging.getLogger().warning("the log: 日本")
    output.terminal(pd.DataFrame({"class": ["日本"] * 10_000}), "a table │")
    if "wrong" in sys.argv:
        raise InputError("wrong: 日本")
    if "interrupted" in sys.argv:
        raise KeyboardInterrupt
    if "missing" in sys.argv:
        open("nowhere/x")
    print("end: 日本")
terminal.command(main)
"""


def run(line, folder, **more):
    """What bash makes of a command line."""
    environment = ENVIRONMENT | more
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("line", "code", "out", "err"),
    [
        ("RUN", 0, "end: 日本\n", "the log: 日本\n"),
        ("RUN wrong", 1, "日本 \n", "wrong: 日本\n"),
        ("RUN missing", 1, "日本 \n", "nowhere/x cannot be used: No such file or directory\n"),
        ("RUN interrupted", 130, "日本 \n", "the log: 日本\n"),
        ("RUN 2>&-", 0, "end: 日本\n", ""),
        ("RUN wrong 2>&-", 1, "日本 \n", ""),
        ("RUN >&-", 0, "", "the log: 日本\n"),
        ("RUN >&- 2>&- <&-", 0, "", ""),
        ("RUN > /dev/full", 1, "", "the output cannot be used: No space left on device\n"),
        ("RUN 2> /dev/full", 0, "end: 日本\n", ""),
        ("RUN > /dev/full 2>&1", 1, "", ""),
        ("RUN | head -1; exit ${PIPESTATUS[0]}", 141, "a table │\n", "the log: 日本\n"),
        ("LC_ALL=C PYTHONUTF8=0 RUN", 0, "end: \\u65e5\\u672c\n", "the log: \\u65e5\\u672c\n"),
        ("PYTHONIOENCODING=ascii RUN wrong", 1, "\\u65e5\\u672c \n", "wrong: \\u65e5\\u672c\n"),
        ("PYTHONIOENCODING=ascii:strict RUN", 0, "end: \\u65e5\\u672c\n", "the log: \\u65e5\\u672c\n"),
        ("PYTHONIOENCODING=cp1252 RUN wrong", 1, "\\u65e5\\u672c \n", "wrong: \\u65e5\\u672c\n"),
    ],
)
def test_streams(tmp_path, line, code, out, err):
    (tmp_path / "program.py").write_text(PROGRAM, "utf-8")
    done = run(line.replace("RUN", f"{sys.executable} program.py"), tmp_path, PYTHONIOENCODING="")
    assert done.returncode == code, done.stderr.decode()
    assert done.stdout.decode().endswith(out)
    assert done.stderr.decode().endswith(err)
    assert "Traceback" not in done.stderr.decode()
    assert "Exception ignored" not in done.stderr.decode()


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_goes_through_the_one_place_that_handles_streams(name):
    last = Path(tuner.__file__).with_name(f"{name}.py").read_text("utf-8").splitlines()[-1]
    assert last.startswith("    terminal.command(")


def test_ctrl_c_while_a_command_is_imported_leaves_no_traceback(tmp_path):
    words = [sys.executable, "-X", "importtime", "-m", "tuner.compare"]
    default = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731 - as in a terminal
    with subprocess.Popen(
        words, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, preexec_fn=default
    ) as process:
        lines = [next(process.stderr)]
        while not lines[-1].rstrip().endswith("| tuner"):
            lines.append(next(process.stderr))
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode in (-signal.SIGINT, 130)
    assert "Traceback" not in rest


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with images of two classes, whose names are not ASCII, and a run trained on them."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("日本", "a│b"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(20):
            pixels = draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    arguments = "data=image_folder data.root=images data.size=16 model=tiny epochs=1 plots=false"
    for more in ("hydra.run.dir=run", "-m hparams_search=optuna hydra.sweeper.n_trials=2 final.seeds=0 study=s"):
        done = run(f"{sys.executable} -m tuner.train {arguments} {more}", folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_the_log_of_a_run_is_utf_8_whatever_the_console_is(tmp_path):
    logger, handler = logging.getLogger("tuner.train"), logging.FileHandler(tmp_path / "train.log", encoding="ascii")
    logger.addHandler(handler)
    try:
        run = Run(tmp_path)
        run.log.warning("日本")
        run.close()
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert (tmp_path / "train.log").read_text("utf-8") == "日本\n"


def test_file_names_that_the_environment_cannot_express_are_one_line(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "images" / "日本.png")
    program = "from tuner.data.files.image_file import find; from pathlib import Path; find(Path('images'))"
    line = f'LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {sys.executable} -c "{program}"'
    done = run(line, tmp_path)
    says = "the name \\u65e5\\u672c.png is not ascii, the encoding of this environment: set PYTHONUTF8=1"
    assert done.stderr.decode().splitlines()[-1].endswith(says)


EVERY = {
    "train": "train data=image_folder data.root=images data.size=16 model=tiny epochs=1 hydra.run.dir=FRESH",
    "search": "train -m data=image_folder data.root=images data.size=16 model=tiny epochs=1 hparams_search=optuna "
    "hydra.sweeper.n_trials=2 final.seeds=0 study=FRESH",
    "study": "study multirun/s",
    "compare": "compare run multirun",
    "predict": "predict run images",
    "predict csv": "predict run images --csv",
    "evaluate": "evaluate run",
    "export": "export run --format pt2 --out FRESH",
    "cache": "cache",
    "audit": "audit data=image_folder data.root=images data.size=16 model=tiny epochs=1 --out FRESH",
    "resume": "resume run",
    "help": "compare --help",
}
STREAMS = {
    "closed error": "RUN 2>&-",
    "closed output": "RUN >&-",
    "full output": "RUN > /dev/full",
    "full error": "RUN 2> /dev/full",
    "no reader": "RUN | head -1; exit ${PIPESTATUS[0]}",
    "ascii": "PYTHONIOENCODING=ascii RUN",
    "cp1252": "PYTHONIOENCODING=cp1252 RUN",
}


PAIRS = [(name, list(STREAMS)[(k + turn) % len(STREAMS)]) for k, name in enumerate(EVERY) for turn in (0, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "streams"), PAIRS)
def test_every_command(photos, tmp_path, name, streams):
    """Each command with two kinds of streams, each kind with several commands.

    No traceback; exit code 0, 1 in a line, or that of SIGPIPE. A run or a search is complete in any case."""
    words = EVERY[name].replace("FRESH", f"fresh-{name}-{streams}".replace(" ", "-"))
    done = run(STREAMS[streams].replace("RUN", f"{sys.executable} -m tuner.{words}"), photos)
    assert "Traceback" not in (done.stdout + done.stderr).decode()
    assert "Exception ignored" not in done.stderr.decode()
    if name == "resume":
        assert done.returncode == 1
    elif name in ("train", "search"):
        assert done.returncode == 0, done.stderr
    else:
        full = (0, 1) if name == "help" else (1,)  # argparse passes over errors when it prints help
        allowed = {"full output": full, "no reader": (0, 141)}.get(streams, (0,))
        assert done.returncode in allowed, done.stderr
