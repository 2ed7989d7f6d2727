"""A storage that waits while its server is away, and stops the sweep, not a trial, when it can't be written."""

import abc
import copy
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.exc import DataError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tuner.files import disk_error
from tuner.sweep import optuna_private
from tuner.sweep.optuna_private import id_of, storage_of, study_id
from tuner.sweep.passwords import hidden
from tuner.sweep.storage_files import Place, StorageLostError

log = logging.getLogger("tuner.sweep")
REFUSED = re.compile(  # how servers refuse a client: waiting does not help
    r'authentication failed|no pg_hba.conf entry|(database|role) ".*" does not exist|Access denied|Unknown database'
)
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between attempts
# System attributes of a trial.
REQUEST = "request"  # an identifier, by which a repeated request finds it
SURPLUS = "surplus"  # asked for beyond the budget, or twice: it never ran


class Patience:
    """Repeats calls of a storage while its server is away, for at most `seconds` from the first failure on.

    After that each call is tried once, until one succeeds. All threads share it.
    """

    def __init__(self, spec: str, shown: str, seconds: float):
        self.spec, self.shown, self.seconds = spec, shown, seconds
        self.lock = threading.Lock()
        self.away_since: float | None = None
        self.given_up = False

    def call(self, function: Callable[[], Any], again: Callable[[], Any] | None = None) -> Any:
        """The result of `function`. again: called instead once it has failed, as it may have been done all the same.

        Raises StorageLostError after `seconds`, or if the storage fails for another reason than an absent server.
        """
        pause = FIRST_PAUSE
        while True:
            try:
                result = function()
            except Exception as error:
                if disk_error(error) or not is_failure(error):
                    raise
                self._failed(error)
                function = again or function
            else:
                self._answered()
                return result
            try:
                time.sleep(pause)
            except BaseException:  # interrupted: what ends the sweep does not wait once more
                self.given_up = True
                raise
            pause = min(2 * pause, LONGEST_PAUSE)

    def _failed(self, error: Exception) -> None:
        reason = hidden(" ".join(str(driver_error(error) or error).split()), self.spec)
        if not is_away(error):
            raise StorageLostError(f"the storage {self.shown} cannot be used: {reason}") from error
        with self.lock:
            now = time.monotonic()
            if self.away_since is None:
                self.away_since = now
                if self.seconds:
                    text = "the storage %s does not answer (%s): trying again for up to %g s"
                    log.warning(text, self.shown, reason, self.seconds)
            if now - self.away_since < self.seconds and not self.given_up:
                return
            self.given_up = True
        raise StorageLostError(
            f"the storage {self.shown} did not answer for {self.seconds:g} s ({reason}): no trial has failed by it, "
            "and outcomes that could not be written are in the run folders; start the storage again"
        ) from error

    def _answered(self) -> None:
        if self.away_since is None:
            return
        with self.lock:
            if self.away_since is not None:
                if self.seconds:
                    away = time.monotonic() - self.away_since
                    log.warning("the storage %s answers again, after %.0f s", self.shown, away)
                self.away_since, self.given_up = None, False


def driver_error(error: BaseException | None) -> BaseException | None:
    """What the database's driver raised, among an error and its causes."""
    while error is not None:
        if isinstance(error, DBAPIError):
            return error.orig
        error = error.__cause__ or error.__context__
    return None


def is_away(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that a server can't be reached, or that an SQLite file is locked."""
    while error is not None:
        module, name = type(error).__module__.partition(".")[0], type(error).__name__
        if isinstance(error, DBAPIError) and type(error.orig).__module__.startswith("sqlite3"):
            return "locked" in str(error.orig)
        if isinstance(error, DBAPIError) and REFUSED.search(str(error.orig)):
            return False
        if isinstance(error, OperationalError | InterfaceError | PoolTimeout | ConnectionError):
            return True
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return True
        if module == "redis" and name in ("ConnectionError", "TimeoutError", "BusyLoadingError"):
            return True
        if module == "grpc" and str(getattr(error, "code", str)()).endswith(("UNAVAILABLE", "DEADLINE_EXCEEDED")):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_failure(error: Exception) -> bool:
    """Whether an error is one of the storage itself. Others, such as a KeyError for an unknown study, are answers."""
    if isinstance(error.__cause__ or error, DataError):  # what was to be written is not valid
        return False
    known = (SQLAlchemyError, StorageInternalError, OSError, json.JSONDecodeError)
    return isinstance(error, known) or type(error).__module__.partition(".")[0] in ("grpc", "redis")


class PatientStorage(BaseStorage):
    """Another storage, whose calls are patient, and end with StorageLostError if its file is not the same any more.

    A call that fails may have been done all the same: the connection broke after it. The methods here can be repeated;
    those of RDBStorage that set something can be anyway.
    """

    def __init__(self, inner: BaseStorage, patience: Patience, place: Place | None):
        self.inner, self.patience, self.place = inner, patience, place

    def call(self, function: Callable[[], Any], again: Callable[[], Any] | None = None) -> Any:
        """The result of a call of the inner storage, see Patience.call."""
        if self.place:
            self.place.check()
        return self.patience.call(function, again)

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """Create a study, once."""
        name = study_name or f"no-name-{uuid.uuid4()}"  # as Optuna names it: a repeated call must not make another

        def again() -> int:
            try:
                return self.inner.create_new_study(directions, name)
            except DuplicatedStudyError:
                if study_name:
                    raise  # whoever created it: the caller opens it
                return self.inner.get_study_id_from_name(name)

        return int(self.call(lambda: self.inner.create_new_study(directions, name), again))

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Create a trial, once."""
        # with a file, what fails has not been done; a client of a proxy finds its trial by its own request
        if self.place or (template_trial and REQUEST in template_trial.system_attrs):
            return int(self.call(lambda: self.inner.create_new_trial(study_id, template_trial)))
        request = uuid.uuid4().hex
        template = copy.copy(template_trial or create_trial(state=TrialState.RUNNING))
        template.system_attrs = template.system_attrs | {REQUEST: request}
        again = partial(self._created, study_id, template, request)
        self.call(lambda: self.inner.create_new_trial(study_id, template), again)
        return int(self.call(again))

    def _created(self, study_id: int, template: FrozenTrial, request: str) -> int:
        """The trial of a request, created if there is none. Of several, which Optuna's own attempts left, one runs."""
        trials = self.inner.get_all_trials(study_id, deepcopy=False)
        ids = [id_of(trial) for trial in trials if trial.system_attrs.get(REQUEST) == request]
        for surplus in ids[1:]:
            if not self.inner.get_trial(surplus).state.is_finished():
                self.inner.set_trial_system_attr(surplus, SURPLUS, True)
                self.inner.set_trial_state_values(surplus, TrialState.FAIL)
        return ids[0] if ids else self.inner.create_new_trial(study_id, template)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Set the state of a trial, once. False if another program was faster."""

        def again() -> bool:
            trial = self.inner.get_trial(trial_id)
            # a running trial is this one's: sweeps that share a study's folder ask one after another
            if trial.state == state and (values is None or trial.values == list(values)):
                return True
            return self.inner.set_trial_state_values(trial_id, state, values)

        return bool(self.call(lambda: self.inner.set_trial_state_values(trial_id, state, values), again))


def changed_trials(study: Study, unfinished: Sequence[int], known: int) -> list[FrozenTrial]:
    """The trials of a study with these numbers, then those from number `known` on, as they are now."""
    storage, of_study = storage_of(study), (study_id(study), unfinished, known)
    if isinstance(storage, PatientStorage):
        found: list[FrozenTrial] = storage.call(lambda: optuna_private.changed_trials(storage.inner, *of_study))
        return found
    return optuna_private.changed_trials(storage, *of_study)


def set_attributes(
    study: Study, trial: Trial | FrozenTrial, user: Mapping[str, Any], system: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Set several attributes of a trial at once, the system's last."""
    storage, of_trial = storage_of(study), (id_of(trial), user, system)
    if isinstance(storage, PatientStorage) and optuna_private.is_database(storage.inner):
        storage.call(lambda: optuna_private.set_attributes(storage.inner, *of_trial))
    else:  # one after another, each with its own patience: all at once might fail at a later one again and again
        optuna_private.set_attributes(storage, *of_trial)


def patient(inner: BaseStorage, patience: Patience, place: Place | None) -> BaseStorage:
    """A PatientStorage. Its remaining methods are set below, which mypy does not see."""
    return PatientStorage(inner, patience, place)  # type: ignore[abstract]


def _delegated(name: str) -> Callable[..., Any]:
    def method(self: PatientStorage, *arguments: Any, **options: Any) -> Any:
        return self.call(partial(getattr(self.inner, name), *arguments, **options))

    return method


for _name, _member in vars(BaseStorage).items():
    if callable(_member) and not _name.startswith("_") and _name not in vars(PatientStorage):
        setattr(PatientStorage, _name, _delegated(_name))
abc.update_abstractmethods(PatientStorage)  # type: ignore[type-abstract]
