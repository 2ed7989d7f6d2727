"""Results that come after their trial was taken for lost: they are used unless it has been started again."""

import logging
from collections.abc import Mapping
from typing import Any

from optuna.trial import Trial, TrialState

from tuner.sweep import sampling
from tuner.sweep.budget import OWNER
from tuner.sweep.leases import LEASE, new_lease
from tuner.sweep.optuna_private import RETRY_HISTORY, claim, frozen_trial, tell
from tuner.sweep.outcome import Outcome, set_outcome

log = logging.getLogger("tuner.sweep")


def hand_over(trial: Trial, outcome: Outcome, attributes: Mapping[str, Any]) -> None:
    """Give the outcome of a trial that was taken for lost to its copy, which then is not run.

    attributes: user attributes of the trial that its study lacks. Logs what becomes of the outcome.
    """
    study, number = trial.study, trial.number
    lost = frozen_trial(study, number)
    for waiting in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        if waiting.system_attrs.get(RETRY_HISTORY, [None])[-1] != number:
            continue
        copy = claim(study, waiting, {OWNER: lost.system_attrs.get(OWNER), LEASE: new_lease()})
        if copy is None:
            break
        for name, distribution in lost.distributions.items():
            sampling.suggest(copy, name, distribution)  # the value is given
        for step, value in lost.intermediate_values.items():
            copy.report(value, step)
        own = {key: lost.user_attrs[key] for key in ("output_dir", "host") if key in lost.user_attrs}
        for key, value in (own | dict(attributes)).items():
            copy.set_user_attr(key, value)
        set_outcome(copy, outcome)
        tell(study, copy.number, outcome.values, outcome.trial_state)
        log.warning("trial %d was taken for lost, but has ended: trial %d gets its result", number, copy.number)
        return
    log.warning("trial %d was taken for lost, and its result comes too late: it is not used", number)
