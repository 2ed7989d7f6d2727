"""The config of a run: parsed and checked once, from what Hydra composed to typed objects; and what a `_target_` names.

conf/ has the defaults that a command uses. Those here are for configs of earlier versions, which lack newer keys.
"""

import functools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import hydra
import yaml
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tuner import InputError, earlier, targets, yaml_file
from tuner.cache_files import Cache
from tuner.config_reference import CONF as CONF
from tuner.files import replacing
from tuner.rules import (
    BELOW_ONE,
    COUNT,
    DURATION,
    FOLDER_NAME,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SIZE,
    TEXT,
    Rule,
    check_fields,
    number,
    one_of,
    or_null,
    shown,
    whole,
)

log = logging.getLogger("tuner.config")
PATHS = (  # that may be relative
    ("model", "weights"),
    *(("data", key) for key in ("root", "path", "test_path", "folder", "exclude")),
)
REFERENCE = re.compile(r"\$\{(?!hydra\.)[\w.]+\}")  # to another key
IN_A_SINGLE_RUN = one_of("auto", True, False)
PRECISION = one_of("auto", "bf16", "fp32")


@dataclass(frozen=True)
class Target:
    """The part of a config group that its `_target_`, a function or class, takes as arguments.

    keywords: `_target_`, `_partial_` and the keyword arguments.
    """

    group: str
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """Call the target. Raises InputError for a target that is not trusted, and for arguments that it refuses."""
        if not self.keywords:
            raise InputError(f"the config has no group {self.group}")
        if "_target_" not in self.keywords:
            raise InputError(f"{self.group}._target_ has no default; give it, as in {self.group}._target_=VALUE")
        keywords = dict(self.keywords)
        keywords["_target_"] = earlier.target(str(keywords["_target_"]))
        trusted = targets.of_group(self.group)
        with argument_errors(self.group), hydra.utils.execution_whitelist(trusted, reset=True):
            try:
                return hydra.utils.instantiate(keywords, _convert_="all")
            except InstantiationException as error:
                reason = " ".join(str(error).split())
                if "whitelist" in reason and (name := re.search(r"Target '(.*?)'", reason)):
                    known = f"choose one of {names}, or " if (names := ", ".join(targets.GROUPS[self.group])) else ""
                    reason = (
                        f"{self.group}: _target_ {name[1]!r} is not on the list of what a config may call; "
                        f"{known}name packages you trust in TUNER_TRUST, as in "
                        "TUNER_TRUST='mypackage.*'"
                    )
                raise InputError(reason) from error


@contextmanager
def argument_errors(group: str) -> Iterator[None]:
    """Turn the TypeErrors and ValueErrors that a config group's arguments cause into InputErrors."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{group}: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class HeadConfig:
    """`model.head`; its values are checked by tuner.training.heads."""

    width: Any = 512
    depth: Any = None
    dropout: Any = 0.3


@dataclass(frozen=True)
class ModelConfig:
    """`model`; its values are checked by tuner.networks.backbone, or chosen by tuner.training.model_choice."""

    name: Any
    weights: Any
    image_size: Any
    last_block: Any
    frozen: Any
    pool: Any
    mean: Any = None
    std: Any = None
    budget: Annotated[float | str | None, or_null(DURATION)] = None
    screen: Annotated[float | str | None, or_null(DURATION)] = None
    head: HeadConfig = HeadConfig()

    def __post_init__(self) -> None:
        check_fields(self, "model.")


@dataclass(frozen=True)
class DataConfig:
    """`data`: how many views of an image are used, a list of images to leave out, and the target that loads the set."""

    target: Target = Target("data")
    views: Annotated[int, whole(1, 1000)] = 1
    test_views: Annotated[int, Rule(lambda v: v in (1, 2), "1, or 2 for the mirror image, too")] = 1
    exclude: Annotated[str | None, or_null(TEXT)] = None
    folds: Annotated[int | None, or_null(whole(2, 100))] = None

    def __post_init__(self) -> None:
        check_fields(self, "data.")


@dataclass(frozen=True)
class OptimizerConfig:
    """`optimizer`: the learning rates of trained blocks, and a class of torch.optim with its keywords."""

    target: Target = Target("optimizer")
    backbone_lr_scale: Annotated[float, POSITIVE] = 0.1
    backbone_lr_decay: Annotated[float, number(lambda v: 0 < v <= 1, "more than 0 and at most 1")] = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "optimizer.")
        if keywords := self.target.keywords:
            POSITIVE.check("optimizer.lr", keywords.get("lr"))
            or_null(NOT_NEGATIVE).check("optimizer.weight_decay", keywords.get("weight_decay"))


@dataclass(frozen=True)
class FinalConfig:
    """`final`: the end of a search. `epochs` is given in the run that retrains its best trial, and only there."""

    seeds: Annotated[int, whole(0, 1000)] = 3
    default: Annotated[bool, one_of(True, False)] = True
    ensemble: Annotated[int, whole(0, 100)] = 0
    epochs: Annotated[int | None, or_null(COUNT)] = None
    temperature: Annotated[float | None, or_null(number(lambda v: 0.01 <= v <= 100, "from 0.01 to 100"))] = None

    def __post_init__(self) -> None:
        check_fields(self, "final.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run's config. conf/train.yaml says what each key means; `plain` is all of it as dicts, lists and values."""

    seed: Annotated[int, SEED]
    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: Target = Target("scheduler")
    loss: Target = Target("loss")
    augment: Target = Target("augment")
    logger: Target = Target("logger")
    final: FinalConfig = FinalConfig()
    epochs: Annotated[int, COUNT] = 25
    batch_size: Annotated[int, COUNT] = 128
    label_smoothing: Annotated[float, BELOW_ONE] = 0.1
    grad_clip: Annotated[float | None, or_null(number(lambda v: v > 0, "more than 0"))] = None
    keep: Annotated[str, one_of("last", "best")] = "last"
    patience: Annotated[int | None, or_null(COUNT)] = None
    precision: Annotated[str, PRECISION] = "auto"
    device: Annotated[str, TEXT] = "auto"
    cache_dir: Annotated[str, TEXT] = "~/.cache/tuner"
    cache_limit: Annotated[str | None, or_null(SIZE)] = None
    artifacts: Annotated[str | None, or_null(TEXT)] = None
    objective: Annotated[str, TEXT] = "accuracy"
    class_weights: Annotated[str | None, Rule(lambda v: v in (None, "balanced"), "balanced, or null")] = None
    warm_start: Annotated[str | None, or_null(TEXT)] = None
    head_first: Annotated[int, whole(0, 10**6)] = 0
    micro_batch: Annotated[int | None, or_null(COUNT)] = None
    recompute: Annotated[bool, one_of(True, False)] = False
    study: Annotated[str | None, or_null(FOLDER_NAME)] = None
    test: Annotated[bool | str, IN_A_SINGLE_RUN] = "auto"
    plots: Annotated[bool | str, IN_A_SINGLE_RUN] = "auto"
    plain: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, "")
        if self.patience is not None and self.keep == "last":
            raise InputError(
                f"patience={self.patience} ends a run after its best epoch, so it needs keep=best, not keep=last"
            )
        whole = isinstance(self.model.last_block, list) or self.model.frozen == self.model.last_block
        if whole and (self.head_first or self.recompute):
            given = f"head_first={self.head_first}" if self.head_first else "recompute=true"
            raise InputError(f"{given} is for blocks that are trained: set model.frozen below model.last_block")
        if self.warm_start is not None and self.head_first:
            raise InputError(
                f"warm_start={self.warm_start} brings a trained head: leave head_first={self.head_first} at 0"
            )
        if self.final.ensemble and not whole:
            raise InputError(
                f"final.ensemble={self.final.ensemble} averages heads over the same features, so no block may be "
                f"trained: leave model.frozen at model.last_block, or final.ensemble at 0"
            )
        if self.data.folds:
            self._check_folds(whole)
        epochs, seeds = self.final.epochs, self.final.seeds
        if epochs is not None and not (epochs <= self.epochs and seeds):
            raise InputError(
                f"final.epochs={epochs} must be at most epochs={self.epochs}, and final.seeds={seeds} at least 1"
            )

    def _check_folds(self, whole: bool) -> None:
        """Raises InputError for options that contradict data.folds.   whole: whether only a head is trained."""
        rules = {
            "is for heads on cached features: set model.frozen to model.last_block": not whole,
            "needs keep=last: the best epoch of each fold would be chosen by the images that score it": self.keep
            != "last",
            f"can't start from warm_start={self.warm_start}, which has seen the images of all folds": self.warm_start,
        }
        for text, broken in rules.items():
            if broken and self.final.epochs is None:
                raise InputError(f"data.folds={self.data.folds} {text}")

    @property
    def cache(self) -> Cache:
        """The cache that `cache_dir` and `cache_limit` describe."""
        return Cache.of(self.cache_dir, self.cache_limit)


def parse(config: DictConfig | Mapping[str, Any]) -> RunConfig:
    """A composed config as typed objects.

    Raises InputError for the first value that is missing or breaks its rule, and for a key by the name that it had in
    an earlier version. Further keys at the top are allowed: a search, or the user, may have added them.
    """
    plain = config
    if isinstance(config, DictConfig):
        plain = _resolved(config)
    earlier.refuse_old_names(
        f"{group!s}.{key}" for group, values in plain.items() if isinstance(values, Mapping) for key in values
    )
    return _section(RunConfig, plain, "")


def _resolved(config: DictConfig) -> dict[str, Any]:
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise InputError(f"{missing[0]} has no default; give it, as in {missing[0]}=VALUE")
        plain: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"the config cannot be resolved: {' '.join(str(error).split())}") from error
    return plain


def _section(section: Any, values: Any, prefix: str) -> Any:
    """An object of a dataclass above, from its part of the config.   prefix: of its keys, such as "model."."""
    if not isinstance(values, Mapping):
        raise InputError(f"{prefix.rstrip('.')}={shown(values)} must be a group of keys")
    types = get_type_hints(section)
    known = {key for key in types if key not in ("target", "plain")}
    given: dict[str, Any] = {}
    for key in (key for key in values if key in known):
        if types[key] is Target:
            if values[key] is not None and not isinstance(values[key], Mapping):
                raise InputError(f"{key}={shown(values[key])} must be a group of keys")
            given[key] = Target(key, values[key] or {})
        else:
            given[key] = (
                _section(types[key], values[key], f"{prefix}{key}.") if is_dataclass(types[key]) else values[key]
            )
    others = {key: value for key, value in values.items() if key not in known}
    if section is RunConfig:
        given["plain"] = values
    elif "target" in types:
        given["target"] = Target(prefix.rstrip("."), others)
    elif others:
        first = next(iter(others))
        raise InputError(f"{prefix}{first} is not a key of the config; the keys are {', '.join(sorted(known))}")
    for required in fields(section):
        if required.name not in given and required.default is MISSING and required.default_factory is MISSING:
            raise InputError(f"{prefix}{required.name} has no default; give it, as in {prefix}{required.name}=VALUE")
    return section(**given)


def of_run(folder: Path, *groups: str) -> RunConfig:
    """The config of a finished run, as parse_part() reads it. Raises InputError if it is missing or damaged."""
    config = written(folder)
    try:
        return parse_part(config, *groups)
    except InputError as error:
        raise InputError(f"the config of {folder} cannot be used: {error}") from error


def parse_part(config: DictConfig, *groups: str) -> RunConfig:
    """Seed, precision, epochs, model, views and these groups of a run's config; other keys have their defaults.

    Only these are resolved. Others may refer to what only the running job knew, as ${now:...} and ${hydra:...} do.
    Raises InputError for the first value that is missing or breaks its rule.
    """
    part: dict[str, Any] = {}
    try:
        for key in ("seed", "precision", "epochs", "model", *groups):
            if key in config:
                value = config[key]
                part[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        if "data" not in groups:
            views = {key: OmegaConf.select(config, f"data.{key}") for key in ("views", "test_views")}
            part["data"] = {key: value for key, value in views.items() if value is not None}
    except OmegaConfBaseException as error:
        raise InputError(f"the config cannot be resolved: {' '.join(str(error).split())}") from error
    return parse(part)


def written(folder: Path) -> DictConfig:
    """A run's applied config, with today's key names, no cache_limit, and paths that are valid in any working folder.

    Raises InputError if it is missing or damaged.
    """
    path = earlier.config_file(folder)
    if path is None:
        raise InputError(f"{folder} has no conf/config.yaml: keep a model in the folder of its run")
    plain = yaml_file.mapping(path)
    if not {"model", "seed", "precision"} <= plain.keys():
        raise InputError(f"{path} is not the config of a run: it must have model, seed and precision")
    earlier.rename_keys(plain)
    for key in ("hydra", "name", "study"):  # how a new run would be started
        plain.pop(key, None)
    plain["cache_limit"] = None  # no run folder decides what is removed from this machine's cache
    if isinstance(plain.get("data"), dict) and "cache_limit" in plain["data"]:
        plain["data"]["cache_limit"] = "${cache_limit}"
    started = start_folder(folder) if path.parent.name == ".hydra" else None
    try:
        return OmegaConf.create(with_absolute_paths(plain, started) if started else plain)
    except (OmegaConfBaseException, ValueError) as error:
        raise InputError(f"{path} is not the config of a run: {' '.join(str(error).split())}") from error


def with_values(config: DictConfig, lines: Sequence[str]) -> DictConfig:
    """A config with values set, each by a line KEY=VALUE. Raises InputError for a key that it does not have."""
    if not_values := [line for line in lines if "=" not in line or line[0] in "+~"]:
        raise InputError(f"{not_values[0]} must be KEY=VALUE, with a key of the run's config")
    try:
        OmegaConf.set_struct(config, True)
        return cast(DictConfig, OmegaConf.merge(config, OmegaConf.from_dotlist(list(lines))))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise InputError(f"{' '.join(lines)}: {str(error).splitlines()[0]}") from error


def start_folder(folder: Path) -> Path | None:
    """The folder in which a run was started, from its .hydra/hydra.yaml; None without that file."""
    hydra_yaml = folder / ".hydra" / "hydra.yaml"
    if not hydra_yaml.is_file():
        return None
    try:
        return Path(yaml_file.mapping(hydra_yaml)["hydra"]["runtime"]["cwd"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{hydra_yaml} does not say where the run was started: it has no hydra.runtime.cwd") from error


def with_absolute_paths(plain: Mapping[str, Any], start: Path) -> dict[str, Any]:
    """A copy of a config with its existing relative paths resolved against the start directory."""
    copied = dict(plain)
    for group, key in PATHS:
        value = copied[group].get(key) if isinstance(copied.get(group), Mapping) else None
        if isinstance(value, str) and _exists(path := start / value):
            copied[group] = {**copied[group], key: str(path)}
    return copied


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long, for example
        return False


@functools.cache
def _root() -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(OmegaConf.load(CONF / "train.yaml"), resolve=False)
    return {key: plain[key] for key in ("name", "study", "hydra")}


def applied_yaml(composed: DictConfig, config: RunConfig) -> str:
    """A run's config as YAML for --config-name, with absolute paths, and run folders as in train.yaml.

    References to other keys stay; what resolvers such as ${now:...} and ${oc.env:...} gave is written out.
    """
    raw = OmegaConf.to_container(composed, resolve=False)
    applied = with_absolute_paths(_applied(raw, config.plain), Path.cwd())
    final = {**applied.get("final", {}), "epochs": None, "temperature": None}
    return OmegaConf.to_yaml(OmegaConf.create({**applied, "final": final, **_root()}))


def _applied(raw: Any, resolved: Any) -> Any:
    if isinstance(resolved, Mapping):
        return {key: _applied(raw[key] if isinstance(raw, Mapping) else None, item) for key, item in resolved.items()}
    if isinstance(resolved, list):
        return [_applied(None, item) for item in resolved]
    if isinstance(raw, str) and REFERENCE.fullmatch(raw):
        return raw
    return resolved.replace("${", r"\${") if isinstance(resolved, str) else resolved  # ${ is literal text here


def record_values(folder: Path, values: Mapping[str, Any]) -> None:
    """Set values in the applied config of a run, if it is written: dotted key -> what a run has chosen itself."""
    path = folder / "conf" / "config.yaml"
    if path.is_file():
        config = OmegaConf.create(yaml_file.mapping(path))
        for key, value in values.items():
            OmegaConf.update(config, key, value)
        with replacing(path) as file:
            file.write(OmegaConf.to_yaml(config).encode())


def config_options(hydra: Mapping[str, Any]) -> list[str]:
    """The options --config-dir and --config-name that Hydra was given, from a run's .hydra/hydra.yaml.

    Raises InputError if that does not have them.
    """
    try:
        folders = [s["path"] for s in hydra["runtime"]["config_sources"] if s["provider"] == "command-line"]
        name = hydra["job"]["config_name"]
    except (KeyError, TypeError) as error:
        raise InputError(f"hydra.yaml must have the configs of the run, but lacks {error}") from error
    if not all(isinstance(text, str) for text in (*folders, name or "")):
        raise InputError(f"hydra.yaml must name the configs of the run as text, not {[*folders, name]}")
    options = [text for path in folders for text in ("--config-dir", path)]
    return options + ([] if name in ("train", None) else ["--config-name", name])
