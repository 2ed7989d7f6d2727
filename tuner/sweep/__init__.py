"""The Optuna sweeper for Hydra: pruned, asynchronous, resumable. It imports nothing: Hydra loads it on each run."""

MARK = "TUNER_SWEEP"  # in the environment of every process that a sweep starts
WORKER = "TUNER_WORKER"  # in the environment of a search that another one, or tuner.worker, has started
