"""The sweep as a command, on a program that takes no time."""

import json
import re
import signal
import subprocess
import sys
import time

import optuna
import pytest
import yaml
from hydra.core.override_parser.types import Quote, QuotedString
from optuna.trial import TrialState
from sqlalchemy import Engine, event

from tuner import earlier, study
from tuner.analysis import load
from tuner.sweep import ranking
from tuner.sweep.conditional_spaces import wide

TWO = ("objectives=2", "hydra.sweeper.direction=[minimize,minimize]")


def results(toy, folder="toy"):
    return yaml.safe_load((toy.folder / "multirun" / folder / "optimization_results.yaml").read_text())


def test_a_sweep_runs_its_trials_and_says_what_it_found(toy):
    done = toy.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert toy.states() == ["COMPLETE"] * 6
    assert toy.starts() == list(range(6))
    best = toy.study().best_trial
    written = results(toy)
    assert written["best_params"] == best.params
    assert written["best_value"] == best.value
    assert written["best_trial"] == best.number
    assert written["best_dir"] == best.user_attrs["output_dir"] == str(toy.folder / "multirun/toy" / str(best.number))
    assert written["trials"] == {"complete": 6}
    assert written["default_value"] == 1.0
    assert (toy.folder / "multirun/toy/trials.csv").read_text().count("\n") == 7
    assert f"best value {best.value:.6g} (trial {best.number}), the default config's 1" in done.stdout
    assert "6/6 trials" in done.stdout
    for trial in toy.study().trials:
        assert trial.user_attrs["host"]
        assert 0 < trial.user_attrs["seconds"] <= trial.duration.total_seconds() + 0.001
        assert trial.user_attrs["output_dir"].endswith(f"/{trial.number}")


def test_trial_0_is_the_default_config(toy):
    toy.run("x=interval(-2,2)", "group=choice(a,b)", "n=choice(1,2)")
    first = toy.study().trials[0]
    assert first.params == {"x": 1.0, "group": "a", "n": 1}
    assert first.user_attrs["baseline"]


def test_a_default_that_is_not_searched_is_drawn_and_told(toy):
    done = toy.run("x=interval(5,6)")
    assert "trial 0 draws x: the default, 1.0, is not in" in done.stdout
    assert "default_value" not in results(toy)
    assert "; no gain is known, as a value of the default config is not in the search space" in done.stdout


def test_enqueued_trials_come_first(toy):
    toy.run("hydra.sweeper.enqueue=[{x: 0.5},{x: -0.25}]", "hydra.sweeper.baseline=false")
    assert [trial.params["x"] for trial in toy.study().trials[:2]] == [0.5, -0.25]


def test_the_best_of_an_earlier_study_is_enqueued_by_its_name(toy):
    toy.run()
    toy.run("hydra.sweeper.study_name=second", "hydra.sweep.dir=multirun/second", "hydra.sweeper.enqueue=[toy]")
    assert toy.study("second").trials[1].params == toy.study().best_params


@pytest.mark.parametrize(
    ("wish", "message"),
    [("{x: 9}", "enqueue: x=9 is outside of"), ("{w: 1}", "enqueue: w is not searched; searched are x")],
)
def test_what_cannot_be_enqueued_is_told(toy, wish, message):
    done = toy.run(f"hydra.sweeper.enqueue=[{wish}]")
    assert done.returncode == 1
    assert message in done.stdout
    assert "Traceback" not in done.stderr


FAILURES = [  # what trial 2 does, what its error says
    ("raise", "RuntimeError: trial 2 raises"),
    ("exit", "the job ended with sys.exit(3)"),
    ("nan", "must return a finite number, not nan"),
    ("inf", "must return a finite number, not inf"),
    ("none", "must return a finite number, not None"),
    ("text", "must return a finite number, not 'text'"),
    ("two", "must return a finite number, not ("),
]


@pytest.mark.parametrize(("what", "error"), FAILURES)
def test_a_failed_trial_says_why_and_the_sweep_goes_on(toy, what, error):
    done = toy.run(f"does=2-{what}")
    assert done.returncode == 0
    assert toy.states() == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    failed = toy.study().trials[2]
    assert error in failed.user_attrs["error"]
    assert error in done.stdout
    if what in ("raise", "exit"):
        assert "Traceback" in failed.user_attrs["traceback"]
        assert error in (toy.folder / "multirun/toy/2/toy.log").read_text()
    assert results(toy)["trials"] == {"complete": 5, "fail": 1}


@pytest.mark.parametrize(
    ("options", "ran"),
    [
        (["hydra.sweeper.fail_fast=true"], 1),
        (["hydra.sweeper.max_failure_rate=0"], 1),
        (["hydra.sweeper.max_failure_rate=0.5"], 4),  # more than half of six
        (["hydra.sweeper.max_failure_rate=1"], 6),
    ],
)
def test_failures_are_counted_over_the_study(toy, options, ran):
    done = toy.run("does=all-raise", *options)
    assert done.returncode == 1
    assert toy.states() == ["FAIL"] * ran
    assert ("RuntimeError: trial" in done.stderr) == (ran < 6)
    assert results(toy)["trials"] == {"fail": ran}


def test_a_value_that_is_no_number_is_a_failure_like_any_other(toy):
    assert toy.run("does=all-nan", "hydra.sweeper.fail_fast=true").returncode == 1
    assert toy.states() == ["FAIL"]


def test_without_a_completed_trial_there_is_a_report_and_an_exit_code(toy):
    done = toy.run("does=all-nan")
    assert done.returncode == 1
    assert "no trial was completed" in done.stdout
    assert "Traceback" not in done.stderr


def test_no_trials_at_all(toy):
    assert toy.run("hydra.sweeper.n_trials=0").returncode == 1
    toy.run()
    done = toy.run("hydra.sweeper.n_trials=0", "hydra.sweep.dir=multirun/elsewhere")
    assert done.returncode == 0
    assert "best value" in done.stdout


def test_a_complete_study_is_not_run_again_but_prints_its_result(toy):
    toy.run()
    done = toy.run()
    assert len(toy.starts()) == 6
    assert "all of its 6 trials" in done.stdout
    assert "best value" in done.stdout


def test_a_study_goes_on_where_more_trials_are_asked_for_and_draws_new_points(toy):
    toy.run()
    toy.run("hydra.sweeper.n_trials=12")
    assert toy.starts() == list(range(12))
    xs = [trial.params["x"] for trial in toy.study().trials]
    assert len(set(xs)) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["hydra.sweeper.direction=maximize"], r"was started with direction \['minimize'\], not \['maximize'\]"),
        (["x=interval(-1,1)"], r"x: was interval\(-2, 2\), is interval\(-1, 1\)"),
        (["x=choice(1,2)"], r"x: was interval\(-2, 2\), is choice\(1, 2\)"),
        (["x=1"], r"x: was interval\(-2, 2\), is not searched"),
    ],
)
def test_another_search_is_refused_and_leaves_the_study_alone(toy, options, message):
    toy.run()
    done = toy.run("hydra.sweeper.n_trials=9", *options)
    assert done.returncode == 1
    assert re.search(message, done.stdout), done.stdout
    assert toy.states() == ["COMPLETE"] * 6


def test_other_choices_are_refused(toy):
    toy.run("n=choice(1,2)")
    done = toy.run("n=choice(1,3)", "hydra.sweeper.n_trials=9")
    assert done.returncode == 1
    assert "n: was choice(1, 2), is choice(1, 3)" in done.stdout
    assert toy.states() == ["COMPLETE"] * 6


def test_a_wider_range_and_another_parameter_go_on(toy):
    toy.run()
    done = toy.run("hydra.sweeper.n_trials=8", "x=interval(-3,3)", "n=choice(1,2)")
    assert done.returncode == 0
    assert set(toy.study().trials[7].params) == {"x", "n"}


@pytest.mark.parametrize("edit", [None, ("y: b", "y: c"), ("z: 0.0", "z: 0.0\nnew: [1, 2]")])
def test_other_settings_are_refused_or_mixed_in(toy, edit):
    """Given on the command line, or by an edited config file."""
    toy.run()
    before = toy.states()
    config = toy.folder / "conf" / "toy.yaml"
    config.write_text(config.read_text().replace(*edit) if edit else config.read_text())
    given = [] if edit else ["y=c"]
    said = "new=[1, 2] (was not set)" if edit and "new" in edit[1] else "y=c (was b)"
    for _ in range(2):  # the refused sweep leaves the study as it was
        done = toy.run(*given, "hydra.sweeper.n_trials=7")
        assert done.returncode == 1
        assert f"study toy has other settings: {said}; give the old ones, or another study=NAME, or" in done.stdout
        assert toy.states() == before
    done = toy.run(*given, "hydra.sweeper.n_trials=9", "hydra.sweeper.study_mixed=true", "x=interval(-9,9)")
    assert done.returncode == 0, done.stdout
    assert "the new trials count towards n_trials, and no result has them" in done.stdout
    trials = toy.study().trials
    assert [trial.user_attrs.get("mixed") for trial in trials] == [None] * 6 + [said] * 3
    assert ranking.best(toy.study(), trials).number < 6
    assert results(toy)["best_trial"] < 6
    read = load("toy")
    assert dict(read.states) == {"COMPLETE": 6, "MIXED": 3}
    assert len(read.complete) == 6
    assert results(toy)["trials"] == {"complete": 6, "mixed": 3}
    assert study.texts(read)["Left out, as they differ from the study"] == [f"trials 6, 7, 8: {said}"]
    config.write_text(config.read_text().replace(*edit[::-1]) if edit else config.read_text())
    done = toy.run("hydra.sweeper.n_trials=10", "x=interval(-9,9)")  # the old settings go on without a word
    assert done.returncode == 0, done.stdout
    assert "mixed" not in toy.study().trials[9].user_attrs


def test_what_does_not_affect_the_objective_may_change(toy):
    toy.run()
    done = toy.run("seconds=0.01", "hydra.sweeper.n_trials=7", "hydra/sweeper/sampler=tpe", "x=interval(-3,3)")
    assert done.returncode == 0
    assert len(toy.states()) == 7


def test_a_key_that_was_fixed_may_be_searched(toy):
    toy.run("y=c")
    done = toy.run("y=choice(b,c)", "hydra.sweeper.n_trials=8")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("secnds=choice(1,2)", "secnds is not a key of the config; did you mean seconds?"),
        ("group.nme=choice(1,2)", "group.nme is not a key of the config; did you mean group.name?"),
        ("qqq=choice(1,2)", "Could not override 'qqq'"),
        ("group=choice(nowhere,a)", "Could not find 'group/nowhere'"),
    ],
)
def test_a_misspelt_key_is_one_line_and_starts_no_trial(toy, words, says):
    done = toy.run(words)
    assert says in done.stdout
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert toy.starts() == []
    assert len([line for line in done.stdout.splitlines() if "HYDRA" in line]) == 1


@pytest.mark.parametrize("word", ["maximise", "[minimize,up]", "[]", "5"])
def test_another_direction_is_one_line(toy, word):
    done = toy.run(f"hydra.sweeper.direction={word}")
    assert done.returncode == 1
    assert "hydra.sweeper.direction=" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert toy.starts() == []


def test_a_night_in_which_all_fails_is_stopped(toy):
    config = toy.folder / "conf" / "toy.yaml"
    config.write_text(config.read_text().replace("    max_failure_rate: 1.0\n", ""))
    done = toy.run("does=all-raise", "hydra.sweeper.n_trials=40")
    assert done.returncode == 1
    assert "stopped: 21 trials failed, and 20 may" in done.stdout
    assert toy.states() == ["FAIL"] * 21


NASTY = ["it's", 'say "hi"', "a,b", "c d", "1", "true", "null", "[1]", "a=b", "x:y", "back\\slash", "ünïcode", "  pad "]


def test_strings_reach_the_job_as_they_are(toy):
    """Each choice as a grid point; the job's own record of its config is what it got."""
    choices = ",".join(QuotedString(text, Quote.double).with_quotes() for text in NASTY)
    done = toy.run(
        f"y=choice({choices})",
        "x=1",
        "hydra/sweeper/sampler=grid",
        "hydra.sweeper.n_trials=99",
        "hydra.output_subdir=cfg",
    )
    assert done.returncode == 0, done.stdout
    got = {
        trial.params["y"]: yaml.safe_load((toy.folder / f"multirun/toy/{trial.number}/cfg/config.yaml").read_text())[
            "y"
        ]
        for trial in toy.study().trials
    }
    assert got == {text: text for text in NASTY}


def test_groups_lists_and_globs_are_searched(toy):
    done = toy.run("group=glob(*)", "++w=choice([1,2],[3])", "x=1", "hydra.output_subdir=cfg")
    assert done.returncode == 0, done.stdout
    params = [trial.params for trial in toy.study().trials]
    assert {p["group"] for p in params} == {"a", "b"}
    assert {p["++w"] for p in params} == {"[1,2]", "[3]"}
    for trial in [toy.study().trials[number] for number in toy.starts()]:  # duplicates have no folder
        config = yaml.safe_load((toy.folder / f"multirun/toy/{trial.number}/cfg/config.yaml").read_text())
        assert config["group"]["name"] == trial.params["group"]
        assert config["w"] == json.loads(trial.params["++w"])


def test_a_custom_search_space_depends_on_what_was_drawn(toy):
    done = toy.run("hydra.sweeper.custom_search_space=toy.configure")
    assert done.returncode == 0, done.stdout + done.stderr
    for trial in toy.study().trials[1:]:
        assert abs(trial.params["z"] - trial.params["x"]) <= 0.1


def test_a_custom_search_space_sees_fixed_parameters(toy):
    """As hydra-optuna-sweeper has it: drawn ones are in trial.params, fixed ones in trial.user_attrs."""
    done = toy.run("hydra.sweeper.custom_search_space=toy.near_fixed", "x=1.5", "++v=[1,2]")
    assert done.returncode == 0, done.stdout + done.stderr
    for trial in toy.study().trials:
        assert 1.4 <= trial.params["z"] <= 1.6
        assert 0 <= trial.params["+w"] <= 1  # a new key: named with its +, as Hydra's example does
        assert trial.user_attrs["++v"] == [1, 2]


def test_a_new_key_keeps_its_plus_in_the_study(toy):
    done = toy.run("+w=interval(0,1)", "hydra.sweeper.n_trials=3")
    assert done.returncode == 0, done.stdout
    assert all("+w" in trial.params for trial in toy.study().trials)


def test_a_custom_search_space_may_have_the_name_of_an_earlier_version(toy, monkeypatch):
    assert earlier.target("tuner.sweep.spaces.wide") == f"{wide.__module__}.{wide.__name__}"
    monkeypatch.setitem(earlier.TARGETS, "old_toy.", "toy.")
    done = toy.run("hydra.sweeper.custom_search_space=old_toy.configure")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "z" in toy.study().trials[0].params


def test_a_choice_that_does_not_compose_fails_its_trial(toy):
    done = toy.run("group=choice(a,nowhere)", "hydra.sweeper.n_trials=8")
    assert done.returncode == 0
    states = {trial.params["group"]: trial.state for trial in toy.study().trials}
    assert states == {"a": TrialState.COMPLETE, "nowhere": TrialState.FAIL}
    assert "nowhere" in next(t for t in toy.study().trials if t.state == TrialState.FAIL).user_attrs["error"]


def test_a_pruned_trial_is_no_failure_and_leaves_no_traceback(toy):
    done = toy.run(
        "hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=2", "steps=5", "hydra.sweeper.n_trials=20"
    )
    assert done.returncode == 0
    pruned = [trial for trial in toy.study().trials if trial.state == TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        assert 1 <= len(trial.intermediate_values) < 5
        log = toy.folder / f"multirun/toy/{trial.number}/toy.log"
        assert not log.exists() or "Traceback" not in log.read_text()
    assert f"{len(pruned)} pruned" in done.stdout


@pytest.mark.parametrize(
    ("pruner", "options"),
    [
        ("none", []),
        ("median", []),
        ("percentile", []),
        ("successive_halving", ["min_resource=1"]),
        ("hyperband", []),
        ("wilcoxon", []),
        ("threshold", ["upper=2"]),
    ],
)
def test_every_pruner_prunes(toy, pruner, options):
    extra = [f"hydra.sweeper.pruner.{option}" for option in options]
    done = toy.run(f"hydra/sweeper/pruner={pruner}", "steps=9", "hydra.sweeper.n_trials=20", *extra)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(toy.states()) == ({"COMPLETE"} if pruner == "none" else {"COMPLETE", "PRUNED"})


def test_the_patient_pruner_ends_trials_that_get_worse(toy):
    """All do: the values of the toy program fall, and are to be maximised."""
    options = ("hydra.sweeper.pruner.patience=1", "hydra.sweeper.direction=maximize", "steps=9")
    done = toy.run("hydra/sweeper/pruner=patient", *options)
    assert done.returncode == 1
    assert set(toy.states()) == {"PRUNED"}


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "nsgaii", "gp", "qmc"])
def test_every_sampler_goes_on_without_repeating_itself(toy, sampler):
    for n_trials in (6, 10):
        done = toy.run(
            f"hydra/sweeper/sampler={sampler}", f"hydra.sweeper.n_trials={n_trials}", "hydra.sweeper.baseline=false"
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert toy.states() == ["COMPLETE"] * 10
    assert len({trial.params["x"] for trial in toy.study().trials}) == 10


def test_a_grid_ends_with_its_last_point(toy):
    done = toy.run("hydra/sweeper/sampler=grid", "x=choice(1,2,3)", "n=range(0,2)", "hydra.sweeper.n_trials=50")
    assert done.returncode == 0, done.stdout + done.stderr
    points = [tuple(sorted(trial.params.items())) for trial in toy.study().trials]
    assert len(points) == len(set(points)) == 6
    [default] = [trial for trial in toy.study().trials if trial.user_attrs.get("baseline")]
    assert default.params == {"x": 1, "n": 1}
    assert results(toy)["default_value"] == default.value


def test_a_grid_that_was_stopped_misses_and_repeats_nothing(toy):
    grid = ["hydra/sweeper/sampler=grid", "x=choice(1,2,3)", "n=range(0,4)", "hydra.sweeper.sampler.seed=0"]
    for n_trials in (5, 7, 12):
        assert toy.run(*grid, f"hydra.sweeper.n_trials={n_trials}").returncode == 0
    points = {(trial.params["x"], trial.params["n"]) for trial in toy.study().trials}
    assert len(points) == len(toy.study().trials) == 12


def test_a_folder_that_the_study_does_not_know_is_moved_aside(toy):
    toy.run("hydra.sweeper.n_trials=1")
    (toy.folder / "multirun/toy/1").mkdir()
    (toy.folder / "multirun/toy/1/old").touch()
    toy.run("hydra.sweeper.n_trials=2")
    [aside] = (toy.folder / "multirun/toy").glob("1-before-*")
    assert (aside / "old").exists()


def test_several_objectives(toy):
    done = toy.run(
        "objectives=2",
        "hydra.sweeper.direction=[minimize,minimize]",
        "hydra/sweeper/sampler=nsgaii",
        "hydra/sweeper/pruner=median",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = results(toy)
    assert {tuple(s["values"]) for s in written["solutions"]} == {tuple(t.values) for t in toy.study().best_trials}
    assert all(s["dir"].endswith(f"/{s['trial']}") for s in written["solutions"])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], None),  # the program's config has no such key
        (["+objective=null"], None),
        (["+objective=5"], None),
        (["+objective=loss"], ["loss"]),
        (["+objective=accuracy_and_cost"], None),  # of two objectives, and there is one
        (["+objective=accuracy_and_cost", *TWO], ["accuracy", "gmacs"]),
        (["+objective=accuracy", *TWO], None),
    ],
)
def test_objectives_are_called_as_the_config_says(toy, options, names):
    assert toy.run("hydra.sweeper.n_trials=1", *options).returncode == 0
    assert toy.study().metric_names == names
    columns = (toy.folder / "multirun/toy/trials.csv").read_text().splitlines()[0].split(",")
    assert columns[:3] == (["number", "values_0", "values_1"] if TWO[0] in options else ["number", "value", "params_x"])


def test_a_study_without_names_gets_them_and_keeps_those_that_it_has(toy):
    toy.run("hydra.sweeper.n_trials=1")
    for objective in ("first", "second"):
        toy.run("hydra.sweeper.n_trials=1", f"+objective={objective}", "hydra.sweeper.study_mixed=true")
        assert toy.study().metric_names == ["first"]


def test_two_studies_do_not_share_a_folder(toy):
    toy.run()
    done = toy.run("hydra.sweeper.study_name=other")
    assert "multirun/toy is another study's" in done.stdout
    assert results(toy)["study"] == "toy"
    assert results(toy, "toy-2")["study"] == "other"


def test_a_study_keeps_its_folder_wherever_it_is_gone_on_with(toy):
    toy.run()
    toy.run("hydra.sweep.dir=multirun/later", "hydra.sweeper.n_trials=8")
    assert not (toy.folder / "multirun/later").exists()
    assert (toy.folder / "multirun/toy/7").is_dir()


@pytest.mark.parametrize(
    ("storage", "spec"),
    [
        ("journal:///here/there/study.journal", None),
        ("null", None),
        ("{_target_: optuna.storages.RDBStorage, url: 'sqlite:///other.db'}", "sqlite:///{}/other.db"),
        ("sqlite:///${hydra.sweep.dir}/study.db", "sqlite:///{}/multirun/toy/study.db"),
    ],
)
def test_studies_are_kept_where_one_says(toy, storage, spec):
    done = toy.run(f"hydra.sweeper.storage={storage}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(toy)["trials"] == {"complete": 6}
    if spec:
        assert len(optuna.load_study(study_name="toy", storage=spec.format(toy.folder)).trials) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["hydra.sweeper.storage=study.db"], "must be a URL"),
        (["hydra.sweeper.storage=sqlite:////proc/nowhere/study.db"], "storage"),
        (["hydra.sweeper.n_jobs=0"], "n_jobs=0 must be at least 1"),
        (["hydra.sweeper.max_failure_rate=2"], "max_failure_rate=2.0 must be from 0 to 1"),
        (["x=range(1,1)"], "cannot be searched"),
        (["hydra.sweeper.enqueue=[nowhere]"], "nowhere"),
        (["hydra.sweeper.enqueue=[5]"], "5 must be a dict of parameters, or the name of a study"),
        (
            ["hydra/sweeper/sampler=grid"],
            "a grid needs choices or ranges with a step, and x is interval(-2, 2): give it as 'x=choice(A,B,C)', or",
        ),
        (
            ["hydra/sweeper/sampler=cmaes", "objectives=2", "hydra.sweeper.direction=[minimize,minimize]"],
            "CMA-ES takes one objective, and this search has 2: choose another hydra/sweeper/sampler",
        ),
        (
            ["hydra/sweeper/sampler=grid", "x=choice(1,2)", "hydra.sweeper.enqueue=[{x: 1}]"],
            "a grid runs only its own points",
        ),
        (["hydra.sweeper.custom_search_space=nowhere.at_all"], "nowhere"),
        (
            ["hydra/sweeper/pruner=threshold"],
            "hydra.sweeper.pruner: Either lower or upper must be specified; got lower=null, upper=null, "
            "n_warmup_steps=0, interval_steps=1; set others with hydra.sweeper.pruner.KEY=VALUE",
        ),
        (
            ["hydra/sweeper/sampler=nsgaii", "hydra.sweeper.sampler.population_size=1"],
            "hydra.sweeper.sampler: `population_size` must be greater than or equal to 2; got ",
        ),
    ],
)
def test_what_cannot_be_swept_is_one_line_and_an_exit_code(toy, options, message):
    done = toy.run(*options)
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_writes_what_there_is_and_says_how_to_go_on(toy):
    with toy.start("seconds=0.3", "hydra.sweeper.n_trials=30") as process:
        for line in process.stdout:
            if "trial 3:" in line:
                time.sleep(0.15)  # within the next job
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continue with: python -m toy -m seconds=0.3 hydra.sweeper.n_trials=30 hydra.sweeper.study_name=toy" in out
    assert "Traceback" not in err
    assert not any(trial.state == TrialState.RUNNING for trial in toy.study().trials)
    assert results(toy)["trials"]["complete"] >= 3
    assert toy.run("hydra.sweeper.n_trials=6").returncode == 0
    counted = [t for t in toy.study().trials if t.state == TrialState.COMPLETE]
    assert len(counted) == 6
    assert len({t.params["x"] for t in counted}) == 6


def test_several_sweeps_share_a_budget_and_a_folder(toy):
    sweeps = [toy.start("hydra.sweeper.n_trials=30") for _ in range(4)]
    for sweep in sweeps:
        out, err = sweep.communicate(timeout=120)
        assert sweep.returncode == 0, out + err
    trials = toy.study().trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 30
    assert sorted(toy.starts()) == list(range(30))
    assert len({trial.params["x"] for trial in trials}) == 30
    assert results(toy)["trials"] == {"complete": 30}


def test_a_killed_sweep_goes_on_where_it_was(toy):
    with toy.start("seconds=0.5", "hydra.sweeper.n_trials=10") as process:
        toy.wait_for(3)
        process.kill()  # within the third job
    lost = toy.study().trials[2]
    assert lost.state == TrialState.RUNNING
    done = toy.run("hydra.sweeper.n_trials=10")
    assert done.returncode == 0, done.stdout + done.stderr
    trials = toy.study().trials
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 10
    assert "killed" in trials[2].user_attrs["error"]
    [again] = [trial for trial in trials if trial.system_attrs.get("retry_history") == [2]]
    assert again.params == lost.params


def test_a_job_on_a_full_disk_ends_the_sweep_and_no_trial_has_failed(toy):
    options = ("hydra.sweeper.n_trials=6", "hydra.sweeper.baseline=false")
    full = toy.run(*options, "does=2-full")
    assert full.returncode == 1
    assert (
        "a disk is full or cannot be written ([Errno 28] No space left on device): change that, then continue with: "
        in full.stdout
    )
    assert "Traceback" not in full.stderr
    lost = toy.study().trials[2]
    assert lost.user_attrs["error"] == "the sweep was interrupted; it is retried"
    done = toy.run(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(toy)["trials"] == {"complete": 6, "fail": 1}
    [again] = [trial for trial in toy.study().trials if trial.system_attrs.get("retry_history") == [2]]
    assert again.params == lost.params


def test_a_full_disk_below_the_study_ends_the_sweep_in_one_line(toy):
    """SQLite's own limit of a file's size has the error of a full disk."""

    def limit(connection, _):
        connection.execute("PRAGMA max_page_count=44")

    event.listen(Engine, "connect", limit)
    try:
        full = toy.run("hydra.sweeper.n_trials=200", "steps=20")
    finally:
        event.remove(Engine, "connect", limit)
    assert full.returncode == 1
    assert (
        "a disk is full or cannot be written ((sqlite3.OperationalError) database or disk is full): change that"
        in full.stdout
    )
    assert "Traceback" not in full.stderr
    complete = toy.states().count("COMPLETE")
    assert 0 < complete < 200
    done = toy.command(f"hydra.sweeper.n_trials={complete + 2}", "steps=20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert toy.states().count("COMPLETE") == complete + 2


# python -c: the sweep is killed while it draws the second parameter of trial 2
KILLED_DRAWING = """
import os, signal, sys
from optuna.trial import Trial
import toy

suggest = Trial._suggest
def draw(trial, name, distribution):
    if (trial.number, name) == (2, "z"):
        os.kill(os.getpid(), signal.SIGKILL)
    return suggest(trial, name, distribution)

Trial._suggest = draw
sys.argv[0] = "toy"
toy.main()
"""


def test_a_sweep_that_is_killed_while_it_draws_keeps_what_was_drawn(toy):
    options = ["hydra.sweeper.n_trials=6", "z=interval(0, 1)"]
    command = [sys.executable, "-c", KILLED_DRAWING, "-m", *options]
    killed = subprocess.run(command, cwd=toy.folder, env=toy.environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    lost = toy.study().trials[2]
    assert list(lost.params) == ["x"]
    done = toy.run(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = toy.study().trials
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 6
    [again] = [trial for trial in trials if trial.system_attrs.get("retry_history") == [2]]
    assert list(again.params) == ["x", "z"]
    assert again.params["x"] == lost.params["x"]
