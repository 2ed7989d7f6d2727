"""Initial weights, if the config asks for them: another run's (warm_start), or a head trained first (head_first)."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from tuner import InputError
from tuner.config import RunConfig
from tuner.runs import model_file
from tuner.runs.result import read_result
from tuner.training.setup import Setup
from tuner.training.spec import Metrics, Spec, State
from tuner.training.together import fit_stack, shapes

log = logging.getLogger(__name__)


def with_initial_weights(config: RunConfig, setup: Setup, spec: Spec) -> Spec:
    """The spec with the weights of warm_start, or of head_first, if the config has either."""
    if config.warm_start is not None:
        return replace(spec, initial=_warm_start(Path(str(config.warm_start)).expanduser(), config, setup, spec))
    return replace(spec, initial=_head_first(config.head_first, setup, spec)) if config.head_first else spec


def _head_first(epochs: int, setup: Setup, spec: Spec) -> State:
    """Train the head alone for some epochs, on cached features of the pretrained network."""

    def on_epoch(epoch: int, metrics: Mapping[Spec, Metrics]) -> Collection[Spec]:
        [m] = metrics.values()
        val = f" (val {m['val_accuracy']:.4f})" if "val_accuracy" in m else ""
        log.info("the head alone, epoch %d/%d: accuracy %.4f%s", epoch, epochs, m["train_accuracy"], val)
        return ()

    alone = replace(spec, epochs=epochs, stop=None, keep="last", patience=None, augment=None, micro_batch=None)
    [fitted] = fit_stack(setup.frozen_whole(), [alone], on_epoch)
    fitted.raise_error()
    return fitted.state


def _warm_start(folder: Path, config: RunConfig, setup: Setup, spec: Spec) -> State:
    """The weights of a finished run: its head, and the blocks that it trained.

    Raises InputError if they do not fit, or if the run may have been trained on images of the validation or test split.
    """
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"warm_start={folder} is not the folder of a finished run: it has no model.safetensors")
    try:
        about, state = model_file.read(folder / "model.safetensors")
        result = read_result(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"warm_start={folder} is not the folder of a finished run ({error})") from error
    theirs, ours = result.get("split_hashes"), setup.data.hashes
    changed = [name for name in ("val", "test") if not isinstance(theirs, dict) or theirs.get(name) != ours[name]]
    if changed or not result.get("n_val"):
        why = f"its {' and '.join(changed)} images differ" if changed else "it was trained on validation images, too"
        raise InputError(
            f"warm_start={folder} may have been trained on images that are now in validation or test ({why}); use a "
            f"run with the same data and seed={config.seed}"
        )
    if about["class_names"] != list(setup.data.classes):
        names = (", ".join(names) for names in (about["class_names"], setup.data.classes))
        raise InputError("warm_start={} has the classes {}; the data has {}".format(folder, *names))
    if about["weights"] != setup.backbone.weights.key:
        raise InputError(f"warm_start={folder} was trained on other pretrained weights: use that run's model.weights")
    expected = shapes(setup, spec.head)
    wrong = [name for name, tensor in state.items() if expected.get(name) != tensor.shape]
    wrong += [name for name in expected if name.startswith("head.") and name not in state]
    if wrong:
        raise InputError(
            f"warm_start={folder} does not fit: {len(wrong)} tensors differ, the first is {wrong[0]}; use that run's "
            "model.* and classes; only model.frozen may be lower"
        )
    log.info("starting from the weights of %s", folder)
    return state
