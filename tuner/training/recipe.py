"""From a config to how its head is trained: the plan, and the weights to begin with."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from tuner import InputError
from tuner.config import build, called
from tuner.runs import model_file
from tuner.runs.result import read_result
from tuner.training.heads import Head, widths
from tuner.training.parts import Parts
from tuner.training.spec import Metrics, OnEpoch, Plan, Schedule, State
from tuner.training.trainer import Trainer

log = logging.getLogger("tuner.training.recipe")


def hidden(cfg: DictConfig, seed: int) -> Head:
    """The head as the config has it."""
    head: dict[str, Any] = OmegaConf.to_container(cfg.model.head, resolve=True)  # type: ignore[assignment]
    return Head(widths(head["width"], head["depth"]), head["dropout"], seed)


def plan(
    cfg: DictConfig, made: Parts, seed: int, on_epoch: OnEpoch, train: torch.Tensor, val: torch.Tensor | None
) -> Plan:
    """How the config has its head trained, and the blocks below it; without `val` for final.epochs."""
    with called("optimizer"):
        optimizer = build("optimizer", cfg)
        optimizer([torch.zeros(1, requires_grad=True)])  # complains here, not where others are trained with it
    with called("scheduler"):
        schedule: Schedule = build("scheduler", cfg)
        schedule(0.0)
    names = ("epochs", "batch_size", "label_smoothing", "grad_clip", "keep", "patience", "micro_batch", "recompute")
    knobs: dict[str, Any] = {name: cfg[name] for name in names}
    knobs |= {"judge": judge(cfg), "block_lr": (cfg.optimizer.backbone_lr_scale, cfg.optimizer.backbone_lr_decay)}
    if made.backbone.frozen is None and (made.augment.changes_images or made.augment.mixes):
        knobs["augment"] = made.augment
    if cfg.class_weights:
        knobs["class_weights"] = balanced(made.data.pool.labels[train], len(made.data.classes))
    if val is None:
        knobs |= {"stop": cfg.final.epochs, "keep": "last", "patience": None}
    return Plan(hidden(cfg, seed), optimizer, schedule, seed, train, val, on_epoch=on_epoch, **knobs)


def judge(cfg: DictConfig) -> str:
    """The metric that a search gets, and that keep=best, patience and pruners go by."""
    return "val_balanced_accuracy" if cfg.objective == "balanced_accuracy" else "val_accuracy"


def balanced(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Weights, float32 [num_classes], that give each class the same part in the gradient; 1 in the mean of images."""
    counts = torch.bincount(labels, minlength=num_classes)
    return len(labels) / (num_classes * counts.clamp(min=1).float())


def begun(cfg: DictConfig, made: Parts, plan: Plan) -> Plan:
    """The plan with weights to begin with, if so configured: of another run, or of the head trained alone before."""
    if cfg.warm_start is not None and cfg.head_first:
        raise InputError(f"warm_start={cfg.warm_start} brings a trained head: leave head_first={cfg.head_first} at 0")
    if cfg.warm_start is not None:
        return replace(plan, initial=_of_run(Path(str(cfg.warm_start)).expanduser(), cfg, made, plan))
    return replace(plan, initial=_head_alone(cfg.head_first, made, plan)) if cfg.head_first else plan


def _head_alone(epochs: int, made: Parts, plan: Plan) -> State:
    """The head, trained on the cached features of the network as it was."""

    def on_epoch(epoch: int, m: Metrics) -> None:
        val = f" (val {m['val_accuracy']:.4f})" if "val_accuracy" in m else ""
        log.info("the head alone, epoch %d/%d: accuracy %.4f%s", epoch, epochs, m["train_accuracy"], val)

    first = replace(plan, epochs=epochs, stop=None, keep="last", patience=None, augment=None, micro_batch=None)
    trainer = Trainer(made.head_alone())
    [fitted] = trainer([replace(first, on_epoch=on_epoch)])
    return trainer.trained(plan, fitted).fitted.state


def _of_run(folder: Path, cfg: DictConfig, made: Parts, plan: Plan) -> State:
    """The head of a run, and what it trained below.

    Raises InputError where it doesn't fit, or may have learnt from images that now validate or test.
    """
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"warm_start={folder} is no folder of a finished run: it has no model.safetensors")
    try:
        about, state = model_file.read(folder / "model.safetensors")
        result = read_result(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"warm_start={folder} is no folder of a finished run ({error})") from error
    theirs, now = result.get("split_hashes", {}), made.data.hashes
    others = [name for name in ("val", "test") if theirs.get(name) != now[name]]
    if others or not result.get("n_val"):
        why = f"its {' and '.join(others)} images were others" if others else "it was trained on validation images, too"
        raise InputError(
            f"warm_start={folder} may have learnt from images that now validate or test ({why}); begin with a run of "
            f"the same data and seed={cfg.seed}"
        )
    if about["class_names"] != list(made.data.classes):
        names = (", ".join(names) for names in (about["class_names"], made.data.classes))
        raise InputError("warm_start={} was trained for the classes {}; here they are {}".format(folder, *names))
    if about["weights"] != made.backbone.weights.key:
        raise InputError(f"warm_start={folder} was trained above other weights: give that run's model.weights")
    ours = Trainer(made).shapes(plan.head)
    wrong = [name for name, tensor in state.items() if ours.get(name) != tensor.shape]
    wrong += [name for name in ours if name.startswith("head.") and name not in state]
    if wrong:
        raise InputError(
            f"warm_start={folder} does not fit: {len(wrong)} tensors differ, the first is {wrong[0]}; give model.* and "
            "the classes of that run, but a lower model.frozen"
        )
    log.info("beginning with the weights of %s", folder)
    return state
