"""All uses of Optuna's private names, which may change with any release.

Each function has a contract test in tests/sweep/test_optuna_private.py. None has a public equivalent, except for one
that reads all trials of the study.
"""

import copy
import itertools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage, GrpcStorageProxy, InMemoryStorage, RDBStorage, _CachedStorage
from optuna.storages._rdb.models import BaseModel, TrialModel, TrialSystemAttributeModel, TrialUserAttributeModel
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.storages.journal._file import BaseJournalFileLock as BaseJournalFileLock
from optuna.storages.journal._storage import JournalOperation
from optuna.study import Study
from optuna.study._tell import _tell_with_warning
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

# System attributes of a trial that Optuna itself writes and reads.
FIXED_PARAMS = "fixed_params"  # the parameters of an enqueued trial, which are not drawn
FAILED_TRIAL, RETRY_HISTORY = "failed_trial", "retry_history"  # numbers of the trials that this one repeats
GRID_ID = "grid_id"  # the point of a grid
TABLES = {*BaseModel.metadata.tables, "alembic_version"}  # of a database
JOURNAL_OPERATIONS = {operation.value for operation in JournalOperation}  # op_code of a journal's records


class FixedTrial(Trial):
    """A trial whose parameters are given by `choose(name, distribution)`, or drawn if that raises LookupError."""

    def __init__(self, trial: Trial, choose: Callable[[str, BaseDistribution], Any]):
        super().__init__(trial.study, trial._trial_id)
        self.choose = choose

    def _is_fixed_param(self, name: str, distribution: BaseDistribution) -> bool:
        if name in self._fixed_params:
            return True
        try:
            self._fixed_params[name] = self.choose(name, distribution)
        except LookupError:
            return False
        return True


def fix(trial: Trial, name: str, value: Any) -> None:
    """Give a parameter its value before it is suggested: it follows from another one, and is not drawn."""
    trial._fixed_params[name] = value


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a parameter can have this value."""
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (TypeError, ValueError):
        return False


def study_id(study: Study) -> int:
    """The number of a study in its storage, as in the addresses of optuna-dashboard."""
    return study._study_id


def storage_of(study: Study) -> BaseStorage:
    """The storage that a study is kept in."""
    return study._storage


def frozen_trial(study: Study, number: int) -> FrozenTrial:
    """One trial by its number. Study.get_trials reads them all."""
    return study._storage.get_trial(_trial_id(study, number))


def _trial_id(study: Study, number: int) -> int:
    return study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)


def changed_trials(storage: BaseStorage, study_id: int, unfinished: Sequence[int], known: int) -> list[FrozenTrial]:
    """The trials of a study with these numbers, then those from number `known` on, as they are now.

    Storage.get_all_trials copies the list of all, and sorts it.
    """
    trials: Sequence[FrozenTrial] | Mapping[int, FrozenTrial]
    if isinstance(storage, _CachedStorage):
        storage._read_trials_from_remote_storage(study_id)
        trials = storage._studies[study_id].trials
    elif isinstance(storage, GrpcStorageProxy):
        with storage._cache.lock:
            storage._cache._read_trials_from_remote_storage(study_id)
        trials = storage._cache.studies[study_id].trials
    elif isinstance(storage, InMemoryStorage):
        trials = storage._studies[study_id].trials
    else:
        trials = storage.get_all_trials(study_id, deepcopy=False)
    if isinstance(trials, dict):  # by number
        new: Iterable[int] = itertools.takewhile(trials.__contains__, itertools.count(known))
    else:
        new = range(known, len(trials))
    return [trials[number] for number in (*unfinished, *new)]


def of_jobs(study: Study, pruner: BasePruner) -> Study:
    """A study as its jobs use it: their trials can report and be pruned, but do not touch the study's sampler."""
    return Study(study.study_name, study._storage, optuna.samplers.RandomSampler(), pruner)


def running_trial(study: Study, number: int) -> Trial:
    """A running trial, opened in its job."""
    return Trial(study, _trial_id(study, number))


class PartOfStudy(Study):
    """A study as a sampler sees it that is shown only some of its trials, in order of their numbers."""

    def __init__(self, study: Study, trials: Sequence[FrozenTrial]):
        self.__dict__ |= study.__dict__
        self.trials_shown = trials

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,  # noqa: ARG002 - Optuna's signature
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self.trials_shown if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials


class _TrialsShown:
    """A storage that shows these trials, with what is written through it since."""

    def __init__(self, storage: BaseStorage):
        self.storage = storage
        self.trials: Sequence[FrozenTrial] = ()  # by number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.storage, name)

    def get_all_trials(
        self, _study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self.trials if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.storage.set_trial_system_attr(trial_id, key, value)
        for trial in reversed(self.trials):
            if trial._trial_id == trial_id:
                trial.system_attrs[key] = value
                return


class StudyView:
    """A study as its pruner sees it: the trials that were shown last, with the values added since."""

    def __init__(self, study: Study, pruner: BasePruner):
        self.storage = _TrialsShown(study._storage)
        self.study = Study(study.study_name, self.storage, optuna.samplers.RandomSampler(), pruner)  # type: ignore[arg-type]

    def show(self, trials: Sequence[FrozenTrial]) -> None:
        """Show all trials of the study."""
        self.storage.trials = trials

    def add(self, number: int, value: float, step: int) -> bool:
        """Add a value that a running trial has reported. False for a trial that was not shown."""
        if number >= len(self.storage.trials):
            return False
        self.storage.trials[number].intermediate_values.setdefault(step, value)
        return True

    def should_prune(self, number: int) -> bool:
        """What the pruner says, as Trial.should_prune."""
        return self.study.pruner.prune(self.study, self.storage.trials[number])


def is_database(storage: BaseStorage) -> bool:
    """Whether several attributes of a trial can be set in one transaction."""
    return isinstance(storage, _CachedStorage)


def set_attributes(storage: BaseStorage, trial_id: int, user: Mapping[str, Any], system: Mapping[str, Any]) -> None:
    """Set several attributes of a trial, in this order. In a database that is one transaction."""
    if isinstance(storage, _CachedStorage):  # is_database, for mypy
        database = storage._backend
        with _create_scoped_session(database.scoped_session, True) as session:
            TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)  # nobody ends it meanwhile
            for model, attributes in ((TrialUserAttributeModel, user), (TrialSystemAttributeModel, system)):
                for key, value in attributes.items():
                    database._set_trial_attr_without_commit(session, model, trial_id, key, value)
        return
    for key, value in user.items():
        storage.set_trial_user_attr(trial_id, key, value)
    for key, value in system.items():
        storage.set_trial_system_attr(trial_id, key, value)


def set_system_attr(study: Study, trial: Trial | FrozenTrial, key: str, value: Any) -> None:
    """Set an attribute that dashboards and tables of trials don't show."""
    study._storage.set_trial_system_attr(trial._trial_id, key, value)


def ask(study: Study, attributes: dict[str, Any], queue: Iterable[FrozenTrial]) -> Trial:
    """Study.ask, with system attributes that the trial has from its first moment on.

    queue: the trials that waited at the last look at the study.
    """
    storage = study._storage
    study._thread_local.cached_all_trials = None
    for waiting in queue:
        if trial := claim(study, waiting, attributes):
            return trial
    template = create_trial(state=TrialState.RUNNING, system_attrs=attributes)
    return Trial(study, storage.create_new_trial(study._study_id, template))


def claim(study: Study, waiting: FrozenTrial, attributes: dict[str, Any]) -> Trial | None:
    """Start a waiting trial, which has these system attributes before it runs. None: another program was faster."""
    storage = study._storage
    try:
        for key, value in attributes.items():
            storage.set_trial_system_attr(waiting._trial_id, key, value)
        if not storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
            return None
    except UpdateFinishedTrialError:
        return None
    trial = Trial(study, waiting._trial_id)
    for key, value in attributes.items():
        if trial._cached_frozen_trial.system_attrs.get(key) != value:  # another one came too late, but set its own
            storage.set_trial_system_attr(waiting._trial_id, key, value)
    return trial


def id_of(trial: Trial | FrozenTrial) -> int:
    """The number of a trial in its storage."""
    return trial._trial_id


def tell(study: Study, number: int, values: Sequence[float] | None, state: TrialState) -> bool:
    """Study.tell, outside of Study.optimize. Returns whether the sampler called Study.stop: it has no more points."""
    loop = study._thread_local
    loop.in_optimize_loop = True  # Study.stop raises RuntimeError without it
    try:
        _tell_with_warning(study, number, values, state, skip_if_finished=True)  # Study.tell reads the trial once more
    finally:
        loop.in_optimize_loop = False
    return study._stop_flag


def cached(storage: BaseStorage) -> BaseStorage:
    """A database behind Optuna's cache of finished trials; other storages as they are."""
    return _CachedStorage(storage) if isinstance(storage, RDBStorage) else storage
