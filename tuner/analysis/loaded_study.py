"""A study, read back: its trials as a table, the importance of parameters, the overrides of a trial."""

import logging
import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial

from tuner import InputError, artifacts, yaml_file
from tuner.config import config_options
from tuner.plots import HUGE, Parameter
from tuner.rules import FOLDER_NAME
from tuner.sweep import ranking, report, storage
from tuner.sweep.search_space import SearchSpace
from tuner.sweep.settings import MIXED, SAME_AS
from tuner.sweep.stopping import ENDED_BY, STOPPED
from tuner.sweep.study_folder import direction_names

log = logging.getLogger("tuner.analysis.loaded_study")
COLUMNS = ("start", "end", "seconds", "epochs", "folder", "host", "error", "ended_by", "baseline")
OBJECTIVES = {  # how tables and plots name the objectives of a sweep of tuner.train; others are "validation NAME"
    "accuracy": "validation accuracy",
    "balanced_accuracy": "balanced validation accuracy",
    "gmacs": "billions of multiply-adds",
}
DEFAULT_STORAGE = "sqlite:///multirun/optuna.db"


@dataclass(frozen=True)
class LoadedStudy:
    """A study and what can be read from it.

    spec: its storage, in the form of `tuner.sweep.storage`.   folder: of its sweep, if known.
    What is read is kept: to see the progress of a running sweep, load the study again.
    """

    study: optuna.Study
    spec: str
    folder: Path | None

    @cached_property
    def frozen(self) -> list[FrozenTrial]:
        """The study's trials by number, read from the storage once."""
        return self.study.get_trials(deepcopy=False)

    @property
    def goals(self) -> list[str]:
        """maximize or minimize, for each objective."""
        return direction_names(self.study.directions)

    @property
    def stopped(self) -> str | None:
        """Why the search ended before its n_trials; None if it did not."""
        reason = self.study.user_attrs.get(STOPPED)
        return reason if isinstance(reason, str) else None

    @property
    def values(self) -> list[str]:
        """The columns of `trials` that have the values of the objectives."""
        return ["value"] if len(self.goals) == 1 else [f"value_{k}" for k in range(len(self.goals))]

    @cached_property
    def trials(self) -> pd.DataFrame:
        """One row per trial.

        Columns: number, state, value (value_0, value_1 ... with several objectives), start, end, seconds, epochs,
        folder, host, error, ended_by (a rule), baseline (whether it is the default config), and the parameters by
        their names. A parameter with the name of another column is `params.NAME`. The state of a trial that has other
        settings or images than its study is MIXED; that of one with the parameters of an earlier trial is DUPLICATE.
        """
        values, rows = self.values, []
        for trial in self.frozen:
            attributes = trial.user_attrs
            duration = trial.duration.total_seconds() if trial.duration else None
            row = {"number": trial.number, "state": ranking.state(trial)}
            row |= dict(zip(values, trial.values or [None] * len(values), strict=True))
            row |= {"start": trial.datetime_start, "end": trial.datetime_complete}
            row |= {"seconds": attributes.get("seconds", duration), "epochs": attributes.get("epochs")}
            row |= {"folder": self.folder_of(trial), "host": attributes.get("host"), "error": attributes.get("error")}
            row["ended_by"] = attributes.get(ENDED_BY)
            row["baseline"] = bool(attributes.get("baseline"))
            rows.append(row | {_column(name): value for name, value in trial.params.items()})
        frame = pd.DataFrame(rows, columns=None if rows else ["number", "state", *values, *COLUMNS])
        for name in ("seconds", "epochs"):  # another program may have set anything
            frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(float)
        types: dict[str, Any] = dict.fromkeys(values, float)
        return frame.astype(types | dict.fromkeys(("start", "end"), "datetime64[ns]"))

    @property
    def complete(self) -> pd.DataFrame:
        """The complete trials in `trials`."""
        return self.trials[self.trials.state == "COMPLETE"]

    @property
    def states(self) -> Counter[str]:
        """The number of trials by state, such as COMPLETE or RUNNING."""
        return Counter(map(ranking.state, self.frozen))

    def folder_of(self, trial: FrozenTrial) -> str | None:
        """The trial's run folder, also if the sweep's folder was moved, or copied to another machine."""
        folder = ranking.folder_of(trial, self.folder)
        return str(folder) if folder else None

    @cached_property
    def objectives(self) -> list[str]:
        """What each objective is called: by the names that the study has, or value."""
        names = self.study.metric_names
        if names is None:
            return self._objectives_of_an_earlier_version()
        return (
            [OBJECTIVES.get(name, f"validation {name}") for name in names]
            if "fixed" in self.study.user_attrs
            else names
        )

    def _objectives_of_an_earlier_version(self) -> list[str]:
        """Sweeps did not name their objectives: compare the values of a trial with its result.json."""
        trial = next(iter(ranking.complete(self.frozen)), None)
        if trial is None or not (folder := self.folder_of(trial)):
            return self.values
        result = report.read_result(Path(folder))
        keys = {"gmacs": "gmacs", "val_balanced_accuracy": "balanced_accuracy", "val_accuracy": "accuracy"}
        by_value = {result.get(key): OBJECTIVES[name] for key, name in keys.items()}  # the last of equals
        return [by_value.get(value, column) for value, column in zip(trial.values, self.values, strict=True)]

    @cached_property
    def best(self) -> FrozenTrial | None:
        """The best complete trial, the earliest of equals; None where there is none, or several objectives."""
        return ranking.best(self.study, self.frozen)

    @cached_property
    def front(self) -> list[int]:
        """The numbers of the trials that no other one is better than, in every objective."""
        return [trial.number for trial in ranking.pareto_front(self.study, self.frozen)]

    @property
    def baseline(self) -> FrozenTrial | None:
        """The complete trial of the default config, if there is one."""
        return ranking.baseline(self.frozen)

    @property
    def tested(self) -> dict[str, Any] | None:
        """result.json of best/, the best configuration retrained and tested; None without it."""
        return report.final_result(self.folder, self.best.number) if self.folder and self.best else None

    @property
    def curves(self) -> dict[int, dict[int, float]]:
        """The values that each trial reported: number -> step -> value."""
        shown = (trial for trial in self.frozen if not {MIXED, SAME_AS} & trial.user_attrs.keys())
        return {trial.number: trial.intermediate_values for trial in shown if trial.intermediate_values}

    @cached_property
    def importances(self) -> dict[str, dict[str, float]]:
        """The share of each parameter in the variation of the complete trials' values: evaluator -> parameter -> 0..1.

        fANOVA (Hutter et al., ICML 2014) considers the whole range of values, PED-ANOVA (Watanabe et al., IJCAI 2023)
        what distinguishes the best tenth. fANOVA only handles parameters that all complete trials have, with one range;
        it is left out if PED-ANOVA handles more. With several objectives: fANOVA for each. Empty if there are fewer
        complete trials than parameters + 2, or if their values are equal, or beyond 1e100.
        """
        complete = ranking.complete(self.frozen)
        importances: dict[str, dict[str, float]] = {}
        if len(complete) < len({name for trial in complete for name in trial.params}) + 2:
            return importances
        # this imports scikit-learn, which takes a second
        from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

        study = self.study
        if any({MIXED, SAME_AS} & trial.user_attrs.keys() for trial in self.frozen):
            study = _copy(self.study, complete)
        # 1,000 trials take 5 s; with Optuna's depth of 64 they take 25 s, and the shares differ by 0.004
        fanova = FanovaImportanceEvaluator(max_depth=8, seed=0)
        wanted: list[tuple[str, Any, int]] = [("PED-ANOVA", PedAnovaImportanceEvaluator(), 0), ("fANOVA", fanova, 0)]
        if len(self.goals) > 1:
            wanted = [(f"fANOVA, {name}", fanova, k) for k, name in reversed(list(enumerate(self.objectives)))]
        for name, evaluator, k in wanted:
            finite = {trial.values[k] for trial in complete if math.isfinite(trial.values[k])}
            if len(finite) > 1 and max(map(abs, finite)) < HUGE:
                target = partial(_value, k) if len(self.goals) > 1 else None
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # about conditions that few trials meet
                        shares = get_param_importances(study, evaluator=evaluator, target=target)
                except RuntimeError as error:  # from fANOVA, if no parameter explains anything
                    log.info("%s: %s", name, error)
                    continue
                if len(shares) < len(importances.get("PED-ANOVA", ())):
                    log.info("%s is left out: it needs parameters that all trials have, with the same range", name)
                    continue
                importances[name] = {_column(parameter): float(share) for parameter, share in shares.items()}
        return {name: shares for name, shares in reversed(importances.items()) if any(shares.values())}

    @cached_property
    def parameters(self) -> list[Parameter]:
        """The parameters that were searched, the most important first."""
        parameters = []
        for parameter, searched in self._distributions.items():
            name, last = _column(parameter), searched[-1]
            if isinstance(last, CategoricalDistribution):
                parameters.append(Parameter(name, None, None, False, tuple(last.choices)))
            else:  # the range may have been widened, or depend on another parameter
                low, high = min(d.low for d in searched), max(d.high for d in searched)
                parameters.append(Parameter(name, low, high, last.log, None))
        return parameters

    @property
    def searched(self) -> list[str]:
        """Optuna's names of the parameters, the most important first."""
        return list(self._distributions)

    @cached_property
    def _distributions(self) -> dict[str, list[Any]]:
        distributions: dict[str, list[Any]] = {}
        for trial in self.frozen:
            for name, distribution in trial.distributions.items():
                distributions.setdefault(name, []).append(distribution)
        first = next(iter(self.importances.values()), {})
        return dict(sorted(distributions.items(), key=lambda item: -first.get(_column(item[0]), 0)))

    def overrides(self, trial: FrozenTrial) -> list[str]:
        """A trial's overrides and config options, as command-line arguments that run it again on its own."""
        folder = self.folder_of(trial)
        written = folder and Path(folder) / ".hydra" / "overrides.yaml"
        if written and written.exists():
            lines = yaml_file.read(written)
            if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
                raise InputError(f"{written} must be a list of overrides")
        else:
            lines = [*SearchSpace().overrides(trial.params), *self.study.user_attrs.get("fixed", {}).values()]
        of_search = ("study", "hparams_search", "final.seeds", "final.ensemble")
        kept = [line for line in lines if line.split("=")[0] not in of_search]
        hydra = written and written.with_name("hydra.yaml")
        options = config_options(yaml_file.mapping(hydra).get("hydra", {})) if hydra and hydra.exists() else []
        return [*options, *kept]


def _copy(study: optuna.Study, trials: list[FrozenTrial]) -> optuna.Study:
    """A study in memory with some of the trials."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # or it would be announced
    copied = optuna.create_study(directions=study.directions)
    optuna.logging.set_verbosity(verbosity)
    copied.add_trials(trials)
    return copied


def _column(name: str) -> str:
    taken = name in ("number", "trial", "state", "value", *COLUMNS) or re.fullmatch(r"value_\d+", name)
    return f"params.{name}" if taken else name


def _value(k: int, trial: FrozenTrial) -> float:
    return float(trial.values[k])


# Finding a study


def load(where: str | Path | None = None, storage_url: str | None = None) -> LoadedStudy:
    """Open a study for inspection. Nothing is written, and a sweep may be running on it.

    where: the folder of a sweep or of one of its trials, or a study's name; default: the newest study.
    storage_url: as hydra.sweeper.storage; default: that of the folder, or sqlite:///multirun/optuna.db.
    Raises InputError if there is no such study.
    """
    folder = _newest_folder() if where is None and storage_url is None else _folder(where)
    if folder is None and storage_url is None and where is not None and Path(where).is_dir():
        raise InputError(f"{where} belongs to no study; to compare its runs: python -m tuner.compare {where}")
    written = _results(folder) if folder else {}
    if folder and not storage_url and "storage" not in written:
        raise InputError(f"{folder / report.RESULTS} does not say where the study is; give its name and --storage URL")
    try:
        spec = _given(storage_url) if storage_url else _spec(folder, written)
        if spec is None:
            raise InputError(f"study {written.get('study', where)} was kept in memory, and ended with its process")
        store = storage.open_read_only(spec)
    except OSError as error:  # a path that is too long, for example
        raise InputError(f"the storage of {folder or where} cannot be used: {error.strerror}") from error
    with storage.damage_named(spec):
        name = written.get("study") or (str(where) if where is not None else _newest(store, spec))
        names = optuna.get_all_study_names(store)
        if name not in names:
            there = ", ".join(names[-10:]) or "none"
            raise InputError(f"no study {name} in {storage.redacted(spec)}; it has {there}")
        study = optuna.load_study(study_name=name, storage=store)
        known = study.user_attrs.get("folder")
        s = LoadedStudy(study, spec, folder or (Path(known) if known and Path(known).is_dir() else None))
        _read_all(s)
    return s


def fetched(s: LoadedStudy) -> LoadedStudy:
    """A study whose run folders that have copies are on this machine: in its folder, or in multirun/NAME.

    Raises InputError if no run has a copy.
    """
    urls = artifacts.of_study(s.study)
    if not urls:
        raise InputError(f"no run of study {s.study.study_name} has a copy: it was started without artifacts=PLACE")
    FOLDER_NAME.check("the study's name", s.study.study_name)
    folder = s.folder or Path("multirun").absolute() / s.study.study_name
    artifacts.bring(urls, folder)
    report.write(s.study, s.frozen, folder, s.spec, s.stopped)
    return LoadedStudy(s.study, s.spec, folder)


def _read_all(s: LoadedStudy) -> None:
    """Read all that the storage has of a study: where it is damaged, this fails, and what follows does not."""
    for trial in s.frozen:
        for name, value in trial.params.items():
            trial.distributions[name].to_internal_repr(value)
    _ = s.goals, s.study.metric_names, s.trials


def _results(folder: Path) -> dict[str, Any]:
    """A sweep's optimization_results.yaml. Raises InputError if it is damaged."""
    path = folder / report.RESULTS
    written = yaml_file.mapping(path)
    for key in ("study", "storage"):
        if not isinstance(written.get(key), str | None):
            raise InputError(f"{path} is damaged: {key} must be text, not {written[key]!r:.80}")
    return written


def _folder(where: str | Path | None) -> Path | None:
    """The folder of the sweep that `where` names: that folder, the one above it, or multirun/WHERE."""
    if where is None:
        return None
    inside = Path(where).absolute().parents[:1] if Path(where).exists() else ()
    near = (Path(where), *inside, Path("multirun") / where)
    return next((folder for folder in near if (folder / report.RESULTS).exists()), None)


def _newest_folder() -> Path | None:
    """The folder in multirun/ with the newest results."""
    results = list(Path("multirun").glob(f"*/{report.RESULTS}"))
    return max(results, key=lambda path: path.stat().st_mtime).parent if results else None


def _given(url: str) -> str | None:
    for scheme in (storage.SQLITE, storage.JOURNAL):  # resolve() would create its folder
        path = Path(url.removeprefix(scheme)).expanduser()
        if url.startswith(scheme) and not path.parent.is_dir():
            raise InputError(f"there is no file {path}, where --storage {url} would have the study")
    return storage.resolve(url)


def _spec(folder: Path | None, written: dict[str, Any]) -> str | None:
    if folder is None:
        if not Path(DEFAULT_STORAGE.removeprefix(storage.SQLITE)).exists():
            raise InputError("no study in multirun/; start one: python -m tuner.train -m hparams_search=optuna")
        return storage.resolve(DEFAULT_STORAGE)
    spec: str | None = written.get("storage")
    if not isinstance(spec, str | None):
        raise InputError(f"{folder / report.RESULTS}: storage must be a text, and is {type(spec).__name__}")
    if spec and "***" in spec:
        raise InputError(f"the study is in {spec}: give it with the password, --storage URL")
    for scheme in (storage.SQLITE, storage.JOURNAL):
        if spec and spec.startswith(scheme) and not Path(spec.removeprefix(scheme)).exists():
            beside = folder.absolute().parent / Path(spec.removeprefix(scheme)).name
            log.info("%s does not exist: using %s, beside the sweep's folder", spec, beside)
            return f"{scheme}{beside}"
    return spec


def _newest(store: Any, spec: str) -> str:
    names_by_start = {s.datetime_start: s.study_name for s in optuna.get_all_study_summaries(store) if s.datetime_start}
    if not names_by_start:
        raise InputError(f"no study with a trial in {storage.redacted(spec)}")
    return names_by_start[max(names_by_start)]
