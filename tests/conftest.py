import logging
import sys

import pytest


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
    from tuner import train

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tuner.train", *arguments])
        try:
            train.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        output = capfd.readouterr()
        return code, output.out + output.err

    return run


@pytest.fixture(autouse=True)
def own_log():
    """Commands that run in this process set up logging; the next test starts without."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
