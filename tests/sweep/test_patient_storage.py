"""A storage whose server hiccups: calls are repeated, done once, and no trial fails by it."""

import json
import logging
import socket
import sqlite3
import time

import optuna
import pytest
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import DataError, OperationalError, ProgrammingError

from tuner.sweep import storage
from tuner.sweep.budget import Budget
from tuner.sweep.outcome import OUTCOME, OUTCOME_FILE, Outcome
from tuner.sweep.patient_storage import SURPLUS, Patience, PatientStorage, is_away, patient
from tuner.sweep.storage_files import StorageLostError

OPERATIONAL = OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly, password secret"))


def away():
    """What Optuna raises when the connection breaks."""
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = OPERATIONAL
    return error


class Flaky:
    """A storage whose next calls of these names fail: before they are done, or after."""

    def __init__(self, inner):
        self.inner, self.fails, self.calls = inner, {}, []

    def __getattr__(self, name):
        member = getattr(self.inner, name)
        if not callable(member):
            return member

        def call(*arguments, **options):
            self.calls.append(name)
            fails = self.fails.get(name, self.fails.get("*", []))
            moment = fails.pop(0) if fails else None
            if moment == "before":
                raise away()
            result = member(*arguments, **options)
            if moment == "after":
                raise away()
            return result

        return call


@pytest.fixture
def flaky(tmp_path, monkeypatch):
    monkeypatch.setattr("tuner.sweep.patient_storage.FIRST_PAUSE", 0.001)
    inner = Flaky(RDBStorage(f"sqlite:///{tmp_path}/it.db"))
    yield inner
    inner.inner.engine.dispose()


@pytest.fixture
def study(flaky):
    store = patient(flaky, Patience("postgresql://ann:secret@h/db", "postgresql://ann:***@h/db", 60), None)
    return optuna.create_study(study_name="s", storage=store, sampler=RandomSampler(0))


def test_every_call_of_a_storage_is_patient():
    names = {name for name, member in vars(BaseStorage).items() if callable(member) and not name.startswith("_")}
    assert names <= vars(PatientStorage).keys()
    assert not PatientStorage.__abstractmethods__


MOMENTS = [["before"], ["after"], ["before", "before", "after"], ["after", "after", "before"]]


@pytest.mark.parametrize("moments", MOMENTS, ids=str)
def test_each_call_is_done_once(study, flaky, moments):
    def interrupted(name, use):
        flaky.fails = {name: list(moments)}
        result = use()
        assert flaky.fails[name] != moments, f"{name} was not called"
        return result

    interrupted("set_study_user_attr", lambda: study.set_user_attr("a", 1))
    interrupted("create_new_trial", lambda: study.enqueue_trial({"x": 0.25}))
    assert len(study.trials) == 1
    first = interrupted("set_trial_state_values", study.ask)
    second = interrupted("create_new_trial", study.ask)
    assert (first.number, second.number) == (0, 1)
    assert interrupted("set_trial_param", lambda: first.suggest_float("x", 0, 1)) == 0.25
    interrupted("set_trial_intermediate_value", lambda: first.report(0.5, 1))
    interrupted("set_trial_user_attr", lambda: first.set_user_attr("a", 1))
    interrupted("set_trial_state_values", lambda: study.tell(first, 0.5))
    interrupted("set_trial_state_values", lambda: study.tell(second, state=TrialState.FAIL))
    interrupted("get_all_trials", lambda: study.get_trials())
    trials = study.trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL"]
    assert (trials[0].value, trials[0].params, trials[0].user_attrs) == (0.5, {"x": 0.25}, {"a": 1})
    with pytest.raises(UpdateFinishedTrialError):
        study._storage.set_trial_state_values(first._trial_id, TrialState.FAIL)


@pytest.mark.parametrize("moments", [[], *MOMENTS], ids=str)
def test_through_a_proxy_each_trial_is_created_once(study, flaky, moments):
    """A proxy has a storage of its own kind, with the same attributes, in front of the database."""
    client = patient(study._storage, Patience("grpc://h", "grpc://h", 60), None)
    remote = optuna.load_study(study_name="s", storage=client, sampler=RandomSampler(0))
    flaky.fails = {"create_new_trial": list(moments)}
    for _ in range(3):
        remote.ask()
    remote.enqueue_trial({"x": 0.25})
    states = [trial.state.name for trial in study.trials if SURPLUS not in trial.system_attrs]
    assert states == ["RUNNING"] * 3 + ["WAITING"]
    assert {trial.state.name for trial in study.trials if SURPLUS in trial.system_attrs} <= {"FAIL"}


@pytest.mark.parametrize("name", ["mine", None])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_study_is_created_once(study, flaky, name, moment):
    flaky.fails = {"create_new_study": [moment]}
    if name and moment == "after":
        with pytest.raises(optuna.exceptions.DuplicatedStudyError):  # open_study then loads it
            study._storage.create_new_study([StudyDirection.MINIMIZE], name)
    else:
        study._storage.create_new_study([StudyDirection.MINIMIZE], name)
    assert len(study._storage.get_all_studies()) == 2


def test_of_trials_that_optuna_created_twice_one_runs(study, flaky):
    """Optuna itself repeats the creation of a trial up to five times."""
    create = flaky.inner.create_new_trial
    flaky.inner.create_new_trial = lambda *arguments: [create(*arguments) for _ in range(3)][-1]
    trial = study.ask()
    assert trial.number == 0
    assert [(t.state.name, t.system_attrs.get(SURPLUS)) for t in study.trials] == [
        ("RUNNING", None),
        ("FAIL", True),
        ("FAIL", True),
    ]


def test_a_wait_is_two_lines_in_the_log(study, flaky, caplog):
    flaky.fails = {"*": ["before"] * 3}
    with caplog.at_level(logging.INFO, "tuner.sweep"):
        study.set_user_attr("a", 1)
        study.set_user_attr("a", 2)
    first, second = caplog.messages
    assert first == (
        "the storage postgresql://ann:***@h/db does not answer (server closed the connection unexpectedly, password "
        "***): trying again for up to 60 s"
    )
    assert second == "the storage postgresql://ann:***@h/db answers again, after 0 s"


def test_after_its_patience_a_call_is_tried_once_until_one_succeeds(study, flaky):
    study._storage.patience.seconds = 0.01
    flaky.fails = {"*": ["before"] * 1000}
    with pytest.raises(
        StorageLostError, match=r"did not answer for 0.01 s \(.*\*\*\*\): no trial has failed by it"
    ) as error:
        study.set_user_attr("a", 1)
    assert "secret" not in str(error.value)
    flaky.calls.clear()
    for _ in range(3):
        with pytest.raises(StorageLostError):
            study.set_user_attr("a", 1)
    assert len(flaky.calls) == 3
    flaky.fails = {}
    study.set_user_attr("a", 1)
    study._storage.patience.seconds = 60
    flaky.fails = {"*": ["before"] * 3}
    study.set_user_attr("a", 2)
    assert study.user_attrs == {"a": 2}


def test_an_interrupt_ends_the_wait_and_the_ones_after_it(study, flaky, monkeypatch):
    flaky.fails = {"*": ["before"] * 1000}

    def interrupt(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            study.set_user_attr("a", 1)
    with pytest.raises(StorageLostError):  # at once
        study.set_user_attr("a", 1)


def test_errors_that_are_answers_are_passed_on(study):
    with pytest.raises(KeyError):
        study._storage.get_trial(99)
    study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    with pytest.raises(ValueError, match="distribution"):
        study.ask({"x": optuna.distributions.IntDistribution(0, 1)})


@pytest.mark.parametrize(
    "error", [ProgrammingError("x", {}, Exception("no such table, secret")), OSError("I/O, secret")]
)
def test_another_fault_of_the_storage_stops_the_sweep_at_once(error):
    def fail():
        raise error

    with pytest.raises(StorageLostError, match=r"the storage shown cannot be used: .*, \*\*\*"):
        Patience("postgresql://ann:secret@h/db", "shown", 60).call(fail)


def test_a_full_disk_and_invalid_data_are_passed_on():
    for error in (OSError(28, "No space left on device"), DataError("x", {}, Exception("too long"))):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)):
            Patience("s", "s", 60).call(fail)


def test_a_locked_file_of_sqlite_is_waited_for(tmp_path):
    for text, expected in (("database is locked", True), ("disk I/O error", False)):
        assert is_away(OperationalError("x", {}, sqlite3.OperationalError(text))) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("connection refused", True),
        ("FATAL:  the database system is starting up", True),
        ('FATAL:  password authentication failed for user "ann"', False),
        ('FATAL:  database "mine" does not exist', False),
        ('FATAL:  role "ann" does not exist', False),
        ("(1045, \"Access denied for user 'ann'@'h' (using password: YES)\")", False),
    ],
)
def test_a_server_that_refuses_is_not_waited_for(text, expected):
    assert is_away(OperationalError("x", {}, Exception(text))) is expected


def test_a_server_that_is_not_there_is_waited_for_only_by_jobs(monkeypatch):
    monkeypatch.setattr("tuner.sweep.patient_storage.FIRST_PAUSE", 0.001)
    attempts = []

    def build(spec):
        attempts.append(spec)
        if len(attempts) % 3:
            raise OPERATIONAL
        return InMemoryStorage()

    monkeypatch.setattr(storage, "_build", build)
    spec = f"postgresql://ann:secret@h/{time.monotonic()}"
    with pytest.raises(storage.InputError, match="cannot be used"):
        storage.connect(spec, patience=60)
    assert len(attempts) == 1
    storage.connect(spec, patience=60, joining=True)
    assert len(attempts) == 3


# In a sweep


@pytest.fixture
def hiccup(monkeypatch):
    """The storage of a sweep in this process, which can be made to fail."""
    build, made = storage._build, []

    def flaky(spec):
        made.append(Flaky(build(spec)))
        return made[-1]

    monkeypatch.setattr("tuner.sweep.patient_storage.FIRST_PAUSE", 0.001)
    monkeypatch.setattr(storage, "_build", flaky)
    monkeypatch.setattr(storage, "file_of", lambda spec: None)  # as a server
    storage._open.cache_clear()
    yield made
    storage._open.cache_clear()


def test_a_sweep_with_a_hiccup_at_every_third_call_is_exact(toy, hiccup, monkeypatch):
    class Every(list):
        """Fails at every third call, before it is done and after it by turns."""

        count = 0

        def __bool__(self):
            return True

        def pop(self, _):
            Every.count += 1
            return {0: "before", 3: "after"}.get(Every.count % 6)

    start = Flaky.__init__

    def unreliable(self, inner):
        start(self, inner)
        self.fails = {"*": Every()}

    with monkeypatch.context() as patch:
        patch.setattr(Flaky, "__init__", unreliable)
        done = toy.run("hydra.sweeper.n_trials=6", "steps=3", "does=3-raise", "hydra.sweeper.enqueue=[{x: 0.5}]")
    assert done.returncode == 0, done.stdout + done.stderr
    trials = toy.study().trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3 + ["FAIL"] + ["COMPLETE"] * 2
    assert toy.starts() == list(range(6))
    assert Every.count > 100


def test_a_sweep_without_its_storage_loses_no_outcome(toy, hiccup):
    """The storage goes while trial 2 runs, and is back for the next sweep."""
    options = ["hydra.sweeper.n_trials=5", "hydra.sweeper.retries=0", "steps=4", "seconds=0.2"]

    def go_away(number, outcome):
        if number == 1:
            hiccup[0].fails = {name: ["before"] * 10_000 for name in ("set_trial_intermediate_value",)}
            hiccup[0].fails |= {
                "set_trial_user_attr": [None, None] + ["before"] * 10_000
            }  # its folder and host are written
            hiccup[0].fails |= {
                "set_trial_system_attr": ["before"] * 10_000,
                "set_trial_state_values": ["before"] * 10_000,
            }
            hiccup[0].fails |= {"get_all_trials": [None] * 7 + ["before"] * 10_000}

    ended = Budget.tell

    def tell(self, number, outcome):
        ended(self, number, outcome)
        go_away(number, outcome)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "tell", tell)
        done = toy.run(*options, "hydra.sweeper.storage_patience=0.05")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "does not answer" in done.stdout + done.stderr
    assert "no trial has failed by it" in done.stdout
    assert "then continue with: " in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert toy.starts() == [0, 1, 2]
    written = json.loads((toy.folder / "multirun" / "toy" / "2" / OUTCOME_FILE).read_text())
    hiccup[0].fails = {}
    assert toy.states() == ["COMPLETE", "COMPLETE", "RUNNING"]
    done = toy.run(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = toy.study().trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 5
    assert trials[2].values == written["values"]
    assert trials[2].system_attrs[OUTCOME] == written  # as if the job had written it to the study itself
    assert toy.starts() == list(range(5))
    assert not list((toy.folder / "multirun").rglob(OUTCOME_FILE))
    assert not list((toy.folder / "multirun").rglob("*.released"))


def test_a_trial_that_could_not_run_for_want_of_the_storage_is_run_again(study, flaky, tmp_path):
    locks = tmp_path / ".locks"
    locks.mkdir()
    study._storage.patience.seconds = 0.01
    first = Budget(study, locks, f"{socket.gethostname()}:1:first", n_trials=1, retries=0)

    def lose_the_storage():
        with first.alive():
            first.ask()
            flaky.fails = {"*": ["before"] * 1000}
            first.tell(0, Outcome("COMPLETE", [0.5]))

    with pytest.raises(StorageLostError):
        lose_the_storage()
    flaky.fails = {}
    assert [trial.state.name for trial in study.trials] == ["RUNNING"]
    Budget(study, locks, f"{socket.gethostname()}:1:second", n_trials=1, retries=0).recover()
    states = [trial.state.name for trial in study.trials]
    assert states == ["FAIL", "WAITING"]
    assert study.trials[0].user_attrs["error"] == "the sweep that ran it lost its storage; it is retried"
    assert not list(locks.glob("*.released"))


def test_what_is_added_with_a_template_keeps_its_attributes(study):
    study.add_trial(create_trial(value=1.0, user_attrs={"a": 1}, system_attrs={"b": 2}))
    [trial] = study.trials
    assert (trial.user_attrs, trial.system_attrs["b"]) == ({"a": 1}, 2)
