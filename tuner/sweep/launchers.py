"""Hydra's launchers: how many jobs each can run at once, and the end of their worker processes with the sweep."""

import importlib.util
import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf, open_dict, read_write

from tuner import InputError, artifacts
from tuner.runs.layout import STUDY_FILE
from tuner.sweep import MARK, hydra_private, passwords, slurm
from tuner.sweep.reaper import marked_processes

log = logging.getLogger("tuner.sweep")
RAYS_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray ends without them


@dataclass(frozen=True)
class Slots:
    """How jobs run at once: `threads` calls of the launcher, each with `batch` jobs.

    in_process: whether jobs run in this process. forks: whether workers are forked, and inherit its signal handlers.
    why: the reason if fewer jobs run at once than n_jobs asked for.
    """

    threads: int
    batch: int = 1
    in_process: bool = False
    forks: bool = False
    why: str | None = None


def slots(launcher: Launcher, n_jobs: int) -> Slots:
    """How to keep `n_jobs` jobs running through this launcher. If it can, a trial starts as soon as another ends."""
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


def is_fused(launcher: Launcher) -> bool:
    """Whether this is the launcher of jobs that train together."""
    return type(launcher).__name__ == "FusedLauncher"


def sends_jobs_in_memory(launcher: Launcher) -> bool:
    """Whether jobs never are on a disk on their way to the workers, which have an environment of their own."""
    return type(launcher).__name__ == "RayLauncher"


def jobs_outlive_sweep(launcher: Launcher) -> bool:
    """Whether jobs may go on when the sweep is killed: those on other machines do, and those of unknown launchers."""
    name = type(launcher).__name__
    if name == "RayLauncher":
        address = (launcher.ray_cfg.init or {}).get("address")  # type: ignore[attr-defined]
        return (address or os.environ.get("RAY_ADDRESS")) not in (None, "", "local")
    return name not in ("BasicLauncher", "FusedLauncher", "JoblibLauncher", "LocalLauncher")


@dataclass(frozen=True)
class Needs:
    """What the jobs of a search need on each node of a cluster.

    folder: the study's. Nodes need not see it.   storage: the study's file, which they must see, if it is in one.
    targets: config key -> dotted name of what is called there.   artifacts: where they copy run folders to.
    """

    folder: Path
    storage: Path | None = None
    targets: Mapping[str, str] = field(default_factory=dict)
    artifacts: str | None = None


@contextmanager
def workers_end_with_sweep(launcher: Launcher, spec: str | None, workers: int, needs: Needs) -> Iterator[bool]:
    """End worker processes with the sweep, however it ends, kill -9 included. Jobs of Slurm survive a kill -9.

    Yields whether jobs see `needs.folder`.
    spec: the storage. Its password is in the environment of the workers.   workers: processes, this one included.
    Raises InputError if a node of a cluster lacks something.
    """
    if workers == 1 and type(launcher).__name__ in ("BasicLauncher", "FusedLauncher"):  # jobs run in this process
        yield True
        return
    if slurm.is_slurm(launcher):
        with passwords.in_environment(spec), slurm.cancelled_with_sweep():
            yield True
        return
    mark = uuid.uuid4().hex
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "tuner.sweep.reaper", mark]
    reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment)
    with reaper, passwords.in_environment(spec):
        os.environ[MARK] = mark
        started_ray = False
        try:
            started_ray = _start_ray(launcher)
            yield _check_nodes(needs, _options_of_ray(launcher)) if type(launcher).__name__ == "RayLauncher" else True
        finally:
            _stop_workers(started_ray)
            del os.environ[MARK]  # then Popen closes the pipe, and the reaper ends the remaining processes


def _options_of_ray(launcher: Launcher) -> dict[str, Any]:
    """Ray's options for a job, of hydra.launcher.ray.remote."""
    return dict(OmegaConf.to_container(launcher.ray_cfg.remote or OmegaConf.create({}), resolve=True))  # type: ignore


def _has(resources: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    """Whether a node has what a job asks for."""
    return all(resources.get(name, 0.0) >= amount for name, amount in wanted.items() if amount)


def _start_ray(launcher: Launcher) -> bool:
    """Start Ray once, before threads would start it. A killed job is retried by the sweep, not by Ray.

    If there are GPUs, each job gets one, and its process is kept for the next job.
    """
    if type(launcher).__name__ != "RayLauncher":
        return False
    import ray

    options = launcher.ray_cfg  # type: ignore[attr-defined]
    given = _options_of_ray(launcher)
    hydra_private.follow_jobs_of_ray()
    starts = not ray.is_initialized()
    if starts:
        ray.init(**OmegaConf.to_container(options.init, resolve=True))  # type: ignore[arg-type]
    defaults: dict[str, int] = {"max_retries": 0, "max_calls": 0}
    if "num_gpus" not in given and ray.cluster_resources().get("GPU", 0):
        log.info("hydra.launcher.ray.remote.num_gpus: 1 (auto: Ray has GPUs, and each trial gets one)")
        defaults["num_gpus"] = 1
    with read_write(options), open_dict(options):
        options.remote = defaults | given
    return starts


def _check_nodes(needs: Needs, job: Mapping[str, Any]) -> bool:
    """Whether all nodes of Ray's cluster see the study's folder. Raises InputError for a node that lacks something.

    job: Ray's options for the jobs. Nodes that are too small for them get none.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = _found(needs)
    wanted = {"CPU": job.get("num_cpus", 1), "GPU": job.get("num_gpus", 0), **(job.get("resources") or {})}
    nodes = [node for node in ray.nodes() if node["Alive"] and _has(node["Resources"], wanted)]
    probe = ray.remote(num_cpus=0, max_retries=0, runtime_env=job.get("runtime_env") or {})(_found)
    answers = [
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(needs)
        for node in nodes
    ]
    try:
        found = ray.get(answers)
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[-300:]
        raise InputError(f"the nodes of Ray's cluster cannot run tuner; install it there: {reason}") from error
    for node, there in zip(nodes, found, strict=True):
        name = f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}) of Ray's cluster"
        if needs.storage and (there.storage, there.folder) != (here.storage, here.folder):
            path = needs.folder / STUDY_FILE if there.folder != here.folder else needs.storage
            raise InputError(
                f"{name} does not see {path} of this machine, so its trials can't reach the study: use a database "
                "server, hydra.sweeper.storage=postgresql+psycopg://..., or a folder that all nodes share"
            )
        if missing := set(there.missing) - set(here.missing):  # what is missing here, too, is a mistake in the config
            key = min(missing)
            package = needs.targets[key].partition(".")[0]
            raise InputError(
                f"{name} has no Python package {package}, of {key}={needs.targets[key]}: install it there, or send it "
                f"with +hydra.launcher.ray.init.runtime_env.py_modules=[{package}]"
            )
        if there.artifacts:
            raise InputError(f"{name}: {there.artifacts}")
    return all(there.folder == here.folder for there in found)


@dataclass(frozen=True)
class _Found:
    """What a node has of Needs.

    folder, storage: the first bytes of a file that stays as it is and tells two studies apart; None if it is not seen.
    missing: the keys of targets whose package is not there.   artifacts: why the place cannot be used; None: it can.
    """

    folder: bytes | None
    storage: bytes | None
    missing: Sequence[str]
    artifacts: str | None


def _found(needs: Needs) -> _Found:
    reason = None
    if needs.artifacts:
        try:
            artifacts.check(needs.artifacts)
        except InputError as error:
            reason = str(error)
    missing = [key for key, name in needs.targets.items() if not _is_installed(name.partition(".")[0])]
    storage = _content(needs.storage) if needs.storage else None
    return _Found(_content(needs.folder / STUDY_FILE), storage, missing, reason)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # __main__, which is sent with the job; an empty name, which the job refuses
        return True


def _content(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError:  # not there, or not to be read by this user
        return None


def _stop_workers(started_ray: bool) -> None:
    hydra_private.stop_joblib_workers()
    if started_ray:
        import ray

        ray.shutdown()


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Hide the lines that launchers log for each job: the sweep reports them. hydra.verbose=true shows them."""
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


def kill_jobs(launcher: Launcher) -> None:
    """End this sweep's jobs, and its worker processes. Ray's own processes stay: they report the killed jobs."""
    if slurm.is_slurm(launcher):
        slurm.QUEUE.cancel()
        return
    hydra_private.cancel_jobs_of_ray()  # also those on other nodes
    for process in marked_processes(os.environ[MARK]):
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if "/ray/" not in line and not line.startswith(RAYS_AGENTS):
                process.kill()
    hydra_private.end_messages_of_joblib_workers()
