"""hydra-optuna-sweeper's own examples and cases, as configs that name its keys, run by this sweeper.

What upstream gets wrong, by its number in the list that this project started from, is tested in
  test_sweeper.py: 1, 2 (studies that go on), 3 (pruned), 4 to 8 (failures), 9 (exits, Ctrl-C), 11 (strings), 12, 17
  (another search is refused), 13, 16 (storages), 14 (no trials), 15 (folders), 18 (globs and prefixes);
  test_launchers.py: 9 (Ctrl-C of workers), 10 (killed workers);   test_nothing_is_lost.py: 1.
"""

import pytest
import yaml
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from tuner.sweep.plugin import TunerSweeper

SPHERE = """
defaults:
  - _self_
  - override hydra/sweeper: optuna
  - override hydra/sweeper/sampler: {sampler}
hydra:
  sweeper:
    direction: {direction}
    study_name: sphere
    storage: null
    n_trials: 20
    n_jobs: {n_jobs}
    params:
      {params}
x: 1
y: 1
z: 100
steps: 1
seconds: 0.0
objectives: {objectives}
does: ""
ran: ${{hydra:runtime.cwd}}/ran.txt
"""


@pytest.fixture
def sphere(toy):
    def configured(params, sampler="tpe", direction="minimize", objectives=1, n_jobs=1):
        config = SPHERE.format(
            params="\n      ".join(params), sampler=sampler, direction=direction, objectives=objectives, n_jobs=n_jobs
        )
        (toy.folder / "conf/toy.yaml").write_text(config)
        return toy

    return configured


def results(toy, folder):
    return yaml.safe_load((toy.folder / folder / "optimization_results.yaml").read_text())


def test_hydra_discovers_it():
    assert TunerSweeper in Plugins.instance().discover(Sweeper)


@pytest.mark.parametrize("command_line", [True, False])
def test_the_sphere(sphere, command_line):
    toy = sphere(["x: range(-5.5, 5.5, step=0.5)", "y: choice(-5, 0, 5)"])
    more = ["x=choice(0, 1, 2)", "y=0"] if command_line else []
    done = toy.run("hydra.sweep.dir=out", "hydra.job.chdir=True", "hydra.sweeper.sampler.seed=123", "~z", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    written = results(toy, "out")
    assert written["name"] == "optuna"
    assert ("y" in written["best_params"]) != command_line
    assert written["best_value"] <= 2.27
    assert written["best_value"] == written["best_params"]["x"] ** 2


@pytest.mark.parametrize("n_trials", [20, 10, 1])
def test_the_grid(sphere, n_trials):
    toy = sphere(["x: choice(-1, 1)", "y: range(-1.0, 1.0, step=1)", "z: choice('foo', 'bar')"], sampler="grid")
    done = toy.run("hydra.sweep.dir=out", f"hydra.sweeper.n_trials={n_trials}")
    assert done.returncode == 0, done.stdout + done.stderr
    written = results(toy, "out")
    assert written["trials"]["complete"] == min(n_trials, 8)
    assert written["best_params"]["x"] in (-1, 1)
    assert written["best_params"]["z"] in ("foo", "bar")


@pytest.mark.parametrize("command_line", [True, False])
def test_several_objectives(sphere, command_line):
    toy = sphere(
        ["x: range(0, 5, step=0.5)"], sampler="random", direction="[minimize, minimize]", objectives=2, n_jobs=2
    )
    more = ["x=range(0, 5)"] if command_line else []
    done = toy.run("hydra.sweep.dir=out", "hydra.sweeper.sampler.seed=123", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    solutions = results(toy, "out")["solutions"]
    for solution in solutions:
        assert solution["params"]["x"] % (1 if command_line else 0.5) == 0
        for other in solutions:
            worse = all(a <= b for a, b in zip(solution["values"], other["values"], strict=True))
            assert not (worse and solution["values"] != other["values"])


def test_the_custom_search_space(sphere):
    toy = sphere(["x: range(-5.5, 5.5, step=0.5)"])
    done = toy.run("hydra.sweep.dir=out", "hydra.sweeper.custom_search_space=toy.configure")
    assert done.returncode == 0, done.stdout + done.stderr
    best = results(toy, "out")["best_params"]
    assert abs(best["z"] - best["x"]) <= 0.1 or best["z"] == 100  # trial 0 has the config's z


def test_a_config_without_a_search_space_runs(sphere):
    toy = sphere([""])
    done = toy.run("hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=3", "hydra.sweep.dir=out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(toy, "out")["best_params"] == {}


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_the_failure_rate(sphere, rate):
    toy = sphere(["x: interval(0, 1)"], sampler="random", n_jobs=2)
    done = toy.run("hydra.sweep.dir=out", f"hydra.sweeper.max_failure_rate={rate}", "does=all-raise")
    assert done.returncode == 1
    assert ("RuntimeError: trial" in done.stderr) == (rate < 1)
