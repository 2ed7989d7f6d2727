"""The line of progress: what it says of trials that run."""

import optuna
import pytest
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from tuner.sweep import progress
from tuner.sweep.history import History
from tuner.sweep.progress import Progress
from tuner.sweep.stopping import StopRules

UP, DOWN = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE


def running(values):
    return create_trial(state=TrialState.RUNNING, intermediate_values=dict(enumerate(values, 1)))


@pytest.mark.parametrize(
    ("trials", "directions", "epochs", "text"),
    [
        ([], [UP], 25, None),
        ([[]], [UP], 25, None),
        ([[0.5, 0.75]], [UP], 25, "1 trial in epoch 2 of 25, the best at 0.7500"),
        ([[0.5, 0.75], [0.8, 0.7]], [UP], 25, "2 trials in epoch 2 of 25, the best at 0.8000"),
        ([[0.5], [0.8, 0.7], []], [DOWN], None, "2 trials in epoch 1 to 2, the best at 0.5000"),
        ([[0.5]], [UP, DOWN], None, "1 trial in epoch 1"),
    ],
)
def test_how_far_running_trials_are(trials, directions, epochs, text):
    assert progress.training([running(values) for values in trials], directions, epochs) == text


def test_the_time_left_counts_the_epochs_of_running_trials(monkeypatch):
    study = optuna.create_study(direction="maximize")
    shown = Progress(History(study), n_trials=4, rules=StopRules(), epochs=10)
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown.start, shown.finished_before = 100.0, 0
    for _ in range(2):
        trial = study.ask()
        for epoch in range(1, 6):
            trial.report(0.5, epoch)
    now[0] = 130.0
    assert shown._parts() == {
        "trials": "0/4 trials",
        "running": "2 trials in epoch 5 of 10, the best at 0.5000",
        "left": "1 min 30 s left",  # two halves took 30 s, three trials are left
    }
    assert shown.line() == "0/4 trials, 1 min 30 s left"
