"""The settings that all trials of a study share: recorded when it starts, compared when it is continued.

Settings are a composed config without what is searched, and without the keys that do not affect the objective.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tuner import InputError

log = logging.getLogger("tuner.sweep")
COMMAND = "command"  # attribute of a study: the overrides that started it, without passwords
SETTINGS = "settings"  # attribute of a study: what settings_of() gave when it was started
IMAGES = "images:"  # attributes of a study: for each config of its data, the hashes of the splits
CHOSEN = "chosen:"  # attributes of a study: config keys and values that a trial chose for all trials
SCORE = "cut_score"  # attribute of a trial: the closed-form score of its cut
MIXED = "mixed"  # attribute of a trial: how it differs from its study
SAME_AS = "same_as"  # attribute of a trial: the number of the one with the same parameters, which it does not repeat


class MixedStudyError(InputError):
    """A trial does not belong to its study: its settings or its images are others."""


def flat(config: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """A config's values by their dotted keys; lists and empty groups are values."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def targets_of(config: DictConfig) -> dict[str, str]:
    """The keys of a composed config that name what is called, with the dotted names; those of hydra left out."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    names = flat(OmegaConf.to_container(own, resolve=False))
    return {key: name for key, name in names if key.endswith("._target_") and isinstance(name, str)}


def is_below(key: str, keys: Sequence[str]) -> bool:
    """Whether a dotted key is one of `keys`, or in a group of that name."""
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def settings_of(config: DictConfig, irrelevant: Sequence[str], *, resolve: bool) -> dict[str, Any]:
    """The settings of a composed config.   resolve: references, which are else compared as text."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    plain: Any = OmegaConf.to_container(own, resolve=resolve)
    return {key: value for key, value in flat(plain) if not is_below(key, irrelevant)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each setting that is another: `KEY=NEW (was OLD)`.

    A key that is null counts as one that is not there: later versions add such keys.
    """
    return [
        f"{key}={_text(now, key)} (was {_text(before, key)})"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]


def compare(
    study: str, before: Mapping[str, Any] | None, now: Mapping[str, Any], searched: Sequence[str], may_be_mixed: bool
) -> str | None:
    """How a search's settings differ from its study's; None if they do not.

    before: None if the study starts, or an earlier version recorded nothing.   searched: keys that are searched now.
    Raises MixedStudyError if they differ, unless the study may be mixed.
    """
    known = {key: value for key, value in (now if before is None else before).items() if not is_below(key, searched)}
    text = ", ".join(differences(known, now))
    if not text:
        return None
    if not may_be_mixed:
        raise MixedStudyError(
            f"study {study} has other settings: {text}; give the old ones, or another study=NAME, or "
            "study_mixed=true: the new trials then count towards n_trials, and no result has them"
        )
    log.warning(
        "study %s has other settings: %s; the new trials count towards n_trials, and no result has them", study, text
    )
    return text


def _text(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key]).strip('"') if key in settings else "not set"


def choice_key(config: Mapping[str, Any], keys: Sequence[str], irrelevant: Sequence[str]) -> str:
    """The attribute with what a trial chose for these keys of `model`, for this config of the data."""
    own = {"data": config.get("data", {}), "model": {key: config["model"].get(key) for key in keys}}
    kept = [(key, value) for key, value in flat(own) if value is not None and not is_below(key, irrelevant)]
    return CHOSEN + hashlib.sha256(json.dumps(kept, default=str).encode()).hexdigest()[:16]


def images_key(data: Mapping[str, Any], irrelevant: Sequence[str]) -> str:
    """The attribute with the hashes of the splits for this config of the data."""
    kept = [(key, value) for key, value in flat(data, "data.") if value is not None and not is_below(key, irrelevant)]
    return IMAGES + hashlib.sha256(json.dumps(kept, default=str).encode()).hexdigest()[:16]
