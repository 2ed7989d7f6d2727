"""Fine-tune a pretrained image network: `python -m tuner.train`. The one place where everything is put together."""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from tuner import InputError, metrics, plots
from tuner.backbones import Backbone
from tuner.data import Data, Samples
from tuner.features import bank
from tuner.fit import DivergedError, Fitted, Metrics, Schedule, fit, predict, score
from tuner.heads import Classifier, Head, Stack, widths
from tuner.runs import Run

log = logging.getLogger("tuner.train")
HERE = Path(__file__).resolve().parent
CONF = next(folder for folder in (HERE / "conf", HERE.parent / "conf") if folder.is_dir())  # installed, or a checkout
# A config may name these as _target_; TUNER_TRUST adds more, such as "mypackage.*".
TRUSTED = ("tuner.*", "torch.optim.*", *filter(None, os.environ.get("TUNER_TRUST", "").split(",")))


def train(cfg: DictConfig, run: Run, *, in_sweep: bool) -> float:
    """One run, from the config to the run folder. Returns the validation accuracy of the weights that are saved."""
    start = time.perf_counter()
    check(cfg)
    torch.set_flush_denormal(True)  # an optimizer's fading averages end in numbers that CPUs are very slow with
    device = choose_device(cfg.device)
    precision = choose_precision(cfg.precision, device)
    run.result |= {"seed": cfg.seed, "device": describe(device), "precision": str(precision).removeprefix("torch.")}
    run.result |= {"study": cfg.study, "trial": HydraConfig.get().job.num if in_sweep else None}

    # 1. The network and where it is cut; the head on top of it; the images and how they are split.
    model_cfg: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore[assignment]
    head_cfg = model_cfg.pop("head")
    with called("model"):
        backbone = Backbone(**model_cfg, seed=cfg.seed)
    head = Head(widths(head_cfg["width"], head_cfg["depth"]), head_cfg["dropout"], seed=cfg.seed)
    data: Data = build("data", cfg)
    run.result |= {"class_names": data.classes, "n_train": len(data.train), "n_val": len(data.val)}
    run.result |= {"n_test": len(data.test), "test_duplicates": data.test_duplicates}

    # 2. What is trained: a stack of one head, and the blocks that are not frozen.
    trunk = backbone.trained_part()
    stack = Stack(backbone.feature_size, len(data.classes), [head], device)
    model = Classifier(trunk.to(device) if trunk else None, stack)
    with called("optimizer"):
        optimizer: torch.optim.Optimizer = build("optimizer", cfg)(model.parameters_of(0))
    with called("scheduler"):
        schedule: Schedule = build("scheduler", cfg)
        schedule(0.0)
    run.result |= {"trained_parameters": sum(p.numel() for p in model.parameters_of(0))}

    # 3. What the frozen part makes of each image: computed once, then read from the cache.
    def inputs(images: torch.Tensor) -> torch.Tensor:
        if backbone.frozen is None:
            return images.to(device)
        begin = time.perf_counter()
        features = bank(images, backbone, cache_dir=cache_dir(cfg), device=device, dtype=precision).to(device)
        run.result["seconds_features"] = round(run.result.get("seconds_features", 0) + time.perf_counter() - begin, 2)
        return features

    x = inputs(data.pool.images)  # [N, F] under a head alone

    # 4. Train what is above the cut.
    knobs = {key: cfg[key] for key in ("epochs", "batch_size", "grad_clip", "keep", "patience", "seed")}
    knobs |= {"label_smoothing": [cfg.label_smoothing], "precision": precision}
    labels, train, val = data.pool.labels, data.train, data.val
    with tqdm(total=cfg.epochs, desc="training", unit="epoch", disable=None) as bar:
        note = partial(on_epoch, run, bar)
        [fitted] = fit(model, optimizer, [schedule], x, labels, train, val, **knobs, on_epoch=note)
    if fitted.error:
        raise fitted.error

    # 5. Save the weights and score them; the test split is read here, once, or not at all.
    model.load_state(0, fitted.state)
    run.save_model(fitted.state, data.classes)
    options = {"batch_size": cfg.batch_size, "precision": precision}
    _, [train_accuracy] = score(predict(model, x, train, **options), labels[train])
    val_accuracy = fitted.metrics["val_accuracy"]
    accuracies = {"train": train_accuracy, "validation": val_accuracy}
    if wanted(cfg.test, in_sweep):
        split, samples, rows = "test", data.test, torch.arange(len(data.test))
        log_p = predict(model, inputs(samples.images), rows, **options)
        _, [accuracies["test"]] = score(log_p, samples.labels)
    else:
        split, samples, rows = "validation", data.pool, val
        log_p = predict(model, x, rows, **options)
    draw = wanted(cfg.plots, in_sweep)
    report(run, split, log_p[0], samples, rows, data.classes, accuracies, fitted, draw)

    seconds = time.perf_counter() - start
    run.finish(
        "complete",
        val_accuracy=val_accuracy,
        val_loss=fitted.metrics["val_loss"],
        train_accuracy=train_accuracy,
        test_accuracy=accuracies.get("test"),
        epochs=fitted.epochs,
        saved_epoch=fitted.epoch,
        reported_split=split,
        seconds=round(seconds, 2),
    )
    test = f", test accuracy {accuracies['test']:.4f} ({len(data.test):,} images)" if "test" in accuracies else ""
    log.info("validation accuracy %.4f%s, %.0f s: %s", val_accuracy, test, seconds, run.folder)
    return val_accuracy


def report(
    run: Run,
    split: str,
    log_p: torch.Tensor,
    samples: Samples,
    rows: torch.Tensor,
    classes: Sequence[str],
    accuracies: dict[str, float],
    fitted: Fitted,
    draw: bool,
) -> None:
    """A run's tables and plots, from log-probabilities [len(rows), classes] of the given rows of a split's images."""
    labels, predicted, confidence = samples.labels[rows], log_p.argmax(1), log_p.amax(1).exp()
    counts = metrics.confusion_matrix(labels, predicted, len(classes))
    per_class = metrics.per_class(labels, predicted, classes)
    run.save_table("confusion_matrix.csv", [["true \\ predicted", *classes], *zip(classes, *counts.T, strict=True)])
    run.save_table("per_class.csv", [list(per_class[0]), *(list(row.values()) for row in per_class)])
    if not draw:
        return
    curve = run.metrics()
    worst = metrics.most_confident_mistakes(labels, predicted, confidence, 25)
    run.save_plot("accuracy", plots.accuracy(curve, fitted.epoch))
    run.save_plot("loss", plots.loss(curve, fitted.epoch))
    run.save_plot("train_vs_test", plots.train_vs_test(accuracies))
    run.save_plot("confusion_matrix", plots.confusion_matrix(counts, classes, split))
    run.save_plot("per_class", plots.per_class(per_class, split))
    examples = plots.examples(
        samples.images[rows[worst]],
        [classes[i] for i in labels[worst]],
        [classes[i] for i in predicted[worst]],
        confidence[worst].tolist(),
        split,
    )
    run.save_plot("examples", examples)


def on_epoch(run: Run, bar: tqdm, epoch: int, of_heads: list[Metrics]) -> None:
    """Write an epoch down and show it: on the bar, or as a line where the output is no terminal."""
    [m] = of_heads
    run.log_epoch(epoch, m)
    text = f"loss {m['train_loss']:.4f} (val {m['val_loss']:.4f}), "
    text += f"accuracy {m['train_accuracy']:.4f} (val {m['val_accuracy']:.4f})"
    bar.set_postfix_str(text, refresh=False)
    bar.update()
    bar.refresh()
    if bar.disable:
        log.info("epoch %d/%d: %s", epoch, bar.total, text)


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
    ("optimizer.lr", lambda v: _number(v) and v > 0, "more than 0"),
    ("optimizer.weight_decay", lambda v: v is None or (_number(v) and v >= 0), "at least 0"),
    ("precision", lambda v: v in ("auto", "bf16", "fp32"), "auto, bf16 or fp32"),
    ("test", lambda v: v in ("auto", True, False), "auto, true or false"),
    ("plots", lambda v: v in ("auto", True, False), "auto, true or false"),
)


def check(cfg: DictConfig) -> None:
    """Raises InputError for the first value of the config that is missing or out of range."""
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


def cache_dir(cfg: DictConfig) -> Path:
    return Path(cfg.cache_dir).expanduser()


def wanted(choice: bool | str, in_sweep: bool) -> bool:
    return not in_sweep if choice == "auto" else bool(choice)


def build(group: str, cfg: DictConfig) -> Any:
    """What the `_target_` of a config group makes. Raises InputError for a target or a keyword that it can't take."""
    with called(group):
        try:
            return hydra.utils.instantiate(cfg[group], _convert_="all", _execution_whitelist_=TRUSTED)
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


def choose_device(choice: str) -> torch.device:
    """`auto` takes a CUDA GPU where there is one. Raises InputError for a device that this machine does not have."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if choice == "auto":
        choice = "cuda" if gpus else "cpu"
        log.info("device: %s (auto: %s)", choice, f"torch sees {gpus} CUDA GPUs" if gpus else "torch sees no CUDA GPU")
    if str(choice).startswith("cuda") and not gpus:
        raise InputError(
            f"device={choice}, but torch {torch.__version__} sees no CUDA GPU; use device=cpu or device=auto"
        )
    if choice not in ("cpu", "cuda", *(f"cuda:{i}" for i in range(gpus))):
        raise InputError(f"device={choice} must be auto, cpu{''.join(f', cuda:{i}' for i in range(gpus))}")
    if choice != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in any order
        torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device(choice)


def choose_precision(choice: str, device: torch.device) -> torch.dtype:
    """`auto` takes bfloat16 where the hardware multiplies it, which is faster, else float32."""
    if choice != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[choice]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    log.info(
        "precision: %s (auto: %s %s bfloat16)", "bf16" if native else "fp32", device, "has" if native else "has no"
    )
    return torch.bfloat16 if native else torch.float32


def describe(device: torch.device) -> str:
    """The device for result.json, with its name or threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


@hydra.main(config_path=str(CONF), config_name="train", execution_whitelist=TRUSTED)
def main(cfg: DictConfig) -> float:
    hydra_cfg = HydraConfig.get()
    in_sweep = hydra_cfg.mode == RunMode.MULTIRUN
    folder = Path(hydra_cfg.runtime.output_dir)
    try:
        run = Run(folder)
        try:
            return train(cfg, run, in_sweep=in_sweep)
        except BaseException as error:
            run.finish("failed", error=f"{type(error).__name__}: {error}")
            raise
    except (InputError, DivergedError) as error:
        log.error("%s", error)
        log.debug("where it came from, for hydra.verbose=true", exc_info=error)
        if in_sweep:
            raise  # the sweeper's to handle
        sys.exit(1)  # the line above says it all: no traceback


if __name__ == "__main__":
    main()
