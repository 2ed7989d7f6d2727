"""Search spaces in which a parameter depends on another one, for `hydra.sweeper.custom_search_space`.

A parameter that the command line fixes, or searches in another range, is left to it.
"""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf
from optuna.trial import Trial

from tuner import InputError

LR = {"adamw": (1e-4, 1e-2), "adam": (1e-4, 1e-2), "sgd": (1e-3, 1e-1)}
WEIGHT_DECAY = {"adamw": (1e-4, 1e-1), "adam": (1e-6, 1e-3), "sgd": (1e-6, 1e-3)}


def wide(cfg: DictConfig, trial: Trial) -> None:
    """The parameters of hparams_search=optuna_wide that depend on the optimizer, image size, last block and depth."""
    optimizer = _value(cfg, trial, "optimizer")
    for name, ranges in (("optimizer.lr", LR), ("optimizer.weight_decay", WEIGHT_DECAY)):
        if not _is_given(trial, name):
            if optimizer not in ranges:
                raise InputError(f"this search has no range of {name} for optimizer={optimizer}: give it yourself")
            trial.suggest_float(name, *ranges[optimizer], log=True)
    pareto(cfg, trial)
    if _value(cfg, trial, "model.head.depth") > 0:
        if not _is_given(trial, "model.head.width"):
            trial.suggest_categorical("model.head.width", [256, 512, 1024])
        if not _is_given(trial, "model.head.dropout"):
            trial.suggest_float("model.head.dropout", 0.1, 0.6)


def pareto(cfg: DictConfig, trial: Trial) -> None:
    """The pool of hparams_search=optuna_pareto: at most the side of the feature map, which each block of VGG halves."""
    if _is_given(trial, "model.pool"):
        return
    last_block = _value(cfg, trial, "model.last_block")
    block = re.fullmatch(r"block(\d)", last_block)
    if block is None:
        raise InputError(f"this search is for VGG: model.last_block must be block1 to block5, not {last_block}")
    side = _value(cfg, trial, "model.image_size") // 2 ** int(block[1])
    trial.suggest_int("model.pool", 1, min(4, side))


def _is_given(trial: Trial, name: str) -> bool:
    """Whether a parameter was drawn already, or is fixed."""
    return name in trial.params or name in trial.user_attrs


def _value(cfg: DictConfig, trial: Trial, name: str) -> Any:
    """A parameter that was drawn or fixed, or else the config's own value or choice."""
    chosen = OmegaConf.select(cfg, "hydra.runtime.choices") or {}
    default = chosen[name] if name in chosen else OmegaConf.select(cfg, name)
    return {**trial.user_attrs, **trial.params}.get(name, default)
