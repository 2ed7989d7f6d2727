"""The results of a sweep: optimization_results.yaml, trials.csv, and its last log lines."""

import logging
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from optuna.study import Study
from optuna.trial import FrozenTrial

from tuner.files import replacing
from tuner.rules import is_number
from tuner.runs import baselines, readings, result
from tuner.runs.layout import BEST, DEFAULT
from tuner.safe_text import cell
from tuner.sweep import ranking, storage, workers
from tuner.sweep.settings import CHOSEN
from tuner.sweep.stopping import ENDED_BY, TIMEOUT, because
from tuner.sweep.study_folder import direction_names

OUTSIDE = "not in the search space"  # of the default config
RESULTS = "optimization_results.yaml"
GAIN = ("announced", "corrected", "low", "high", "images", "trials")  # the fields of runs.selection.Gain
log = logging.getLogger("tuner.sweep.report")


def write(
    study: Study, trials: list[FrozenTrial], folder: Path, spec: str | None, stopped: str | None = None
) -> dict[str, Any]:
    """Write optimization_results.yaml and trials.csv into the sweep's folder, and return the contents of the former.

    spec: the study's storage.   stopped: why the study ended before its n_trials.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"name": "optuna", **_best(study, trials, folder)}
    if chosen := [value for key, value in study.user_attrs.items() if key.startswith(CHOSEN)]:
        results["chosen"] = chosen
    results["trials"] = {state.lower(): n for state, n in Counter(map(ranking.state, trials)).items()}
    ended = Counter(trial.user_attrs[ENDED_BY] for trial in trials if ENDED_BY in trial.user_attrs)
    if stopped:
        results["stopped"] = stopped
    else:
        del ended[TIMEOUT]  # they have run again
    if ended:
        results["ended_by"] = dict(ended)
    results |= {
        "study": study.study_name,
        "storage": storage.redacted(spec),
        "directions": direction_names(study.directions),
    }
    with replacing(folder / RESULTS) as file:
        file.write(yaml.safe_dump(results, sort_keys=False, allow_unicode=True).encode())
    with replacing(folder / "trials.csv") as file:
        file.write(_csv(study).encode())
    return results


def _best(study: Study, trials: list[FrozenTrial], folder: Path) -> dict[str, Any]:
    """The best trial or the Pareto front, the default config's value, the gain, and the test of the retrained best."""
    results: dict[str, Any] = {}
    best = ranking.best(study, trials)
    if len(study.directions) > 1:
        results["solutions"] = [
            {"params": t.params, "values": t.values, "trial": t.number, "dir": _dir(t, folder)}
            for t in ranking.pareto_front(study, trials)
        ]
    elif best is not None:
        results |= {"best_params": best.params, "best_value": best.values[0]}
        results |= {"best_trial": best.number, "best_dir": _dir(best, folder)}
    results |= _default(study, trials)
    if gain := ranking.gain(study, trials, folder):
        results["gain"] = asdict(gain)
    if best is not None and (tested := final_result(folder, best.number)):
        keys = ("test_accuracy", "test_accuracy_std", "test_accuracy_interval", "n_test", "seeds", "ensemble")
        results["final"] = {key: tested[key] for key in keys if key in tested}
        if read := readings.of_result(tested):
            results["final"]["test_readings"] = asdict(read)
        if beside := tested_default(trials, folder, tested):
            results["final"]["default"] = beside
        if found := baselines.of_result(tested):
            results["baselines"] = found | {"best_trial": score_of(best, folder, found["metric"])}
    return results


def _dir(trial: FrozenTrial, folder: Path) -> str | None:
    own = ranking.folder_of(trial, folder)
    return str(own) if own else None


def _default(study: Study, trials: list[FrozenTrial]) -> dict[str, Any]:
    """The value of the default config, or why there is none; empty for a search without its trial."""
    if (baseline := ranking.baseline(trials)) is not None:
        return {"default_value": baseline.values if len(study.directions) > 1 else baseline.values[0]}
    if lost := [trial for trial in trials if trial.user_attrs.get("baseline") and trial.state.is_finished()]:
        return {"default_state": lost[-1].state.name.lower()}
    if any(trial.user_attrs.get("baseline") is False for trial in trials):
        return {"default_state": OUTSIDE}
    return {}


def score_of(trial: FrozenTrial, folder: Path | None, metric: str) -> float | None:
    """A metric of a trial on the validation images, from its result.json; None if that does not have it.

    folder: the sweep's.
    """
    own = ranking.folder_of(trial, folder)
    value = read_result(own).get(f"val_{metric}") if own else None
    return value if is_number(value) else None


def _csv(study: Study) -> str:
    """Optuna's table of trials, with the same columns whether or not the objectives have names."""
    table = study.trials_dataframe(attrs=("number", "value", "params", "state", "duration", "user_attrs"))
    names = study.metric_names or []
    columns = {f"value_{names[0]}": "value"} if len(names) == 1 else {}
    columns |= {f"values_{name}": f"values_{k}" for k, name in enumerate(names)}
    table = table.drop(columns="user_attrs_traceback", errors="ignore").rename(columns=columns)
    for name in [name for name in table if table[name].dtype.kind == "O"]:
        table[name] = table[name].map(cell)
    text: str = table.rename(columns=cell).to_csv(index=False)
    return text


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a trial's folder, whatever program wrote it; empty if there is none that can be read."""
    try:
        return result.read_result(folder, any_program=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s", error)
        return {}


def final_result(folder: Path, number: int, name: str = BEST) -> dict[str, Any] | None:
    """The result of best/ or default/ in a sweep's folder. None unless it is complete and the retrained `number`."""
    best = read_result(folder / name)
    if best.get("status") != "complete" or best.get("trial") != number:
        return None
    accuracies = best.get("test_accuracy"), best.get("test_accuracy_std")
    if not (all(map(is_number, accuracies)) and _are_whole(best.get("seeds"))):
        log.warning("%s has no test accuracy, its standard deviation or seeds: it is damaged", folder / name)
        return None
    if "ensemble" in best and not _is_ensemble(best["ensemble"]):
        log.warning("%s has an ensemble without its trials or gain: it is damaged", folder / name)
        return None
    return best


def tested_default(trials: list[FrozenTrial], folder: Path, tested: dict[str, Any]) -> dict[str, Any] | None:
    """The test of the default config, retrained as the best was, and how much more accurate the best is.

    folder: the sweep's.   tested: the result of best/. None if the default config was not retrained.
    `difference` is that of the means over the seeds. Its 95% interval, `low` to `high`, is that of the first seeds on
    the test images, None if there are no predictions; seeds that are averaged differ less.
    """
    from tuner.runs import selection  # imports pandas, which trials do not need

    baseline = ranking.baseline(trials)
    default = final_result(folder, baseline.number, DEFAULT) if baseline else None
    if default is None:
        return None
    keys = ("test_accuracy", "test_accuracy_std", "test_accuracy_interval", "n_test", "seeds")
    difference = tested["test_accuracy"] - default["test_accuracy"]
    low, high = selection.tested_interval(folder / DEFAULT, folder / BEST, difference) or (None, None)
    return {key: default[key] for key in keys if key in default} | {"difference": difference, "low": low, "high": high}


def _are_whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int for number in numbers)


def _is_ensemble(value: Any) -> bool:
    if not isinstance(value, dict) or not _are_whole(value.get("trials")):
        return False
    gain = value.get("gain")
    is_gain = isinstance(gain, dict) and gain.keys() == {*GAIN} and all(map(is_number, gain.values()))
    return gain is None or is_gain


def describe_test(tested: dict[str, Any], name: str) -> str:
    """The test accuracy of the retrained best, with its standard deviation, or that of the ensemble."""
    seeds = len(tested["seeds"])
    of_seeds, accuracy = f"{seeds} seed{'s' * (seeds != 1)}", f"{name}{tested['test_accuracy']:.4f}"
    n = tested.get("n_test")
    images = f" ({result.on_images(tested['test_accuracy'], n)})" if type(n) is int and n > 0 else ""
    if ensemble := tested.get("ensemble"):
        trials = ", ".join(map(str, ensemble["trials"]))
        several = len(ensemble["trials"]) > 1
        return f"the ensemble of trial{'s' * several} {trials}, {of_seeds}{' each' * several}: {accuracy}{images}"
    spread = f", standard deviation {tested['test_accuracy_std']:.4f}" if seeds > 1 else ""
    return f"{of_seeds}: {accuracy}{spread}{images}"


def describe_default(default: dict[str, Any], *, alone: bool) -> str:
    """The result of `tested_default` as a line.   alone: whether the best was retrained alone, not an ensemble."""
    who = "the best has" if alone else "the ensemble has, over single heads of the default,"
    line = f"the default config likewise, {describe_test(default, '')}; {who} {default['difference']:+.4f}"
    if default["low"] is None:
        return line
    within = default["low"] <= 0 <= default["high"]
    verdict = "within chance" if within else "more than chance explains"
    return f"{line} (95% interval {default['low']:+.4f} to {default['high']:+.4f}): {verdict}"


def ensemble_lines(tested: dict[str, Any]) -> list[str]:
    """The gain of the ensemble over the best trial; nothing without an ensemble, or without an estimate."""
    from tuner.runs.selection import Gain  # imports pandas, which trials do not need

    gain = tested.get("ensemble", {}).get("gain")
    return [f"gain of the ensemble over the best trial {Gain(**gain)}"] if gain else []


def resume_command(config: DictConfig, study: str, shown: Sequence[str]) -> str:
    """The command that continues this sweep: this one, with the study's name. shown: its arguments, no password."""
    program, key = workers.program() or ["python"], name_key(config, study)
    kept = [argument for argument in shown if not argument.startswith(f"{key}=")]
    command = [Path(program[0]).name, *program[1:], *kept, f"{key}={study}"]
    return shlex.join(command)


def name_key(config: DictConfig, study: str) -> str:
    """The key that gives a sweep the name of its study."""
    return "study" if OmegaConf.select(config, "study") == study else "hydra.sweeper.study_name"


def summary(results: dict[str, Any], folder: Path) -> str:
    """The result of the sweep and its files, as log lines."""
    if "best_value" in results:
        lines = _best_lines(results)
    elif results.get("solutions"):
        lines = [f"{len(results['solutions'])} of {results['trials']['complete']} trials are on the Pareto front"]
    else:
        lines = [f"no trial was completed; {_advice(results)}"]
    if "stopped" in results:
        ran = sum(count for state, count in results["trials"].items() if state not in ("waiting", "duplicate"))
        lines.append(f"the search ended after {ran} trials, {because(results['stopped'])}")
    for values in results.get("chosen", ()):
        text = " ".join(f"{key}={value}" for key, value in values.items())
        lines += [f"chosen for all trials: {text}"]
    if found := results.get("baselines"):
        lines += baselines.lines(found, found["best_trial"], "the best trial")
    if tested := results.get("final"):
        best_folder = shlex.quote(str(folder / "best"))
        again = f"as a run of its own: python -m tuner.train --config-dir {best_folder}/conf --config-name config"
        lines += [*ensemble_lines(tested), f"on train + validation, {describe_test(tested, 'test accuracy ')}"]
        if beside := tested.get("default"):
            lines.append(describe_default(beside, alone="ensemble" not in tested))
        if read := tested.get("test_readings"):
            lines.append(f"this test split {readings.Readings(**read)}")
        lines += [f"model, tables and plots: {best_folder}", *([again] if "ensemble" not in tested else [])]
    lines.append(f"results: {folder / RESULTS}, every trial: {folder / 'trials.csv'}")
    if results["storage"]:
        lines.append(f"look at it: python -m tuner.study {shlex.quote(str(folder))}")
    return "\n".join(lines)


def _best_lines(results: dict[str, Any]) -> list[str]:
    from tuner.runs.selection import Gain  # imports pandas, which trials do not need

    best, default = results["best_value"], results.get("default_value")
    better = 1 if results["directions"] == ["maximize"] else -1
    gain = "" if default is None else f", the default config's {default:.6g}, gain {better * (best - default):.6g}"
    if state := results.get("default_state"):
        why = "a value of the default config is not in the search space"
        why = why if state == OUTSIDE else f"the trial of the default config ended as {state}"
        gain = f"; no gain is known, as {why}"
    lines = [f"best value {best:.6g} (trial {results['best_trial']}){gain}"]
    if "gain" in results:
        lines.append(f"gain to expect {Gain(**results['gain'])}")
    return [*lines, "parameters: " + " ".join(f"{name}={value}" for name, value in results["best_params"].items())]


def _advice(results: dict[str, Any]) -> str:
    """What to do if no trial was completed."""
    if ended := results.get("ended_by"):
        rules = " and ".join(f"hydra.sweeper.{rule}" for rule in ended)
        return f"{sum(ended.values())} were ended by {rules}: give more time"
    if set(results["trials"]) == {"pruned"}:
        return "all were pruned: loosen hydra.sweeper.pruner, or model.screen if it is set"
    return "the errors are in trials.csv"
