"""The trials of a study that may form an ensemble, and the ensemble that is retrained: `final.ensemble`."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.trial import FrozenTrial

from tuner import InputError, earlier, yaml_file
from tuner.rules import COUNT, POSITIVE
from tuner.runs import ensemble
from tuner.runs.ensemble import Ensemble, Member
from tuner.runs.result import read_result
from tuner.sweep import ranking
from tuner.sweep.settings import is_below, settings_of
from tuner.training.heads import widths

log = logging.getLogger("tuner.sweep")


@dataclass(frozen=True)
class _Candidate:
    """A trial with its config, without `irrelevant` keys, and the stored predictions of N validation images.

    log_p: float [N, classes].   labels: int64 [N].
    """

    member: Member
    config: Mapping[str, Any]
    log_p: torch.Tensor
    labels: torch.Tensor

    @property
    def depth(self) -> int:
        """Hidden layers of its head."""
        return len(widths(self.config["model.head.width"], self.config.get("model.head.depth")))

    def why_not_with(self, best: "_Candidate") -> str | None:
        """Why its head cannot be merged with that of the best trial; None if it can."""
        keys = sorted({*self.config, *best.config})
        others = [key for key in keys if self.config.get(key) != best.config.get(key)]
        if others := [key for key in others if not is_below(key, ensemble.HEAD_KEYS)]:
            return f"another {', '.join(others)}"
        if self.depth != best.depth:
            return f"another depth of the head than {best.depth}"
        if not torch.equal(self.labels, best.labels) or self.log_p.shape != best.log_p.shape:
            return "other validation images"
        return None


def chosen(
    best: FrozenTrial, others: Sequence[FrozenTrial], folder: Path, irrelevant: Sequence[str], most: int
) -> Ensemble:
    """The ensemble of at most `most` picks that starts with the best trial. What is left out is logged.

    others: complete trials, the best first.   folder: the sweep's.   irrelevant: keys in which trials may differ.
    Raises InputError if the best trial's folder lacks what is needed.
    """
    try:
        first = _candidate(best, folder, irrelevant)
    except (InputError, OSError) as error:
        raise InputError(
            f"final.ensemble={most} cannot use trial {best.number}, the best: {error}; final.ensemble=0 retrains it "
            "alone"
        ) from error
    candidates = [first, *_that_fit(first, others if most > 1 else (), folder, irrelevant, most)]
    return ensemble.choose(
        [candidate.member for candidate in candidates],
        torch.stack([candidate.log_p for candidate in candidates]),
        first.labels,
        most,
        with_gain=most > 1 < len(first.labels) and first.config.get("objective") == "accuracy",
    )


def _that_fit(
    first: _Candidate, others: Sequence[FrozenTrial], folder: Path, irrelevant: Sequence[str], most: int
) -> Iterator[_Candidate]:
    """The others whose heads can be merged with the first's, as many as are considered. Logs why the rest cannot."""
    images, classes = first.log_p.shape
    left = ensemble.most_candidates(images, classes, most) - 1
    left_out: dict[str, list[str]] = {}
    for trial in others:
        reason: str | None = "there are enough better ones"
        if left:
            try:
                candidate = _candidate(trial, folder, irrelevant)
                reason = candidate.why_not_with(first)
            except (InputError, OSError) as error:
                reason = str(error)
        if reason:
            left_out.setdefault(reason, []).append(str(trial.number))
        else:
            left -= 1
            yield candidate
    for reason, numbers in left_out.items():
        trials = f"trial{'s' * (len(numbers) > 1)} {', '.join(numbers)}"
        log.info("final.ensemble leaves out %s: %s", trials, reason)


def _candidate(trial: FrozenTrial, sweep: Path, irrelevant: Sequence[str]) -> _Candidate:
    """Raises InputError or OSError if the trial's folder lacks something."""
    folder = ranking.folder_of(trial, sweep) or sweep / str(trial.number)
    result = read_result(folder)
    epochs: Any = result.get("saved_epoch")
    temperature: Any = result.get("temperature")
    COUNT.check("saved_epoch", epochs)
    POSITIVE.check("temperature", temperature)
    path = earlier.config_file(folder)
    if path is None:
        raise InputError("there is no conf/config.yaml")
    plain = yaml_file.mapping(path)
    earlier.rename_keys(plain)
    try:
        config = settings_of(OmegaConf.create(plain), irrelevant, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(str(error).splitlines()[0]) from error
    return _Candidate(Member(trial.number, folder, epochs, float(temperature)), config, *ensemble.read(folder))
