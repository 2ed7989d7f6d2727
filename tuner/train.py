"""Fine-tune a pretrained image network: `python -m tuner.train`. The one place where everything is put together."""

import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from tuner import InputError
from tuner.backbones import Backbone
from tuner.data import Data
from tuner.features import bank
from tuner.fit import DivergedError, Fitted, Metrics, Schedule, fit, predict, score
from tuner.heads import Classifier, Head, Stack, widths
from tuner.runs import Run
from tuner.scoring import Scored, report
from tuner.settings import (
    TRUSTED,
    build,
    cache_dir,
    called,
    check,
    choose_device,
    choose_precision,
    describe,
    wanted,
)
from tuner.sweep import plugin, trial
from tuner.trackers import Tracker, UnreachableError

plugin.register()
log = logging.getLogger("tuner.train")
HERE = Path(__file__).resolve().parent
CONF = next(folder for folder in (HERE / "conf", HERE.parent / "conf") if folder.is_dir())  # installed, or a checkout


def train(cfg: DictConfig, run: Run, *, in_sweep: bool) -> float | tuple[float, float]:
    """One run, from the config to the run folder. Returns the objective: the validation accuracy of the saved weights.

    With objective=accuracy_and_cost that and the billions of multiply-adds for an image.
    """
    parts = prepare(cfg, run, in_sweep)
    data = parts.data
    run.result |= {"n_train": len(data.train), "n_val": len(data.val)}
    x = parts.inputs(data.pool.images)
    [trained] = fit_heads(cfg, run, parts, [cfg.seed], x, data.train, data.val, in_sweep)
    trained.save(run, data.classes)

    # Score the saved weights; the test split is read here, once, or not at all.
    fitted = trained.fitted
    val_accuracy = fitted.metrics["val_accuracy"]
    _, [train_accuracy] = score(trained.predict(x, data.train), data.pool.labels[data.train])
    accuracies = {"train": train_accuracy, "validation": val_accuracy}
    scored = [Scored("validation", data.pool, data.val, trained.predict(x, data.val)[0])]
    if wanted(cfg.test, in_sweep):
        rows = torch.arange(len(data.test))
        log_p = trained.predict(parts.inputs(data.test.images), rows)
        _, [accuracies["test"]] = score(log_p, data.test.labels)
        scored.append(Scored("test", data.test, rows, log_p[0]))
    report(run, scored, data.classes, accuracies, fitted, draw=wanted(cfg.plots, in_sweep))

    run.finish(
        "complete",
        val_accuracy=val_accuracy,
        val_loss=fitted.metrics["val_loss"],
        train_accuracy=train_accuracy,
        test_accuracy=accuracies.get("test"),
        epochs=fitted.epochs,
        saved_epoch=fitted.epoch,
        reported_split=scored[-1].split,
    )
    test = f", test accuracy {accuracies['test']:.4f} ({len(data.test):,} images)" if "test" in accuracies else ""
    log.info("validation accuracy %.4f%s, %.0f s: %s", val_accuracy, test, run.seconds(), run.folder)
    return val_accuracy if cfg.objective == "accuracy" else (val_accuracy, run.result["gmacs"])


def retrain(cfg: DictConfig, run: Run, *, in_sweep: bool) -> float:
    """A search's last run: `final.epochs` on train + validation, `final.seeds` times, each tested once.

    Returns the mean accuracy on test. model.safetensors, the tables and the plots are the first seed's; the other
    seeds' weights are model-SEED.safetensors. config.yaml is the configuration as a run of its own.
    """
    parts = prepare(cfg, run, in_sweep)
    data = parts.data
    seeds = list(range(cfg.seed, cfg.seed + cfg.final.seeds))
    rows = torch.cat([data.train, data.val])
    run.result |= {"n_train": len(rows), "n_val": 0, "seeds": seeds}
    x = parts.inputs(data.pool.images)
    trained = fit_heads(cfg, run, parts, seeds, x, rows, None, in_sweep)

    z, everything = parts.inputs(data.test.images), torch.arange(len(data.test))
    tests = []
    for seed, one in zip(seeds, trained, strict=True):
        one.save(run, data.classes, "model.safetensors" if seed == cfg.seed else f"model-{seed}.safetensors")
        tests.append(score(one.predict(z, everything), data.test.labels)[1][0])
    first = trained[0]
    _, [train_accuracy] = score(first.predict(x, rows), data.pool.labels[rows])
    accuracies = {"train": train_accuracy, "test": tests[0]}
    scored = [Scored("test", data.test, everything, first.predict(z, everything)[0])]
    report(run, scored, data.classes, accuracies, first.fitted, draw=cfg.plots is not False)
    run.save_config(runnable(cfg))

    mean, spread = statistics.mean(tests), statistics.stdev(tests) if len(tests) > 1 else 0.0
    run.finish(
        "complete",
        val_accuracy=None,
        val_loss=None,
        train_accuracy=train_accuracy,
        test_accuracy=mean,
        test_accuracy_std=spread,
        test_accuracies=tests,
        epochs=first.fitted.epochs,
        saved_epoch=first.fitted.epoch,
        reported_split="test",
    )
    log.info("test accuracy %.4f, standard deviation %.4f, of %d seeds: %s", mean, spread, len(seeds), run.folder)
    return mean


def runnable(cfg: DictConfig) -> DictConfig:
    """The config as one that @hydra.main takes: a plain run, with the run folders of train.yaml."""
    root = OmegaConf.masked_copy(OmegaConf.load(CONF / "train.yaml"), ["study", "hydra"])  # type: ignore[arg-type]
    with open_dict(cfg):
        config = OmegaConf.merge(cfg, root, {"final": {"epochs": None}})
    assert isinstance(config, DictConfig)
    return config


@dataclass
class Parts:
    """What runs are made of. inputs: images uint8 [N, C, H, W] -> what the trained part takes, [N, ...]."""

    device: torch.device
    precision: torch.dtype
    backbone: Backbone
    data: Data
    inputs: Callable[[torch.Tensor], torch.Tensor]


def prepare(cfg: DictConfig, run: Run, in_sweep: bool) -> Parts:
    """Check the config; choose the device; find the network, cut it; load the images and split them."""
    check(cfg)
    torch.set_flush_denormal(True)  # an optimizer's fading averages end in numbers that CPUs are very slow with
    device = choose_device(cfg.device)
    precision = choose_precision(cfg.precision, device)
    link = trial.link()
    run.result |= {"seed": cfg.seed, "device": describe(device), "precision": str(precision).removeprefix("torch.")}
    run.result |= {"study": link and link.study, "trial": HydraConfig.get().job.num if in_sweep else None}
    run.result |= {"storage": link and link.storage}
    network: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore[assignment]
    del network["head"]
    with called("model"):
        backbone = Backbone(**network, seed=cfg.seed)
    hidden(cfg)  # its mistakes are told before images are read
    run.tracker = tracker(cfg, run.folder, in_sweep)
    data: Data = build("data", cfg)
    run.result |= {"class_names": data.classes, "n_test": len(data.test), "test_duplicates": data.test_duplicates}

    def inputs(images: torch.Tensor) -> torch.Tensor:
        """What the frozen part makes of each image: computed once, then read from the cache."""
        if backbone.frozen is None:
            return images.to(device)
        begin = time.perf_counter()
        features = bank(images, backbone, cache_dir=cache_dir(cfg), device=device, dtype=precision).to(device)
        run.result["seconds_features"] = round(run.result.get("seconds_features", 0) + time.perf_counter() - begin, 2)
        return features

    return Parts(device, precision, backbone, data, inputs)


def tracker(cfg: DictConfig, folder: Path, in_sweep: bool) -> Tracker | None:
    """What else is told of the run, by its study and its number there, or as best; None with logger=csv.

    Raises InputError where it can't be; inside a sweep a store that can't be reached is a warning, and None.
    """
    if not OmegaConf.select(cfg, "logger"):
        return None
    link = trial.link()
    study = link.study if link else cfg.study if in_sweep else None
    name = "best" if cfg.final.epochs else str(HydraConfig.get().job.num) if in_sweep else folder.name
    config = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "logger"])
    plain: Any = OmegaConf.to_container(config, resolve=True)
    try:
        with called("logger"):
            return Tracker(build("logger", cfg)(folder, study, name, plain), folder)
    except UnreachableError as error:
        if not in_sweep:
            raise
        log.warning("%s; trial %s goes on without it", error, name)  # a server's bad hour must not cost a night
        return None


def hidden(cfg: DictConfig) -> Callable[[int], Head]:
    """The head as the config has it, for any seed."""
    head: dict[str, Any] = OmegaConf.to_container(cfg.model.head, resolve=True)  # type: ignore[assignment]
    make = partial(Head, widths(head["width"], head["depth"]), head["dropout"])
    make(cfg.seed)
    return make


@dataclass
class Trained:
    """One head of a stack that was fitted, with the weights that were kept."""

    model: Classifier
    k: int
    fitted: Fitted
    options: dict[str, Any]

    def predict(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [1, len(rows), classes]."""
        self.model.load_state(self.k, self.fitted.state)
        return predict(self.model, x, rows, **self.options)[self.k : self.k + 1]

    def save(self, run: Run, classes: Sequence[str], name: str = "model.safetensors") -> None:
        run.save_model(self.fitted.state, classes, name)


def fit_heads(
    cfg: DictConfig,
    run: Run,
    parts: Parts,
    seeds: Sequence[int],
    x: torch.Tensor,
    train: torch.Tensor,
    val: torch.Tensor | None,
    in_sweep: bool,
) -> list[Trained]:
    """Train what is above the cut, once for each seed: together where that is heads alone, else one after another.

    Raises DivergedError where a loss is not finite.
    """
    if len(seeds) > 1 and parts.backbone.frozen != parts.backbone.features:
        return [fit_heads(cfg, run, parts, [seed], x, train, val, in_sweep)[0] for seed in seeds]
    heads = [hidden(cfg)(seed) for seed in seeds]
    trunk = parts.backbone.trained_part()
    stack = Stack(parts.backbone.feature_size, len(parts.data.classes), heads, parts.device)
    model = Classifier(trunk.to(parts.device) if trunk else None, stack)
    with called("optimizer"):
        groups = [{"params": model.parameters_of(k)} for k in range(len(heads))]
        optimizer: torch.optim.Optimizer = build("optimizer", cfg)(groups)
    with called("scheduler"):
        schedule: Schedule = build("scheduler", cfg)
        schedule(0.0)
    run.result |= {"trained_parameters": sum(p.numel() for p in model.parameters_of(0))}
    head_macs = sum(p.numel() for p in stack.parameters_of(0) if p.ndim == 2)
    run.result |= {"gmacs": round((parts.backbone.macs() + head_macs) / 1e9, 6)}

    options = {"batch_size": cfg.batch_size, "precision": parts.precision}
    knobs = {key: cfg[key] for key in ("epochs", "grad_clip", "keep", "patience", "seed")} | options
    knobs |= {"label_smoothing": [cfg.label_smoothing] * len(heads)}
    if val is None:
        knobs |= {"stop": cfg.final.epochs, "keep": "last", "patience": None}
    with tqdm(total=cfg.epochs, desc="training", unit="epoch", disable=in_sweep or None) as bar:
        note = partial(on_epoch, run, bar) if seeds[0] == cfg.seed else lambda epoch, metrics: None
        schedules, labels = [schedule] * len(heads), parts.data.pool.labels
        fitted = fit(model, optimizer, schedules, x, labels, train, val, **knobs, on_epoch=note)
    for one in fitted:
        if one.error:
            raise one.error
    return [Trained(model, k, one, options) for k, one in enumerate(fitted)]


def on_epoch(run: Run, bar: tqdm, epoch: int, of_heads: list[Metrics]) -> None:
    """Write an epoch down and show it: on the bar, or as a line where the output is no terminal.

    Of several seeds it is the first. In a search it is also reported. Raises TrialPruned where that ends the trial.
    """
    m = of_heads[0]
    run.log_epoch(epoch, m)
    text = f"loss {m['train_loss']:.4f}, accuracy {m['train_accuracy']:.4f}"
    if "val_loss" in m:
        text = f"loss {m['train_loss']:.4f} (val {m['val_loss']:.4f}), "
        text += f"accuracy {m['train_accuracy']:.4f} (val {m['val_accuracy']:.4f})"
    bar.set_postfix_str(text, refresh=False)
    bar.update()
    bar.refresh()
    if bar.disable:
        log.info("epoch %d/%d: %s", epoch, bar.total, text)
    if "val_loss" in m and math.isfinite(m["train_loss"] + m["val_loss"]):  # a diverged run is no pruned one
        trial.report(m["val_accuracy"], epoch)


@hydra.main(config_path=str(CONF), config_name="train", execution_whitelist=TRUSTED)
def main(cfg: DictConfig) -> float | tuple[float, float]:
    hydra_cfg = HydraConfig.get()
    in_sweep = hydra_cfg.mode == RunMode.MULTIRUN
    folder = Path(hydra_cfg.runtime.output_dir)
    try:
        run = Run(folder)
        try:
            return (train if cfg.final.epochs is None else retrain)(cfg, run, in_sweep=in_sweep)
        except trial.TrialPruned as pruned:
            last = run.metrics().iloc[-1]
            run.finish("pruned", epochs=int(last.epoch), val_accuracy=last.val_accuracy, val_loss=last.val_loss)
            log.info("%s", pruned)
            raise
        except BaseException as error:
            run.finish("failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            run.close()
    except (InputError, DivergedError) as error:
        if in_sweep:
            raise  # the sweeper's to tell
        log.error("%s", error)
        log.debug("where it came from, for hydra.verbose=true", exc_info=error)
        sys.exit(1)  # the line above says it all: no traceback


if __name__ == "__main__":
    from tuner.train import main as importable  # so that worker processes import it, instead of being sent its code

    importable()
