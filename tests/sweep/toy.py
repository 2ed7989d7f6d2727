"""A program with a Hydra config and an objective that takes no time, for sweeps that are tested as commands.

TOY_CONFIG names its config folder. `does` tells a trial, by its number, to do something else than to return x^2.
With TOY_STAGES its jobs train together. TOY_HOST is the name of the machine, and TOY_LEASE the seconds after which a
trial is lost. TOY_POLL: seconds between two calls of squeue, and after the end of a job in which it may have a result.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig

from tuner.sweep import leases, plugin, slurm
from tuner.sweep.trial import Stages, TrialPruned, report

plugin.register()
if host := os.environ.get("TOY_HOST"):
    socket.gethostname = lambda: host
if seconds := os.environ.get("TOY_LEASE"):
    leases.RENEWAL, leases.EXPIRY = float(seconds) / 6, float(seconds)
if poll := os.environ.get("TOY_POLL"):
    slurm.POLL = slurm.RESULT_DELAY = float(poll)


def objective(cfg):  # noqa: C901 - one case per way to end
    number = HydraConfig.get().job.num
    with Path(cfg.ran).open("a") as file:  # one line a start, by whichever process, with its GPUs
        file.write(f"{number} {os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
    for step in range(1, cfg.steps + 1):
        time.sleep(cfg.seconds / cfg.steps)
        report(cfg.x**2 + 1 / step, step)
    does = dict(item.split("-") for item in cfg.does.split())
    match does.get(str(number), does.get("all")):
        case "raise":
            raise RuntimeError(f"trial {number} raises")
        case "wait":  # until later trials have started
            while len(Path(cfg.ran).read_text().splitlines()) < 6:
                time.sleep(0.05)
        case "go":  # until it may go
            while not Path("go").exists():
                time.sleep(0.05)
        case "pair":  # until two processes have started trials
            while len({line.split()[1] for line in Path(cfg.ran).read_text().splitlines()}) < 2:
                time.sleep(0.05)
        case "half":  # as a worker that is killed while it writes its result
            frame = sys._getframe()
            while frame.f_code.co_name != "_process_worker":
                frame = frame.f_back
            os.write(frame.f_locals["result_queue"]._writer.fileno(), (1000).to_bytes(4, "big") + b"half")
            Path("half").touch()
            time.sleep(1000)
        case "full":
            Path("/dev/full").write_text("as on a full disk")
        case "exit":
            sys.exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "nan":
            return float("nan")
        case "inf":
            return float("inf")
        case "none":
            return None
        case "text":
            return "text"
        case "two":
            return cfg.x**2, 1.0
    return cfg.x**2 if cfg.objectives == 1 else (cfg.x**2, (cfg.x - 2) ** 2)


def prepare(cfg, trial):
    return cfg, HydraConfig.get().job.num, trial


def fit_together(jobs):
    """Report the steps of all jobs in turns. Yields a job's value, or the exception that ended it, when it is done."""
    for cfg, number, _ in jobs:
        with Path(cfg.ran).open("a") as file:
            file.write(f"{number} {os.getpid()}\n")
    for index, (cfg, _, trial) in enumerate(jobs):
        ended = cfg.x**2
        for step in range(1, cfg.steps + 1):
            time.sleep(cfg.seconds / cfg.steps / len(jobs))
            try:
                if trial:
                    trial.report(cfg.x**2 + 1 / step, step)
            except TrialPruned as error:
                ended = error
                break
        yield index, ended


def finish(job, ended):
    if isinstance(ended, BaseException):
        raise ended
    return ended


if "TOY_STAGES" in os.environ:
    objective.stages = Stages(prepare, fit_together, finish)


def configure(cfg, trial):
    """A custom search space: z lies near x."""
    trial.suggest_float("z", trial.params["x"] - 0.1, trial.params["x"] + 0.1)


def near_fixed(cfg, trial):
    """A custom search space in which x is fixed."""
    x = trial.user_attrs["x"]
    trial.suggest_float("z", x - 0.1, x + 0.1)
    trial.suggest_float("+w", 0.0, 1.0)


def one_more(cfg, trial):
    """A custom search space with two configurations for each x."""
    trial.suggest_int("n", 1, 2)


def no_more(cfg, trial):
    """A custom search space with one configuration for each x."""
    trial.suggest_int("n", 1, 1)


def main():
    hydra.main(config_path=os.environ["TOY_CONFIG"], config_name="toy", execution_whitelist=("toy.*",))(objective)()


if __name__ == "__main__":
    from toy import main as importable  # so that worker processes import the objective

    importable()
