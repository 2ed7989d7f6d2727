"""What a job knows of its trial, and the stages of its task function."""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import optuna
from omegaconf import DictConfig
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial, TrialState

from tuner.sweep import settings
from tuner.sweep.outcome import Outcome, set_outcome
from tuner.sweep.pruning import Pruning
from tuner.sweep.stopping import ENDED_BY, TIMEOUT, StopRules
from tuner.sweep.storage_files import StorageLostError

if TYPE_CHECKING:
    from tuner.runs.ensemble import Ensemble

log = logging.getLogger("tuner.sweep")
TrialPruned = optuna.TrialPruned
STARTUP = 5  # complete trials, before one is judged by the score of its cut


@dataclass(frozen=True)
class Shared:
    """What the trials of a study have in common.

    irrelevant: keys that do not affect the objective.   images: attribute -> hashes of the splits, those known so far.
    may_be_mixed: whether a trial with other images is marked instead of refused.   rules: may end a trial.
    """

    irrelevant: Sequence[str] = ()
    images: dict[str, dict[str, str]] = field(default_factory=dict)
    may_be_mixed: bool = False
    rules: StopRules = field(default_factory=StopRules)


class RunningTrial:
    """The trial that a job runs, or the best trial, in the job that retrains it.

    study: its name.   number: of the trial.   storage: a URL without a password, or None for a study in memory.
    shared: what the trials of the study have in common.   trial, pruning: None if it reports nothing.
    ensemble: what is retrained together with the best trial, if `final.ensemble` asks for it.
    """

    ensemble: "Ensemble | None" = None

    def __init__(
        self,
        study: str,
        number: int,
        storage: str | None,
        shared: Shared,
        trial: Trial | None = None,
        pruning: Pruning | None = None,
    ):
        self.study, self.number, self.storage, self.shared = study, number, storage, shared
        self.trial, self.pruning = trial, pruning
        self.lost = False  # whether the study could not be written once, or takes the trial for lost
        self.deadlines = self._deadlines()

    def check_images(self, data: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
        """Compare the images with those that the study's trials had; the first trial records them.

        data: the config of the data.   hashes: of its splits.
        Raises MixedStudyError if they are others, unless the study may be mixed: then the trial is marked.
        """
        key = settings.images_key(data, self.shared.irrelevant)
        known = self.shared.images
        if key not in known and self.trial:  # another process may have recorded them
            known |= {name: value for name, value in self.trial.study.user_attrs.items() if name == key}
        if key not in known and self.trial:
            self.trial.study.set_user_attr(key, dict(hashes))
        before = known.setdefault(key, dict(hashes))
        if before != hashes:
            splits = ", ".join(name for name in hashes if before.get(name) != hashes[name])
            if not (self.shared.may_be_mixed and self.trial):
                raise settings.MixedStudyError(
                    f"study {self.study} had other images ({splits}): restore them, or give another study=NAME, or "
                    "study_mixed=true: the new trials then count towards n_trials, and no result has them"
                )
            self._set(settings.MIXED, f"other images ({splits})")

    def chosen(self, config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any] | None:
        """What a trial of the study chose for these keys of `model`: config keys and values. None if none did.

        config: of the run, with `data` and `model`.
        """
        name = settings.choice_key(config, keys, self.shared.irrelevant)
        return self.trial.study.user_attrs.get(name) if self.trial else None

    def share_choice(self, config: Mapping[str, Any], keys: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
        """Give all trials of the study these config keys and values. Returns an earlier trial's, if there are any."""
        known = self.chosen(config, keys)
        if known is None and self.trial:
            self.trial.study.set_user_attr(settings.choice_key(config, keys, self.shared.irrelevant), dict(values))
        return known or dict(values)

    def screen(self, score: float) -> None:
        """Judge the trial by a score of its cut, before it is trained.

        Raises TrialPruned if STARTUP or more trials are complete and the score is below the median of theirs.
        """
        if self.trial is None:
            return
        complete = self.trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        scores = [trial.user_attrs[settings.SCORE] for trial in complete if settings.SCORE in trial.user_attrs]
        self._set(settings.SCORE, score)
        if len(scores) >= STARTUP and score < (median := statistics.median(scores)):
            self.prune(
                f"pruned before training: its cut scores {score:.3f}, below the median {median:.3f} of the trials"
            )

    def _set(self, key: str, value: Any) -> None:
        """Set a user attribute."""
        try:
            if self.trial:
                self.trial.set_user_attr(key, value)
        except UpdateFinishedTrialError:
            self._taken_for_lost()

    def _taken_for_lost(self) -> None:
        if not self.lost:
            text = "trial %d was taken for lost; it goes on, and its result is used unless it has been started again"
            log.warning(text, self.number)
        self.lost = True

    def _deadlines(self) -> dict[str, float]:
        """The rules that end a trial after a time -> when, by the monotonic clock."""
        if self.pruning is None:
            return {}
        rules, left = self.shared.rules, {}
        if rules.trial_timeout is not None:
            left["trial_timeout"] = rules.trial_timeout
        if rules.timeout is not None:
            left[TIMEOUT] = rules.left(self.pruning.history.look())
        return {rule: time.monotonic() + seconds for rule, seconds in left.items()}

    def report(self, value: float, step: int) -> None:
        """Report an intermediate value of the objective, once a step.

        Raises TrialPruned if the study's pruner or its time ends the trial. A study with several objectives is not
        pruned by its values.
        """
        if self.trial is None or self.pruning is None:
            return
        is_judged = len(self.trial.study.directions) == 1
        over = next((rule for rule, deadline in self.deadlines.items() if time.monotonic() > deadline), None)
        try:
            prune = is_judged and self.pruning.should_prune(self.trial, self.number, value, step)
            if over:
                self._set(ENDED_BY, over)
        except UpdateFinishedTrialError:
            self._taken_for_lost()
            prune = False
        except StorageLostError as error:
            if not self.lost:
                log.warning("trial %d goes on without being pruned: %s", self.number, error)
            self.lost = True
            return
        if over:
            self.prune(f"ended at step {step} by hydra.sweeper.{over}")
        if prune:
            self.prune(f"pruned at step {step} with {value:.6g}")

    def prune(self, reason: str) -> NoReturn:
        """End the trial. Raises TrialPruned."""
        with suppress(UpdateFinishedTrialError):  # then the end of the job deals with it
            if self.trial:
                set_outcome(self.trial, Outcome("PRUNED", reason=reason))  # a kill from here on does not run it again
        raise TrialPruned(reason)


# For report() alone: programs in which Hydra calls the task function with a config and nothing else.
running_in_job: ContextVar[RunningTrial | None] = ContextVar("running", default=None)


def report(value: float, step: int) -> None:
    """Report an intermediate value of the running trial from anywhere in its job. Outside a search: nothing.

    Raises TrialPruned if the study's pruner ends the trial.
    """
    if running := running_in_job.get():
        running.report(value, step)


@dataclass(frozen=True)
class Stages:
    """A task function in three stages, for launchers that train many jobs together.

    prepare: config, trial or None -> prepared; called in the job's Hydra context.
    fit_together: prepared jobs -> the index of each and its result, as soon as that is known; called once for many
        jobs, in no job's context. A job is finished before the next result is asked for.
    finish: prepared, and its result or the exception that ended it -> the objective; in the job's context.
    check: a config that jobs would get; raises InputError if none of them could run. Called before a search starts.
    """

    prepare: Callable[[DictConfig, RunningTrial | None], Any]
    fit_together: Callable[[Sequence[Any]], Iterator[tuple[int, Any]]]
    finish: Callable[[Any, Any], Any]
    check: Callable[[DictConfig], object] = lambda _cfg: None

    def run(self, cfg: DictConfig, trial: RunningTrial | None) -> Any:
        """One job, from start to end."""
        prepared = self.prepare(cfg, trial)
        try:
            [(_, fitted)] = self.fit_together([prepared])
        except BaseException as error:  # noqa: BLE001 - the last stage records it and raises it
            fitted = error
        return self.finish(prepared, fitted)


def stages_of(task: Any) -> Stages | None:
    """The stages of a task function, its attribute `stages`; None for one that runs in one piece."""
    return getattr(task, "stages", None)
