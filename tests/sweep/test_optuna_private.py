"""What tuner relies on in Optuna without a promise of its documentation. A failure says what tuner would do wrong."""

import json
import socket
import sqlite3
from contextlib import closing

import optuna
import pytest
import sqlalchemy
from contract import contract
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import SuccessiveHalvingPruner, ThresholdPruner
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages import GrpcStorageProxy, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._grpc.server import make_server
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from tuner.sweep import optuna_private
from tuner.sweep.sampling import suggest

SPACE = {
    "lr": FloatDistribution(0, 1),
    "depth": IntDistribution(1, 1000),
    "choice": CategoricalDistribution([*"abcdefghij"]),
}
DEFAULTS = {"lr": 0.123, "depth": 456, "choice": "g"}


@pytest.fixture
def study():
    return optuna.create_study(sampler=RandomSampler(0))


def test_a_fixed_trial_takes_its_values(study):
    with contract(
        "Optuna: Trial._suggest no longer asks Trial._is_fixed_param: the baseline would become a random trial"
    ):
        trial = optuna_private.FixedTrial(study.ask(), lambda name, _: DEFAULTS[name])
        for name, distribution in SPACE.items():
            suggest(trial, name, distribution)
        assert trial.params == study.trials[0].params == DEFAULTS


def test_a_fixed_trial_draws_what_has_no_value(study):
    with contract("Optuna: Trial._suggest no longer draws what is not fixed: the baseline would fail"):
        trial = optuna_private.FixedTrial(study.ask(), lambda name, _: {"lr": 0.123}[name])
        for name, distribution in SPACE.items():
            suggest(trial, name, distribution)
        assert trial.params["lr"] == 0.123
        assert trial.params.keys() == SPACE.keys()


@pytest.mark.parametrize("baseline", [False, True])
def test_a_parameter_that_follows_from_another_is_not_drawn(study, baseline):
    with contract("Optuna: Trial._fixed_params no longer holds given values: a network would get another one's blocks"):
        for choice in "aceg":
            trial = study.ask()
            if baseline:
                trial = optuna_private.FixedTrial(trial, lambda name, _: DEFAULTS[name])
            optuna_private.fix(trial, "choice", choice)
            assert trial.suggest_categorical("choice", [*"abcdefghij"]) == choice
            assert trial.params == study.trials[-1].params == {"choice": choice}


def test_the_parameters_of_a_waiting_trial_are_used(study):
    with contract("Optuna: fixed_params no longer holds enqueued parameters: a retried trial would be a random one"):
        study.enqueue_trial(DEFAULTS)
        assert study.trials[0].system_attrs[optuna_private.FIXED_PARAMS] == DEFAULTS
        attributes = {optuna_private.FIXED_PARAMS: DEFAULTS}
        study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=attributes))
        for _ in range(2):
            trial = study.ask()
            for name, distribution in SPACE.items():
                suggest(trial, name, distribution)
            assert trial.params == DEFAULTS


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_retried_trials_have_optunas_own_marks(study):
    with contract("Optuna: retries are marked otherwise: its dashboard and callbacks would not know tuner's retries"):
        study.ask()
        history = {optuna_private.FAILED_TRIAL: 0, optuna_private.RETRY_HISTORY: [0]}
        study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=history))
        second = study.trials[1]
        assert RetryHeartbeatStaleTrialCallback.retried_trial_number(second) == 0
        assert RetryHeartbeatStaleTrialCallback.retry_history(second) == [0]


@pytest.mark.parametrize(
    ("distribution", "inside", "outside"),
    [
        (FloatDistribution(0, 1), [0, 0.5, 1.0], [-0.1, 1.1, "a", None]),
        (FloatDistribution(0, 1, step=0.25), [0.25], [0.3]),
        (IntDistribution(0, 8, step=2), [0, 4], [3, 9]),
        (CategoricalDistribution(["a", None, 1]), ["a", None, 1], ["b", 2]),
    ],
)
def test_whether_a_value_is_in_a_distribution(distribution, inside, outside):
    with contract("Optuna: BaseDistribution._contains no longer tells values: defaults would be refused"):
        assert all(optuna_private.contains(distribution, value) for value in inside)
        assert not any(optuna_private.contains(distribution, value) for value in outside)


def test_ids_storage_and_attributes(study):
    with contract("Optuna: studies and trials have other ids: what a job writes down would not reach its trial"):
        other = optuna.create_study(study_name="second", storage=optuna_private.storage_of(study))
        trial, _ = other.ask(), other.ask()
        number = optuna_private.storage_of(other).get_study_id_from_name("second")
        assert optuna_private.study_id(other) == number != optuna_private.study_id(study)
        for it in (trial, optuna_private.frozen_trial(other, 0)):
            kind = type(it).__name__
            optuna_private.set_attributes(other._storage, it._trial_id, {kind: 1}, {})
            optuna_private.set_system_attr(other, it, kind, 2)
        first = optuna_private.frozen_trial(other, 0)
        assert first.number == 0
        assert first.user_attrs == {"Trial": 1, "FrozenTrial": 1}
        assert first.system_attrs == {"Trial": 2, "FrozenTrial": 2}
        assert optuna_private.frozen_trial(other, 1).user_attrs == {}


@pytest.fixture
def proxied(tmp_path):
    """A proxy's client, of a database in this process."""
    database = RDBStorage(f"sqlite:///{tmp_path}/it.db", engine_kwargs={"connect_args": {"timeout": 60}})
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    server = make_server(optuna_private.cached(database), "localhost", port)
    server.start()
    client = GrpcStorageProxy(port=port)
    yield client
    client.close()
    server.stop(0).wait()
    database.engine.dispose()


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("kind", ["memory", "sqlite", "journal", "grpc"])
def test_trials_that_have_changed_are_read(tmp_path, kind, request):
    choices = {
        "memory": optuna.storages.InMemoryStorage,
        "sqlite": lambda: optuna_private.cached(RDBStorage(f"sqlite:///{tmp_path}/it.db")),
        "journal": lambda: optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "it.log"))),
        "grpc": lambda: request.getfixturevalue("proxied"),
    }
    with contract("Optuna: storages keep their trials otherwise: sweeps would see old ones, or read all of them"):
        store = choices[kind]()
        for name in ("other", "it"):
            study = optuna.create_study(study_name=name, storage=store, sampler=RandomSampler(0))
            assert optuna_private.changed_trials(store, study._study_id, [], 0) == []
            for _ in range(3):
                study.ask()
            study.tell(1, 0.5)
            seen = optuna_private.changed_trials(store, study._study_id, [], 0)
            assert [(t.number, t.state.name) for t in seen] == [(0, "RUNNING"), (1, "COMPLETE"), (2, "RUNNING")]
            study.tell(2, 1.5)
            study.ask().suggest_float("x", 0, 1)
            seen = optuna_private.changed_trials(store, study._study_id, [0, 2], 3)
            assert [(t.number, t.value, len(t.params)) for t in seen] == [(0, None, 0), (2, 1.5, 0), (3, None, 1)]
        if kind == "sqlite":
            store._backend.engine.dispose()


def test_a_sampler_is_shown_a_part_of_a_study(study):
    with contract("Optuna: samplers read a study otherwise: TPE would see all its trials, or none"):
        for number in range(20):
            trial = study.ask()
            trial.suggest_float("x", 0, 100)
            study.tell(trial, number)
        part = optuna_private.PartOfStudy(study, study.trials[5:15])
        assert [trial.number for trial in part._get_trials(states=(TrialState.COMPLETE,))] == [*range(5, 15)]
        few = optuna.create_study()
        few.add_trials(study.trials[5:15])
        proposals, trial = [], study.trials[0]
        for seen in (part, few):
            sampler = TPESampler(seed=1, constant_liar=False)
            space = sampler.infer_relative_search_space(seen, trial)
            assert space == {"x": FloatDistribution(0, 100)}
            proposals.append(sampler.sample_relative(seen, trial, space))
        assert proposals[0] == proposals[1] != {}


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_attributes_are_set_at_once_or_not_at_all(tmp_path, kind):
    with contract("Optuna: attributes are written otherwise: outcomes of trials would not be recorded"):
        database = RDBStorage(f"sqlite:///{tmp_path}/it.db")
        store = optuna_private.cached(database) if kind == "sqlite" else optuna.storages.InMemoryStorage()
        study = optuna.create_study(storage=store)
        trial, commits = study.ask(), []
        sqlalchemy.event.listen(database.engine, "commit", commits.append)
        optuna_private.set_attributes(store, trial._trial_id, {"a": 1, "b": [2]}, {"c": {"d": None}})
        optuna_private.set_attributes(store, trial._trial_id, {"a": 3}, {})
        assert len(commits) == (2 if kind == "sqlite" else 0)
        frozen = study.trials[0]
        assert (frozen.user_attrs, frozen.system_attrs) == ({"a": 3, "b": [2]}, {"c": {"d": None}})
        if kind == "sqlite":
            with pytest.raises(TypeError):  # no JSON
                optuna_private.set_attributes(store, trial._trial_id, {"e": 1, "f": object()}, {})
        study.tell(trial, 0.5)
        with pytest.raises(UpdateFinishedTrialError):
            optuna_private.set_attributes(store, trial._trial_id, {"e": 1}, {})
        assert "e" not in study.trials[0].user_attrs
        database.engine.dispose()


class Untouched(BaseSampler):
    def infer_relative_search_space(self, study, trial):
        raise AssertionError("sampled")

    sample_relative = sample_independent = before_trial = infer_relative_search_space


def test_a_job_reports_and_is_pruned_without_the_sampler(study):
    with contract("Optuna: Study and Trial are made otherwise: a job could not report, nor be pruned"):
        study.ask()
        study.sampler = Untouched()
        trial = optuna_private.running_trial(optuna_private.of_jobs(study, ThresholdPruner(upper=1.0)), 0)
        trial.report(0.5, 1)
        assert not trial.should_prune()
        trial.report(2.0, 2)
        assert trial.should_prune()
        assert study.trials[0].intermediate_values == {1: 0.5, 2: 2.0}


def test_a_pruner_sees_the_trials_of_the_last_reading_and_what_was_added(study):
    with contract("Optuna: Study, pruners or storages work otherwise: trials of a stack could not be pruned"):
        pruner = SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
        other = optuna.create_study(pruner=pruner)
        view = optuna_private.StudyView(study, pruner)
        trials, others = ([s.ask() for _ in range(4)] for s in (study, other))
        view.show(study.get_trials(deepcopy=False))
        for trial, theirs, value in zip(trials, others, (0.5, 0.9, 0.1, 0.3), strict=True):
            for reported in (trial, theirs):
                reported.report(value, 1)
            assert view.add(trial.number, value, 1)
            assert view.should_prune(trial.number) == theirs.should_prune()  # which reads the study each time
        # the pruner's own notes, which it looks for in the other trials
        assert [trial.system_attrs for trial in study.trials] == [trial.system_attrs for trial in other.trials]
        late = study.ask()
        assert not view.add(late.number, 0.7, 1)
        view.show(study.get_trials(deepcopy=False))
        assert view.add(late.number, 0.7, 1)


def test_the_end_of_a_grid_is_told(study):
    with contract("Optuna: Study.stop is told otherwise: a sweep would repeat the points of a grid"):
        study.sampler = GridSampler({"lr": [0.0, 1.0]})
        stops = []
        for number in range(2):
            trial = study.ask()
            assert study.trials[number].system_attrs[optuna_private.GRID_ID] == number
            suggest(trial, "lr", SPACE["lr"])
            stops.append(optuna_private.tell(study, number, [0.5], TrialState.COMPLETE))
        assert stops == [False, True]
        with pytest.raises(RuntimeError, match="stop"):
            study.stop()  # or tuner need not pretend to be in Study.optimize


def test_a_database_is_cached_as_optuna_does_it(tmp_path):
    with contract("Optuna: databases are cached otherwise: each look at a study would read all its trials"):
        storage = RDBStorage(f"sqlite:///{tmp_path}/optuna.db")
        cached = optuna_private.cached(storage)
        assert type(cached) is type(optuna_private.storage_of(optuna.create_study(storage=storage)))
        assert type(cached) is not type(storage)
        assert optuna_private.cached(cached) is cached
        storage.engine.dispose()


def test_a_journal_takes_a_lock_of_our_own(tmp_path):
    class Lock(optuna_private.BaseJournalFileLock):
        calls: list[str] = []  # noqa: RUF012

        def acquire(self):
            self.calls.append("acquire")
            return True

        def release(self):
            self.calls.append("release")

    with contract("Optuna: a journal has another kind of lock: sweeps at once would write over each other"):
        JournalFileBackend(str(tmp_path / "log"), lock_obj=Lock()).append_logs([{"a": 1}])
        assert Lock.calls == ["acquire", "release"]


@pytest.mark.parametrize("kind", ["memory", "sqlite", "journal"])
def test_a_trial_is_asked_for_with_its_attributes(tmp_path, kind):
    """As Study.ask does it, but in one step."""
    choices = {
        "memory": optuna.storages.InMemoryStorage,
        "sqlite": lambda: RDBStorage(f"sqlite:///{tmp_path}/it.db"),
        "journal": lambda: optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "it.log"))),
    }
    with contract("Optuna: a trial can't be created with attributes: one that is killed at once would stay running"):
        study = optuna.create_study(storage=choices[kind](), sampler=GridSampler({"x": [1, 2, 3]}))
        study.enqueue_trial({"x": 3})
        for number in range(3):
            queue = study.get_trials(states=(TrialState.WAITING,))
            trial = optuna_private.ask(study, {"owner": "me"}, queue)
            assert trial.number == number
            x = trial.suggest_int("x", 1, 3)
            study.tell(trial, x)
        trials = study.trials
        assert [t.system_attrs["owner"] for t in trials] == ["me"] * 3
        assert trials[0].params == {"x": 3}
        assert all(t.datetime_start <= t.datetime_complete for t in trials)
        assert [optuna_private.id_of(t) for t in trials] == [t._trial_id for t in trials]
        if kind == "sqlite":
            study._storage._backend.engine.dispose()


def test_what_files_hold(tmp_path):
    with contract("Optuna: its tables or the operations of its journal have changed: files would be taken for others"):
        with closing(sqlite3.connect(tmp_path / "it.db")) as file:
            RDBStorage(f"sqlite:///{tmp_path}/it.db").engine.dispose()
            tables = {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert tables == optuna_private.TABLES
        store = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "it.log")))
        study = optuna.create_study(storage=store)
        study.tell(study.ask(), 0.5)
        records = [json.loads(line) for line in (tmp_path / "it.log").read_text().splitlines()]
        assert {record["op_code"] for record in records} <= optuna_private.JOURNAL_OPERATIONS
        assert all("worker_id" in record for record in records)
        assert (tmp_path / "it.log").read_text().startswith('{"op_code":')
