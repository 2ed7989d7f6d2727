import optuna
import pytest
from optuna.pruners import MedianPruner

from tuner.sweep.history import History
from tuner.sweep.pruning import Pruning

PRUNER = MedianPruner(n_startup_trials=1, n_warmup_steps=0)


@pytest.fixture
def study(tmp_path):
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/optuna.db", direction="maximize", pruner=PRUNER)
    complete = study.ask()
    for step in (1, 2, 3):
        complete.report(0.5, step)
    study.tell(complete, 0.5)
    return study


@pytest.fixture
def readings(monkeypatch):
    """The number of times that all trials are read, as a list of one."""
    count, look = [0], History.look

    def counted(history):
        count[0] += 1
        return look(history)

    monkeypatch.setattr(History, "look", counted)
    return count


def test_the_study_is_read_once_an_epoch_of_a_stack(study, readings):
    pruning, trials = Pruning(study, PRUNER), [study.ask() for _ in range(5)]
    values = {trial.number: 0.45 + 0.02 * trial.number for trial in trials}  # the first two are below the median
    for step in (1, 2, 3):
        ended = [t.number for t in trials if pruning.should_prune(t, t.number, values[t.number], step)]
        assert ended == ([1, 2] if step == 1 else [])
        assert readings == [step]
        trials = [trial for trial in trials if trial.number not in ended]
    assert study.trials[5].intermediate_values == dict.fromkeys((1, 2, 3), values[5])


def test_a_trial_alone_sees_what_other_processes_have_told_since_its_last_report(study, readings):
    pruning, trial = Pruning(study, PRUNER), study.ask()
    assert not pruning.should_prune(trial, trial.number, 0.6, 1)
    for _ in range(2):
        other = study.ask()
        other.report(0.9, 2)
        study.tell(other, 0.9)
    assert pruning.should_prune(trial, trial.number, 0.6, 2)
    assert readings == [2]


def test_a_trial_that_starts_later_is_judged_with_the_others(study):
    pruning, first = Pruning(study, PRUNER), study.ask()
    pruning.should_prune(first, first.number, 0.6, 1)
    late = study.ask()
    assert pruning.should_prune(late, late.number, 0.4, 1)
