"""What earlier versions wrote, in today's names. Nothing else knows that names have changed."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tuner import InputError

TARGETS = {  # the first part of a `_target_`
    "tuner.fit.": "tuner.training.schedules.",
    "tuner.augment.": "tuner.data.augmentation.",
    "tuner.trackers.": "tuner.runs.trackers.",
    "tuner.sweep.spaces.": "tuner.sweep.conditional_spaces.",  # as hydra.sweeper.custom_search_space
}
KEYS = {"model.features": "model.last_block"}
FITTED = {"epoch": "saved_epoch", "best": "best_value"}


def config_file(folder: Path) -> Path | None:
    """The config of a run: conf/config.yaml, or what Hydra wrote for an earlier version. None if there is neither."""
    names = ("conf/config.yaml", ".hydra/config.yaml")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def target(name: str) -> str:
    """Today's name of a `_target_`."""
    for old, new in TARGETS.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def key(name: str) -> str:
    """Today's name of a config key with dots."""
    return KEYS.get(name, name)


def rename_keys(config: Any) -> None:
    """Give the keys of a run's config their names of today, in place. config: as written, references not resolved."""
    for old, new in KEYS.items():
        group, _, name = old.partition(".")
        values = config.get(group) if isinstance(config, dict) else None
        if isinstance(values, dict) and name in values:
            renamed = new.partition(".")[2]
            values[renamed] = values.pop(name)
            _replace_references(values, f"${{.{name}}}", f"${{.{renamed}}}")
            _replace_references(config, f"${{{old}}}", f"${{{new}}}")


def _replace_references(values: dict[Any, Any], old: str, new: str) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _replace_references(value, old, new)
        elif value == old:
            values[key] = new


def fitted(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of tuner.training.spec.Fitted, as a checkpoint has them."""
    return {FITTED.get(name, name): value for name, value in values.items()}


def override(line: str) -> str:
    """An override of the command line, such as KEY=VALUE, with today's name of its key."""
    name, equals, value = line.partition("=")
    return f"{key(name)}{equals}{value}"


def refuse_old_names(names: Iterable[str]) -> None:
    """Raises InputError for the first name of a config key, or override, that is an earlier version's."""
    for name in names:
        old = name.lstrip("+~").partition("=")[0]
        if old in KEYS:
            raise InputError(f"{old} is now called {KEYS[old]}")
