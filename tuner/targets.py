"""Which `_target_`s a config may name, and what those of earlier versions are called today."""

import os

# TUNER_TRUST adds more, such as "mypackage.*".
TRUSTED = ("tuner.*", "torch.optim.*", *filter(None, os.environ.get("TUNER_TRUST", "").split(",")))
RENAMED = {
    "tuner.fit.": "tuner.training.schedules.",
    "tuner.augment.": "tuner.data.augmentation.",
    "tuner.trackers.": "tuner.runs.trackers.",
}


def current(target: str) -> str:
    """Today's name of a target that a config of an earlier version names."""
    for old, new in RENAMED.items():
        if target.startswith(old):
            return new + target.removeprefix(old)
    return target
