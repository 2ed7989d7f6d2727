"""model=auto: a network, its cut and its input size, chosen by what they are worth on a sample of the training images.

Validation and test images are never read. tuner.bank.cuts makes the features and scores them.
"""

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from tuner import InputError
from tuner.bank.cuts import TIMED, Candidate, Pass, sample
from tuner.bank.ridge import leave_one_out
from tuner.cache_files import Cache
from tuner.config import ModelConfig, RunConfig, argument_errors
from tuner.data import Data
from tuner.files import replacing
from tuner.networks.architectures import check_name
from tuner.networks.backbone import LARGEST, Backbone, block_shapes
from tuner.networks.weights import at_hand, resolve
from tuner.rules import TEXT, Rule, or_null, seconds, shown, whole

log = logging.getLogger("tuner.train")
AUTO = "auto"
KEYS = ("name", "weights", "image_size", "last_block", "pool")  # which may be auto
SIZES = (64, 128, 224)  # pixels
POOLS = (1, 2, 4)
STRIDE = 8  # pixels of the input for one position of a map, at least: maps of earlier blocks are large and weak
FEATURES = 16_384  # the most of a candidate
SHARE = 6  # the first pass may take a sixth of the budget
BUDGET = 60.0  # seconds, without model.budget
SHOWN = 8  # candidates in the log
FORMAT = 4  # raise it if the same inputs would give another choice


@dataclass(frozen=True)
class Choice:
    """What was chosen, from what.

    candidates: all that were scored, the best first.   images: of the sample.   seconds: that it took.
    left_out: networks and sizes that did not fit into the budget, or whose weights can't be read; with the reason.
    """

    candidates: Sequence[Candidate]
    images: int
    seconds: float
    left_out: Sequence[str]

    @property
    def chosen(self) -> Candidate:
        """The one that was chosen."""
        return next(candidate for candidate in self.candidates if candidate.chosen)

    def as_json(self) -> dict[str, Any]:
        """For result.json and the cache."""
        return dataclasses.asdict(self)


def from_json(plain: Mapping[str, Any]) -> Choice:
    """The choice that as_json() gave. Raises KeyError, TypeError or ValueError for anything else."""
    choice = Choice(**{**plain, "candidates": [Candidate(**values) for values in plain["candidates"]]})
    if [candidate.chosen for candidate in choice.candidates].count(True) != 1 or set(choice.chosen.values) != {*KEYS}:
        raise ValueError("it must have one chosen candidate")
    return choice


def is_auto(model: ModelConfig) -> bool:
    """Whether something of `model` is to be chosen."""
    return any(getattr(model, key) == AUTO for key in KEYS)


def chosen_values(model: ModelConfig, choice: "Choice | None") -> dict[str, Any]:
    """The values of the keys of `model` that were `auto`."""
    values = choice.chosen.values if choice else {}
    return {key: value for key, value in values.items() if getattr(model, key) == AUTO}


def applied(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The config with chosen values of `model`. What follows them follows: model.frozen, and the size of images."""
    model = dataclasses.replace(config.model, **values)
    if config.model.frozen == config.model.last_block:
        model = dataclasses.replace(model, frozen=model.last_block)
    plain = dict(config.plain)
    if "model" in plain:
        plain["model"] = {**plain["model"], **values, "frozen": model.frozen}
    sized = with_size(config, model.image_size)
    if sized is not config and "data" in plain:
        plain["data"] = {**plain["data"], "size": model.image_size}
    return dataclasses.replace(sized, model=model, plain=plain)


def with_size(config: RunConfig, size: int) -> RunConfig:
    """The config with images of this size, where data.size follows model.image_size and that is `auto`."""
    target = config.data.target
    if config.model.image_size != AUTO or target.keywords.get("size") != AUTO:
        return config
    target = dataclasses.replace(target, keywords={**target.keywords, "size": size})
    return dataclasses.replace(config, data=dataclasses.replace(config.data, target=target))


def choose(
    model: ModelConfig,
    data: Data,
    *,
    seed: int,
    cache: Cache,
    device: torch.device,
    dtype: torch.dtype,
    sized: bool = False,
) -> Choice:
    """Choose what is `auto`; log what was chosen, and why. A choice is remembered in CACHE/choices.

    sized: image files are decoded at the size of the network, so they are read again for each size.
    dtype: of the features.   seed: of the sample and of random weights.
    Raises InputError if the fixed values leave nothing to choose from.
    """
    networks = list(_networks(model))
    key = {
        "format": FORMAT,
        "model": {key: getattr(model, key) for key in (*KEYS, "frozen", "mean", "std", "budget")},
        "networks": [(name, _weights_key(name, weights, seed)) for name, weights in networks],
        "seed": seed,
        "device": device.type,
        "dtype": str(dtype),
        "torch": torch.__version__,
        "images": data.hashes["train"],
        "sized": sized,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
    path = cache.folder / "choices" / f"{name}.json"
    choice = _remembered(path)
    if choice is None:
        with _locked(path):  # or trials that start together would all choose, each with a share of the processor
            choice = _remembered(path)
            if choice is None:
                choice = _choose(model, networks, data, seed, device, dtype, sized)
                _remember(path, choice)
    for line in lines(choice):
        log.info("%s", line)
    return choice


def check_fixed(model: ModelConfig) -> None:
    """Raises InputError for a fixed value that no network can have."""
    rules = {
        "name": TEXT,
        "weights": or_null(TEXT),
        "image_size": whole(1, LARGEST),
        "pool": or_null(whole(1)),
        "last_block": Rule(_is_blocks, "a block, or a list of blocks"),
    }
    for key, rule in rules.items():
        if getattr(model, key) != AUTO:
            rule.check(f"model.{key}", getattr(model, key))


def _is_blocks(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(block, str) for block in value)
    )


def _weights_key(name: str, weights: str | None, seed: int) -> str | None:
    """What identifies the weights; None if they can't be used, which is reported later."""
    try:
        check_name(name)
        return resolve(name, weights, seed).key
    except InputError:
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock beside the file, if the file system has locks and can be written."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        log.warning("model: %s can't be locked (%s): runs that start together may choose at the same time", path, error)
    try:
        yield
    finally:
        lock.release()


def _remembered(path: Path) -> Choice | None:
    try:
        choice = from_json(json.loads(path.read_text("utf-8")))
        log.info("model: chosen before, in %s", path)
        return choice
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("model: the choice in %s cannot be read (%s): choosing again", path, error)
        return None


def _remember(path: Path, choice: Choice) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(choice.as_json(), indent=1).encode())
    except OSError as error:
        log.warning("model: the choice is not remembered, as %s cannot be written (%s)", path.parent, error.strerror)


def lines(choice: Choice) -> list[str]:
    """The choice in words."""
    best = choice.candidates[0]
    candidates, images = len(choice.candidates), f"{choice.images:,} training images"
    text = [f"model: {candidates} candidates, scored on {images} in {choice.seconds:.0f} s"]
    shown = [*choice.candidates[:SHOWN], *([] if choice.chosen in choice.candidates[:SHOWN] else [choice.chosen])]
    width = max(len(candidate.name) for candidate in shown)
    for candidate in shown:
        mark = "  <- chosen" if candidate.chosen else ""
        text.append(
            f"  {candidate.name:{width}}  {candidate.accuracy:.3f} +- {candidate.error:.3f}  "
            f"{candidate.bank_seconds:6.0f} s for all images{mark}"
        )
    if choice.left_out:
        text.append(f"  not tried: {', '.join(choice.left_out)}")
    better = "with a smaller squared error" if choice.chosen.loss < best.loss else "cheaper"
    why = "the best" if choice.chosen is best else f"{better}, and within one standard error of the best"
    text.append(f"model: {choice.chosen.name}, {why}")
    return text


def _networks(model: ModelConfig) -> Iterator[tuple[str, str | None]]:
    """(network, weights) of the candidates."""
    if model.name != AUTO:
        found = dict(at_hand()).get(model.name, "DEFAULT") if model.weights == AUTO else model.weights
        yield model.name, found
        return
    for name, weights in at_hand():
        yield name, weights if model.weights == AUTO else model.weights


def _passes(model: ModelConfig, networks: Sequence[tuple[str, str | None]], seed: int) -> list[Pass]:
    """The passes. Raises InputError if there is none."""
    passes: list[Pass] = []
    reasons: list[str] = []
    for name, weights in networks:
        for size in SIZES if model.image_size == AUTO else (model.image_size,):
            try:
                passes.append(_pass(model, name, weights, size, seed))
            except InputError as error:  # this network has no such block, or can't be used at this size
                reasons.append(str(error))
    if not passes:
        raise InputError(f"model=auto has nothing to choose from: {'; '.join(dict.fromkeys(reasons))}")
    return passes


def _pass(model: ModelConfig, name: str, weights: str | None, size: int, seed: int) -> Pass:
    if model.last_block == AUTO:
        shapes = block_shapes(name, size)
        last_of_side = {max(shape[1:]) if len(shape) == 3 else 1: block for block, shape in shapes.items()}
        deep = [block for side, block in last_of_side.items() if side * STRIDE <= size]
        groups = [[block] for block in deep] + [list(pair) for pair in pairwise(deep)]
        if model.frozen != AUTO:  # blocks above it are trained, which goes with one last block
            if model.frozen is not None and model.frozen not in list(shapes):
                raise InputError(f"model.frozen={shown(model.frozen)} is not a block of {name}")
            order = list(shapes)
            below = -1 if model.frozen is None else order.index(model.frozen)
            groups = [[block] for block in deep if order.index(block) > below]
        if not groups:
            above = "" if model.frozen == AUTO else f" above model.frozen={shown(model.frozen)}"
            raise InputError(f"{name} has no block{above} to use at model.image_size={size}")
    else:
        groups = [[model.last_block] if isinstance(model.last_block, str) else list(model.last_block)]
    blocks = list(dict.fromkeys(block for group in groups for block in group))
    with argument_errors("model"):
        backbone = Backbone(
            name,
            weights=weights,
            image_size=size,
            last_block=blocks,
            frozen=blocks,
            pool=1,
            mean=model.mean,
            std=model.std,
            seed=seed,
        )
    one = Pass(backbone, weights, groups)
    if model.pool != AUTO:
        one.groups = [group for group in groups if all(one.size(block, model.pool) for block in group)]
        if not one.groups:
            raise InputError(f"no map is as large as model.pool={model.pool} ({one.name})")
    return one


def _choose(
    model: ModelConfig,
    networks: Sequence[tuple[str, str | None]],
    data: Data,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    sized: bool,
) -> Choice:
    start, budget = time.monotonic(), BUDGET if model.budget is None else seconds(model.budget)
    left_out: list[str] = []
    passes = _cheapest_first(_passes(model, networks, seed), data, device, dtype, left_out)
    rows = sample(data, round(budget / SHARE / passes[0][1]), seed)
    samples = data.pool.rows(rows)
    labels = samples.labels
    pools = POOLS if model.pool == AUTO else (model.pool,)
    most = FEATURES if AUTO in (model.pool, model.last_block) else math.inf
    scored: list[tuple[Candidate, torch.Tensor]] = []
    scoring = 0.0
    for one, per_image in passes:
        before = time.monotonic()
        if scored and before - start + len(rows) * per_image + scoring > budget:  # the cheapest is tried in any case
            left_out.append(f"{one.name} (about {len(rows) * per_image + scoring:,.0f} s, beyond model.budget)")
            continue
        size = one.backbone.image_size
        images = data.pool.read_at(samples.names, size) if sized and samples.names and data.pool.read_at else None
        images = samples.images if images is None else images
        grams, per_image = one.grams(images, pools, most=most, device=device, dtype=dtype)
        extracted, all_seconds = time.monotonic(), per_image * (len(data.pool) + len(data.test))
        for candidate, gram in one.candidates(grams, most=most, all_seconds=all_seconds):
            if scored and time.monotonic() - start > budget:  # with many classes, scoring takes longest
                left_out.append(f"{candidate.name} and the cuts after it (beyond model.budget)")
                break
            predicted, loss = leave_one_out(gram, labels, len(data.classes))
            correct = predicted == labels
            accuracy = float(correct.double().mean())
            error = math.sqrt(accuracy * (1 - accuracy) / len(correct))
            scored.append((dataclasses.replace(candidate, accuracy=accuracy, error=error, loss=loss), correct))
        scoring = time.monotonic() - extracted
        log.info("model: %s tried, %.0f s of %.0f", one.name, time.monotonic() - start, budget)
    if not scored:
        reason = f"no map is as large as model.pool={model.pool}, with at most {FEATURES:,} features"
        raise InputError(f"model=auto has nothing to choose from: {reason}")
    return Choice(_ranked(scored, budget), len(rows), round(time.monotonic() - start, 1), left_out)


def _cheapest_first(
    passes: Sequence[Pass], data: Data, device: torch.device, dtype: torch.dtype, left_out: list[str]
) -> list[tuple[Pass, float]]:
    """The passes with the predicted seconds for an image. A network is timed at one size; the others go by its MACs.

    left_out: gets the networks whose weights can't be read.   Raises InputError if that is all of them.
    """
    timed: dict[str, float] = {}  # network -> seconds for a multiply-add
    predicted = []
    unreadable: dict[str, InputError] = {}
    for one in sorted(passes, key=lambda one: one.macs):
        name = one.backbone.name
        try:
            if name not in timed and name not in unreadable:
                timed[name] = one.seconds_per_image(data.pool.images[data.train[:TIMED]], device, dtype) / one.macs
        except InputError as error:
            unreadable[name] = error
        if name in timed:
            predicted.append((one, timed[name] * one.macs))
    left_out += [f"{name} ({error})" for name, error in unreadable.items()]
    if not predicted:
        raise next(iter(unreadable.values()))
    return sorted(predicted, key=lambda pair: pair[1])


def _ranked(scored: Sequence[tuple[Candidate, torch.Tensor]], budget: float) -> list[Candidate]:
    """The candidates, the best first. Those as good as the best are marked, and so is the chosen one.

    As good: the best is right more often by at most one standard error of that difference (after Breiman et al., CART,
    1984, section 3.4.3), which is smaller than that of an accuracy, as all are scored on the same images. Of those,
    the cheapest is chosen. Features that take less time than the choice itself are all equally cheap. Between equals
    the squared error decides, which is less a matter of luck than the accuracy on a few hundred images.
    """
    ordered = sorted(scored, key=lambda pair: (-pair[0].accuracy, pair[0].loss))
    best = ordered[0][1].double()
    marked = []
    for candidate, correct in ordered:
        difference = best - correct.double()
        error = float(difference.std()) / math.sqrt(len(difference))
        marked.append(dataclasses.replace(candidate, as_good=float(difference.mean()) <= error + 1e-12))
    chosen = min((c for c in marked if c.as_good), key=lambda c: (max(c.bank_seconds, budget), c.loss))
    return [dataclasses.replace(candidate, chosen=candidate is chosen) for candidate in marked]
