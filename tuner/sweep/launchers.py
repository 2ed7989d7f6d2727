"""Hydra's launchers: how many jobs each can have at once, and that none of their processes outlives the sweep."""

import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf, open_dict, read_write

from tuner.sweep import MARK, hydra_private
from tuner.sweep.reaper import marked

RAYS_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # without which Ray ends


@dataclass(frozen=True)
class Slots:
    """`threads` calls of the launcher at once, each with `batch` jobs. `why`: where n_jobs asked for more.

    forks: whether workers are forked from this process, with its handlers of signals.
    """

    threads: int
    batch: int = 1
    in_process: bool = False
    forks: bool = False
    why: str | None = None


def slots(launcher: Launcher, n_jobs: int) -> Slots:
    """How to keep `n_jobs` jobs running through this launcher, each trial starting when another ends where it can."""
    name = type(launcher).__name__
    batches = "jobs start in batches" if n_jobs > 1 else None
    if name == "BasicLauncher":
        why = "the basic launcher runs one job at a time; choose another hydra/launcher" if n_jobs > 1 else None
        return Slots(1, in_process=True, why=why)
    if name == "FusedLauncher":
        size = launcher.fused.size()  # type: ignore[attr-defined]
        why = f"the fused launcher trains {size} trials together; set hydra.launcher.stack" if n_jobs > 1 else None
        return Slots(1, size, in_process=True, why=why)
    if name == "JoblibLauncher":
        from joblib import effective_n_jobs

        options = launcher.joblib  # type: ignore[attr-defined]
        workers = effective_n_jobs(options.get("n_jobs", -1))
        if (options.get("backend") or "loky") != "loky":
            why = batches and f"joblib's multiprocessing can't be shared by threads: {batches}"
            return Slots(1, n_jobs, forks=True, why=why)
        if workers < n_jobs:
            return Slots(workers, why=f"hydra.launcher.n_jobs allows {workers} workers")
        return Slots(n_jobs)
    if name in ("LocalLauncher", "SlurmLauncher", "RayLauncher"):
        return Slots(n_jobs)
    return Slots(1, n_jobs, why=batches and f"{name} is not known to be safe in threads: {batches}")


@contextmanager
def running(launcher: Launcher) -> Iterator[None]:
    """While a sweep uses a launcher: worker processes end with the sweep, whichever way it ends, kill -9 included."""
    if type(launcher).__name__ in ("BasicLauncher", "FusedLauncher"):  # jobs run in this process
        yield
        return
    mark = uuid.uuid4().hex
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "tuner.sweep.reaper", mark]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment):
        os.environ[MARK] = mark
        ray_is_ours = False
        try:
            ray_is_ours = _start_ray(launcher)
            yield
        finally:
            _stop_workers(ray_is_ours)
            del os.environ[MARK]  # and with the pipe's end the reaper looks for what is left


def _start_ray(launcher: Launcher) -> bool:
    """Start Ray before threads do, at once and each on its own. A killed job is the sweep's to try again, not Ray's."""
    if type(launcher).__name__ != "RayLauncher":
        return False
    import ray

    options = launcher.ray_cfg  # type: ignore[attr-defined]
    with read_write(options), open_dict(options):
        options.remote = {"max_retries": 0, **(options.remote or {})}
    if ray.is_initialized():
        return False
    ray.init(**OmegaConf.to_container(options.init, resolve=True))  # type: ignore[arg-type]
    return True


def _stop_workers(ray_is_ours: bool) -> None:
    hydra_private.stop_joblib_workers()
    if ray_is_ours:
        import ray

        ray.shutdown()


@contextmanager
def quiet() -> Iterator[None]:
    """Launchers' lines a job are left to hydra.verbose: the sweep says how it goes."""
    names = (hydra_private.BASIC_LAUNCHER_LOG, "hydra_plugins", "tuner.sweep.fused")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def end_jobs() -> None:
    """End this sweep's worker processes now, with what they do; Ray's own, which tell it of that, stay."""
    for process in marked(os.environ[MARK]):
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if "/ray/" not in line and not line.startswith(RAYS_AGENTS):
                process.kill()
