"""model=auto: a network, its cut and its input size, chosen by what they are worth on a sample of the training images.

A network runs once over the sample for each image size. Its maps give the features of many cuts, and ridge regression
scores each in closed form. Validation and test images are never read.
"""

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tuner import InputError
from tuner.bank import features
from tuner.bank.ridge import leave_one_out
from tuner.cache_files import Cache
from tuner.config import ModelConfig, RunConfig, argument_errors
from tuner.data import Data
from tuner.device import Batches, repeatable, send, wait
from tuner.files import replacing
from tuner.networks.backbone import Backbone, block_shapes
from tuner.networks.blocks import Pool
from tuner.networks.weights import at_hand
from tuner.rules import seconds

log = logging.getLogger("tuner.train")
AUTO = "auto"
KEYS = ("name", "weights", "image_size", "last_block", "pool")  # which may be auto
SIZES = (64, 128, 224)  # pixels
POOLS = (1, 2, 4)
STRIDE = 8  # pixels of the input for one position of a map, at least: maps of earlier blocks are large and weak
FEATURES = 16_384  # the most of a candidate
FEWEST, MOST = 200, 600  # images of the sample
SHARE = 6  # the first pass may take a sixth of the budget
WARM_UP, TIMED = 4, 32  # images
SHOWN = 8  # candidates in the log
SCREENED = 400  # images of the sample on which a search judges a cut
FORMAT = 2  # raise it if the same inputs would give another choice


_speed: dict[tuple[Any, ...], float] = {}  # network, size, device -> multiply-adds per second, as measured


@dataclass(frozen=True)
class Candidate:
    """A way to make features, and what it is worth.

    values: of `model`'s keys in KEYS.   features: their number.   gmacs: billions of multiply-adds for an image.
    accuracy: leave-one-out accuracy of ridge regression on the sample.   error: its standard error.
    loss: mean squared error of the same predictions, which decides between equal accuracies.
    bank_seconds: predicted time for the features of all images.
    chosen: whether it is the one; as_good: whether it is at most one standard error of the difference below the best.
    """

    values: Mapping[str, Any]
    features: int
    gmacs: float
    accuracy: float
    error: float
    loss: float
    bank_seconds: float
    as_good: bool = False
    chosen: bool = False

    @property
    def name(self) -> str:
        """Such as "vgg16 block3+block4, pool 2, 64 px"."""
        block, pool = self.values["last_block"], self.values["pool"]
        blocks, map_size = block if isinstance(block, str) else "+".join(block), f"pool {pool}" if pool else "whole map"
        return f"{self.values['name']} {blocks}, {map_size}, {self.values['image_size']} px"


@dataclass(frozen=True)
class Choice:
    """What was chosen, from what.

    candidates: all that were scored, the best first.   images: of the sample.   seconds: that it took.
    left_out: networks and sizes that did not fit into the budget.
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


def applied(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The config with chosen values of `model`. What follows them follows: model.frozen, and the size of images."""
    model = config.model
    frozen = values["last_block"] if model.frozen == model.last_block else model.frozen
    plain = dict(config.plain)
    if "model" in plain:
        plain["model"] = {**plain["model"], **values, "frozen": frozen}
    sized = with_size(config, values["image_size"])
    if sized is not config and "data" in plain:
        plain["data"] = {**plain["data"], "size": values["image_size"]}
    return dataclasses.replace(sized, model=dataclasses.replace(model, **values, frozen=frozen), plain=plain)


def with_size(config: RunConfig, size: int) -> RunConfig:
    """The config with images of this size, where data.size follows model.image_size and that is `auto`."""
    target = config.data.target
    if config.model.image_size != AUTO or target.keywords.get("size") != AUTO:
        return config
    target = dataclasses.replace(target, keywords={**target.keywords, "size": size})
    return dataclasses.replace(config, data=dataclasses.replace(config.data, target=target))


def name_of(config: RunConfig) -> str:
    """What the choice is called in a study. Trials that choose the same thing on the same data share it."""
    model, data = config.plain.get("model", {}), config.plain.get("data")
    own = json.dumps([data, {key: model.get(key) for key in KEYS}], sort_keys=True, default=str)
    return f"model {hashlib.sha256(own.encode()).hexdigest()[:16]}"


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
        "model": {key: getattr(model, key) for key in (*KEYS, "mean", "std", "budget")},
        "networks": networks,
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
        choice = _choose(model, networks, data, seed, device, dtype, sized)
        _remember(path, choice)
    for line in lines(choice):
        log.info("%s", line)
    return choice


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
        text.append(f"  not tried, for lack of time (model.budget): {', '.join(choice.left_out)}")
    why = "the best" if choice.chosen is best else "cheaper than the best, and within one standard error of it"
    text.append(f"model: {choice.chosen.name}, {why}")
    return text


@dataclass
class _Pass:
    """One run of a network over the sample, for the candidates of one image size.

    blocks: whose maps are used, in order.   groups: the blocks of each cut to try.
    """

    backbone: Backbone
    weights: str | None
    blocks: list[str]
    groups: list[list[str]]

    @property
    def name(self) -> str:
        return f"{self.backbone.name} at {self.backbone.image_size} px"

    @cached_property
    def macs(self) -> int:
        return self.backbone.macs()

    def network(self, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Images -> the maps of `blocks`, not pooled: a tuple, or one tensor."""
        *parts, _pool = self.backbone.frozen_part(dtype)
        return torch.nn.Sequential(*parts).to(device)


def _networks(model: ModelConfig) -> Iterator[tuple[str, str | None]]:
    """(network, weights) of the candidates."""
    if model.name != AUTO:
        found = dict(at_hand()).get(model.name, "DEFAULT") if model.weights == AUTO else model.weights
        yield model.name, found
        return
    for name, weights in at_hand():
        yield name, weights if model.weights == AUTO else model.weights


def _passes(model: ModelConfig, networks: Sequence[tuple[str, str | None]], seed: int) -> list[_Pass]:
    """The passes. Raises InputError if there is none."""
    passes, reason = [], ""
    for name, weights in networks:
        for size in SIZES if model.image_size == AUTO else (model.image_size,):
            try:
                passes.append(_pass(model, name, weights, size, seed))
            except InputError as error:  # this network has no such block, or can't be used at this size
                reason = str(error)
    if not passes:
        raise InputError(f"model=auto has nothing to choose from: {reason}")
    return passes


def _pass(model: ModelConfig, name: str, weights: str | None, size: int, seed: int) -> _Pass:
    if model.last_block == AUTO:
        last_of_side = {max(shape[1:] or (1,)): block for block, shape in block_shapes(name, size).items()}
        deep = [block for side, block in last_of_side.items() if side * STRIDE <= size]
        groups = [[block] for block in deep] + [list(pair) for pair in pairwise(deep)]
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
    return _Pass(backbone, weights, backbone.used, groups)


def predicted_seconds(
    backbone: Backbone, data: Data, *, cache: Cache, device: torch.device, dtype: torch.dtype
) -> float:
    """The time for the features of all images up to model.frozen; 0 for those that are cached."""
    parts = [
        part
        for part in (data.pool, data.test)
        if not features.is_cached(part, backbone, cache=cache, device=device, dtype=dtype)
    ]
    count = sum(map(len, parts))
    if not count:
        return 0.0
    name = (backbone.name, backbone.weights.key, backbone.image_size, device, dtype)
    if name not in _speed:
        one = _Pass(backbone, None, backbone.used, [backbone.used])
        _speed[name] = one.macs / _seconds_per_image(one, data, device, dtype)
    return count * backbone.macs() / _speed[name]


def score(
    backbone: Backbone, data: Data, *, seed: int, cache: Cache, device: torch.device, dtype: torch.dtype
) -> float:
    """The leave-one-out accuracy of ridge regression on a sample of the training images, for one cut."""
    samples = data.pool.rows(sample(data, SCREENED, seed))
    x = features.bank(samples.images, backbone, cache=cache, device=device, dtype=dtype).float().flatten(1)
    x = F.layer_norm(x, x.shape[1:])
    predicted, _ = leave_one_out(x @ x.T, samples.labels, len(data.classes))
    return float((predicted == samples.labels).double().mean())


def _choose(
    model: ModelConfig,
    networks: Sequence[tuple[str, str | None]],
    data: Data,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    sized: bool,
) -> Choice:
    start, budget = time.monotonic(), seconds(model.budget)
    passes = _cheapest_first(_passes(model, networks, seed), data, device, dtype)
    rows = sample(data, round(budget / SHARE / passes[0][1]), seed)
    samples = data.pool.rows(rows)
    labels = samples.labels
    scored: list[tuple[Candidate, torch.Tensor]] = []
    left_out, scoring = [], 0.0
    for one, per_image in passes:
        before = time.monotonic()
        if scored and before - start + len(rows) * per_image + scoring > budget:  # the cheapest is tried in any case
            left_out.append(f"{one.name} (about {len(rows) * per_image + scoring:,.0f} s)")
            continue
        size = one.backbone.image_size
        images = data.pool.read_at(samples.names, size) if sized and samples.names and data.pool.read_at else None
        grams = _grams(model, one, samples.images if images is None else images, device, dtype)
        extracted = time.monotonic()
        for candidate, gram in _candidates(one, grams, (extracted - before) / len(rows), data):
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
    passes: Sequence[_Pass], data: Data, device: torch.device, dtype: torch.dtype
) -> list[tuple[_Pass, float]]:
    """The passes with the predicted seconds for an image. A network is timed at one size; the others go by its MACs."""
    timed: dict[str, float] = {}  # network -> seconds for a multiply-add
    predicted = []
    for one in sorted(passes, key=lambda one: one.macs):
        name = one.backbone.name
        if name not in timed:
            timed[name] = _seconds_per_image(one, data, device, dtype) / one.macs
        predicted.append((one, timed[name] * one.macs))
    return sorted(predicted, key=lambda pair: pair[1])


def sample(data: Data, count: int, seed: int) -> torch.Tensor:
    """Row numbers of training images, int64: a share of each class, without copies.

    count: how many are wanted; there are FEWEST to MOST, unless the training images are fewer, or the classes many.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = data.train[torch.randperm(len(data.train), generator=generator)]
    _, digest = data.pool.digests[rows].unique(return_inverse=True)
    first = torch.full((int(digest.max()) + 1,), len(rows)).scatter_reduce(0, digest, torch.arange(len(rows)), "amin")
    rows = rows[first.sort().values]
    share = min(1.0, max(min(MOST, max(FEWEST, count)), 4 * len(data.classes)) / len(rows))
    labels = data.pool.labels[rows]
    parts = [rows[labels == label] for label in labels.unique()]
    return torch.cat([part[: math.ceil(share * len(part))] for part in parts]).sort().values


def _seconds_per_image(one: _Pass, data: Data, device: torch.device, dtype: torch.dtype) -> float:
    """The time of a pass, after a warm-up."""
    network, images = one.network(device, dtype), data.pool.images[data.train[:TIMED]]
    with torch.inference_mode(), repeatable(device):
        network(send(images[:WARM_UP], device))
        wait(device)
        start = time.perf_counter()
        network(send(images, device))
        wait(device)
    return (time.perf_counter() - start) / len(images)


def _grams(
    model: ModelConfig, one: _Pass, images: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> dict[tuple[str, int | None], torch.Tensor]:
    """For each block and pool: the products of the normalised features of each pair of images, float32 [N, N]."""
    network = one.network(device, dtype)
    parts: dict[tuple[str, int | None], list[torch.Tensor]] = {}
    pools = POOLS if model.pool == AUTO else (model.pool,)
    ways = [(name, k) for name in one.blocks for k in pools if _size(one.backbone, name, k)]

    @torch.inference_mode()
    def run(batch: torch.Tensor) -> None:
        with repeatable(device):
            maps = network(send(batch, device))
            maps = dict(zip(one.blocks, maps if isinstance(maps, tuple) else (maps,), strict=True))
            for name, k in ways:
                x = Pool(k, one.backbone.blocks[name].channels_last)(maps[name]).float()
                parts.setdefault((name, k), []).append(F.layer_norm(x, x.shape[1:]).cpu())

    for _ in Batches(one.backbone.batch_size(device), device)(run, images):
        pass
    return {way: (x := torch.cat(parts[way])) @ x.T for way in ways}


def _size(backbone: Backbone, block: str, pool: int | None) -> int:
    """The number of features of a block; 0 if its map is smaller than the pool, or if they are too many."""
    try:
        size = backbone.size_of(block, pool)
    except InputError:
        return 0
    return size if size <= FEATURES else 0


def _candidates(
    one: _Pass, grams: Mapping[tuple[str, int | None], torch.Tensor], per_image: float, data: Data
) -> Iterator[tuple[Candidate, torch.Tensor]]:
    """The cuts of a pass, not scored yet, and their products of features: those of joined blocks are a sum.

    per_image: seconds for an image, up to the pass's last block.
    """
    all_seconds = per_image * (len(data.pool) + len(data.test))
    for blocks in one.groups:
        for k in dict.fromkeys(k for _, k in grams):
            if not all((block, k) in grams for block in blocks):
                continue
            size = sum(one.backbone.size_of(block, k) for block in blocks)
            if size > FEATURES:
                continue
            macs = one.backbone.macs(blocks[-1])
            values = {
                "name": one.backbone.name,
                "weights": one.weights,
                "image_size": one.backbone.image_size,
                "last_block": blocks[0] if len(blocks) == 1 else blocks,
                "pool": k,
            }
            predicted = round(all_seconds * macs / one.macs, 1)
            gram = torch.stack([grams[block, k] for block in blocks]).sum(0)
            yield Candidate(values, size, round(macs / 1e9, 4), 0.0, 0.0, 0.0, predicted), gram


def _ranked(scored: Sequence[tuple[Candidate, torch.Tensor]], budget: float) -> list[Candidate]:
    """The candidates, the best first; marked are those as good as the best, and the chosen one.

    As good: the best is right more often by at most one standard error of that difference (after Breiman et al., CART,
    1984, section 3.4.3), which is smaller than that of an accuracy, as all are scored on the same images. Of those,
    the cheapest is chosen; features that take less time than the choice itself are all cheap, so there accuracy counts.
    """
    ordered = sorted(scored, key=lambda pair: (-pair[0].accuracy, pair[0].loss))
    best = ordered[0][1].double()
    marked = []
    for candidate, correct in ordered:
        difference = best - correct.double()
        error = float(difference.std(correction=0)) / math.sqrt(len(difference))
        marked.append(dataclasses.replace(candidate, as_good=float(difference.mean()) <= error))
    chosen = min((c for c in marked if c.as_good), key=lambda c: max(c.bank_seconds, budget))  # the first of several
    return [dataclasses.replace(candidate, chosen=candidate is chosen) for candidate in marked]
