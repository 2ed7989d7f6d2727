"""Search spaces in which a parameter depends on another one, for `hydra.sweeper.custom_search_space`.

A parameter that the command line fixes, or searches in another range, is left to it.
"""

import functools
import math
import re
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf
from optuna.trial import Trial

from tuner import InputError
from tuner.networks.backbone import Backbone
from tuner.sweep.optuna_private import fix

LR = {"adamw": (1e-4, 1e-2), "adam": (1e-4, 1e-2), "sgd": (1e-3, 1e-1)}
WEIGHT_DECAY = {"adamw": (1e-4, 1e-1), "adam": (1e-6, 1e-3), "sgd": (1e-6, 1e-3)}
BLOCKS = {  # model -> last blocks that are searched; no two networks have one of the same name
    "vgg16": ("block2", "block3", "block4", "block5", "[block3,block4]", "[block4,block5]"),
    "efficientnet_lite0": (
        *("features.3", "features.5", "features.8", "[features.3,features.5]", "[features.5,features.8]"),
    ),
}
NETWORK_OF = {block: network for network, blocks in BLOCKS.items() for block in blocks}
SMALLEST, LARGEST, STEP = 64, 224, 32  # model.image_size: the networks halve the map five times
MOST_MACS = 5.5e9  # multiply-adds per image: seven times those of the default cut
MOST_FEATURES = 8192


class Cut(NamedTuple):
    """What a network computes up to a block, for one image. side: of the map at the last block, in pixels."""

    channels: int
    side: int
    macs: int


def wide(cfg: DictConfig, trial: Trial) -> None:
    """The parameters of hparams_search=optuna_wide that depend on the optimizer, image size, last block and depth."""
    optimizer = _value(cfg, trial, "optimizer")
    for name, ranges in (("optimizer.lr", LR), ("optimizer.weight_decay", WEIGHT_DECAY)):
        if not _is_given(trial, name):
            if optimizer not in ranges:
                raise InputError(f"this search has no range of {name} for optimizer={optimizer}: give it yourself")
            trial.suggest_float(name, *ranges[optimizer], log=True)
    pareto(cfg, trial)
    _head(cfg, trial)


def model(cfg: DictConfig, trial: Trial) -> None:
    """The network, cut and head of hparams_search=optuna_model.

    Drawn are the last block, then what fits it: an image size at which the block costs at most MOST_MACS (a larger one
    is up to the command line), and a pool that gives at most MOST_FEATURES. The network follows from the block, so
    both are one choice to the sampler.
    """
    if "model" in trial.params:
        raise InputError(
            "this search draws model with model.last_block: fix model, or give blocks as in "
            "'model.last_block=choice(block3,features.8)'"
        )
    is_fixed = _is_given(trial, "model")
    if not _is_given(trial, "model.last_block"):
        network = _network(cfg, trial)
        if is_fixed and network not in BLOCKS:
            raise InputError(f"this search knows no blocks of {network}: give model.last_block yourself")
        trial.suggest_categorical("model.last_block", BLOCKS[network] if is_fixed else list(NETWORK_OF))
    last_block = _value(cfg, trial, "model.last_block")
    if not is_fixed and last_block in NETWORK_OF:
        fix(trial, "model", NETWORK_OF[last_block])
        trial.suggest_categorical("model", list(BLOCKS))
    network = _network(cfg, trial)
    if not _is_given(trial, "model.image_size"):
        trial.suggest_int("model.image_size", SMALLEST, largest_size(network, last_block), step=STEP)
    if not _is_given(trial, "model.pool"):
        at = cut(network, last_block, _value(cfg, trial, "model.image_size"))
        trial.suggest_int("model.pool", 1, min(4, at.side, math.isqrt(MOST_FEATURES // at.channels)))
    _head(cfg, trial)


@functools.cache
def cut(network: str, last_block: str, image_size: int) -> Cut:
    """A network's cut. Raises InputError for an unknown network or block, and for images that are too small.

    last_block: a block, or a list of them in brackets.
    """
    blocks = last_block.strip("[]").split(",")
    options: dict[str, Any] = {"weights": None, "last_block": blocks, "frozen": blocks, "pool": 1}
    backbone = Backbone(network, image_size=image_size, **options)
    last = backbone.blocks[backbone.last_block]
    side = min(last.shape[:-1] if last.channels_last else last.shape[1:]) if len(last.shape) == 3 else 1
    return Cut(backbone.feature_size, side, backbone.macs())


def largest_size(network: str, last_block: str) -> int:
    """The largest image size of the search at which a block costs at most MOST_MACS. Costs grow with the area."""
    affordable = SMALLEST * math.sqrt(MOST_MACS / cut(network, last_block, SMALLEST).macs)
    return int(min(LARGEST, max(SMALLEST, affordable // STEP * STEP)))


def _network(cfg: DictConfig, trial: Trial) -> str:
    """The network's name. An option of the group `model` that a search draws has the name of its network."""
    option = _value(cfg, trial, "model")
    return str(option if option in BLOCKS else cfg.model.name)


def _head(cfg: DictConfig, trial: Trial) -> None:
    """The width and dropout of hidden layers, if there are any."""
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
    value = {**trial.user_attrs, **trial.params}.get(name, default)
    if isinstance(value, list | ListConfig):  # as the search writes its own choices
        return f"[{','.join(map(str, value))}]"
    return value
