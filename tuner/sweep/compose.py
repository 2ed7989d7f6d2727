"""Composing a job's config: Hydra does it once, and from then on only the searched values are set anew."""

import copy
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from tuner.sweep import hydra_private


@dataclass
class Composer:
    """Hydra's config loader, in front of which it stands, composes all but plain values: KEY=VALUE of what is no group.

    Composing takes 50 ms, most of it reading and merging the defaults list, which such values have no part in; copying
    what was composed and setting them takes 5.
    """

    loader: ConfigLoader
    composed: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "loader":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"loader": self.loader, "composed": {}}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        parsed = hydra_private.parse_overrides(sweep_overrides, self.loader)
        values = [override for override in parsed if self._is_value(override)]
        rest = tuple(str(override.input_line) for override in parsed if override not in values)
        if rest not in self.composed:
            self.composed[rest] = self.loader.load_sweep_config(master_config, list(rest))
        config = copy.deepcopy(self.composed[rest])
        hydra_private.set_values(config, values)
        OmegaConf.copy_cache(from_config=master_config, to_config=config)  # of what a sweep looks at once: the time
        config.hydra.overrides.task = [o.input_line for o in parsed if not o.is_hydra_override()]
        return config

    def _is_value(self, override: Override) -> bool:
        if override.type != OverrideType.CHANGE or override.package or override.is_sweep_override():
            return False
        if override.is_hydra_override():
            return False
        return override.is_value_path or not self.loader.get_group_options(override.key_or_group)
