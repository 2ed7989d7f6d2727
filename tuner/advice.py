"""What a study's trials say: how sure its best is, and what to try next."""

import math
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.trial import FrozenTrial

from tuner import paired
from tuner.inspection import Inspection, result_of
from tuner.plots import Parameter
from tuner.sweep import account

ENOUGH = 10  # complete trials, before something is said of a parameter
P = 0.05  # from which on chance is said to explain a difference
MOST = 100  # trials that are compared with the best


def certainty(s: Inspection) -> list[str]:
    """How the best compares with the default config and with the other trials, and how it was tested."""
    if s.best is None:
        return []
    lines = [*_against_default(s, s.best), *_against_others(s)]
    if tested := s.tested:
        test, spread, seeds = tested["test_accuracy"], tested["test_accuracy_std"], len(tested["seeds"])
        lines.append(
            f"retrained on train + validation and tested, {seeds} seeds: {test:.4f}, standard deviation {spread:.4f}"
        )
    return lines


def _against_default(s: Inspection, best: FrozenTrial) -> list[str]:
    default = s.baseline
    if default is None:
        return []
    if default.number == best.number:
        return [f"the default config (trial {best.number}) is the best"]
    gain = abs(best.values[0] - default.values[0])
    text = f"the best (trial {best.number}) is better than the default config (trial {default.number}) by {gain:.4g}"
    both = _on_the_same_images(s, default.number, best.number)
    if both is None:
        return [text]
    flattered = "; p flatters the best, which was chosen on these images" if both["split"] == "validation" else ""
    return [text, paired.verdict(both, "the default", "the best") + flattered]


def _on_the_same_images(s: Inspection, a: int, b: int) -> dict[str, Any] | None:
    """Two trials, by number, on the images that both were scored on, where both have written their predictions."""
    folders = [Path(folder) for number in (a, b) if (folder := s.folder_of(s.frozen[number]))]
    if len(folders) < 2 or not all((folder / "predictions.csv").exists() for folder in folders):
        return None
    both = paired.on_the_same_images(*folders)
    return both if both["images"] else None


def _against_others(s: Inspection) -> list[str]:
    error, n_val = _standard_error(s)
    if not error or s.best is None or len(s.complete) < 2:
        return []
    others, images = len(s.complete) - 1, f"{n_val:,} validation images"
    if (equals := _equals(s)) is not None:
        what = f"differ from the best by no more than chance explains (McNemar's test, p >= {P}, {images})"
        return [f"of the next {min(others, MOST)} complete trials {len(equals)} {what}"]
    near = (s.complete.value - s.best.values[0]).abs() <= error
    what = f"within one standard error of the best ({error:.2g}, of {images})"
    return [f"{near.sum() - 1} of the other {others} complete trials are {what}"]


def _standard_error(s: Inspection) -> tuple[float, int]:
    """Of the best trial's accuracy, and the number of validation images it is from; 0, 0 where that can't be told."""
    folder = s.folder_of(s.best) if s.best and s.objectives == ["validation accuracy"] else None
    n_val = result_of(folder).get("n_val") if folder else None
    if not n_val or s.best is None:
        return 0.0, 0
    value = s.best.values[0]
    return math.sqrt(value * (1 - value) / n_val), n_val


def _equals(s: Inspection) -> pd.DataFrame | None:
    """Of the trials that come next to the best those whose difference to it chance explains; None: it can't be told."""
    if s.best is None or s.objectives != ["validation accuracy"]:
        return None
    others = s.complete[s.complete.number != s.best.number].sort_values("value", ascending=False, kind="stable")
    pairs = {number: _on_the_same_images(s, number, s.best.number) for number in others.number.head(MOST)}
    if not pairs or None in pairs.values():
        return None
    return others[others.number.isin([number for number, both in pairs.items() if both and both["p_value"] >= P])]


def advice(s: Inspection) -> list[str]:
    """What should be tried next, the most pressing first."""
    if not s.frozen:
        return ["no trial has begun"]
    return [*_on_failures(s), *_on_edges(s), *_on_more_trials(s), *_on_what_matters(s), *_on_noise(s)]


def _on_failures(s: Inspection) -> list[str]:
    excused = [bool(trial.system_attrs.keys() & {account.EXCUSED, account.SURPLUS}) for trial in s.frozen]
    failed = s.trials[(s.trials.state == "FAIL") & ~pd.Series(excused)]  # not those that were interrupted
    if len(failed) < max(1, 0.1 * len(s.trials)):
        return []
    why = failed.error.dropna().mode()
    reason = f", most often with: {why[0]}" if len(why) else ""
    return [f"{len(failed)} of {len(s.trials)} trials failed{reason}"]


def _on_edges(s: Inspection) -> list[str]:
    """Where the best trials lie at the end of what was searched."""
    top = _top(s)
    ends = {p.name: _end(p, top[p.name]) for p in s.parameters if p.name in top and _share(s, p.name) >= 0.1}
    return [
        f"{name}: the best {len(top)} trials lie at the {end}; search beyond, where that is possible"
        for name, end in ends.items()
        if end
    ]


def _top(s: Inspection) -> pd.DataFrame:
    """The best tenth of complete trials, at least three; none where there are too few to speak of."""
    if len(s.goals) > 1 or len(s.complete) < ENOUGH:
        return pd.DataFrame()
    order = s.complete.sort_values("value", ascending=s.goals == ["minimize"], kind="stable")
    return order.head(max(3, len(order) // 10))


def _end(parameter: Parameter, values: pd.Series) -> str | None:
    """Which end of what was searched all of the values lie at, if they do."""
    if parameter.choices is not None:
        numbers = all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in parameter.choices)
        if not numbers or len(parameter.choices) < 3 or values.nunique(dropna=False) > 1:
            return None
        ends = {max(parameter.choices): "largest choice", min(parameter.choices): "smallest choice"}
        value = values.iloc[0]
        return f"{ends[value]}, {value}" if value in ends else None
    scale = math.log if parameter.log else float
    low, high = scale(parameter.low or 0), scale(parameter.high or 0)
    if high == low or values.isna().any():
        return None
    shares = values.map(lambda value: (scale(value) - low) / (high - low))
    if (shares > 0.9).all():
        return f"top of the range, {parameter.high:g}"
    return f"bottom of the range, {parameter.low:g}" if (shares < 0.1).all() else None


def _share(s: Inspection, name: str) -> float:
    """The most that an evaluator gives to a parameter; 1 where none has judged it."""
    return max((shares[name] for shares in s.importances.values() if name in shares), default=1.0)


def _on_more_trials(s: Inspection) -> list[str]:
    """Whether the search was still finding better trials when it ended."""
    finished = s.trials[s.trials.state.isin(("COMPLETE", "PRUNED"))]
    grid = any("grid_id" in trial.system_attrs for trial in s.frozen)  # which has no more points
    if s.best is None or len(finished) < ENOUGH or grid:
        return []
    since = int((finished.number > s.best.number).sum())
    if since < len(finished) / 4:
        more = f"{shlex.quote(f'study={s.study.study_name}')} hydra.sweeper.n_trials={2 * len(s.trials)}"
        return [f"the best came {since} trials before the end: more may help, by the same command with {more}"]
    if since >= max(15, len(finished) / 2):
        return [f"none of the last {since} trials was better: more of this search are unlikely to help"]
    return []


def _on_what_matters(s: Inspection) -> list[str]:
    little = [p.name for p in s.parameters if _share(s, p.name) < 0.05] if len(_top(s)) else []
    if not little:
        return []
    return [f"{', '.join(little)}: hardly matters within its range; fix it, and the search has less to try"]


def _on_noise(s: Inspection) -> list[str]:
    equals = _equals(s)
    if equals is None or len(equals) < max(2, len(s.complete) / 4):
        return []
    fastest = equals.sort_values("seconds", kind="stable").iloc[0]
    cheapest = f"trial {fastest.number}, {fastest.seconds:.3g} s"
    return [
        f"{len(equals)} trials can't be told from the best: take the cheapest ({cheapest}), or judge them with more "
        "validation images (data.val_share) or several seeds"
    ]
