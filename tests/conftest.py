import importlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import optuna
import pytest
from helpers import TINY
from postgres import postgresql, server  # noqa: F401 - fixtures

from tuner.sweep.leases import Renewals
from tuner.sweep.storage import connect, resolve

if "PYTEST_XDIST_WORKER" in os.environ:  # with -n 2, each process has one core; torch is not imported yet
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or writes the user's caches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
        yield


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Run `python -m tuner.train ARGUMENTS` in an empty folder; gives (exit code, what it printed)."""
    from tuner import terminal as present
    from tuner import train

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tuner.train", *arguments])
        try:
            present.command(train.main, log=False)
            code = 0
        except SystemExit as stop:
            code = stop.code
        output = capfd.readouterr()
        said = f"{code}\n" if isinstance(code, str) else ""  # as the interpreter does
        return (1 if isinstance(code, str) else code), output.out + output.err + said

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run of `tuner.train ARGUMENTS`, which is made once for all tests: don't change what is in it."""
    from tuner import train

    folder, runs = tmp_path_factory.mktemp("trained"), {}

    def run(*arguments):
        if arguments not in runs:
            runs[arguments] = folder / str(len(runs))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["tuner.train", *TINY, f"hydra.run.dir={runs[arguments]}", *arguments])
                train.main()
        return runs[arguments]

    return run


@pytest.fixture
def call(monkeypatch, capfd):
    """Run `python -m tuner.COMMAND ARGUMENTS` in this process; gives (exit code, standard output, standard error)."""
    from tuner import terminal as present

    def run(name, *arguments):
        module = importlib.import_module(f"tuner.{name}")
        monkeypatch.setattr(sys, "argv", [f"tuner.{name}", *map(str, arguments)])
        capfd.readouterr()
        root, code = logging.getLogger(), 0
        before, root.handlers[:] = root.handlers[:], []
        try:
            present.command(module.main)
        except SystemExit as stop:
            code = stop.code
        finally:
            for handler in root.handlers:
                handler.close()
            root.handlers[:] = before
        output = capfd.readouterr()
        said = f"{output.err}{code}\n" if isinstance(code, str) else output.err  # as the interpreter does
        return (1 if isinstance(code, str) else code), output.out, said

    return run


@pytest.fixture(autouse=True)
def leases_end():
    """No thread renews leases when its test has ended: it would log into the next ones that its study is gone."""
    held, hold = [], Renewals.hold

    def remembered(self, trial):
        held.append(self)
        hold(self, trial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Renewals, "hold", remembered)
        yield
    for renewals in held:
        renewals.end()


@pytest.fixture(autouse=True)
def own_log():
    """Commands that run in this process set up logging; the next test starts without."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    levels = {logger: logger.level for logger in (root, logging.getLogger("tuner"))}  # hydra.verbose sets them
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    for logger, level in levels.items():
        logger.setLevel(level)


@pytest.fixture
def closed():
    """A folder that all may enter, and a function that closes one in it to all, and so to us."""
    with tempfile.TemporaryDirectory() as name:
        folder, user, shut = Path(name), os.geteuid(), []
        folder.chmod(0o755)

        def close(path):
            path.chmod(0)
            shut.append(path)
            if user == 0:
                os.seteuid(65534)  # nobody: to root all is open

        yield folder, close
        os.seteuid(user)
        for path in shut:
            path.chmod(0o755)


@pytest.fixture(scope="session")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Opens a page; afterwards it has loaded nothing from elsewhere, and there was no error or warning."""
    tab = chromium.new_page()
    wrong, asked = [], []
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))

    def open_page(path):
        tab.goto(Path(path).absolute().as_uri())
        return tab

    yield open_page
    assert [text for text in wrong if "crbug/1173575" not in text] == []  # Chromium's own, of its lists of folders
    assert [url for url in asked if urlsplit(url).scheme not in ("file", "data", "blob")] == []
    tab.close()


TOY = """
defaults:
  - _self_
  - group: a
  - override hydra/sweeper: optuna
  - override hydra/sweeper/sampler: random
x: 1.0
y: b
z: 0.0
n: 1
steps: 1
seconds: 0.0
objectives: 1
does: ""
ran: ${hydra:runtime.cwd}/ran.txt
hydra:
  output_subdir: null
  sweep:
    dir: multirun/toy
  sweeper:
    direction: minimize
    storage: sqlite:///multirun/optuna.db
    study_name: toy
    n_trials: 6
    n_jobs: 1
    max_failure_rate: 1.0
    irrelevant: [steps, seconds, does, ran]
    sampler:
      seed: 0
    params:
      x: interval(-2, 2)
"""


class Toy:
    """The toy program in an empty folder.

    `run` is its command in this process, which saves the time of imports; `start` and `command` have a process for it.
    `study` is what it left.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture):
        self.folder, self.patch, self.capture = folder, patch, capture
        conf = folder / "conf"
        (conf / "group").mkdir(parents=True)
        (conf / "toy.yaml").write_text(TOY)
        for name in "ab":
            (conf / "group" / f"{name}.yaml").write_text(f"name: {name}\n")
        here = str(Path(__file__).parent / "sweep")
        self.environment = os.environ | {
            "TOY_CONFIG": str(conf),
            "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
            "PYTHONWARNINGS": "ignore",
        }
        patch.chdir(folder)
        patch.setenv("TOY_CONFIG", str(conf))
        patch.syspath_prepend(here)

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        command = [sys.executable, "-m", "toy", "-m", *arguments]
        pipe = subprocess.PIPE
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the tests run in the background
        options |= {"cwd": self.folder, "env": self.environment, "preexec_fn": heard}
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        toy = importlib.import_module("toy")
        self.patch.setattr(sys, "argv", ["toy", "-m", *arguments])
        code = 0
        try:
            toy.main()
        except SystemExit as stop:
            code = stop.code
        return subprocess.CompletedProcess(arguments, code, *self.capture.readouterr())

    def command(self, *arguments: str) -> subprocess.CompletedProcess:
        with self.start(*arguments) as process:
            try:
                out, err = process.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                process.kill()  # or the end of `with` would wait for it
                raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def study(self, name: str = "toy", storage: str = "sqlite:///multirun/optuna.db") -> optuna.Study:
        return optuna.load_study(study_name=name, storage=connect(resolve(storage)))

    def states(self) -> list[str]:
        return [trial.state.name for trial in self.study().trials]

    def starts(self) -> list[int]:
        """The number of each job that was started."""
        ran = self.folder / "ran.txt"
        return [int(line.split()[0]) for line in ran.read_text().splitlines()] if ran.exists() else []

    def wait_for(self, starts: int) -> None:
        """Until so many jobs have started."""
        deadline = time.monotonic() + 300  # a machine that is busy takes a minute to start Ray
        while len(self.starts()) < starts:
            assert time.monotonic() < deadline, "no job starts"
            time.sleep(0.02)


@pytest.fixture
def toy(tmp_path, monkeypatch, capfd):
    return Toy(tmp_path, monkeypatch, capfd)
