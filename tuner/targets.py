"""Which `_target_`s a config may name."""

import os

# TUNER_TRUST adds more, such as "mypackage.*".
TRUSTED = ("tuner.*", "torch.optim.*", *filter(None, os.environ.get("TUNER_TRUST", "").split(",")))
