"""What is said of a study: each rule where it applies and where it does not."""

import json

import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from tuner.analysis.advice import advice, certainty
from tuner.analysis.loaded_study import LoadedStudy
from tuner.runs.selection import Gain
from tuner.sweep import budget, report

UNIT, LR = FloatDistribution(0, 1), FloatDistribution(1e-5, 1e-1, log=True)
COMPLETE, FAIL, PRUNED = TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED
RUNNING, WAITING = TrialState.RUNNING, TrialState.WAITING


def trial(value, state=COMPLETE, /, *, system=None, user=None, **params):
    """params: of each (value, distribution)."""
    return create_trial(
        state=state,
        value=value,
        params={name: found for name, (found, _) in params.items()},
        distributions={name: distribution for name, (_, distribution) in params.items()},
        user_attrs=user or {},
        system_attrs=system or {},
    )


def study(trials, direction="maximize", name="mine", folder=None):
    made = optuna.create_study(direction=direction, study_name=name)
    made.add_trials(trials)
    return LoadedStudy(made, "memory", folder)


FLATTERED = "; p is too small, as the best was chosen on these images"
NO_MORE = "no more than chance explains (McNemar's test, p >= 0.05, 100 validation images)"


def said(lines, words):
    return any(words in line for line in lines)


# Failures


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([], "no trial has started"),
        ([trial(1.0)] * 20, None),
        ([trial(1.0)] * 19 + [trial(None, FAIL)], None),
        ([trial(1.0)] * 18 + [trial(None, FAIL)] * 2, "2 of 20 trials failed"),
        (
            [trial(None, FAIL, user={"error": error}) for error in ("E: no memory", "E: nan", "E: nan")],
            "3 of 3 trials failed, most often with: E: nan",
        ),
        (
            [trial(None, FAIL, user={"error": error}) for error in ("E: nan", "E: no memory")],
            "2 of 2 trials failed, such as: E: nan",
        ),
        (  # killed, and tried again: once with success, twice not
            [trial(None, FAIL, user={"error": "killed"}), *[trial(1.0, system={budget.RETRY_HISTORY: [0]})] * 9],
            None,
        ),
        (
            [trial(None, FAIL, system={budget.RETRY_HISTORY: list(range(k))} if k else {}) for k in range(3)],
            "1 of 1 trials failed",
        ),
        ([trial(1.0)] + [trial(None, FAIL, system={budget.INTERRUPTED: True})] * 3, None),  # Ctrl-C
        ([trial(1.0)] + [trial(None, FAIL, system={budget.SURPLUS: True})] * 3, None),
        ([trial(None, RUNNING)] * 3, None),
    ],
)
def test_failures(trials, expected):
    lines = advice(study(trials))
    assert lines[0] == expected if expected else not said(lines, "failed")


# Sweeps that ended, and those that nothing can be learned from


@pytest.mark.parametrize(
    ("trials", "owner", "expected"),
    [
        (
            [trial(1.0), trial(None, RUNNING), trial(None, RUNNING)],
            None,
            "2 running trials, and no sweep is running: resume with the same command and study=mine",
        ),
        ([trial(None, RUNNING), trial(None, WAITING)], None, "1 running and 1 waiting trials, and no sweep is running"),
        ([trial(1.0), trial(None, WAITING)], None, "1 waiting trial, and no sweep"),
        ([trial(1.0), trial(None, FAIL)], None, None),
        ([trial(1.0), trial(None, RUNNING)], "elsewhere:1:abc", None),
    ],
)
def test_what_a_killed_sweep_left(tmp_path, trials, owner, expected):
    (tmp_path / budget.LOCKS).mkdir()
    if owner:
        (tmp_path / budget.LOCKS / f"{owner}.alive").touch()
    lines = advice(study(trials, folder=tmp_path))
    assert said(lines, expected) if expected else not said(lines, "at work")
    assert not said(advice(study(trials)), "at work")  # of a study without a folder no sweep is known


STRICT = "trials were pruned and none is complete: the pruner is too strict"
EQUAL = "complete trials have the same value, 0.5: no parameter changes it"


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([trial(0.1, PRUNED)] * 5, f"5 of 5 {STRICT}"),
        ([trial(0.1, PRUNED)] * 4 + [trial(None, FAIL)], f"4 of 5 {STRICT}"),
        (
            [trial(0.1, PRUNED, user={"ended_by": "timeout"})] * 2,
            "2 trials were ended by time and none is complete: give more time",
        ),
        ([trial(0.1, PRUNED), trial(None, RUNNING)], None),
        ([trial(0.1, PRUNED), trial(0.5)], None),
        ([trial(0.5)] * 3, f"all 3 {EQUAL}"),
        ([trial(0.5)] * 2, None),
        ([trial(0.5)] * 9 + [trial(0.6)], None),
    ],
)
def test_trials_that_say_nothing(trials, expected):
    lines = advice(study(trials))
    assert said(lines, expected) if expected else not (said(lines, "too strict") or said(lines, "the same value"))


def test_there_is_nothing_to_gain_on_the_best_possible_value():
    s = study([trial(1.0)] * 3)
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        s.study.set_metric_names(["accuracy"])
    s.study.set_user_attr("fixed", {})  # a study of tuner
    assert said(advice(s), "all 3 complete trials have the same value, 1: there is nothing to gain on these validation")


# Ends of what was searched


def along(best_at, distribution, count=20, name="x"):
    """Trials over a range of which the best lie where `best_at` says, the others anywhere."""
    low, high = (0, len(distribution.choices) - 1) if hasattr(distribution, "choices") else (0, 1)
    found = []
    for k in range(count):
        share = best_at if k < 3 else k / count
        if hasattr(distribution, "choices"):
            x = distribution.choices[round(low + share * (high - low))]
        elif distribution.log:
            x = distribution.low * (distribution.high / distribution.low) ** share
        else:
            x = distribution.low + share * (distribution.high - distribution.low)
        found.append(trial(1 - 0.01 * k - abs(share - best_at), **{name: (x, distribution)}))
    return found


def replaced(found, others):
    """A trial with more parameters, which have nothing to do with its value."""
    more = {f"p{k}": (hash((k, found.value)) % 97 / 97, UNIT) for k in range(others)}
    return trial(found.value, x=(found.params["x"], UNIT), **more)


NUMBERS = CategoricalDistribution([64, 128, 256, 512])


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        (along(1.0, UNIT), "x: the best 3 trials are at the top of the range, 1; extend it if possible"),
        (along(0.95, UNIT), "top of the range, 1"),
        (along(0.0, UNIT), "x: the best 3 trials are at the bottom of the range, 0; extend it if possible"),
        (along(0.5, UNIT), None),
        (along(0.85, UNIT), None),
        (along(1.0, UNIT, count=9), None),  # too few
        ([replaced(t, others=5) for t in along(1.0, UNIT)], None),  # for six parameters
        ([replaced(t, others=5) for t in along(1.0, UNIT, count=24)], "x: the best 3 trials are at the top"),
        (along(1.0, LR), "top of the range, 0.1"),
        (along(0.02, LR), "bottom of the range, 1e-05"),
        (along(0.5, LR), None),  # 0.001, near the bottom if it were no log range
        (along(0.85, LR), None),
        (along(1.0, NUMBERS), "x: the best 3 trials are at the largest choice, 512; extend it if possible"),
        (along(0.0, NUMBERS), "smallest choice, 64"),
        (along(0.34, NUMBERS), None),
        (along(1.0, CategoricalDistribution([64, 128])), None),  # two choices are no range
        (along(1.0, CategoricalDistribution(["adam", "sgd", "lion"])), None),
        (along(1.0, CategoricalDistribution([None, 1, 2])), None),
        (along(1.0, CategoricalDistribution([1, 2, "3"])), None),
        (along(1.0, UNIT, name="value"), "params.value: the best 3 trials are at the top"),
        (along(1.0, UNIT)[:12] + [trial(2.0 + k) for k in range(3)], None),  # the best have no x
    ],
)
def test_ends(trials, expected):
    lines = advice(study(trials))
    assert said(lines, expected) if expected else not said(lines, "extend it if possible")
    falling = [trial(-t.value, **{n: (v, t.distributions[n]) for n, v in t.params.items()}) for t in trials]
    assert said(advice(study(falling, "minimize")), "extend it if possible") == bool(expected)


def test_a_range_that_another_parameter_moves_has_no_end():
    moving = [
        trial(1 - abs(x - 0.5), x=(x, UNIT), z=(x + 0.09, FloatDistribution(x - 0.1, x + 0.1)))
        for x in (k / 20 for k in range(20))
    ]
    assert not said(advice(study(moving)), "extend it if possible")


# More trials


def rising(count, best, name="mine", **more):
    return study([trial(0.5 if k != best else 0.9, **more) for k in range(count)], name=name)


@pytest.mark.parametrize(
    ("s", "expected"),
    [
        (rising(9, 8), None),
        (rising(20, 19), "the best came 0 trials before the end: more may help; use the same command with study=mine "),
        (rising(20, 16), "more may help; use the same command with study=mine hydra.sweeper.n_trials=40"),
        (rising(20, 19, name="my study"), "with 'study=my study' hydra.sweeper.n_trials=40"),
        (rising(20, 14), None),
        (rising(20, 6), None),
        (rising(20, 4), "none of the last 15 trials was better: more trials are unlikely to help"),
        (rising(40, 19), "none of the last 20 trials was better"),
        (rising(40, 21), None),
        (
            study(
                [trial(None, FAIL)] * 2 + [trial(0.1 * k, system={budget.RETRY_HISTORY: [k % 2]}) for k in range(20)]
            ),
            "with study=mine hydra.sweeper.n_trials=40",  # not of those that were tried again
        ),
        (study([trial(0.5)] + [trial(0.1, PRUNED)] * 15), "none of the last 15 trials was better"),
        (study([trial(0.5)] + [trial(None, FAIL)] * 15), None),
    ],
)
def test_more_trials(s, expected):
    lines = advice(s)
    assert said(lines, expected) if expected else not (said(lines, "may help") or said(lines, "unlikely"))


# What does not matter


def test_a_parameter_that_hardly_matters_is_named_where_there_are_trials_enough():
    def of(count):
        return study([trial(k % 5, a=(k % 5 / 5, UNIT), b=(k * 7 % 20 / 20, UNIT)) for k in range(count)])

    assert said(advice(of(40)), "b: hardly matters within its range; fix it to make the search smaller")
    assert not said(advice(of(9)), "hardly matters")
    both = study([trial(k % 5 + k * 3 % 7, a=(k % 5 / 5, UNIT), b=(k * 3 % 7 / 7, UNIT)) for k in range(40)])
    assert not said(advice(both), "hardly matters")
    equal = study([trial(1.0, a=(k / 40, UNIT)) for k in range(40)])
    assert not said(advice(equal), "hardly matters")


@pytest.mark.parametrize(
    ("shares", "count", "expected"),
    [
        ([1 / 30] * 30, 300, None),  # alike
        ([0.64] + [0.04] * 9, 300, None),  # near to 0.1, which each had then
        ([0.97, 0.01, 0.01, 0.01], 60, "p1, p2, p3: hardly matter within their ranges; fix them to make the search"),
        ([0.97, 0.01, 0.01, 0.01], 15, None),  # fewer than four trials for each
    ],
)
def test_of_many_parameters_each_may_matter_little(shares, count, expected):
    names = [f"p{k}" for k in range(len(shares))]
    s = study([trial(k, **dict.fromkeys(names, (0.5, UNIT))) for k in range(count)])
    s.__dict__["importances"] = {"fANOVA": dict(zip(names, shares, strict=True))}
    lines = advice(s)
    assert said(lines, expected) if expected else not said(lines, "hardly")


def test_of_several_objectives_little_is_said():
    made = optuna.create_study(directions=["maximize", "minimize"])
    made.add_trials([create_trial(values=[k, k], params={"x": 1.0}, distributions={"x": UNIT}) for k in range(30)])
    assert advice(LoadedStudy(made, "memory", None)) == []
    assert certainty(LoadedStudy(made, "memory", None)) == []


def test_a_grid_is_not_asked_for_more():
    late = [trial(k / 20, x=(k / 20, UNIT)) for k in range(20)]
    assert said(advice(study(late)), "more may help")
    grid = [trial(k / 20, system={"grid_id": k}, x=(k / 20, UNIT)) for k in range(20)]
    assert not said(advice(study(grid)), "more may help")


# How sure the best is


def run(folder, accuracy, wrong=0, n_val=100, **result):
    """A trial's run folder: of 100 validation images the first `wrong` are predicted wrong; None: no predictions."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"val_accuracy": accuracy, "n_val": n_val} | result))
    if wrong is not None:
        rows = [f"validation,{k},a,{'b' if k < wrong else 'a'}" for k in range(100)]
        (folder / "predictions.csv").write_text("\n".join(["split,image,label,predicted", *rows]))
    return folder


def accuracies(tmp_path, *found, default=0, **options):
    """A sweep's folder with a trial an accuracy; `default` is the number of the default config's."""
    trials = []
    for number, accuracy in enumerate(found):
        folder = run(tmp_path / str(number), accuracy, **{"wrong": round(100 * (1 - accuracy))} | options)
        user = {"output_dir": str(folder), "seconds": 10.0 - number, "baseline": number == default}
        trials.append(trial(accuracy, user=user, x=(number / len(found), UNIT)))
    return study(trials, folder=tmp_path)


@pytest.mark.parametrize(
    ("found", "options", "expected"),
    [
        ((0.7, 0.9), {"default": None}, []),
        ((0.9, 0.7), {}, ["the default config (trial 0) is the best"]),
        (
            (0.7, 0.9),
            {},
            [
                "the best (trial 1) is better than the default config (trial 0) by 0.2",
                "on the same 100 validation images the best alone gets 20 right, the default alone 0: a difference of "
                "+0.2000, more than chance explains (exact McNemar test, p = 1.9e-06)" + FLATTERED,
                "gain to expect on other images: 0.2000 (95% interval 0.1212 to 0.2788; the best of 2 complete trials "
                "on 100 images): more than chance explains",
            ],
        ),
        (
            (0.88, 0.9),
            {},
            [
                "the best (trial 1) is better than the default config (trial 0) by 0.02",
                "on the same 100 validation images the best alone gets 2 right, the default alone 0: a difference of "
                "+0.0200, no more than chance explains (exact McNemar test, p = 0.5)" + FLATTERED,
                "gain to expect on other images: 0.0128 (95% interval -0.0147 to 0.0404; the best of 2 complete trials "
                "on 100 images): within chance",
            ],
        ),
        ((0.7, 0.9), {"wrong": None}, ["the best (trial 1) is better than the default config (trial 0) by 0.2"]),
        (
            (0.9, 0.9),
            {"wrong": None, "default": 1},
            ["the best (trial 0) is as good as the default config (trial 1), and no better"],
        ),
    ],
)
def test_against_the_default(tmp_path, found, options, expected):
    lines = certainty(accuracies(tmp_path, *found, **options))
    assert [line for line in lines if "standard error" not in line and "McNemar's" not in line] == expected


def test_a_search_ends_with_the_gain_to_expect_on_other_images(tmp_path):
    s = accuracies(tmp_path, 0.7, 0.9, 0.8)
    results = report.write(s.study, s.frozen, tmp_path, None)
    assert results["gain"]["announced"] == pytest.approx(0.2)
    assert results["gain"]["low"] < results["gain"]["corrected"] <= 0.2
    assert (results["gain"]["images"], results["gain"]["trials"]) == (100, 3)
    assert yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())["gain"] == results["gain"]
    assert f"\ngain to expect {Gain(**results['gain'])}\n" in report.summary(results, tmp_path)


def test_a_default_that_was_pruned_is_told(tmp_path):
    made = study([trial(0.1, PRUNED, user={"baseline": True}), trial(0.9)])
    results = report.write(made.study, made.frozen, tmp_path, None)
    assert results["default_state"] == "pruned"
    expected = "best value 0.9 (trial 1); no gain is known, as the trial of the default config ended as pruned"
    assert report.summary(results, tmp_path).splitlines()[0] == expected


@pytest.mark.parametrize("options", [{"default": 1}, {"default": None}, {"wrong": None}, {"wrong": 3}])
def test_without_predictions_behind_the_values_no_gain_is_expected(tmp_path, options):
    """The default is the best; there is none; there are no predictions; another metric is the objective."""
    s = accuracies(tmp_path, 0.7, 0.9, **options)
    assert "gain" not in report.write(s.study, s.frozen, tmp_path, None)


@pytest.mark.parametrize(
    ("found", "options", "expected"),
    [
        ((0.7, 0.9), {}, [f"the next trial differs from the best by {NO_MORE.replace('no ', '')}"]),
        ((0.88, 0.9), {}, [f"the next trial differs from the best by {NO_MORE}"]),
        # 6 images against none: p = 0.03, 5 against none: p = 0.06
        ((0.89, 0.7, 0.9, 0.84), {}, [f"of the next 3 complete trials 1 differs from the best by {NO_MORE}"]),
        ((0.89, 0.7, 0.9, 0.85), {}, [f"of the next 3 complete trials 2 differ from the best by {NO_MORE}"]),
        (
            (0.89, 0.7, 0.9),
            {"wrong": None},
            [
                "1 of the other 2 complete trials is within one standard error of the best (0.03, of 100 validation "
                "images)"
            ],
        ),
        (
            (0.7, 0.9),
            {"wrong": None},
            ["the other complete trial is not within one standard error of the best (0.03, of 100 validation images)"],
        ),
        ((0.89, 0.7, 0.9), {"n_val": 0}, []),
        ((0.89, 0.7, 0.9), {"val_accuracy": 0.5}, []),  # it is no accuracy
        ((0.89, 1.0), {}, []),  # nor has a perfect score an error
    ],
)
def test_against_the_others(tmp_path, found, options, expected):
    lines = certainty(accuracies(tmp_path, *found, default=None, **options))
    assert [line for line in lines if "standard error" in line or "McNemar's" in line] == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            (0.9, 0.89, 0.9, 0.5),
            "2 trials do not differ significantly from the best: take the fastest (trial 2, 8 s), or compare",
        ),
        ((0.9, 0.89, 0.5, 0.5), None),
        ((0.9, 0.89, 0.9, *[0.5] * 10), None),
    ],
)
def test_noise(tmp_path, found, expected):
    lines = advice(accuracies(tmp_path, *found))
    assert said(lines, expected) if expected else not said(lines, "differ significantly")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # gmacs, trained parameters of the best, its two equals and a worse one
        ([(1, 3e6), (1, 2e6), (1, 1.1e6), (1, 1)], "smallest (trial 2: 1 billion multiply-adds an image, 1.1 million "),
        ([(1, 3e6), (0.5, 4e6), (1, 1e6), (1, 1)], "smallest (trial 1: 0.5 billion multiply-adds an image, 4 million "),
        ([(1, 1e6), (1, 2e6), (1, 1e6), (1, 1)], None),  # none is smaller
    ],
)
def test_of_equals_the_smallest_is_named(tmp_path, sizes, expected):
    s = accuracies(tmp_path, 0.9, 0.89, 0.9, 0.5)
    for number, (gmacs, trained) in enumerate(sizes):
        path = tmp_path / str(number) / "result.json"
        more = {"gmacs": gmacs, "trained_parameters": trained}
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    lines = advice(s)
    assert said(lines, f"take the {expected}" if expected else "from the best: compare them on more validation images")


def test_an_equal_that_is_more_than_a_standard_error_behind_is_not_recommended(tmp_path):
    """5 images of 100 do not tell two trials apart, but the standard error is 3."""
    s = accuracies(tmp_path, 0.9, 0.85, 0.88)
    assert said(advice(s), "2 trials do not differ significantly from the best: take the fastest (trial 2, 8 s), or")
    s = accuracies(tmp_path / "other", 0.9, 0.88, 0.85)
    assert said(advice(s), "2 trials do not differ significantly from the best: take the fastest (trial 1, 9 s), or")


def test_seconds_of_trials_that_ran_at_once_are_not_compared(tmp_path):
    s = accuracies(tmp_path, 0.9, 0.89, 0.9, 0.5)
    s.trials["end"] = s.trials.end.max()  # as of a stack
    assert said(advice(s), "2 trials do not differ significantly from the best: compare them on more validation images")


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"status": "complete", "trial": 1}, True),
        ({"status": "complete", "trial": 0}, False),  # of an earlier best
        ({"status": "failed", "trial": 1}, False),
    ],
)
def test_the_retrained_best(tmp_path, result, expected):
    s = accuracies(tmp_path, 0.7, 0.9)
    tested = {"test_accuracy": 0.91, "test_accuracy_std": 0.002, "seeds": [0, 1, 2]}
    run(tmp_path / "best", None, **result, **tested)
    line = "retrained on train + validation and tested, 3 seeds: 0.9100, standard deviation 0.0020"
    assert (line in certainty(s)) == expected


def test_one_seed_has_no_standard_deviation(tmp_path):
    s = accuracies(tmp_path, 0.7, 0.9)
    tested = {"test_accuracy": 0.91, "test_accuracy_std": 0.0, "seeds": [0]}
    run(tmp_path / "best", None, status="complete", trial=1, **tested)
    assert certainty(s)[-1] == "retrained on train + validation and tested, 1 seed: 0.9100"
