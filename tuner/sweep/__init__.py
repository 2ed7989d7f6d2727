"""The Optuna sweeper for Hydra: pruned, asynchronous, resumable. It imports little: Hydra loads it on each run.

`tuner.sweep(...)` runs a search: see `tuner.calls.sweep`.
"""

import sys

from tuner import CallableModule

MARK = "TUNER_SWEEP"  # in the environment of every process that a sweep starts
WORKER = "TUNER_WORKER"  # in the environment of a search that another one, or tuner.worker, has started
sys.modules[__name__].__class__ = CallableModule
