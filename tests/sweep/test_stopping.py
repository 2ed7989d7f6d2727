"""When a study ends before its number of trials: after a time, at a target, or when nothing improves any more."""

import re
from datetime import datetime, timedelta

import optuna
import pytest
import yaml
from optuna.trial import TrialState, create_trial

from tuner import InputError
from tuner.analysis.advice import advice
from tuner.analysis.loaded_study import load
from tuner.sweep import stopping
from tuner.sweep.history import History
from tuner.sweep.progress import Progress
from tuner.sweep.stopping import StopRules, of_options

NOON = datetime(2026, 1, 1, 12)
COMPLETE, PRUNED, FAIL, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING


def ran(start, end, state=COMPLETE, value=0.5, **user):
    """A trial that ran from a minute to another one."""
    trial = create_trial(state=state, value=value if state == COMPLETE else None, user_attrs=user)
    trial.datetime_start = NOON + timedelta(minutes=start)
    trial.datetime_complete = None if end is None else NOON + timedelta(minutes=end)
    return trial


def numbered(*values, direction="maximize"):
    """A study of trials with these values; None is a pruned one."""
    study = optuna.create_study(direction=direction)
    for value in values:
        study.add_trial(create_trial(state=PRUNED if value is None else COMPLETE, value=value))
    return History(study).look()


def history_of(*trials):
    study = optuna.create_study()
    study.add_trials(trials)
    return History(study).look()


# The rules


def test_the_time_of_trials_at_once_counts_once_and_a_pause_does_not_count(monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls):
            return NOON + timedelta(minutes=110)

    monkeypatch.setattr(stopping, "datetime", Clock)
    job = {"seconds": 600.0}
    for minutes, trials in [
        (0, []),
        (20, [ran(0, 10, **job), ran(5, 20, PRUNED, **job), ran(7, 8, FAIL, **job)]),
        (20, [ran(60, 70, **job), ran(0, 10, **job)]),
        (45, [ran(60, 70, **job), ran(0, 10, **job), ran(20, 30, **job), ran(5, 35, **job)]),
        (10, [ran(0, 10, **job), ran(5, 600, FAIL)]),  # found lost when the study was continued
        (10, [ran(100, None, RUNNING)]),
        (80, [ran(10, 20, **job), ran(40, 70, **job), ran(90, None, RUNNING), ran(60, None, RUNNING)]),
        (0, [create_trial(state=TrialState.WAITING)]),
    ]:
        assert history_of(*trials).used() == minutes * 60


def test_the_time_of_the_last_run_is_kept_free():
    history = history_of(ran(0, 10, seconds=600.0), ran(10, 14, seconds=240.0))
    assert StopRules(timeout=15 * 60).reason(history) is None
    assert StopRules(timeout=25 * 60, last_runs=1).reason(history) is None
    reason = StopRules(timeout=24 * 60, last_runs=1).reason(history)
    limit = "the limit is 24 min 0 s, of which 10 min 0 s are kept for the last run"
    assert reason == f"timeout: trials have run for 14 min 0 s; {limit}"
    reason = StopRules(timeout=34 * 60, last_runs=2).reason(history)
    assert reason.endswith("the limit is 34 min 0 s, of which 20 min 0 s are kept for the last runs")
    reason = StopRules(timeout=14 * 60).reason(history)
    assert reason == "timeout: trials have run for 14 min 0 s; the limit is 14 min 0 s"


@pytest.mark.parametrize(
    ("direction", "values", "target", "reached"),
    [
        ("maximize", (0.8, 0.9, 0.85), 0.9, "target: trial 1 has 0.9"),
        ("maximize", (0.8, 0.89), 0.9, None),
        ("minimize", (0.3, 0.1), 0.2, "target: trial 1 has 0.1"),
        ("minimize", (0.3, 0.25), 0.2, None),
        ("maximize", (None,), 0.0, None),
    ],
)
def test_target(direction, values, target, reached):
    assert StopRules(target=target).reason(numbered(*values, direction=direction)) == reached


@pytest.mark.parametrize(
    ("values", "flat", "since"),
    [
        ((0.5, 0.4, 0.3), 2, 2),
        ((0.5, 0.5, None), 2, 2),  # as good is not better; a pruned trial counts
        ((0.5, 0.4, 0.6), 2, None),
        ((None, None, None), 2, None),  # without a best, nothing is flat
    ],
)
def test_stop_when_flat(values, flat, since):
    reason = StopRules(stop_when_flat=flat).reason(numbered(*values))
    assert reason == (since and f"stop_when_flat: the last {since} trials are not better than trial 0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": "soon"}, "hydra.sweeper.timeout=soon must be a time above 0, in seconds or as 60s, 10m or 2h"),
        ({"trial_timeout": 0}, "hydra.sweeper.trial_timeout=0 must be a time above 0"),
        ({"target": float("nan")}, "hydra.sweeper.target=nan must be a finite number"),
        ({"stop_when_flat": 0}, "hydra.sweeper.stop_when_flat=0 must be a whole number of at least 1"),
        ({"target": 1.0, "objectives": 2}, "hydra.sweeper.target=1.0 needs one objective, and this study has 2"),
        ({"stop_when_flat": 3, "objectives": 2}, "hydra.sweeper.stop_when_flat=3 needs one objective"),
    ],
)
def test_what_a_rule_cannot_have(options, message):
    options = dict.fromkeys(("timeout", "trial_timeout", "target", "stop_when_flat")) | options
    objectives = options.pop("objectives", 1)
    with pytest.raises(InputError, match=re.escape(message)):
        of_options(options, objectives=objectives, last_runs=0)


# Searches


def stopped(toy):
    return yaml.safe_load((toy.folder / "multirun/toy/optimization_results.yaml").read_text()).get("stopped")


LAUNCHERS = [
    [],
    *(
        pytest.param([f"hydra/launcher={name}", "hydra.sweeper.n_jobs=2", *more], marks=marks)
        for name, more, marks in [
            ("joblib", [], ()),
            ("submitit_local", [], pytest.mark.slow),
            ("ray", ["+hydra.launcher.ray.init.include_dashboard=false"], pytest.mark.slow),
        ]
    ),
]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=["basic", "joblib", "submitit", "ray"])
def test_a_search_ends_after_its_time_and_is_continued_with_more(toy, launcher):
    launcher = [*launcher, "steps=0"]  # a trial that reports nothing runs to its end
    done = toy.command("hydra.sweeper.timeout=1e-6", *launcher)
    assert done.returncode == 0, done.stderr
    first = len(toy.states())
    assert 0 < first < 6
    assert set(toy.states()) == {"COMPLETE"}
    assert stopped(toy).startswith("timeout: trials have run for ")
    assert f"the search ended after {first} trials, by timeout: " in done.stdout
    again = toy.run("hydra.sweeper.timeout=1e-6", *launcher)
    assert again.returncode == 0
    assert "no more trials, by hydra.sweeper.timeout: " in again.stdout
    assert len(toy.states()) == first
    assert toy.command("hydra.sweeper.timeout=1h", *launcher).returncode == 0
    assert toy.states().count("COMPLETE") == 6
    assert stopped(toy) is None


def test_at_the_timeout_running_trials_end_at_their_next_step_and_run_again_with_more_time(toy):
    done = toy.run("hydra.sweeper.timeout=1e-6", "steps=3")
    assert done.returncode == 1
    assert toy.states() == ["PRUNED", "WAITING"]
    assert toy.study().trials[0].user_attrs["ended_by"] == "timeout"
    assert list(toy.study().trials[0].intermediate_values) == [1]
    assert "trial 0: ended at step 1 by hydra.sweeper.timeout | 0/6 trials" in done.stdout
    assert "no trial was completed; 1 were ended by hydra.sweeper.timeout: give more time" in done.stdout
    assert "the search ended after 1 trials, by timeout: " in done.stdout
    done = toy.run("hydra.sweeper.timeout=1h", "steps=3")
    assert toy.states() == ["PRUNED"] + ["COMPLETE"] * 6
    assert toy.study().trials[1].user_attrs["baseline"]
    written = yaml.safe_load((toy.folder / "multirun/toy/optimization_results.yaml").read_text())
    assert "default_value" in written
    assert "ended_by" not in written


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=["basic", "joblib", "submitit", "ray"])
def test_a_trial_ends_after_its_time_and_the_search_goes_on(toy, launcher):
    done = toy.command("hydra.sweeper.trial_timeout=1e-6", "steps=3", *launcher)
    assert "no trial was completed; 6 were ended by hydra.sweeper.trial_timeout: give more time" in done.stdout
    assert toy.states() == ["PRUNED"] * 6
    assert {trial.user_attrs["ended_by"] for trial in toy.study().trials} == {"trial_timeout"}
    assert stopped(toy) is None


def test_the_line_of_progress_counts_the_time_of_trials_that_run_again():
    ended = [ran(0, minutes, PRUNED, ended_by="timeout", seconds=60) for minutes in (1, 2)]
    copies = [create_trial(state=TrialState.WAITING, system_attrs={"retry_history": [n]}) for n in (0, 1)]
    progress = Progress(history_of(*ended, *copies), 6, StopRules(timeout=120))
    assert progress.line() == "0/6 trials, 2 min 0 s of 2 min 0 s"


def test_a_search_ends_at_its_target(toy):
    done = toy.run("hydra.sweeper.target=1.0")  # trial 0 is the default config, whose value is 1
    assert done.returncode == 0
    assert toy.states() == ["COMPLETE"]
    assert stopped(toy) == "target: trial 0 has 1"
    said = "the search ended before its n_trials, by hydra.sweeper.target: trial 0 has 1; to go on, change that, and "
    assert said + "resume with the same command and study=toy" in advice(load("toy"))
    toy.run("hydra.sweeper.target=-1")
    assert toy.states() == ["COMPLETE"] * 6
    assert "the search ended" not in " ".join(advice(load("toy")))


def test_a_search_ends_when_it_is_flat(toy):
    toy.run("hydra.sweeper.stop_when_flat=2", "hydra.sweeper.enqueue=[{x:0},{x:1},{x:2},{x:0.5}]")
    assert toy.states() == ["COMPLETE"] * 4 + ["WAITING"]
    assert stopped(toy) == "stop_when_flat: the last 2 trials are not better than trial 1"


def test_the_line_of_progress_says_how_near_the_rules_are(toy):
    done = toy.run("hydra.sweeper.stop_when_flat=6", "hydra.sweeper.timeout=2h")
    state = r"\d+ s of 2 h 0 min, \d of 6 without gain, 0 s left"
    assert re.search(f"trial 5: .* 6/6 trials, best .*, {state}", done.stdout)
