"""Conclusions from a study's trials: how sure it is that its best is better, and what to try next."""

import math
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.trial import FrozenTrial

from tuner.analysis import paired
from tuner.analysis.loaded_study import LoadedStudy
from tuner.plots import Parameter
from tuner.runs import baselines, readings
from tuner.sweep import budget, history, ranking, report
from tuner.sweep.optuna_private import GRID_ID
from tuner.sweep.stopping import ENDED_BY, RULES, because

ENOUGH, EACH = 10, 4  # complete trials that advice on parameters needs, in all and per parameter
P = 0.05  # significance level
MOST = 100  # largest number of trials that are compared with the best


def certainty(s: LoadedStudy) -> list[str]:
    """Lines that compare the best with the default config and the other trials, and say how it was tested."""
    if s.best is None:
        return []
    lines = [*_against_default(s, s.best), *_against_others(s)]
    if tested := s.tested:
        lines += report.ensemble_lines(tested)
        if found := baselines.of_result(tested):
            lines += baselines.lines(found, report.score_of(s.best, s.folder, found["metric"]), "the best trial")
        lines.append(f"retrained on train + validation and tested, {report.describe_test(tested, '')}")
        if s.folder and (beside := report.tested_default(s.frozen, s.folder, tested)):
            lines.append(report.describe_default(beside, alone="ensemble" not in tested))
        if read := readings.of_result(tested):
            lines.append(f"this test split {read}")
    return lines


def _against_default(s: LoadedStudy, best: FrozenTrial) -> list[str]:
    default = s.baseline
    if default is None:
        return []
    if default.number == best.number:
        return [f"the default config (trial {best.number}) is the best"]
    gain = abs(best.values[0] - default.values[0])
    how, by = ("better than", f" by {gain:.4g}") if gain else ("as good as", ", and no better")
    text = f"the best (trial {best.number}) is {how} the default config (trial {default.number}){by}"
    both = _on_the_same_images(s, default.number, best.number)
    if both is None:
        return [text]
    flattered = "; p is too small, as the best was chosen on these images" if both["split"] == "validation" else ""
    corrected = ranking.gain(s.study, s.frozen, s.folder)
    lines = [text, paired.verdict(both, "the default", "the best") + flattered]
    return [*lines, f"gain to expect {corrected}"] if corrected else lines


def _on_the_same_images(s: LoadedStudy, a: int, b: int) -> dict[str, Any] | None:
    """Two trials, by number, on the images that both predicted; None if they have no predictions in common."""
    folders = [Path(folder) for number in (a, b) if (folder := s.folder_of(s.frozen[number]))]
    if len(folders) < 2 or not all((folder / "predictions.csv").exists() for folder in folders):
        return None
    both = paired.on_the_same_images(*folders)
    return both if both["images"] else None


def _against_others(s: LoadedStudy) -> list[str]:
    error, n_val = _standard_error(s)
    if not error or s.best is None or len(s.complete) < 2:
        return []
    others, images = len(s.complete) - 1, f"{n_val:,} validation images"
    if (equals := _equals(s)) is not None:
        alike, test = len(equals), f"(McNemar's test, p >= {P}, {images})"
        if others == 1:
            return [f"the next trial differs from the best by {'no ' * alike}more than chance explains {test}"]
        verb = "differs" if alike == 1 else "differ"
        what = f"{verb} from the best by no more than chance explains {test}"
        return [f"of the next {min(others, MOST)} complete trials {alike} {what}"]
    near = int(((s.complete.value - s.best.values[0]).abs() <= error).sum()) - 1
    what = f"within one standard error of the best ({error:.2g}, of {images})"
    if others == 1:
        return [f"the other complete trial is {'' if near else 'not '}{what}"]
    return [f"{near} of the other {others} complete trials {'is' if near == 1 else 'are'} {what}"]


def cannot_be_told_apart(s: LoadedStudy) -> bool:
    """Whether no complete trial differs from the best by more than chance explains (McNemar's test)."""
    equals, others = _equals(s), len(s.complete) - 1
    return equals is not None and len(equals) == min(others, MOST)


def _standard_error(s: LoadedStudy) -> tuple[float, int]:
    """The standard error of the best accuracy, and its number of validation images; 0, 0 if unknown."""
    folder = s.folder_of(s.best) if s.best and s.objectives == ["validation accuracy"] else None
    n_val = report.read_result(Path(folder)).get("n_val") if folder else None
    if not n_val or s.best is None:
        return 0.0, 0
    value = s.best.values[0]
    return math.sqrt(value * (1 - value) / n_val), n_val


def _equals(s: LoadedStudy) -> pd.DataFrame | None:
    """The trials next to the best that do not differ from it by more than chance; None if that is unknown."""
    if s.best is None or s.objectives != ["validation accuracy"]:
        return None
    others = s.complete[s.complete.number != s.best.number].sort_values("value", ascending=False, kind="stable")
    pairs = {number: _on_the_same_images(s, number, s.best.number) for number in others.number.head(MOST)}
    if not pairs or None in pairs.values():
        return None
    return others[others.number.isin([number for number, both in pairs.items() if both and both["p_value"] >= P])]


def advice(s: LoadedStudy) -> list[str]:
    """Lines on what to try next, the most urgent first."""
    if not s.frozen:
        return ["no trial has started"]
    return [
        *_on_a_sweep_that_ended(s),
        *_on_failures(s),
        *_on_pruning(s),
        *_on_equal_values(s),
        *_on_edges(s),
        *_on_more_trials(s),
        *_on_what_matters(s),
        *_on_noise(s),
    ]


def _on_a_sweep_that_ended(s: LoadedStudy) -> list[str]:
    """The trials left by a sweep that was killed or interrupted."""
    if s.folder is None or budget.sweep_is_running(s.folder):
        return []
    if s.stopped:
        is_rule = s.stopped.split(":")[0] in RULES
        go_on = f"; to go on, change that, and resume with the same command and {_named(s)}" if is_rule else ""
        return [f"the search ended before its n_trials, {because(s.stopped, 'hydra.sweeper.')}{go_on}"]
    left = {state.lower(): s.states[state] for state in ("RUNNING", "WAITING") if s.states[state]}
    if not left:
        return []
    which = " and ".join(f"{count} {state}" for state, count in left.items())
    trials = f"trial{'s' * (sum(left.values()) != 1)}"
    return [f"{which} {trials}, and no sweep is running: resume with the same command and {_named(s)}"]


def _named(s: LoadedStudy) -> str:
    return shlex.quote(f"study={s.study.study_name}")


def _counted(s: LoadedStudy) -> pd.DataFrame:
    """The trials that count, without those that were interrupted or tried again."""
    counting = [t.number for t in history.counted(s.frozen) if budget.INTERRUPTED not in t.system_attrs]
    return s.trials[s.trials.number.isin(counting)]


def _on_failures(s: LoadedStudy) -> list[str]:
    counted = _counted(s)
    failed = counted[counted.state == "FAIL"]
    if len(failed) < max(1, 0.1 * len(counted)):
        return []
    errors = failed.error.value_counts(sort=False)
    how = "most often with" if errors.max() > 1 else "such as"
    reason = f", {how}: {errors.idxmax()}" if len(errors) else ""
    return [f"{len(failed)} of {len(counted)} trials failed{reason}"]


def _on_pruning(s: LoadedStudy) -> list[str]:
    pruned = s.states["PRUNED"]
    if s.states["COMPLETE"] or s.states["RUNNING"] or not pruned:
        return []
    if late := sum(ENDED_BY in trial.user_attrs for trial in s.frozen):
        return [f"{late} trial{'s were' if late > 1 else ' was'} ended by time and none is complete: give more time"]
    which = f"{pruned} of {len(_counted(s))} trials were pruned and none is complete"
    return [f"{which}: the pruner is too strict; set hydra.sweeper.pruner.KEY, or hydra/sweeper/pruner=none"]


def _on_equal_values(s: LoadedStudy) -> list[str]:
    values = s.complete[s.values].drop_duplicates()
    if len(s.complete) < 3 or len(values) > 1:
        return []
    same = " and ".join(f"{value:.6g}" for value in values.iloc[0])
    why = "no parameter changes it; widen the ranges, or check in a trial's train.log whether it learns"
    if s.goals == ["maximize"] and s.objectives[0].endswith("accuracy") and same == "1":
        why = "there is nothing to gain on these validation images; only more of them could tell the trials apart"
    return [f"all {len(s.complete)} complete trials have the same value, {same}: {why}"]


def _on_edges(s: LoadedStudy) -> list[str]:
    """The parameters of which the best trials are at the end of their range."""
    top, least = _top(s), _fair(s, 0.1)
    ends = {p.name: _end(p, top[p.name]) for p in s.parameters if p.name in top and _share(s, p.name) >= least}
    return [
        f"{name}: the best {len(top)} trials are at the {end}; extend it if possible"
        for name, end in ends.items()
        if end
    ]


def _top(s: LoadedStudy) -> pd.DataFrame:
    """The best tenth of the complete trials, at least three; empty if there are too few trials."""
    if len(s.goals) > 1 or len(s.complete) < max(ENOUGH, EACH * len(s.parameters)):
        return pd.DataFrame()
    order = s.complete.sort_values("value", ascending=s.goals == ["minimize"], kind="stable")
    return order.head(max(3, len(order) // 10))


def _end(parameter: Parameter, values: pd.Series) -> str | None:
    """The end of a parameter's range, or of its choices, that all values are at; None if they are not."""
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


def _share(s: LoadedStudy, name: str) -> float:
    """The largest importance that an evaluator gives to a parameter; 1 if none does."""
    return max((shares[name] for shares in s.importances.values() if name in shares), default=1.0)


def _fair(s: LoadedStudy, share: float) -> float:
    """The importance `share`; proportionally less if there are more than five parameters."""
    return min(share, 5 * share / max(1, len(s.parameters)))


def _on_more_trials(s: LoadedStudy) -> list[str]:
    """Whether more trials would help: whether the search was still finding better ones when it ended."""
    finished = s.trials[s.trials.state.isin(("COMPLETE", "PRUNED"))]
    grid = any(GRID_ID in trial.system_attrs for trial in s.frozen)  # it has no further points
    if s.best is None or len(finished) < ENOUGH or grid:
        return []
    since = int((finished.number > s.best.number).sum())
    if since < len(finished) / 4:
        more = f"{_named(s)} hydra.sweeper.n_trials={2 * len(history.counted(s.frozen))}"
        return [f"the best came {since} trials before the end: more may help; use the same command with {more}"]
    if since >= max(15, len(finished) / 2):
        return [f"none of the last {since} trials was better: more trials are unlikely to help"]
    return []


def _on_what_matters(s: LoadedStudy) -> list[str]:
    least = _fair(s, 0.05)
    little = [p.name for p in s.parameters if _share(s, p.name) < least] if len(_top(s)) else []
    if not little:
        return []
    verb, its, it = ("matters", "its range", "it") if len(little) == 1 else ("matter", "their ranges", "them")
    return [f"{', '.join(little)}: hardly {verb} within {its}; fix {it} to make the search smaller"]


def _on_noise(s: LoadedStudy) -> list[str]:
    equals = _equals(s)
    if equals is None or len(equals) < max(2, len(s.complete) / 4):
        return []
    cheaper = _cheapest(s, equals)
    take = f"take {cheaper}, or compare" if cheaper else "compare"
    more_images = "" if ranking.folds(s.study) else "on more validation images (data.folds, or data.val_share) or "
    how = f"{more_images}with several seeds"
    return [f"{len(equals)} trials do not differ significantly from the best: {take} them {how}"]


def _cheapest(s: LoadedStudy, equals: pd.DataFrame) -> str | None:
    """The smallest of the best and those equals within one standard error, or the fastest; None if that is the best.

    Few images tell few trials apart: an equal may be far behind. The fastest is taken if sizes are unknown.
    """
    if s.best is None:
        return None
    best = s.complete[s.complete.number == s.best.number]
    near = equals[(equals.value - s.best.values[0]).abs() <= _standard_error(s)[0]]
    among = pd.concat([best, near], ignore_index=True)
    results = pd.DataFrame([report.read_result(Path(folder)) if folder else {} for folder in among.folder])
    sizes = results.reindex(columns=["gmacs", "trained_parameters"]).apply(pd.to_numeric, errors="coerce")
    if sizes.notna().all(axis=None):
        least = among[["number"]].join(sizes).sort_values(list(sizes), kind="stable").iloc[0]
        what = f"{least.gmacs:.3g} billion multiply-adds an image, {least.trained_parameters / 1e6:.3g} million trained"
        smallest = f"the smallest (trial {least.number:.0f}: {what} parameters)"
        return smallest if least.number != among.number[0] else None
    if _at_once(s):  # their times include other trials
        return None
    fastest = among.sort_values("seconds", kind="stable").iloc[0]
    chosen = f"the fastest (trial {fastest.number}, {fastest.seconds:.3g} s)"
    return chosen if fastest.number != among.number[0] else None


def _at_once(s: LoadedStudy) -> bool:
    """Whether trials ran at the same time, as in a stack."""
    times = s.trials[["start", "end"]].dropna().sort_values("start")
    return bool((times.start.iloc[1:].to_numpy() < times.end.cummax().iloc[:-1].to_numpy()).any())
