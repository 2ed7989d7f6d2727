"""What a trial costs in a study that has many already, and how many trials a second several processes run.

    python benchmarks/scale.py trial [--trials 100 1000 10000 100000] [--storage URL] [--stack 1] [--turns 20]
    python benchmarks/scale.py workers [--workers 1 2 4 8] [--trials 200] [--storage URL]

No trial trains anything: its job reports five values and returns a number. Everything else is tuner's own: the budget,
the line of progress, the loop that asks and tells, and the job that writes into the study. What Hydra does for a job
(`sweep.py overhead`) is left out.

trial      milliseconds per trial in studies with so many finished trials, medians of `--turns` trials (or stacks of
           `--stack`). `rules` is a search at random with a timeout and stop_when_flat. `ours` is all but `draw`, which
           is the sampler, and `job`, most of which is files and the pruner. Statements and transactions are those of
           the database.
workers    trials per second by number of processes, each of which draws at random and runs one trial after another:
           with the database itself, and through Optuna's storage proxy (python -m tuner.server).

--storage is the URL of a database; the study is deleted at the end. Without it, `trial` has its study in memory, and
`workers` in an SQLite file.
"""

import argparse
import contextlib
import json
import logging
import math
import multiprocessing
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import results
import sqlalchemy
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, distribution_to_json
from optuna.pruners import MedianPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages._rdb import models
from optuna.study import Study
from optuna.trial import FrozenTrial, create_trial

from tuner.sweep import storage
from tuner.sweep.bounded_tpe import BoundedTPE
from tuner.sweep.budget import OWNER, Budget, new_owner
from tuner.sweep.job import Job
from tuner.sweep.launchers import Slots
from tuner.sweep.leases import LEASE
from tuner.sweep.outcome import OUTCOME, Outcome
from tuner.sweep.progress import Progress
from tuner.sweep.search_space import SearchSpace
from tuner.sweep.stopping import StopRules
from tuner.sweep.trial import RunningTrial, Stages, TrialPruned
from tuner.sweep.trial_loop import Monitor, TrialLoop

SPACE = {
    "optimizer.lr": FloatDistribution(1e-4, 1e-2, log=True),
    "model.head.dropout": FloatDistribution(0.0, 0.7),
    "model.head.width": CategoricalDistribution([256, 512, 1024]),
}
REPORTS = 5  # of a trial
GOOD = 0.1  # of the values that finished trials reported, 10% are better: what is measured is not pruned
PRUNER = MedianPruner(n_warmup_steps=2)
SAMPLERS = {"TPE": TPESampler, "random": RandomSampler, "rules": RandomSampler}
RULES = StopRules(timeout=1e9, stop_when_flat=10**9)
PARTS = {  # column -> what is timed, its callees included
    "ask": (Budget, "ask"),
    "draw": (TrialLoop, "_overrides"),
    "duplicate?": (Budget, "original"),
    "job": (TrialLoop, "_launch"),
    "line": (Progress, "line"),
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("trial")
    sub.set_defaults(run=trial)
    results.add_options(sub)
    sub.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 10_000, 100_000], help="that have finished")
    sub.add_argument("--storage", metavar="URL", help="of a database; default: in memory")
    sub.add_argument("--stack", type=int, default=1, help="trials that train together")
    sub.add_argument("--turns", type=int, default=20, help="trials, or stacks, that are measured")
    sub = commands.add_parser("workers")
    sub.set_defaults(run=workers)
    results.add_options(sub)
    sub.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="processes")
    sub.add_argument("--trials", type=int, default=200, help="that all of them run together")
    sub.add_argument("--storage", metavar="URL", help="of a database; default: an SQLite file")
    return parser


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("tuner.sweep").setLevel(logging.WARNING)
    args = arguments().parse_args()
    args.run(args)


# A sweep without Hydra


def prepare(_cfg: DictConfig, running: RunningTrial) -> RunningTrial:
    return running


def fit_together(jobs: Sequence[RunningTrial]) -> Iterator[tuple[int, Any]]:
    ended: dict[int, Any] = {}
    for step in range(1, REPORTS + 1):
        for index, running in enumerate(jobs):
            try:
                if index not in ended:
                    running.report(GOOD + 1 / step, step)
            except TrialPruned as error:
                ended[index] = error
    for index in range(len(jobs)):
        yield index, ended.get(index, GOOD + 1 / REPORTS)


def finish(_running: RunningTrial, value: Any) -> float:
    if isinstance(value, TrialPruned):
        raise value
    return float(value)


def value_at(number: int, step: int) -> float:
    """The value that a trial reports: noise, which gets better with each step."""
    return random.Random(number).random() + 1 / step


def task(_cfg: DictConfig) -> None:
    raise NotImplementedError("it is run in stages")


task.stages = Stages(prepare, fit_together, finish)  # type: ignore[attr-defined]


class Launcher:
    """Runs the jobs of trials together, without what Hydra does for each."""

    def __init__(self, job: Job, folder: Path):
        self.stages, self.folder = job.stages, folder

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        assert self.stages
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        prepared = [self.stages.prepare(self.enter(number), None) for number in numbers]
        returns = []
        for index, fitted in self.stages.fit_together(prepared):
            self.enter(numbers[index])
            value = self.stages.finish(prepared[index], fitted)
            returns.append(JobReturn(_return_value=value, status=JobStatus.COMPLETED))
        return returns

    def enter(self, number: int) -> DictConfig:
        """The Hydra context of a job."""
        runtime = {"output_dir": str(self.folder / str(number))}
        config = OmegaConf.create({"hydra": {"job": {"num": number}, "runtime": runtime, "verbose": False}})
        HydraConfig.instance().cfg = config
        return config


def loop_of(study: Study, folder: Path, n_trials: int, rules: StopRules, stack: int = 1) -> TrialLoop:
    """The loop of a sweep on this study."""
    locks = folder / "locks"
    locks.mkdir(exist_ok=True)
    budget = Budget(study, locks, new_owner(), n_trials=n_trials, retries=2, rules=rules, space=SPACE)
    monitor = Monitor(budget, Progress(budget.history, n_trials, rules), allowed_failures=0)
    budget.on_trial_end = monitor.trial_ended
    if isinstance(study.sampler, TPESampler):
        study.sampler = BoundedTPE(study.sampler, budget.history)
    launcher: Any = Launcher(Job(task, None, study.study_name, 1, PRUNER, study=study), folder)
    slots = Slots(1, stack, in_process=True)
    config: Any = None  # which only jobs in other processes need
    return TrialLoop(
        monitor, config, config, launcher, slots, SearchSpace(dict(SPACE)), None, folder, mixed=None, reuses=True
    )


# What a trial costs


def trial(args: argparse.Namespace) -> None:
    if args.smallest:
        args.trials, args.turns = [20], 2
    header = ["sampler, finished trials", "a trial, ms", "ours", *PARTS, "the rest", "statements", "transactions"]
    rows = []
    for name, sampler in SAMPLERS.items():
        with tempfile.TemporaryDirectory() as folder, new_study(args.storage) as study:
            for trials in args.trials:
                fill(study, trials)
                study.sampler = sampler(seed=0)
                rules = RULES if name == "rules" else StopRules()
                rows.append([f"{name}, {trials:,}", *columns(study, Path(folder), rules, args)])
                print(" | ".join(rows[-1]), flush=True)
    place = "in memory" if args.storage is None else args.storage.partition(":")[0]
    stack = f", stacks of {args.stack}" if args.stack > 1 else ""
    note = f"Medians of {args.turns} turns; the pruner is the median."
    results.write(f"a trial of a large study, {place}{stack}", torch.device("cpu"), [header, *rows], note)


def columns(study: Study, folder: Path, rules: StopRules, args: argparse.Namespace) -> list[str]:
    """A row: the cost of one more trial of this study."""
    turns: list[dict[str, float]] = []
    loop = loop_of(study, folder, len(study.get_trials(deepcopy=False)), rules, args.stack)
    with measured() as now, loop.monitor.progress, loop.budget.alive():
        for _ in range(args.turns + 1):
            loop.budget.n_trials += args.stack
            now.clear()
            start = time.perf_counter()
            loop._run_trials()
            now["whole"] = time.perf_counter() - start  # type: ignore[assignment]
            now["ours"] = now["whole"] - now["draw"] - now["job"]
            now["rest"] = now["ours"] - now["ask"] - now["duplicate?"] - now["line"]
            turns.append(dict(now))
    del turns[0]  # it reads the whole study
    of = {key: statistics.median(turn.get(key, 0.0) for turn in turns) / args.stack for key in {*PARTS, *turns[0]}}
    times = [of[name] for name in ("whole", "ours", *PARTS, "rest")]
    counts = [f"{of[key]:.0f}" if of.get(key) else "-" for key in ("statements", "transactions")]
    return [*(f"{1000 * seconds:.2f}" for seconds in times), *counts]


@contextlib.contextmanager
def measured() -> Iterator[Counter[str]]:
    """What happens meanwhile: seconds in each of PARTS, and the number of statements and transactions."""
    now: Counter[str] = Counter()
    before = {part: getattr(*part) for part in PARTS.values()}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                now[name] += time.perf_counter() - start  # type: ignore[assignment]

        return call

    def count(name: str) -> Callable[..., None]:
        def counted(*_arguments: Any) -> None:
            now[name] += 1

        return counted

    events = {"before_cursor_execute": count("statements"), "begin": count("transactions")}
    for event, listener in events.items():
        sqlalchemy.event.listen(sqlalchemy.Engine, event, listener)
    for name, (owner, method) in PARTS.items():
        setattr(owner, method, timed(name, before[owner, method]))
    try:
        yield now
    finally:
        for (owner, method), function in before.items():
            setattr(owner, method, function)
        for event, listener in events.items():
            sqlalchemy.event.remove(sqlalchemy.Engine, event, listener)


@contextlib.contextmanager
def new_study(url: str | None) -> Iterator[Study]:
    """A study in a database, or in memory, that is deleted at the end."""
    store, name = storage.connect(storage.resolve(url), patience=60.0), uuid.uuid4().hex
    yield optuna.create_study(study_name=name, storage=store, pruner=PRUNER)
    optuna.delete_study(study_name=name, storage=store)


# Studies that are filled at once


def fill(study: Study, trials: int) -> None:
    """Add finished trials until the study has so many."""
    numbers = range(len(study.get_trials(deepcopy=False)), trials)
    store = getattr(study._storage, "inner", study._storage)
    if hasattr(store, "_backend"):
        insert(store._backend, study._study_id, [finished(number) for number in numbers])
    else:
        for number in numbers:
            store.create_new_trial(study._study_id, finished(number))


def finished(number: int) -> FrozenTrial:
    """A trial as a search leaves it. They ran one after another."""
    draw = random.Random(-1 - number)
    params = {
        "optimizer.lr": math.exp(draw.uniform(math.log(1e-4), math.log(1e-2))),
        "model.head.dropout": draw.uniform(0.0, 0.7),
        "model.head.width": draw.choice([256, 512, 1024]),
    }
    is_pruned = draw.random() < 0.5
    values = {step: value_at(number, step) for step in range(1, 4 if is_pruned else REPORTS + 1)}
    outcome = Outcome("PRUNED", reason="pruned") if is_pruned else Outcome("COMPLETE", [values[REPORTS]])
    one = create_trial(
        state=outcome.trial_state,
        value=values[max(values)],
        params=params,
        distributions=SPACE,
        user_attrs={"output_dir": f"multirun/study/{number}", "host": "here", "seconds": 9.0, "epochs": REPORTS},
        system_attrs={OWNER: "here:1:2:abc", LEASE: 1.5 + number, OUTCOME: asdict(outcome)},
        intermediate_values=values,
    )
    one.datetime_start = datetime(2020, 1, 1) + timedelta(seconds=10 * number)
    one.datetime_complete = one.datetime_start + timedelta(seconds=9)
    one.number = number
    return one


def insert(backend: Any, study_id: int, trials: Sequence[FrozenTrial]) -> None:
    """Insert trials into Optuna's tables in one transaction: through its storage, each would take 20 statements."""
    rows = defaultdict(list)
    with backend.engine.begin() as connection:
        highest = connection.execute(sqlalchemy.select(sqlalchemy.func.max(models.TrialModel.trial_id))).scalar()
        for one in trials:
            it = {"trial_id": (highest or 0) + 1 + len(rows[models.TrialModel])}
            times = {"datetime_start": one.datetime_start, "datetime_complete": one.datetime_complete}
            rows[models.TrialModel].append(
                it | times | {"number": one.number, "study_id": study_id, "state": one.state}
            )
            value_type = models.TrialValueModel.TrialValueType.FINITE
            rows[models.TrialValueModel].append(it | {"objective": 0, "value": one.value, "value_type": value_type})
            for name, distribution in one.distributions.items():
                text, value = distribution_to_json(distribution), distribution.to_internal_repr(one.params[name])
                parameter = {"param_name": name, "param_value": value, "distribution_json": text}
                rows[models.TrialParamModel].append(it | parameter)
            step_type = models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE
            for step, value in one.intermediate_values.items():
                reported = {"step": step, "intermediate_value": value, "intermediate_value_type": step_type}
                rows[models.TrialIntermediateValueModel].append(it | reported)
            for model, attributes in (
                (models.TrialUserAttributeModel, one.user_attrs),
                (models.TrialSystemAttributeModel, one.system_attrs),
            ):
                for key, value in attributes.items():
                    rows[model].append(it | {"key": key, "value_json": json.dumps(value)})
        for model, of_model in rows.items():
            connection.execute(sqlalchemy.insert(model), of_model)
        if connection.dialect.name == "postgresql":  # whose counter did not see these numbers
            connection.execute(
                sqlalchemy.text(
                    "SELECT setval(pg_get_serial_sequence('trials', 'trial_id'), (SELECT max(trial_id) FROM trials))"
                )
            )


# Trials per second


def workers(args: argparse.Namespace) -> None:
    if args.smallest:
        args.workers, args.trials = [1, 2], 4
    with tempfile.TemporaryDirectory() as folder:
        url = args.storage or f"sqlite:///{folder}/studies.db"
        name = url.partition(":")[0].partition("+")[0]
        with proxy(url) as proxied:
            places = {name: url, f"{name}, through the proxy": proxied}
            rows = []
            for place, spec in places.items():
                rows.append([place, *(f"{rate(spec, n, args.trials):.1f}" for n in args.workers)])
                print(" | ".join(rows[-1]), flush=True)
    header = ["trials per second", *(f"{n} processes" for n in args.workers)]
    results.write(f"trials per second, {name}", torch.device("cpu"), [header, *rows], f"{args.trials} trials each.")


def rate(url: str, processes: int, trials: int) -> float:
    """Trials per second of processes that share a study."""
    context = multiprocessing.get_context("spawn")
    barrier, ends = context.Barrier(processes + 1), context.Queue()
    with tempfile.TemporaryDirectory() as folder, new_study(url) as study:
        options = (url, study.study_name, Path(folder), trials, barrier, ends)
        started = [context.Process(target=work, args=options) for _ in range(processes)]
        for process in started:
            process.start()
        barrier.wait()
        start = time.monotonic()
        end = max(ends.get() for _ in started)
        for process in started:
            process.join()
    return trials / (end - start)


def work(url: str, name: str, folder: Path, trials: int, barrier: Any, ends: Any) -> None:
    """A process that runs trials of a study until there are so many."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.disable(logging.INFO)
    store = storage.connect(storage.resolve(url), patience=60.0)
    study = optuna.load_study(study_name=name, storage=store, sampler=RandomSampler())
    loop = loop_of(study, folder, trials, StopRules())
    with loop.budget.alive():
        barrier.wait()
        loop.run()
        ends.put(time.monotonic())


@contextlib.contextmanager
def proxy(url: str) -> Iterator[str]:
    """The URL of Optuna's proxy to a database."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tuner.server", "--storage", url, "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        process.stderr.readline()  # it serves
        try:
            yield f"grpc://localhost:{port}"
        finally:
            process.kill()


if __name__ == "__main__":
    main()
