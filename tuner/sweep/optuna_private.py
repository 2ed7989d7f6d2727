"""All uses of Optuna's private names, which may change with any release.

Each function has a contract test in tests/sweep/test_optuna_private.py. None has a public equivalent, except for one
that reads all trials of the study.
"""

import copy
from collections.abc import Callable, Container, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage, RDBStorage, _CachedStorage
from optuna.storages._rdb.models import BaseModel
from optuna.storages.journal._file import BaseJournalFileLock as BaseJournalFileLock
from optuna.storages.journal._storage import JournalOperation
from optuna.study import Study
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


def trial_view(study: Study, number: int, pruner: BasePruner) -> Trial:
    """A running trial, opened in its job: it can report and be pruned, but does not touch the study's sampler."""
    view = Study(study.study_name, study._storage, optuna.samplers.RandomSampler(), pruner)
    return Trial(view, _trial_id(study, number))


class _TrialsRead:
    """A storage whose trials are those of the last read(), with what is written to it since."""

    def __init__(self, storage: BaseStorage):
        self.storage = storage
        self.trials: dict[int, FrozenTrial] = {}  # by their number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.storage, name)

    def read(self, study_id: int) -> None:
        trials = self.storage.get_all_trials(study_id, deepcopy=False)
        self.trials = {trial.number: trial for trial in trials}

    def get_all_trials(
        self, _study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self.trials.values() if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.storage.set_trial_system_attr(trial_id, key, value)
        for trial in self.trials.values():
            if trial._trial_id == trial_id:
                trial.system_attrs[key] = value


class StudyView:
    """A study as its pruner sees it: the trials of the last read(), with the values added since."""

    def __init__(self, study: Study, pruner: BasePruner):
        self.storage = _TrialsRead(study._storage)
        self.study = Study(study.study_name, self.storage, optuna.samplers.RandomSampler(), pruner)  # type: ignore[arg-type]

    def read(self) -> None:
        """Read all trials."""
        self.storage.read(self.study._study_id)

    def add(self, number: int, value: float, step: int) -> bool:
        """Add a value that a running trial has reported. False for a trial that was not there at the last read()."""
        trial = self.storage.trials.get(number)
        if trial is None:
            return False
        trial.intermediate_values.setdefault(step, value)
        return True

    def should_prune(self, number: int) -> bool:
        """What the pruner says, as Trial.should_prune."""
        return self.study.pruner.prune(self.study, self.storage.trials[number])


def set_user_attr(study: Study, trial: Trial | FrozenTrial, key: str, value: Any) -> None:
    """Trial.set_user_attr, also for a frozen trial."""
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def set_system_attr(study: Study, trial: Trial | FrozenTrial, key: str, value: Any) -> None:
    """Set an attribute that dashboards and tables of trials don't show."""
    study._storage.set_trial_system_attr(trial._trial_id, key, value)


def ask(study: Study, attributes: dict[str, Any]) -> Trial:
    """Study.ask, with system attributes that the trial has from its first moment on."""
    storage = study._storage
    study._thread_local.cached_all_trials = None
    for waiting in storage.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.WAITING,)):
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
    for key, value in attributes.items():  # another one may have set its own before it came too late
        storage.set_trial_system_attr(waiting._trial_id, key, value)
    return Trial(study, waiting._trial_id)


def id_of(trial: FrozenTrial) -> int:
    """The number of a trial in its storage."""
    return trial._trial_id


def tell(study: Study, number: int, values: Sequence[float] | None, state: TrialState) -> bool:
    """Study.tell, outside of Study.optimize. Returns whether the sampler called Study.stop: it has no more points."""
    loop = study._thread_local
    loop.in_optimize_loop = True  # Study.stop raises RuntimeError without it
    try:
        study.tell(number, values=values, state=state, skip_if_finished=True)
    finally:
        loop.in_optimize_loop = False
    return study._stop_flag


def cached(storage: BaseStorage) -> BaseStorage:
    """A database behind Optuna's cache of finished trials; other storages as they are."""
    return _CachedStorage(storage) if isinstance(storage, RDBStorage) else storage
