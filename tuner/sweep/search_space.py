"""The search space: from Hydra's override syntax to Optuna's distributions, and from parameters to overrides."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, Quote, QuotedString, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)

from tuner import InputError
from tuner.sweep import hydra_private


@dataclass
class SearchSpace:
    """The parameters that a sweep searches, and the overrides that all trials share.

    distributions: key with its + or ++, as an override needs it -> distribution.
    literals: the same key -> {text in Optuna: value}, for choices that are lists or dicts.
    fixed: key without + or ++ -> override, the same in every trial.
    deletions: overrides that delete a key or a group (~KEY).
    """

    distributions: dict[str, BaseDistribution] = field(default_factory=dict)
    literals: dict[str, dict[str, Any]] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    deletions: list[str] = field(default_factory=list)

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """The overrides of a trial. Hydra reads exactly the values of `params` from them, strings as strings."""
        lines = [f"{name}={self._text(name, value)}" for name, value in params.items()]
        return self.deletions + lines + list(self.fixed.values())  # a deleted key may be added again

    def fixed_values(self) -> dict[str, Any]:
        """The values of the overrides that all trials share, by their keys with + or ++."""
        parsed = hydra_private.parse_overrides(list(self.fixed.values()))
        return {override.get_key_element(): override.value() for override in parsed if not override.is_hydra_override()}

    def names(self) -> list[str]:
        """The config keys and groups that are searched."""
        return [name.lstrip("+") for name in self.distributions]

    def _text(self, name: str, value: Any) -> str:
        if isinstance(value, str) and name not in self.distributions:
            return value if _is_plain(value) else quoted(value)  # a custom space may write a list or a number as text
        return value if value in self.literals.get(name, ()) else as_override(value)

    def default_value(self, config: DictConfig, name: str) -> Any:
        """The config's value of a parameter, as Optuna stores it. Raises KeyError if the config has none."""
        key = name.lstrip("+")
        choices = config.hydra.runtime.choices
        value = choices[key] if key in choices else OmegaConf.select(config, key, default=KeyError)  # also for ???
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
            value = next((text for text, literal in self.literals.get(name, {}).items() if literal == value), KeyError)
        if value is KeyError:
            raise KeyError(name)
        return value


def parse(lines: Sequence[str], loader: ConfigLoader) -> SearchSpace:
    """Parse overrides such as `x=interval(0,1)`, `db=choice(a,b)`, `group=glob(*)`, `y=5`. The last of a name counts.

    Raises InputError for a range or choice that Optuna can't search.
    """
    space = SearchSpace()
    for override in hydra_private.parse_overrides(lines, loader):
        name = override.get_key_element()
        key = name.lstrip("+~")
        for other in [other for other in space.distributions if other.lstrip("+") == key]:
            del space.distributions[other]
        space.fixed.pop(key, None)
        if override.is_delete():
            space.deletions.append(str(override.input_line))
            continue
        if not override.is_sweep_override():
            assert override.input_line is not None
            space.fixed[key] = override.input_line
            continue
        try:
            value = override.value()
            if override.is_choice_sweep() or (isinstance(value, RangeSweep) and value.shuffle):
                space.distributions[name], space.literals[name] = _choices(override)
            else:
                space.distributions[name] = hydra_private.distribution(override)
            if isinstance(value, IntervalSweep) and not all(map(math.isfinite, (value.start or 0, value.end or 0))):
                raise ValueError("its bounds must be finite")
        except (HydraException, ValueError, AssertionError, NotImplementedError) as error:
            raise InputError(f"{override.input_line} cannot be searched: {error}") from error
    return space


def _choices(override: Override) -> tuple[CategoricalDistribution, dict[str, Any]]:
    choices: list[Any] = []
    literals: dict[str, Any] = {}
    sweep = override.value()
    unshuffled = sweep.list if isinstance(sweep, ChoiceSweep) else sweep if isinstance(sweep, RangeSweep) else None
    for element in override.sweep_iterator() if unshuffled is None else unshuffled:
        value = hydra_private.element_value(element)
        if isinstance(value, list | dict):
            text = hydra_private.element_text(element)
            literals[text] = value
            value = text
        choices.append(value)
    if twice := [value for value in choices if choices.count(value) > 1]:
        raise ValueError(f"choice {twice[0]} is given twice")
    if not choices:
        raise ValueError("it has no choices")
    return CategoricalDistribution(choices), literals


def _parsed(text: str) -> Override:
    return hydra_private.parse_overrides([f"key={text}"])[0]


def as_override(value: Any) -> str:
    """A value as text that Hydra reads as exactly this value."""
    if not isinstance(value, str):
        return hydra_private.element_text(value)
    return value if _is_plain(value) and _parsed(value).value() == value else quoted(value)


def _is_plain(text: str) -> bool:
    """Whether Hydra reads the text as one value without quotes."""
    try:
        return not _parsed(text).is_sweep_override()
    except HydraException:
        return False


def quoted(text: str) -> str:
    """A text in single quotes, as Hydra reads it."""
    return QuotedString(text, Quote.single).with_quotes()


def ends(distribution: BaseDistribution) -> Sequence[Any]:
    """The choices of a distribution, or its bounds."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return distribution.low, distribution.high


def describe(distribution: BaseDistribution) -> str:
    """A distribution as override: choice(a, b), interval(0, 1), tag(log, interval(1, 10)), range(0, 8, step=2)."""
    if isinstance(distribution, CategoricalDistribution):
        return f"choice({', '.join(map(as_override, distribution.choices))})"
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    text = f"interval({low:.12g}, {high:.12g})"
    if isinstance(distribution, IntDistribution):
        text = f"int({text})"
    if step and (step != 1 or isinstance(distribution, FloatDistribution)):
        text = f"range({low:.12g}, {high + step:.12g}, step={step:.12g})"
    return f"tag(log, {text})" if distribution.log else text


def to_json(distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """Distributions as JSON, for the attributes of a study."""
    return {name: json.loads(distribution_to_json(d)) for name, d in distributions.items()}


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, BaseDistribution], study: str) -> None:
    """Raises InputError unless the study can continue with the space `now`. before: its space so far, from to_json.

    Parameters may be added and ranges widened.
    """
    old = {name: json_to_distribution(json.dumps(value)) for name, value in before.items()}
    changes = [
        f"{name}: was {describe(old[name])}, is {describe(now[name]) if name in now else 'not searched'}"
        for name in old
        if name not in now or not _contains(now[name], old[name])
    ]
    if changes:
        raise InputError(
            f"study {study} was started with another search space; give the old one, or another study=NAME. "
            f"{'; '.join(changes)}"
        )


def _contains(new: BaseDistribution, old: BaseDistribution) -> bool:
    if isinstance(new, FloatDistribution | IntDistribution) and type(new) is type(old):
        assert isinstance(old, FloatDistribution | IntDistribution)
        steps = (old.low - new.low) / (new.step or 1)
        same_grid = new.step == old.step and (new.step is None or math.isclose(steps, round(steps), abs_tol=1e-8))
        return new.low <= old.low and old.high <= new.high and new.log == old.log and same_grid
    return new == old
