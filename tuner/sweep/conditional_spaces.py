"""Search spaces in which a parameter depends on another one, for `hydra.sweeper.custom_search_space`."""

import re

from omegaconf import DictConfig
from optuna.trial import Trial

from tuner import InputError

LR = {"adamw": (1e-4, 1e-2), "adam": (1e-4, 1e-2), "sgd": (1e-3, 1e-1)}
WEIGHT_DECAY = {"adamw": (1e-4, 1e-1), "adam": (1e-6, 1e-3), "sgd": (1e-6, 1e-3)}


def wide(_cfg: DictConfig, trial: Trial) -> None:
    """The parameters of hparams_search=optuna_wide that depend on the optimizer, image size, last block and depth."""
    optimizer = trial.params["optimizer"]
    trial.suggest_float("optimizer.lr", *LR[optimizer], log=True)
    trial.suggest_float("optimizer.weight_decay", *WEIGHT_DECAY[optimizer], log=True)
    pareto(_cfg, trial)
    if trial.params["model.head.depth"] > 0:
        trial.suggest_categorical("model.head.width", [256, 512, 1024])
        trial.suggest_float("model.head.dropout", 0.1, 0.6)


def pareto(_cfg: DictConfig, trial: Trial) -> None:
    """The pool of hparams_search=optuna_pareto: at most the side of the feature map, which each block of VGG halves."""
    last_block = trial.params["model.last_block"]
    block = re.fullmatch(r"block(\d)", last_block)
    if block is None:
        raise InputError(f"this search is for VGG: model.last_block must be block1 to block5, not {last_block}")
    side = trial.params["model.image_size"] // 2 ** int(block[1])
    trial.suggest_int("model.pool", 1, min(4, side))
