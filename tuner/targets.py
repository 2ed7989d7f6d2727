"""What a config's `_target_`s may name: an exact list for each group, and the packages in TUNER_TRUST.

A config may come with a run folder of somebody else. So nothing on these lists takes a callable, the path of a file
to overwrite, or a list of further targets; and each takes its arguments as data.

- DATA reads images and labels, and writes only into caches: files named after the hash of what they hold, images of an
  archive below such a name, and for fashion_mnist the four files of that data set, whose checksums are known.
- OPTIMIZERS, SCHEDULERS and AUGMENTATION compute with numbers.
- LOGGERS send a run's numbers to a tracker: a config decides to which server, but not what is sent.
- SAMPLERS and PRUNERS of Optuna, and SEARCH_SPACES, choose parameters.
"""

import os
from fnmatch import fnmatchcase

DATA = tuple(
    f"tuner.data.{module}.load"
    for module in ("csv_file", "fashion_mnist", "fmnist_small", "huggingface", "image_folder", "synthetic")
)
# of torch.optim, those that take a gradient for each parameter: not LBFGS, SparseAdam and Muon
OPTIMIZERS = tuple(
    f"torch.optim.{name}"
    for name in (
        *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW"),
        *("Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
    )
)
SCHEDULERS = tuple(f"tuner.training.schedules.{name}" for name in ("constant", "cosine", "onecycle"))
AUGMENTATION = ("tuner.data.augmentation.Augment",)
LOGGERS = tuple(f"tuner.runs.trackers.{name}" for name in ("MLflow", "TensorBoard", "WandB"))
GROUPS = {
    "data": DATA,
    "optimizer": OPTIMIZERS,
    "scheduler": SCHEDULERS,
    "loss": (),  # the cross-entropy needs no target
    "augment": AUGMENTATION,
    "logger": LOGGERS,
}
SAMPLERS = (
    "hydra_plugins.hydra_optuna_sweeper._impl.create_nsgaii_sampler",
    "hydra_plugins.hydra_optuna_sweeper._impl.create_nsgaiii_sampler",
    "hydra_plugins.hydra_optuna_sweeper.config.raise_motpe_removed",
    *(
        f"optuna.samplers.{name}"
        for name in (
            *("BruteForceSampler", "CmaEsSampler", "GPSampler", "GridSampler", "NSGAIIISampler", "NSGAIISampler"),
            *("QMCSampler", "RandomSampler", "TPESampler"),
        )
    ),
    *(
        f"optuna.samplers.nsgaii.{name}"
        for name in (
            *("BLXAlphaCrossover", "SBXCrossover", "SPXCrossover", "UNDXCrossover", "UniformCrossover"),
            *("VSBXCrossover", "PolynomialMutation"),
        )
    ),
)
PRUNERS = tuple(
    f"optuna.pruners.{name}Pruner"
    for name in (
        *("Hyperband", "Median", "Nop", "Patient", "Percentile"),
        *("SuccessiveHalving", "Threshold", "Wilcoxon"),
    )
)
SEARCH_SPACES = tuple(f"tuner.sweep.conditional_spaces.{name}" for name in ("model", "pareto", "wide"))


def by_user() -> tuple[str, ...]:
    """What TUNER_TRUST in the environment adds for every group, such as `mypackage.*`."""
    return tuple(filter(None, (name.strip() for name in os.environ.get("TUNER_TRUST", "").split(","))))


def is_trusted(name: str) -> bool:
    """Whether TUNER_TRUST names a function or class, such as mypackage.networks.Net."""
    return any(fnmatchcase(name, pattern) for pattern in by_user())


def of_group(group: str) -> tuple[str, ...]:
    """What the `_target_` of a config group may name."""
    return GROUPS[group] + by_user()


def of_hydra() -> tuple[str, ...]:
    """What Hydra may call on its own: search spaces, tuner's log lines, and what only the user can add."""
    of_train = ("tuner.safe_text.Formatter", "tuner.terminal.Console", "tuner.sweep.summary.Summary")
    return (*SEARCH_SPACES, *of_train, *by_user())
