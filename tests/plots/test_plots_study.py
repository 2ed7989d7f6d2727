"""The figures of a study: titles for typical studies, and legible drawings of unusual ones."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from seen import drawn, legible, note, texts, title

from tuner import plots
from tuner.plots import Parameter
from tuner.plots.style import BLUE, LIGHT, ORANGE

NAN, INF = float("nan"), float("inf")
LR, DROPOUT = Parameter("optimizer.lr", 1e-5, 0.1, log=True), Parameter("model.head.dropout", 0.0, 0.7)
WIDTH = Parameter("model.head.width", choices=(256, 512, 1024))
THREE = [LR, DROPOUT, WIDTH]
ACCURACY = ("maximize", "validation accuracy")
LOST = {"states": ["PRUNED", "FAIL"], "values": [0.8, NAN]}


def study(values, states="COMPLETE", baseline=0, **columns):
    """A study with three parameters and one trial per minute, each 50 seconds long."""
    n, rng = len(values), np.random.default_rng(0)
    start = pd.Timestamp("2026-01-01") + pd.to_timedelta(np.arange(n) * 60, unit="s")
    table = {
        "number": np.arange(n), "state": states, "value": np.asarray(values, float), "start": start,
        "end": start + pd.Timedelta(seconds=50), "seconds": 50.0, "epochs": 10.0, "baseline": np.arange(n) == baseline,
        LR.name: 10 ** rng.uniform(-5, -1, n), DROPOUT.name: rng.uniform(0, 0.7, n),
        WIDTH.name: rng.choice(WIDTH.choices, n),
    }  # fmt: skip
    return pd.DataFrame({**table, **columns})


def typical(n=25, **columns):
    return study(0.9 + 0.01 * np.sin(np.arange(n)), **columns)


def curves_of(trials):
    return {n: {epoch: v - 1 / epoch for epoch in range(1, 3 + n % 5)} for n, v in trials["value"].items()}


def figures(trials, parameters, goal, objective):
    yield plots.history(trials, goal, objective)
    yield plots.intermediate_values(trials, curves_of(trials), goal, objective)
    yield plots.edf(trials, goal, objective)
    yield plots.timeline(trials)
    yield plots.slices(trials, parameters, goal, objective)
    yield plots.parallel_coordinates(trials, parameters, goal, objective)
    yield plots.contours(trials, parameters, goal, objective)


def many(count):
    """A study with many parameters with long names; half of them are conditional, some are unusual."""
    rng, columns, parameters = np.random.default_rng(1), {}, []
    for k in range(count):
        name = f"model.backbone.a_long_group_name.überlang_猫_{k}.weight_decay_{k}"
        parameters.append(Parameter(name, 1e-7, 1e-2, log=bool(k % 2)))
        columns[name] = np.where(rng.random(25) < 0.5 + k % 2, rng.uniform(1e-7, 1e-2, 25), NAN)
    return typical(**columns), parameters


CHOICES = (None, True, "$5 to $10", "a" * 60, 0.5, "猫")
ODD = typical(choice=[CHOICES[k % 6] for k in range(25)], size=[[8, 16.0, 8.0, None, 16][k % 5] for k in range(25)])
STATES = ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"]
MIXED = typical(states=[STATES[k % 5] for k in range(25)])
MIXED.loc[MIXED["state"].isin(["RUNNING", "WAITING"]), "end"] = pd.NaT
MIXED.loc[MIXED["state"] == "WAITING", ["start", "value"]] = [pd.NaT, NAN]
LINE = np.linspace(0, 0.7, 25)

EVEN = np.arange(25) % 2 == 0
KINDS = [Parameter("kind", choices=("a", "b")), Parameter("momentum.a", 0, 1), Parameter("decay.b", 0, 1)]
CONDITIONAL = typical(
    **{"kind": np.where(EVEN, "b", "a"), "momentum.a": np.where(EVEN, NAN, LINE), "decay.b": np.where(EVEN, LINE, NAN)}
)

STUDIES = {
    "typical": (typical(), THREE),
    "no trial": (typical(0), THREE),
    "one trial": (typical(1), THREE),
    "one trial, no default": (typical(1, baseline=9), THREE),
    "two trials": (typical(2), THREE),
    "a thousand": (typical(1000), THREE),
    "all states": (MIXED, THREE),
    "only pruned": (typical(states="PRUNED"), THREE),
    "nothing finite": (study([NAN, INF, -INF]), THREE),
    "some infinite": (study([0.9, INF, -INF, NAN, 1e300, 0.8, 0.85] * 3), THREE),
    "all equal": (study([0.9] * 25), THREE),
    "all zero": (study([0.0] * 25), THREE),
    "diverged": (study([0.9, 0.91, 0.92, 0.905, 0.915] * 4 + [-1e6, 0.1, 0.1]), THREE),
    "tiny": (study(1e-9 * np.arange(25)), THREE),
    "one line": (typical(**{DROPOUT.name: LINE, LR.name: 10 ** (LINE - 3)}), THREE),
    "one place": (typical(**{DROPOUT.name: 0.5, LR.name: 0.1, WIDTH.name: 512}), THREE),
    "many parameters": many(15),
    "odd choices": (ODD, [Parameter("choice", choices=CHOICES), Parameter("size", choices=(8, 16))]),
    "never seen": (typical(), [Parameter("missing"), Parameter("gone", choices=("a",)), Parameter("none", log=True)]),
    "outside": (typical(lr=np.linspace(-1, 9, 25)), [Parameter("lr", 0.001, 0.002, log=True), DROPOUT]),
    "many choices": (typical(c=np.arange(25) % 24), [Parameter("c", choices=tuple(range(40))), LR]),
    "no parameter": (typical(), []),
    "conditional": (CONDITIONAL, KINDS),
    "a best without any": (CONDITIONAL.assign(**{p.name: CONDITIONAL[p.name].where(~EVEN) for p in KINDS}), KINDS),
    "large": (study(1e5 + LINE), THREE),
}


BOTH_WAYS = ["typical", "all equal", "diverged"]


@pytest.mark.parametrize(
    ("name", "goal"), [*((name, "maximize") for name in STUDIES), *((name, "minimize") for name in BOTH_WAYS)]
)
def test_every_study_is_drawn_legibly(name, goal, tmp_path, monkeypatch):
    for figure in figures(*STUDIES[name], goal, "validation accuracy"):
        assert legible(figure, tmp_path, monkeypatch)


BEST = "Best validation accuracy 0.900, trial"


@pytest.mark.parametrize(
    ("values", "states", "baseline", "expected"),
    [
        ([0.8, 0.9, 0.85], "COMPLETE", 0, f"{BEST} 1; default config 0.800"),
        ([0.8, 0.9], "COMPLETE", 9, f"{BEST} 1"),
        ([0.9, 0.8, 0.9], "COMPLETE", 0, f"{BEST} 0: the default config"),
        ([0.9, 0.95, NAN], ["COMPLETE", "PRUNED", "FAIL"], 9, f"{BEST} 0"),
        ([0.95, 0.9], ["PRUNED", "COMPLETE"], 0, f"{BEST} 1"),
        ([0.8, NAN], ["PRUNED", "FAIL"], 0, "No complete trial yet: 1 pruned, 1 failed"),
        ([NAN], "COMPLETE", 0, "No finite value yet: 1 complete"),
        ([], "COMPLETE", 0, "No complete trial yet: none has started"),
    ],
)
def test_history_names_the_best_trial(values, states, baseline, expected):
    assert title(plots.history(study(values, states, baseline), *ACCURACY)) == expected


def test_history_draws_the_best_so_far_and_lost_trials():
    trials = study([3, 5, 2, 4, 1, NAN], ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE", "COMPLETE", "FAIL"])
    axes, strip = plots.history(trials, "minimize", "loss").axes
    line = next(line for line in axes.lines if len(line.get_xdata()) > 2)
    assert list(line.get_xdata()) == [0, 2, 3, 4, 5]
    assert list(line.get_ydata()) == [3, 2, 2, 1, 1]
    assert [label.get_text() for label in strip.get_yticklabels()] == ["1 pruned", "1 failed"]
    assert [ticks.get_offsets()[0, 0] for ticks in strip.collections] == [1, 5]


def points(axes):
    """All offsets of scattered points."""
    return np.concatenate([dots.get_offsets() for dots in axes.collections if isinstance(dots, PathCollection)])


def test_outliers_do_not_flatten_the_other_values():
    figure = plots.history(study([0.9, 0.91, 0.92, 0.905, 0.915] * 4 + [-1e6, 0.1, 0.1]), *ACCURACY)
    low, high = figure.axes[0].get_ylim()
    assert high - low < 0.1
    assert len(points(figure.axes[0])) == 23
    assert points(figure.axes[0])[:, 1].min() > low
    assert note(figure) == "3 of 23 complete trials are off the scale, drawn as triangles at the edge."


@pytest.mark.parametrize(
    ("shares", "expected", "bars"),
    [
        ({"fANOVA": {"lr": 0.7, "width": 0.3}}, "lr matters most (fANOVA 0.70)", ["lr", "width"]),
        (
            {"fANOVA": {"width": 0.3, "lr": 0.7}, "PED-ANOVA": {"lr": 0.6, "width": 0.4}},
            "lr matters most (fANOVA 0.70, PED-ANOVA 0.60)", ["lr", "width"],
        ),
        (
            {"fANOVA": {"a": 0.9, "b": 0.1}, "MDI": {"a": 0.2, "b": 0.8}},
            "The methods disagree on what matters most: a (fANOVA), b (MDI)", ["a", "b"],
        ),
        (
            {"fANOVA, accuracy": {"a": 0.9, "b": 0.1}, "fANOVA, cost": {"a": 0.2, "b": 0.8}},
            "What matters most: a for accuracy, b for cost", ["a", "b"],
        ),
        (
            {"fANOVA, accuracy": {"a": 0.9, "b": 0.1}, "fANOVA, cost": {"a": 0.8, "b": 0.2}},
            "a matters most (accuracy 0.90, cost 0.80)", ["a", "b"],
        ),
        ({"fANOVA": {"a": NAN, "b": 1.0}}, "b matters most (fANOVA 1.00)", ["b"]),
        ({"fANOVA": {"a": NAN}, "PED-ANOVA": {}}, "Too few trials to tell which parameters matter", []),
        ({}, "Too few trials to tell which parameters matter", []),
        ({"fANOVA": {"a": 0.0, "b": 0.0}}, "a matters most (fANOVA 0.00)", ["a", "b"]),
    ],
)  # fmt: skip
def test_importances(shares, expected, bars, tmp_path, monkeypatch):
    figure = plots.importances(shares)
    assert legible(figure, tmp_path, monkeypatch) == expected
    axes = figure.axes[0] if bars else None
    assert not bars or [label.get_text() for label in axes.get_yticklabels()] == bars
    assert not bars or len(axes.patches) == len(bars) * sum(
        any(v == v for v in values.values()) for values in shares.values()
    )


def test_importances_of_many_long_names(tmp_path, monkeypatch):
    names = [f"model.head.überlang_{'x' * 50}.{k} 猫" for k in range(15)]
    figure = plots.importances({way: {name: 1 / (k + 2) for k, name in enumerate(names)} for way in ("fANOVA", "MDI")})
    legible(figure, tmp_path, monkeypatch)


@pytest.mark.parametrize(("goal", "best"), [("maximize", 3), ("minimize", 1)])
def test_the_best_trial_is_highlighted(goal, best):
    trials = study([0.5, 0.2, 0.6, 0.8], lr=[0.01, 0.02, 0.03, 0.04], depth=["a", "b", None, "c"])
    parameters = [Parameter("lr", 0, 0.1), Parameter("depth", choices=("a", "b", "c"))]
    expected = (
        f"Trial {best} is best, {trials['value'][best]:.3f}: lr {trials['lr'][best]}, depth {trials['depth'][best]}"
    )
    for draw in (plots.slices, plots.contours, plots.parallel_coordinates):
        figure = draw(trials, parameters, goal, "accuracy")
        assert title(figure) == expected
        marked = [line for line in figure.axes[0].lines if line.get_color() == ORANGE]
        place = marked[0].get_xydata()[0]
        assert place == pytest.approx(
            {
                "slices": (trials["lr"][best], trials["value"][best]),
                "contours": (trials["lr"][best], {1: 1, 3: 2}[best]),
                "parallel_coordinates": (0, trials["lr"][best] / 0.1),
            }[draw.__name__],
            abs=0.26 if draw is plots.contours else 1e-9,  # choices are drawn with a random offset
        )


def test_parallel_coordinates_breaks_where_a_trial_lacks_a_parameter():
    trials = study([0.1, 0.2, 0.3], momentum=[0.5, NAN, 0.9])
    figure = plots.parallel_coordinates(trials, [LR, Parameter("momentum", 0.5, 0.9)], "maximize", "accuracy")
    (lines,) = [item for item in figure.axes[0].collections if isinstance(item, LineCollection)]
    heights = [path.vertices[1, 1] for path in lines.get_paths()]  # sorted by value
    assert heights == pytest.approx([0, NAN, 1], nan_ok=True)
    assert note(figure) == "A line breaks where its trial does not have the parameter."


def test_parallel_coordinates_puts_the_better_value_on_top():
    for goal, expected in (("maximize", [0, 0.5, 1]), ("minimize", [0, 0.5, 1])):
        figure = plots.parallel_coordinates(study([1, 2, 3]), [LR], goal, "accuracy")
        (lines,) = [item for item in figure.axes[0].collections if isinstance(item, LineCollection)]
        assert [path.vertices[-1, 1] for path in lines.get_paths()] == expected  # the best is last
        best = {"maximize": "3.000", "minimize": "1.000"}[goal]
        assert best in texts(figure)


def test_parallel_coordinates_leaves_out_parameters_that_do_not_fit():
    figure = plots.parallel_coordinates(*many(20), *ACCURACY)
    assert len(figure.axes[0].get_xticks()) == 15 + 1
    assert note(figure).startswith("The first 15 of 20 parameters.")


def test_slices_draws_each_complete_trial_with_the_parameter():
    trials = study([0.1, 0.2, 0.3, 0.4], ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED"], momentum=[0.5, NAN, 0.9, 0.7])
    figure = plots.slices(trials, [*THREE, Parameter("momentum", 0, 1)], *ACCURACY)
    assert [len(points(axes)) for axes in figure.axes] == [3, 3, 3, 2]
    assert [axes.get_xlabel() for axes in figure.axes] == [*(p.name for p in THREE), "momentum"]


def test_the_local_mean_follows_the_values():
    trials = study(np.r_[np.zeros(20), np.ones(20)], x=np.r_[np.linspace(0, 0.3, 20), np.linspace(0.7, 1, 20)])
    (axes,) = plots.slices(trials, [Parameter("x", 0, 1)], *ACCURACY).axes
    mean = next(line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 101)
    assert mean[0] == pytest.approx(0, abs=0.02)
    assert mean[50] == pytest.approx(0.5, abs=0.02)
    assert mean[100] == pytest.approx(1, abs=0.02)


def test_the_title_leaves_out_parameters_that_the_best_trial_lacks():
    assert title(plots.slices(CONDITIONAL, KINDS, *ACCURACY)) == "Trial 14 is best, 0.910: kind b, b 0.408"
    none = CONDITIONAL.assign(**{parameter.name: NAN for parameter in KINDS})
    assert title(plots.slices(none, KINDS, *ACCURACY)) == "Best validation accuracy 0.910, trial 14"
    choice = [Parameter("choice", choices=(None, 1, 2))]  # None is NaN in a column of numbers
    assert title(plots.slices(study([0.1, 0.2], choice=[1, NAN]), choice, *ACCURACY)).endswith("0.200: choice None")


def test_contours_leaves_out_pairs_without_trials():
    figure = plots.contours(CONDITIONAL, KINDS, *ACCURACY)
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes[:-1]] == [
        *(("kind", "momentum.a"), ("kind", "decay.b")),
    ]
    assert "Left out: pairs that no trial has both of." in note(figure)
    assert title(plots.contours(CONDITIONAL, KINDS[1:], *ACCURACY)) == "No trial has two of the parameters"


@pytest.mark.parametrize(("n", "areas"), [(9, 0), (25, 3)])
def test_contours_fills_areas_only_with_enough_trials(n, areas):
    figure = plots.contours(typical(n), THREE, *ACCURACY)
    assert ("Areas" in note(figure)) == bool(areas)
    panels = figure.axes[:3]
    assert sum(len(axes.collections) - 1 for axes in panels) == areas
    assert all(len(axes.collections[-1].get_offsets()) == n for axes in panels)


def test_contours_are_white_where_no_trial_is_near():
    near = {"x": np.linspace(0, 0.2, 25), "y": np.linspace(0, 0.2, 25)}
    figure = plots.contours(typical(**near), [Parameter("x", 0, 1), Parameter("y", 0, 1)], *ACCURACY)
    mask = np.ma.getmaskarray(figure.axes[0].collections[0].get_array()).reshape(101, 101)
    assert not mask[10, 10]
    assert mask[90, 90]


@pytest.mark.parametrize(("parameters", "pairs"), [(THREE[:2], 1), (THREE, 3), (many(15)[1], 6)])
def test_contours_draws_each_pair_of_up_to_four(parameters, pairs):
    trials = many(15)[0]
    assert len(plots.contours(trials, parameters, *ACCURACY).axes) == pairs + 1  # plus the colour bar


def test_intermediate_values_distinguishes_pruned_from_complete():
    trials = study([0.8, 0.9, 0.1, NAN], ["COMPLETE", "COMPLETE", "PRUNED", "FAIL"])
    curves = {0: {1: 0.5, 2: 0.8}, 1: {1: 0.6, 2: NAN, 3: 0.9}, 2: {1: 0.1}, 3: {}}
    figure = plots.intermediate_values(trials, curves, *ACCURACY)
    assert title(figure) == "Best validation accuracy 0.900, trial 1; 1 of 3 trials were pruned"
    blue, grey, _ = [lines for lines in figure.axes[0].collections if isinstance(lines, LineCollection)]
    assert [len(blue.get_paths()), len(grey.get_paths())] == [1, 1]
    assert to_hex(blue.get_color()[0]).upper() == BLUE
    (best,) = figure.axes[0].lines
    assert best.get_color() == ORANGE
    assert best.get_xydata().tolist() == [[1, 0.6], [3, 0.9]]
    assert "trial 1" in texts(figure)


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        ({}, "No trial has reported a value by epoch"),
        ({0: {1: NAN}}, "No trial has reported a value by epoch"),
        ({0: {1: 0.5}}, "No complete trial yet: 5 running"),
    ],
)
def test_intermediate_values_without_results(curves, expected, tmp_path):
    figure = plots.intermediate_values(typical(5, states="RUNNING"), curves, *ACCURACY)
    assert drawn(figure, tmp_path) == expected


@pytest.mark.parametrize(
    ("trials", "goal", "expected"),
    [
        (study([2, 1, 3, 4, 2]), "maximize", "2 of 4 trials beat the default config's 2.000"),
        (study([2, 1, 3, 4, 2]), "minimize", "1 of 4 trials beats the default config's 2.000"),
        (study([1, 2, 3, 4], baseline=9), "maximize", "Half of 4 trials reach accuracy 3.000, the best 4.000"),
        (study([1, 2, 3, 4], baseline=9), "minimize", "Half of 4 trials reach accuracy 2.000, the best 1.000"),
        (study([1]), "maximize", "The only complete trial reaches accuracy 1.000"),
    ],
)
def test_edf(trials, goal, expected):
    assert title(plots.edf(trials, goal, "accuracy")) == expected


def test_large_values_are_distinguishable():
    figure = plots.edf(study([100000.5, 100050, 100100], baseline=9), "minimize", "cost")
    assert title(figure) == "Half of 3 trials reach cost 100050, the best 100000"
    assert title(plots.history(study([1234.5], baseline=9), "minimize", "cost")) == "Best cost 1234.5, trial 0"


@pytest.mark.parametrize(("goal", "shares"), [("maximize", [0.25, 0.5, 0.75, 1]), ("minimize", [1, 0.75, 0.5, 0.25])])
def test_edf_is_the_share_of_trials_at_least_as_good(goal, shares):
    figure = plots.edf(study([1, 2, 3, 4], baseline=9), goal, "accuracy")
    line = figure.axes[0].lines[0]
    heights = dict(line.get_xydata()[3::-1].tolist())
    assert [heights[x] for x in (4, 3, 2, 1)] == shares
    assert line.get_drawstyle() == "steps-post"  # from each value to the next worse one


@pytest.mark.parametrize(
    ("seconds", "expected", "lanes"),
    [
        ([(0, 60), (60, 120), (120, 180)], "3 trials in 3 minutes", 1),
        ([(0, 60), (0, 50), (50, 100), (60, 90)], "4 trials in 100 seconds, up to 2 at once", 2),
        ([(0, 100)] * 50, "50 trials in 100 seconds, up to 50 at once", 50),
        ([(0, 0)], "1 trial in 0 seconds", 1),
    ],
)
def test_timeline(seconds, expected, lanes, tmp_path):
    first = pd.Timestamp("2026-01-01")
    start, end = (first + pd.to_timedelta(list(times), unit="s") for times in zip(*seconds, strict=True))
    trials = study([0.5] * len(seconds), start=start, end=end)
    figure = plots.timeline(trials)
    assert drawn(figure, tmp_path) == expected
    bars = figure.axes[0].patches
    assert len(bars) == len(seconds)
    assert len({bar.get_y() for bar in bars}) == lanes
    spans = sorted((bar.get_y(), bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars)
    assert all(b[0] > a[0] or b[1] >= a[2] for a, b in pairwise(spans))


def test_timeline_cuts_out_the_night_before_a_resume():
    trials = typical(10)
    trials.loc[5:, ["start", "end"]] += pd.Timedelta(days=2)
    figure = plots.timeline(trials)
    assert max(bar.get_x() + bar.get_width() for bar in figure.axes[0].patches) < 10.5  # minutes
    assert note(figure) == "Cut out at the dotted lines: 2 days in which nothing ran."


def test_timeline_draws_running_trials_to_the_latest_time():
    trials = study([NAN, 0.5, NAN], ["RUNNING", "COMPLETE", "FAIL"])
    trials.loc[[0, 2], "end"] = pd.NaT
    figure = plots.timeline(trials)
    running, complete, failed = figure.axes[0].patches
    assert to_hex(running.get_facecolor()).upper() == LIGHT
    assert running.get_width() == pytest.approx(2)  # minutes
    assert [line.get_marker() for line in figure.axes[0].lines] == [">"]
    assert complete.get_width() == pytest.approx(50 / 60)
    assert failed.get_width() == 0  # lost, so it has no end


def pareto(*values, **columns):
    table = study([0.0] * len(values), **columns).drop(columns="value")
    return table.assign(**{f"value_{k}": column for k, column in enumerate(zip(*values, strict=True))})


SECONDS = (["maximize", "minimize"], ["accuracy", "seconds"])


ON_FRONT, ONLY = "are on the Pareto front of accuracy and seconds", "The only complete trial is on the Pareto front"


@pytest.mark.parametrize(
    ("trials", "front", "expected"),
    [
        (pareto((0.9, 10), (0.8, 5), (0.7, 7), (0.8, 6)), {0, 1}, f"2 of 4 trials {ON_FRONT}"),
        (pareto((0.9, 10), (0.9, 10)), {0, 1}, f"2 of 2 trials {ON_FRONT}"),
        (pareto((0.9, 10)), {0}, f"{ONLY} of accuracy and seconds"),
        (pareto((0.9, 10), (0.99, 1), states=["COMPLETE", "PRUNED"]), {0}, f"{ONLY} of accuracy and seconds"),
        (pareto((0.9, 10), (INF, 1), (0.8, NAN)), {0}, f"{ONLY} of accuracy and seconds"),
        (pareto((0.9, 10), states="FAIL"), set(), "No complete trial yet: 1 failed"),
    ],
)
def test_pareto_front(trials, front, expected, tmp_path, monkeypatch):
    figure = plots.pareto_front(trials, *SECONDS)
    assert legible(figure, tmp_path, monkeypatch) == expected
    every = [dots for axes in figure.axes for dots in axes.collections]
    orange = [dots for dots in every if to_hex(dots.get_facecolor()[0]).upper() == ORANGE]
    places = {tuple(place) for dots in orange for place in dots.get_offsets()}
    assert places == {(trials["value_0"][n], trials["value_1"][n]) for n in front}


@pytest.mark.parametrize(("n", "objectives", "panels"), [(25, 2, 1), (1000, 2, 1), (25, 3, 3), (200, 4, 6)])
def test_pareto_front_of_many(n, objectives, panels, tmp_path, monkeypatch):
    values = np.random.default_rng(0).random((n, objectives))
    values[:, 1] = 1e6 * (1 - values[:, 0])  # almost all are on the front
    figure = plots.pareto_front(
        pareto(*values), ["maximize"] * objectives, [f"objective {k} 猫" for k in range(objectives)]
    )
    legible(figure, tmp_path, monkeypatch)
    assert len(figure.axes) == panels
