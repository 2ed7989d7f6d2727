"""From a config to what it names: its values checked, its parts built, its device and precision chosen."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from tuner import InputError, earlier
from tuner.targets import TRUSTED

log = logging.getLogger("tuner.config")
HERE = Path(__file__).resolve().parent
CONF = next(folder for folder in (HERE / "conf", HERE.parent / "conf") if folder.is_dir())  # installed, or a checkout
PATHS = (("model", "weights"), ("data", "root"), ("data", "path"), ("data", "test_path"))  # that may be relative
OURS = {  # keys of a group that are not for what its _target_ makes
    "data": ("views", "test_views"),
    "optimizer": ("backbone_lr_scale", "backbone_lr_decay"),
}


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("seed", _whole(0), "a whole number of at least 0"),
    ("epochs", _whole(1), "a whole number of at least 1"),
    ("batch_size", _whole(1), "a whole number of at least 1"),
    ("label_smoothing", lambda v: _number(v) and 0 <= v < 1, "at least 0 and less than 1"),
    ("grad_clip", lambda v: v is None or (_number(v) and v > 0), "more than 0, or null"),
    ("patience", lambda v: v is None or _whole(1)(v), "a whole number of at least 1, or null"),
    ("keep", lambda v: v in ("last", "best"), "last or best"),
    ("class_weights", lambda v: v in (None, "balanced"), "balanced, or null"),
    ("head_first", _whole(0), "a whole number of at least 0"),
    ("micro_batch", lambda v: v is None or _whole(1)(v), "a whole number of at least 1, or null"),
    ("recompute", lambda v: v in (True, False), "true or false"),
    ("data.views", _whole(1), "a whole number of at least 1"),
    ("data.test_views", lambda v: v in (1, 2), "1, or 2 for the mirror image, too"),
    ("optimizer.backbone_lr_scale", lambda v: _number(v) and v > 0, "a number of more than 0"),
    ("optimizer.backbone_lr_decay", lambda v: _number(v) and 0 < v <= 1, "more than 0 and at most 1"),
    ("optimizer.lr", lambda v: _number(v) and v > 0, "a number of more than 0"),
    ("optimizer.weight_decay", lambda v: v is None or (_number(v) and v >= 0), "a number of at least 0"),
    ("precision", lambda v: v in ("auto", "bf16", "fp32"), "auto, bf16 or fp32"),
    (
        "objective",
        lambda v: v in ("accuracy", "balanced_accuracy", "accuracy_and_cost"),
        "accuracy, balanced_accuracy or accuracy_and_cost",
    ),
    ("final.seeds", _whole(0), "a whole number of at least 0"),
    ("final.temperature", lambda v: v is None or (_number(v) and v > 0), "more than 0, or null"),
    ("final.epochs", lambda v: v is None or _whole(1)(v), "a whole number of at least 1, or null"),
    ("test", lambda v: v in ("auto", True, False), "auto, true or false"),
    ("plots", lambda v: v in ("auto", True, False), "auto, true or false"),
)


def anchor(cfg: DictConfig, started: Path) -> None:
    """Make relative paths absolute that are there, seen from where the run was started."""
    written: Any = OmegaConf.to_container(cfg, resolve=False)
    for group, key in PATHS:
        value = written.get(group, {}).get(key)
        if isinstance(value, str) and (path := started / value).exists():
            cfg[group][key] = str(path)


def check(cfg: DictConfig) -> None:
    """Raises InputError for the first value of the config that is missing or out of range."""
    earlier.refuse_old_names(
        f"{group}.{key}" for group in map(str, cfg) if OmegaConf.is_dict(cfg[group]) for key in map(str, cfg[group])
    )
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise InputError(f"{key} has no default; give it, as in {key}=VALUE")
    for key, holds, rule in RULES:
        value = OmegaConf.select(cfg, key)
        if not holds(value):
            raise InputError(f"{key}={value} must be {rule}")
    if cfg.patience is not None and cfg.keep == "last":
        raise InputError(
            f"patience={cfg.patience} ends a run after its best epoch, so it needs keep=best, not keep=last"
        )
    if cfg.model.frozen == cfg.model.last_block and (cfg.head_first or cfg.recompute):
        given = f"head_first={cfg.head_first}" if cfg.head_first else "recompute=true"
        raise InputError(f"{given} is for blocks that are trained: set model.frozen below model.last_block")
    if cfg.final.epochs is not None and not (cfg.final.epochs <= cfg.epochs and cfg.final.seeds):
        raise InputError(
            f"final.epochs={cfg.final.epochs} must be at most epochs={cfg.epochs}, "
            f"and final.seeds={cfg.final.seeds} at least 1"
        )


def cache_dir(cfg: DictConfig) -> Path:
    return Path(cfg.cache_dir).expanduser()


def wanted(choice: bool | str, in_sweep: bool) -> bool:
    return not in_sweep if choice == "auto" else bool(choice)


def build(group: str, cfg: DictConfig) -> Any:
    """What the `_target_` of a config group makes. Raises InputError for a target or a keyword that it can't take."""
    if group not in cfg:
        raise InputError(f"the config has no group {group}")
    given: dict[str, Any] = OmegaConf.to_container(cfg[group], resolve=True)  # type: ignore[assignment]
    given = {key: value for key, value in given.items() if key not in OURS.get(group, ())}
    if "_target_" in given:
        given["_target_"] = earlier.target(str(given["_target_"]))
    with called(group):
        try:
            return hydra.utils.instantiate(given, _convert_="all", _execution_whitelist_=TRUSTED)
        except InstantiationException as error:
            hint = "; name packages you trust in TUNER_TRUST, as in TUNER_TRUST='mypackage.*'"
            reason = " ".join(str(error).split())
            raise InputError(reason + (hint if "whitelist" in reason else "")) from error


@contextmanager
def called(group: str) -> Iterator[None]:
    """Python's and torch's complaints about the arguments that a config group gives, as InputErrors."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{group}: {str(error).splitlines()[0]}") from error


def config_options(hydra: Mapping[str, Any]) -> list[str]:
    """What Hydra was told beside overrides, from a run's .hydra/hydra.yaml: --config-dir and --config-name."""
    folders = [s["path"] for s in hydra["runtime"]["config_sources"] if s["provider"] == "command-line"]
    name = hydra["job"]["config_name"]
    options = [text for path in folders for text in ("--config-dir", path)]
    return options + ([] if name in ("train", None) else ["--config-name", name])
