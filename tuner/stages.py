"""A run in three stages: prepare, fit_together, finish.

A single run goes through them one after another; under hydra/launcher=fused many runs are prepared, then trained
together, then finished.
"""

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm

from tuner import InputError, rules
from tuner.bank import cuts
from tuner.config import RunConfig, record_values
from tuner.data import summary
from tuner.device import describe
from tuner.files import disk_error
from tuner.runs.ensemble import Ensemble
from tuner.runs.run import Run
from tuner.runs.trackers import open_tracker
from tuner.sweep.trial import RunningTrial, TrialPruned
from tuner.terminal import epochs_bar
from tuner.training import merging, model_choice
from tuner.training.checkpoint import with_checkpoints
from tuner.training.folds import Fold, folds_of, means
from tuner.training.initial import with_initial_weights
from tuner.training.results import draw_choice, draw_data, features, is_on, write_results
from tuner.training.setup import Setup, setup_of
from tuner.training.spec import Fitted, Metrics, Spec, head_of, spec_of
from tuner.training.together import fit_all

log = logging.getLogger("tuner.train")


@dataclass(eq=False)
class Prepared:
    """A run that is ready to train.

    specs: one; with data.folds, one for each of `folds`; where a search's best trial is retrained, one for each of
        `final.seeds`; where an ensemble is retrained, so many for each of its members.
    """

    config: RunConfig
    run: Run
    trial: RunningTrial | None
    setup: Setup
    specs: list[Spec]
    bar: tqdm
    in_sweep: bool
    ensemble: Ensemble | None = None
    folds: Sequence[Fold] = ()

    def metrics(self, metrics: Mapping[Spec, Metrics]) -> Metrics | None:
        """The metrics of the run in an epoch, from those of all heads: of its first head, or means over its folds.

        None if a head is not trained any more.
        """
        specs = self.specs if self.folds else self.specs[:1]
        return means([metrics[spec] for spec in specs]) if all(spec in metrics for spec in specs) else None

    def on_epoch(self, epoch: int, metrics: Metrics) -> None:
        """Record an epoch: in metrics.csv, on the bar or in the log, and in the study.

        Raises TrialPruned if the pruner ends the trial.
        """
        self.run.log_epoch(epoch, metrics)
        self.bar.set_description_str(f"epoch {epoch}/{self.bar.total}: {_accuracies(metrics)}", refresh=False)
        self.bar.update()
        self.bar.refresh()
        if self.bar.disable:
            text = f"{_accuracies(metrics)}, {_losses(metrics)}"
            self.run.log.info("%sepoch %d/%d: %s", self._prefix, epoch, self.bar.total, text)
        # A diverged run has failed; it is not reported, or it would count as pruned.
        if self.trial and "val_loss" in metrics and math.isfinite(metrics["train_loss"] + metrics["val_loss"]):
            self.trial.report(self.specs[0].value(metrics), epoch)

    @property
    def _prefix(self) -> str:
        return f"{self.run.folder.name}: " if self.run.folder.name.isdecimal() else ""


def _accuracies(metrics: Metrics) -> str:
    train = f"train accuracy {metrics['train_accuracy']:.4f}"
    return f"val accuracy {metrics['val_accuracy']:.4f}, {train}" if "val_loss" in metrics else train


def _losses(metrics: Metrics) -> str:
    train = f"train loss {metrics['train_loss']:.4f}"
    return f"val loss {metrics['val_loss']:.4f}, {train}" if "val_loss" in metrics else train


# 1. Prepare


def prepare(config: RunConfig, run: Run, trial: RunningTrial | None = None, number: int | None = None) -> Prepared:
    """Load and split the images, cut the network, compute the features.

    number: of the job in a sweep, or None.
    """
    head = head_of(config.model.head, config.seed)  # a mistake here is reported before images are read
    torch.set_flush_denormal(True)  # an optimizer's fading averages end in numbers that CPUs are very slow with
    in_sweep = number is not None
    study, storage = (trial.study, trial.storage) if trial else (None, None)
    run.result |= {"seed": config.seed, "study": study, "trial": number, "storage": storage}
    study = study or (config.study if in_sweep else None)
    chooses = model_choice.is_auto(config.model)
    if not chooses:  # a mistake here is reported before images are read
        run.tracker = open_tracker(config, run.folder, study, number)
    setup, config = chosen_setup(config, run, trial, shared=in_sweep)
    if chooses:  # the tracker shows what was chosen
        run.tracker = open_tracker(config, run.folder, study, number)
    if trial:
        trial.check_images(config.plain["data"], setup.data.hashes)
    describe_setup(config, run, setup, in_sweep)
    run.result |= setup.cost(head)
    ensemble = trial.ensemble if trial and config.final.epochs else None
    folds = (
        folds_of(setup.data, config.data.folds, config.seed) if config.data.folds and not config.final.epochs else []
    )
    specs = specs_for(config, run, setup, ensemble, folds)
    if trial and not config.final.epochs:
        screen(config, setup, trial)
    features(run, setup, "x")
    if not (in_sweep or config.final.epochs or folds):
        specs = [with_checkpoints(spec, run, config, setup.data.hashes) for spec in specs]
    specs = [spec if spec.resume else with_initial_weights(config, setup, spec) for spec in specs]
    if is_on(config.plots, in_sweep and not config.final.epochs):
        draw_data(run, setup)
        if setup.choice and "model_choice" in run.result:
            draw_choice(run, setup.choice)
    epochs = config.final.epochs or config.epochs
    resume = specs[0].resume
    bar = epochs_bar(epochs, resume["fitted"]["epochs"] if resume else 0, hidden=in_sweep)
    return Prepared(config, run, trial, setup, specs, bar, in_sweep, ensemble, folds)


def chosen_setup(config: RunConfig, run: Run, trial: RunningTrial | None, *, shared: bool) -> tuple[Setup, RunConfig]:
    """The setup, and the config with what was chosen in place of `auto`, in the run folder, too.

    The first trial of a study chooses for all.
    """
    if not model_choice.is_auto(config.model):
        return setup_of(config, shared=shared), config
    setup, values = None, trial.chosen(config.plain, model_choice.KEYS) if trial else None
    if values is None:
        setup = setup_of(config, shared=shared)
        own = {f"model.{key}": value for key, value in model_choice.chosen_values(config.model, setup.choice).items()}
        run.result["model_choice"] = setup.choice.as_json() if setup.choice else None
        values = trial.share_choice(config.plain, model_choice.KEYS, own) if trial else own
        setup = setup if values == own else None  # another trial was faster
    record_values(run.folder, values)
    config = model_choice.applied(config, {key.removeprefix("model."): value for key, value in values.items()})
    return setup or setup_of(config, shared=shared), config


def screen(config: RunConfig, setup: Setup, trial: RunningTrial) -> None:
    """Judge the cut of a trial before the features of all images are computed. Raises TrialPruned for a bad one.

    Bad: a closed-form score below the median of the complete trials, or features that take longer than model.screen.
    """
    if setup.backbone.frozen is None or config.model.screen is None:
        return
    cache, device, dtype = setup.cache, setup.device, setup.precision
    seconds = cuts.predicted_seconds(
        setup.backbone, setup.data.pool, cache=cache, device=device, dtype=dtype, views=setup.views
    )
    if seconds > rules.seconds(config.model.screen):
        limit = f"more than model.screen={config.model.screen}"
        trial.prune(f"pruned before training: its features would take {seconds:,.0f} s, {limit}")
    backbone = (setup if setup.trains_heads_alone else setup.frozen_whole()).backbone
    trial.screen(cuts.score(backbone, setup.data, seed=config.seed, cache=cache, device=device, dtype=dtype))


def specs_for(
    config: RunConfig, run: Run, setup: Setup, ensemble: Ensemble | None, folds: Sequence[Fold]
) -> list[Spec]:
    """How the heads of the run are trained; see Prepared.specs. Records the number of images."""
    if ensemble:
        return ensemble_specs(config, run, setup, ensemble)
    if config.final.epochs:
        return retraining_specs(config, run, setup)
    return fold_specs(config, run, setup, folds) if folds else training_specs(config, run, setup)


def training_specs(config: RunConfig, run: Run, setup: Setup) -> list[Spec]:
    """How the head is trained: on the training split, validated on the validation split."""
    data = setup.data
    run.result |= {"n_train": len(data.train), "n_val": len(data.val)}
    return [spec_of(config, setup, config.seed, data.train, data.val)]


def fold_specs(config: RunConfig, run: Run, setup: Setup, folds: Sequence[Fold]) -> list[Spec]:
    """How the heads of a cross-validation are trained: each on all folds but one, which it is validated on."""
    run.result |= {"n_train": len(folds[0].train), "n_val": sum(len(fold.images) for fold in folds)}
    return [spec_of(config, setup, config.seed, fold.train, fold.val, folds=len(folds)) for fold in folds]


def retraining_specs(config: RunConfig, run: Run, setup: Setup) -> list[Spec]:
    """The end of a search: `final.epochs` on train + validation, `final.seeds` times."""
    if config.final.temperature is None:
        log.info("temperature: 1 (there are no validation images to fit it on, and final.temperature is not given)")
    rows, seeds = retraining_rows(config, run, setup)
    return [spec_of(config, setup, seed, rows, None) for seed in seeds]


def ensemble_specs(config: RunConfig, run: Run, setup: Setup, ensemble: Ensemble) -> list[Spec]:
    """The end of a search with `final.ensemble`: each member, `final.seeds` times. Records the head that they make."""
    rows, seeds = retraining_rows(config, run, setup)
    specs = merging.specs_of(config, setup, ensemble, rows, seeds)
    head = merging.merged_head([spec.head for spec in specs])
    if head.widths:
        record_values(run.folder, {"model.head.width": list(head.widths), "model.head.depth": None})
    run.result |= {"ensemble": ensemble.record, **setup.cost(head)}
    return specs


def retraining_rows(config: RunConfig, run: Run, setup: Setup) -> tuple[torch.Tensor, list[int]]:
    """The images and the seeds of a retraining, which are recorded."""
    rows = torch.cat([setup.data.train, setup.data.val])
    seeds = list(range(config.seed, config.seed + config.final.seeds))
    run.result |= {"n_train": len(rows), "n_val": 0, "seeds": seeds}
    return rows, seeds


def describe_setup(config: RunConfig, run: Run, setup: Setup, in_sweep: bool) -> None:
    """Write to result.json what the run trains on; log it if the classes are uneven."""
    data = setup.data
    run.result |= {"device": describe(setup.device), "precision": str(setup.precision).removeprefix("torch.")}
    run.result |= {"class_names": data.classes, "n_test": len(data.test), "test_duplicates": data.test_duplicates}
    run.result |= {"split_hashes": data.hashes, "n_excluded": data.excluded}
    run.result |= {"data": summary.summary(data, config.data.folds)}
    if data.is_uneven and not (in_sweep or config.class_weights):
        counts = torch.bincount(data.pool.labels).tolist()
        log.info(
            "classes are uneven, from %d images (%s) to %d: class_weights=balanced gives each class the same weight in "
            "training, and objective=balanced_accuracy in the objective",
            min(counts),
            data.classes[counts.index(min(counts))],
            max(counts),
        )


# 2. Train


def fit_together(jobs: Sequence[Prepared]) -> Iterator[tuple[int, list[Fitted]]]:
    """Train the heads of these runs: as one stack where they can be.

    Yields the index of each run, and what came of its specs, as soon as all of them have been trained.
    """
    index_of = {spec: index for index, job in enumerate(jobs) for spec in job.specs}
    fitted: list[dict[Spec, Fitted]] = [{} for _ in jobs]
    errors: dict[Spec, Exception] = {}
    ended: set[Spec] = set()  # heads of runs that have failed

    def on_epoch(epoch: int, metrics: Mapping[Spec, Metrics]) -> Collection[Spec]:
        for job in {index_of[spec]: jobs[index_of[spec]] for spec in metrics}.values():
            own = job.metrics(metrics)
            if own is None and job.folds:  # a fold has diverged
                ended.update(job.specs)
            if own is None:
                continue
            try:
                job.on_epoch(epoch, own)
            except Exception as error:  # noqa: BLE001 - it ends this run alone, whose last stage raises it
                errors[job.specs[0]] = _recorded_end(job.run, error)
                ended.update(job.specs)
        return ended

    for spec, result in fit_all([(job.setup, spec) for job in jobs for spec in job.specs], on_epoch, ended):
        index = index_of[spec]
        specs = jobs[index].specs
        fitted[index][spec] = Fitted(error=errors[spec]) if spec in errors else result
        if result.error:
            ended.update(specs)
        if len(fitted[index]) == len(specs):
            results, fitted[index] = fitted[index], {}
            yield index, [results.pop(spec) for spec in specs]


def _recorded_end(run: Run, error: Exception) -> Exception:
    """Record the end of a run whose on_epoch failed. Returns the error without its traceback, which holds the stack."""
    if isinstance(error, TrialPruned):
        try:
            record_end(run, error)
        except OSError as full:  # the last stage tries again
            return full.with_traceback(None)
    elif disk_error(error) is None:
        run.log.error("the end of an epoch failed", exc_info=error)
    return error.with_traceback(None)


# 3. Finish


def finish(job: Prepared, fitted: list[Fitted] | BaseException) -> float | tuple[float, float]:
    """Score the saved weights, and write the model, tables, plots and result.json.

    Returns the objective of the saved weights on the validation split; with
    objective=accuracy_and_cost also the billions of multiply-adds for an image. Where a search's best trial is
    retrained: the mean test accuracy.
    """
    job.bar.close()  # what follows is logged below it
    try:
        if isinstance(fitted, BaseException):
            raise fitted
        specs = job.specs
        if job.ensemble:
            spec, merged = merging.merged_fit(specs, fitted, job.ensemble.weights)
            specs, fitted = [spec], [merged]
        outcome = write_results(job.config, job.run, job.setup, specs, fitted, in_sweep=job.in_sweep, folds=job.folds)
        if job.config.final.epochs:
            return float(outcome["test_accuracy"])
        value = job.specs[0].value(outcome)
        return (value, job.run.result["gmacs"]) if job.config.objective == "accuracy_and_cost" else value
    except BaseException as error:
        record_end(job.run, error)
        raise
    finally:
        job.run.close()


def record_end(run: Run, error: BaseException) -> None:
    """Write to result.json that a run was pruned, interrupted or has failed, unless its end is recorded."""
    if run.has_ended:
        return
    if run.resumes and isinstance(error, InputError):
        run.leave()
    elif isinstance(error, TrialPruned):
        epochs = run.metrics()
        names = ("val_accuracy", "val_loss")
        last = {name: None if epochs.empty else float(epochs[name].iloc[-1]) for name in names}
        run.finish("pruned", epochs=len(epochs), **last)
        run.log.info("%s", error)
    elif isinstance(error, KeyboardInterrupt):
        run.finish("interrupted")
    else:
        run.finish("failed", error=f"{type(error).__name__}: {error}")


def train(config: RunConfig, run: Run) -> float | tuple[float, float]:
    """A single run, outside of Hydra."""
    with recorded(run):
        job = prepare(config, run)
    fitted: list[Fitted] | BaseException
    try:
        [(_, fitted)] = fit_together([job])
    except BaseException as error:  # noqa: BLE001 - the last stage records it and raises it
        fitted = error
    return finish(job, fitted)


# How a run ends


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """An exception in this context ends the run, and is written to its result.json."""
    try:
        yield
    except BaseException as error:
        record_end(run, error)
        run.close()
        raise
