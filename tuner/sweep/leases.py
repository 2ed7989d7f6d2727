"""Leases: whoever runs a trial renews its lease, and a trial whose lease is not renewed any more is lost.

A lease is an attribute of the trial that changes with each renewal. The clocks of two machines may differ, so nobody
compares times: a watcher counts the seconds for which it has seen the same lease, by its own clock.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from tuner.sweep.optuna_private import set_system_attr

log = logging.getLogger("tuner.sweep")
LEASE = "lease"  # system attribute of a trial
RENEWAL = 20.0  # seconds between two renewals
EXPIRY = 120.0  # seconds without one, after which a trial is lost


def new_lease() -> float:
    """A value that no earlier lease had."""
    return time.time()


@dataclass
class Renewals:
    """Renews the leases of this process's trials, in a thread.

    owner: system attributes that are set again with each lease. A sweep of another machine that came too late to start
        a waiting trial may have left its own.
    """

    study: Study
    owner: Mapping[str, Any] = field(default_factory=dict)
    held: dict[int, Trial | FrozenTrial] = field(default_factory=dict)  # by number
    ended: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    failed: bool = False  # whether the last renewal did

    def hold(self, trial: Trial | FrozenTrial) -> None:
        """Renew the lease of a trial from now on."""
        self.held[trial.number] = trial
        if self.thread is None:
            self.thread = threading.Thread(target=self._renew_all, name="leases", daemon=True)
            self.thread.start()

    def drop(self, number: int) -> None:
        """Renew the lease of a trial no more."""
        self.held.pop(number, None)

    def end(self) -> None:
        """Renew nothing any more. Returns at once, even while the storage does not answer."""
        self.ended.set()

    def _renew_all(self) -> None:
        while not self.ended.wait(RENEWAL):
            for number, trial in sorted(self.held.items()):
                self._renew(number, trial)

    def _renew(self, number: int, trial: Trial | FrozenTrial) -> None:
        try:
            for key, value in {**self.owner, LEASE: new_lease()}.items():
                set_system_attr(self.study, trial, key, value)
            self.failed = False
        except UpdateFinishedTrialError:  # it has ended, or was taken for lost: its job is told when it ends
            self.drop(number)
        except Exception as error:  # noqa: BLE001 - whatever the storage raises; the trial itself goes on
            if not (self.failed or self.ended.is_set()):
                log.warning("the lease of trial %d cannot be renewed: %s", number, error)
            self.failed = True


@dataclass
class Watch:
    """Which leases of other sweeps have expired."""

    seen: dict[int, tuple[Any, float, float]] = field(default_factory=dict)  # lease, seconds unchanged, last look

    def has_expired(self, number: int, lease: Any) -> bool:
        """Whether a trial has had the same lease for EXPIRY seconds. Only the time between two looks counts.

        Of a long time without a look, RENEWAL seconds count: the storage may have been away, and nobody could renew.
        """
        now = time.monotonic()
        before, unchanged, look = self.seen.get(number, (None, 0.0, now))
        unchanged = unchanged + min(now - look, RENEWAL) if before == lease else 0.0
        self.seen[number] = (lease, unchanged, now)
        return unchanged >= EXPIRY
