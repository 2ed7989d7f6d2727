"""The Optuna sweeper for Hydra: pruned, asynchronous, resumable. Light to import: Hydra does it on every run."""

MARK = "TUNER_SWEEP"  # in the environment of every process that a sweep starts
