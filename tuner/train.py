"""Fine-tune a pretrained image network: `python -m tuner.train`. The one place where everything is put together."""

import logging
import math
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from tuner import InputError, earlier
from tuner.config import CONF, anchor, build, called, check, wanted
from tuner.data import Data
from tuner.device import describe
from tuner.files import no_space
from tuner.runs import calibration
from tuner.runs.predictions import Predictions, result_scores
from tuner.runs.report import write_report
from tuner.runs.run import CHECKPOINT, Run
from tuner.runs.trackers import Tracker, UnreachableError
from tuner.sweep import plugin, trial
from tuner.sweep.fused import together
from tuner.targets import TRUSTED
from tuner.training.checkpoint import Checkpoint
from tuner.training.fit import DivergedError
from tuner.training.parts import Parts, parts
from tuner.training.recipe import begun, hidden, judge, plan
from tuner.training.spec import Metrics, OnEpoch, Plan
from tuner.training.trainer import Trainer, train_all

plugin.register()
log = logging.getLogger("tuner.train")


def train(cfg: DictConfig, run: Run, *, in_sweep: bool) -> float | tuple[float, float]:
    """One run, from the config to the run folder. Returns the objective: the validation accuracy of the saved weights.

    With objective=accuracy_and_cost that and the billions of multiply-adds for an image.
    """
    made = prepare(cfg, run, in_sweep)
    data = made.data
    run.result |= {"n_train": len(data.train), "n_val": len(data.val)}
    x = features(run, made, "x")
    trainer = Trainer(made)
    run.result |= trainer.cost(hidden(cfg, cfg.seed))
    with tqdm(total=cfg.epochs, desc="training", unit="epoch", disable=in_sweep or None) as bar:
        ours = plan(cfg, made, cfg.seed, partial(on_epoch, run, bar, judge(cfg)), data.train, data.val)
        ours = begun(cfg, made, ours) if in_sweep else resumable(cfg, made, ours, run)
        if ours.resume:
            bar.update(ours.resume["fitted"]["epochs"])
        fitted = together(ours, key=trainer.key(ours), work=trainer)
    trained = trainer.trained(ours, fitted)
    val_log_p, _ = trained.score(x, data.pool.labels, data.val)
    temperature = calibration.temperature(val_log_p, data.pool.labels[data.val])
    run.save_model(fitted.state, about(made, temperature))

    # Score the saved weights; the test split is read here, once, or not at all.
    val_accuracy, value = fitted.metrics["val_accuracy"], fitted.metrics[judge(cfg)]
    _, train_accuracy = trained.score(x, data.pool.labels, data.train)
    accuracies = {"train": train_accuracy, "validation": val_accuracy}
    scored = [Predictions("validation", data.pool, data.val, val_log_p, temperature)]
    if wanted(cfg.test, in_sweep):
        rows = torch.arange(len(data.test))
        log_p, accuracies["test"] = trained.score(features(run, made, "x_test"), data.test.labels, rows)
        scored.append(Predictions("test", data.test, rows, log_p, temperature))
    write_report(run, scored, data.classes, accuracies, fitted.epoch, draw=wanted(cfg.plots, in_sweep))

    measured = result_scores(scored)
    measured["val_balanced_accuracy"] = fitted.metrics["val_balanced_accuracy"]
    run.finish(
        "complete",
        val_accuracy=val_accuracy,
        val_loss=fitted.metrics["val_loss"],
        train_accuracy=train_accuracy,
        test_accuracy=accuracies.get("test"),
        temperature=temperature,
        **measured,
        epochs=fitted.epochs,
        saved_epoch=fitted.epoch,
        reported_split=scored[-1].split,
    )
    test = f", test accuracy {accuracies['test']:.4f} ({len(data.test):,} images)" if "test" in accuracies else ""
    log.info("validation accuracy %.4f%s, %.0f s: %s", val_accuracy, test, run.seconds(), run.folder)
    if uneven(data):
        named = {"validation": measured["val_balanced_accuracy"], "test": measured["test_balanced_accuracy"]}
        found = [f"{name} {value:.4f}" for name, value in named.items() if value is not None]
        log.info("balanced accuracy, each class counting alike: %s", ", ".join(found))
    return (value, run.result["gmacs"]) if cfg.objective == "accuracy_and_cost" else value


def retrain(cfg: DictConfig, run: Run, *, in_sweep: bool) -> float:
    """A search's last run: `final.epochs` on train + validation, `final.seeds` times, each tested once.

    Returns the mean accuracy on test. model.safetensors, the tables and the plots are the first seed's; the other
    seeds' weights are model-SEED.safetensors. conf/config.yaml is the configuration as a run of its own.
    """
    made = prepare(cfg, run, in_sweep)
    data = made.data
    seeds = list(range(cfg.seed, cfg.seed + cfg.final.seeds))
    temperature = cfg.final.temperature or 1.0
    if cfg.final.temperature is None:
        log.info("temperature: 1 (there are no validation images to fit it on, and final.temperature is not given)")
    rows = torch.cat([data.train, data.val])
    run.result |= {"n_train": len(rows), "n_val": 0, "seeds": seeds}
    x = features(run, made, "x")
    run.result |= Trainer(made).cost(hidden(cfg, cfg.seed))
    with tqdm(total=cfg.final.epochs, desc="training", unit="epoch", disable=in_sweep or None) as bar:
        notes: list[OnEpoch] = [partial(on_epoch, run, bar, judge(cfg))]  # the run's curve is the first seed's
        notes += [lambda epoch, metrics: None for _ in seeds[1:]]
        plans = [plan(cfg, made, seed, note, rows, None) for seed, note in zip(seeds, notes, strict=True)]
        trained = train_all(made, [begun(cfg, made, one) for one in plans])

    z, everything = features(run, made, "x_test"), torch.arange(len(data.test))
    scores = [one.score(z, data.test.labels, everything) for one in trained]
    tests = [accuracy for _, accuracy in scores]
    for seed, one in zip(seeds, trained, strict=True):
        name = "model.safetensors" if seed == cfg.seed else f"model-{seed}.safetensors"
        run.save_model(one.fitted.state, about(made, temperature), name)
    _, train_accuracy = trained[0].score(x, data.pool.labels, rows)
    accuracies = {"train": train_accuracy, "test": tests[0]}
    fitted = trained[0].fitted
    scored = [Predictions("test", data.test, everything, scores[0][0], temperature)]
    write_report(run, scored, data.classes, accuracies, fitted.epoch, draw=cfg.plots is not False)
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
        temperature=temperature,
        **result_scores(scored),
        epochs=fitted.epochs,
        saved_epoch=fitted.epoch,
        reported_split="test",
    )
    of = f", standard deviation {spread:.4f}, of {len(seeds)} seeds" if len(seeds) > 1 else ", of 1 seed"
    log.info("test accuracy %.4f%s: %s", mean, of, run.folder)
    return mean


def runnable(cfg: DictConfig) -> DictConfig:
    """The config as one that @hydra.main takes: a plain run, with the run folders of train.yaml."""
    root = OmegaConf.masked_copy(OmegaConf.load(CONF / "train.yaml"), ["study", "hydra"])  # type: ignore[arg-type]
    with open_dict(cfg):
        config = OmegaConf.merge(cfg, root, {"final": {"epochs": None, "temperature": None}})
    assert isinstance(config, DictConfig)
    anchor(config, Path.cwd())
    return config


def resumable(cfg: DictConfig, made: Parts, plan: Plan, run: Run) -> Plan:
    """The plan of a single run, which goes on where it was killed when it is started again in its folder."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    for group in (config, config["data"]):  # what decides nothing
        for key in ("study", "cache_dir"):
            group.pop(key, None)
    checkpoint = Checkpoint(run, config | {"split_hashes": made.data.hashes})
    resume = checkpoint.load()
    plan = plan if resume else begun(cfg, made, plan)
    return replace(plan, resume=resume, checkpoint=checkpoint.save)


def prepare(cfg: DictConfig, run: Run, in_sweep: bool) -> Parts:
    """Check the config, have the parts made, and write down what they are."""
    check(cfg)
    torch.set_flush_denormal(True)  # an optimizer's fading averages end in numbers that CPUs are very slow with
    hidden(cfg, cfg.seed)  # its mistakes are told before images are read
    link = trial.link()
    run.result |= {"seed": cfg.seed}
    run.result |= {"study": link and link.study, "trial": HydraConfig.get().job.num if in_sweep else None}
    run.result |= {"storage": link and link.storage}
    run.tracker = tracker(cfg, run.folder, in_sweep)
    made = parts(cfg, shared=in_sweep)
    run.result |= {"device": describe(made.device), "precision": str(made.precision).removeprefix("torch.")}
    data = made.data
    if uneven(data) and not (in_sweep or cfg.class_weights):
        counts = torch.bincount(data.pool.labels).tolist()
        few, many = (f(counts) for f in (min, max))
        log.info(
            "classes are uneven, from %d images (%s) to %d: class_weights=balanced gives them the same part, and "
            "objective=balanced_accuracy judges by it",
            few,
            data.classes[counts.index(few)],
            many,
        )
    run.result |= {"class_names": data.classes, "n_test": len(data.test), "test_duplicates": data.test_duplicates}
    run.result |= {"split_hashes": data.hashes}
    return made


def about(made: Parts, temperature: float) -> dict[str, Any]:
    """What the weights that are saved need beside the config, to be a model."""
    data = made.data
    shape, weights = list(data.pool.images.shape[1:]), made.backbone.weights.key
    names = {"class_names": data.classes, "input_shape": shape, "fit": data.fit}
    return names | {"temperature": temperature, "weights": weights}


def uneven(data: Data) -> bool:
    """Whether a class has more than twice the images of another."""
    counts = torch.bincount(data.pool.labels, minlength=len(data.classes))
    return bool(counts.max() > 2 * counts.min())


def features(run: Run, made: Parts, name: str) -> torch.Tensor:
    """One of the parts' inputs to the head, and the time that it took to have it."""
    begin = time.perf_counter()
    inputs: torch.Tensor = getattr(made, name)
    if made.backbone.frozen is not None:
        seconds = run.result.get("seconds_features", 0) + time.perf_counter() - begin
        run.result["seconds_features"] = round(seconds, 2)
    return inputs


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


def on_epoch(run: Run, bar: tqdm, judge: str, epoch: int, m: Metrics) -> None:
    """Write an epoch down and show it: on the bar, or as a line where the output is no terminal.

    In a search it is also reported. Raises TrialPruned where that ends the trial.
    """
    run.log_epoch(epoch, m)
    text = f"loss {m['train_loss']:.4f}, accuracy {m['train_accuracy']:.4f}"
    if "val_loss" in m:
        text = f"loss {m['train_loss']:.4f} (val {m['val_loss']:.4f}), "
        text += f"accuracy {m['train_accuracy']:.4f} (val {m['val_accuracy']:.4f})"
    bar.set_postfix_str(text, refresh=False)
    bar.update()
    bar.refresh()
    if bar.disable:
        log.info("%sepoch %d/%d: %s", run.prefix, epoch, bar.total, text)
    if "val_loss" in m and math.isfinite(m["train_loss"] + m["val_loss"]):  # a diverged run is no pruned one
        trial.report(m[judge], epoch)


def task(cfg: DictConfig) -> float | tuple[float, float]:
    hydra_cfg = HydraConfig.get()
    in_sweep = hydra_cfg.mode == RunMode.MULTIRUN
    folder = Path(hydra_cfg.runtime.output_dir)
    if not in_sweep and (search := hydra_cfg.runtime.choices.get("hparams_search")):
        log.warning("hparams_search=%s searches with -m alone: this is one run", search)
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
    except Exception as error:
        reason = no_space(error)
        if in_sweep or reason is None:
            raise
        again = f"go on with: python -m tuner.resume {folder}" if (folder / CHECKPOINT).exists() else "start it again"
        log.error("a disk is full (%s): make room, then %s", reason, again)
        sys.exit(1)


def main() -> None:
    try:
        earlier.refuse_old_names(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
    hydra.main(config_path=str(CONF), config_name="train", execution_whitelist=TRUSTED)(task)()


if __name__ == "__main__":
    from tuner.train import main as importable  # so that worker processes import it, instead of being sent its code

    importable()
