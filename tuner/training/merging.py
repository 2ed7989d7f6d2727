"""An ensemble of heads over the same features as one head: the mean of their logits, computed in one pass."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from tuner import InputError
from tuner.config import RunConfig, parse, written
from tuner.rules import shown
from tuner.runs.ensemble import HEAD_KEYS, Ensemble, Member
from tuner.training.heads import WIDEST, Head
from tuner.training.setup import Setup
from tuner.training.spec import Fitted, Spec, State, spec_of


def merged(states: Sequence[State], weights: Sequence[float]) -> State:
    """The head whose logits are the weighted sum of those of these heads, which have the same depth.

    states: weight and bias of each layer, as `head.0.weight`, `head.0.bias`, ...
    The hidden layers stand side by side: the first layers share their input, later ones are blocks on a diagonal.
    """
    last = len(states[0]) // 2 - 1
    state = {}
    for i in range(last + 1):
        w, b = ([s[f"head.{i}.{name}"] for s in states] for name in ("weight", "bias"))
        if i == last:
            w, b = ([weight * t for weight, t in zip(weights, ts, strict=True)] for ts in (w, b))
        if last == 0:
            weight = torch.stack(w).sum(0)
        elif i == last:
            weight = torch.cat(w, dim=1)
        else:
            weight = torch.block_diag(*w) if i else torch.cat(w)
        state[f"head.{i}.weight"] = weight
        state[f"head.{i}.bias"] = torch.stack(b).sum(0) if i == last else torch.cat(b)
    return state


def specs_of(
    config: RunConfig, setup: Setup, ensemble: Ensemble, rows: torch.Tensor, seeds: Sequence[int]
) -> list[Spec]:
    """How the members are retrained: for each, one spec for each seed.

    config: of the best trial, the first member.   rows: int64 [N], the images.
    """
    configs = [_config_of(config, member) for member in ensemble.members]
    return [spec_of(own, setup, seed, rows, None) for own in configs for seed in seeds]


def _config_of(config: RunConfig, member: Member) -> RunConfig:
    """The config, with the values of a member where members differ. Raises InputError if its config is damaged."""
    own = parse(written(member.folder))
    values = {key: getattr(own, key) for key in HEAD_KEYS if key != "model.head"}
    model, final = replace(config.model, head=own.model.head), replace(config.final, epochs=member.epochs)
    return replace(config, model=model, final=final, **values)


def merged_head(heads: Sequence[Head]) -> Head:
    """The shape of merged(). Raises InputError if a layer has too many units."""
    widths = tuple(map(sum, zip(*(head.widths for head in heads), strict=True)))
    if max(widths, default=0) > WIDEST:
        raise InputError(
            f"{len(heads)} heads make hidden layers of {shown(list(widths))} units as one; at most {WIDEST:,} are "
            "allowed: lower model.head.width, or the number of heads (final.ensemble, final.seeds, data.folds)"
        )
    return replace(heads[0], widths=widths)


def merged_fit(specs: Sequence[Spec], fitted: Sequence[Fitted], weights: Sequence[float]) -> tuple[Spec, Fitted]:
    """The ensemble as one head: specs_of() and what came of them. The curve is that of the first.

    weights: of the members; the seeds of a member share its weight.   Raises what ended the training of a head.
    """
    for result in fitted:
        result.raise_error()
    seeds = len(specs) // len(weights)
    shares = [weight / seeds for weight in weights for _ in range(seeds)]
    state = merged([result.state for result in fitted], shares)
    return replace(specs[0], head=merged_head([spec.head for spec in specs])), replace(fitted[0], state=state)
