"""A cache in front of Hydra's config composition: a job with plain overrides gets a copy, with its values set."""

import copy
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from tuner.sweep import hydra_private


@dataclass
class CachingConfigLoader:
    """Caches Hydra's composition per choice of groups; plain overrides (KEY=VALUE of no group) are set on a copy.

    Composing takes 50 ms, most of it for reading and merging the defaults list, which plain overrides don't change.
    Copying and setting takes 5 ms.
    """

    loader: ConfigLoader
    cache: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "loader":  # asked for by pickle
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"loader": self.loader, "cache": {}}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The config of a job, as Hydra's own loader composes it."""
        overrides = hydra_private.parse_overrides(sweep_overrides, self.loader)
        plain = [override for override in overrides if self._is_plain(override)]
        others = tuple(str(override.input_line) for override in overrides if override not in plain)
        if others not in self.cache:
            self.cache[others] = self.loader.load_sweep_config(master_config, list(others))
        config = copy.deepcopy(self.cache[others])
        hydra_private.set_values(config, plain)
        OmegaConf.copy_cache(from_config=master_config, to_config=config)  # resolvers that a sweep runs once: the time
        config.hydra.overrides.task = [o.input_line for o in overrides if not o.is_hydra_override()]
        return config

    def _is_plain(self, override: Override) -> bool:
        if override.type != OverrideType.CHANGE or override.package or override.is_sweep_override():
            return False
        if override.is_hydra_override():
            return False
        return override.is_value_path or not self.loader.get_group_options(override.key_or_group)
