"""Greedy ensembles of trials, chosen by their stored predictions of the validation images.

Caruana et al., Ensemble Selection from Libraries of Models, ICML 2004: start with the best trial, and add the trial
that improves the mean most, again and again; a trial may be added more than once. The mean is that of the logits, each
divided by its trial's temperature, so a trial does not count for more because it is more confident.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tuner import InputError
from tuner.files import replacing
from tuner.runs import calibration

HEAD_KEYS = (  # of the config: how a head is trained. Members of an ensemble may differ in these
    *("model.head", "optimizer", "scheduler", "epochs", "batch_size", "label_smoothing", "grad_clip", "keep"),
    *("patience", "class_weights", "loss"),
)
LOG_P = "validation.safetensors"  # in the folder of a complete trial
MOST, MOST_VALUES = 50, 1 << 25  # candidates, and their log-probabilities in memory: 134 MB
DRAWS = 200  # bootstrap samples, for each of which an ensemble is chosen


def write(folder: Path, log_p: torch.Tensor, labels: torch.Tensor) -> None:
    """Write log-probabilities, float [N, classes], and labels, int64 [N], of a trial's validation images.

    The former are stored as float16, to three digits.
    """
    with replacing(folder / LOG_P) as file:
        file.write(save({"log_p": log_p.half().contiguous(), "labels": labels.contiguous()}))


def read(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What write() wrote. Raises InputError if that is missing or damaged."""
    path = folder / LOG_P
    if not path.is_file():
        raise InputError(f"there is no {LOG_P}")
    try:
        with safe_open(path, framework="pt") as file:
            log_p, labels = file.get_tensor("log_p").float(), file.get_tensor("labels")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{LOG_P} is damaged ({' '.join(str(error).split())})") from error
    shapes_fit = log_p.dim() == 2 and labels.shape == log_p.shape[:1] and log_p.numel() > 0
    if not (shapes_fit and labels.dtype == torch.int64 and bool(torch.isfinite(log_p).all())):
        raise InputError(f"{LOG_P} is damaged (it must have finite log_p [N, classes] and labels [N])")
    if not 0 <= int(labels.min()) <= int(labels.max()) < log_p.shape[1]:
        raise InputError(f"{LOG_P} is damaged (a label is not one of its {log_p.shape[1]} classes)")
    return log_p, labels


def most_candidates(images: int, classes: int, most: int) -> int:
    """How many trials are considered for an ensemble of `most` picks."""
    return max(most, min(MOST, MOST_VALUES // (images * classes)))


class Means:
    """The means of the logits of M trials, and how good they are on N images.

    log_p: calibrated log-probabilities of the trials, float [M, N, classes].   labels: int64 [N].
    A mean is given by its `picks`, sorted: rows of log_p, each as often as it was picked.
    """

    def __init__(self, log_p: torch.Tensor, labels: torch.Tensor):
        self.log_p, self.labels = log_p, labels
        self.with_each = functools.lru_cache(maxsize=64)(self._with_each)  # many bootstrap samples begin alike

    def _with_each(self, picks: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses, float [M, N], and whether the answers are right, bool [M, N], with each trial added to `picks`."""
        total = self.log_p + self.log_p[list(picks)].sum(0)
        log_q = (total / (len(picks) + 1)).log_softmax(2)
        index = self.labels.expand(len(log_q), -1)[..., None]
        return -log_q.gather(2, index)[..., 0], log_q.argmax(2) == self.labels

    def of(self, picks: tuple[int, ...]) -> torch.Tensor:
        """Logits of a mean, float [N, classes]."""
        return self.log_p[list(picks)].mean(0)

    def log_loss(self, picks: tuple[int, ...]) -> float:
        """The mean loss over the images."""
        return float(self.with_each(picks[:-1])[0][picks[-1]].double().mean())

    def right(self, picks: tuple[int, ...]) -> torch.Tensor:
        """Whether the answers are right, bool [N]."""
        return self.with_each(picks[:-1])[1][picks[-1]]

    def greedy(self, start: int, most: int, counts: torch.Tensor | None = None) -> tuple[int, ...]:
        """At most `most` picks, the first of which is `start`. A pick is added only if it lowers the log loss.

        counts: how often each image counts, float [N]; None: once.
        """
        counts = torch.ones(len(self.labels)) if counts is None else counts
        picks: tuple[int, ...] = (start,)
        loss = float(self.with_each(())[0][start] @ counts)
        while len(picks) < most:
            losses = self.with_each(picks)[0] @ counts
            best = int(losses.argmin())
            if float(losses[best]) >= loss:
                break
            picks, loss = tuple(sorted((*picks, best))), float(losses[best])
        return picks

    def gain(self, start: int, most: int) -> dict[str, Any]:
        """How much more accurate greedy() is than the best trial, `start`: the fields of runs.selection.Gain.

        Both are chosen anew on each bootstrap sample, the best trial by its accuracy, and compared on other images.
        """
        from tuner.runs import selection  # imports pandas, which trials do not need

        alone = self.with_each(())[1].float()

        def difference(counts: torch.Tensor) -> torch.Tensor:
            best = int((alone @ counts).argmax())
            return self.right(self.greedy(best, most, counts)).float() - alone[best]

        corrected = selection.left_out_mean(
            len(self.labels),
            lambda drawn: torch.stack([difference(counts) for counts in torch.from_numpy(drawn).float()]).numpy(),
            draws=DRAWS,
        )
        chosen = self.right(self.greedy(start, most)).float() - alone[start]
        return asdict(selection.of_difference(chosen.double().numpy(), corrected, len(self.log_p)))


@dataclass(frozen=True)
class Member:
    """A trial that is, or may be, in an ensemble.

    folder: its run folder.   epochs: for which it is retrained.   temperature: that calibrates it.
    """

    trial: int
    folder: Path
    epochs: int
    temperature: float


@dataclass(frozen=True)
class Ensemble:
    """What is retrained at the end of a search, instead of its best trial alone.

    members: the first is the best trial.   weights: of their logits.   temperature: of the weighted sum of the logits.
    record: for result.json.
    """

    members: tuple[Member, ...]
    weights: tuple[float, ...]
    temperature: float
    record: dict[str, Any]


def choose(
    candidates: Sequence[Member], log_p: torch.Tensor, labels: torch.Tensor, most: int, *, with_gain: bool
) -> Ensemble:
    """The ensemble of at most `most` picks.

    candidates: the first is the best trial.   log_p: their log-probabilities, float [M, N, classes].
    labels: int64 [N].   with_gain: estimate the gain over the best trial, which must be the best by accuracy.
    """
    temperatures = torch.tensor([candidate.temperature for candidate in candidates])
    means = Means(log_p / temperatures[:, None, None], labels)
    picks = means.greedy(0, most)
    shares = {row: count / len(picks) for row, count in sorted(Counter(picks).items())}
    record = {
        "trials": [candidates[row].trial for row in shares],
        "weights": [round(share, 4) for share in shares.values()],
        "candidates": len(candidates),
        "val_accuracy": float(means.right(picks).double().mean()),
        "val_log_loss": means.log_loss(picks),
        "best_val_log_loss": means.log_loss((0,)),
        "gain": means.gain(0, most) if with_gain else None,
    }
    members = tuple(candidates[row] for row in shares)
    weights = tuple(share / candidates[row].temperature for row, share in shares.items())
    return Ensemble(members, weights, calibration.temperature(means.of(picks), labels), record)
