"""The end of a multirun that is no search: the mean and the spread over its seeds."""

import json
import re

from helpers import TINY

from tuner.sweep import summary


def test_several_seeds_end_with_their_mean_and_spread(command):
    code, output = command(*TINY, "epochs=1", "-m", "seed=0,1,2", "study=seeds")
    assert code == 0, output
    accuracies = r"validation accuracy 0\.\d{4} \(mean of 3 runs, standard deviation 0\.\d{4}, 0\.\d{4} to 0\.\d{4}\)"
    *_, mean, how = output.splitlines()
    assert re.search(f"{accuracies}$", mean)
    assert how.endswith("all runs: python -m tuner.compare multirun/seeds")


def test_each_configuration_has_its_line_and_the_best_comes_first(tmp_path):
    runs = {"adamw": (0.5, 0.7), "sgd": (0.8, 0.9), "adam": (0.4,)}
    number = 0
    for optimizer, values in runs.items():
        tested = {"test_accuracy": 0.5} if optimizer == "adam" else {}
        for seed, value in enumerate(values):
            folder = tmp_path / str(number)
            (folder / ".hydra").mkdir(parents=True)
            (folder / ".hydra" / "overrides.yaml").write_text(f"- optimizer={optimizer}\n- seed={seed}\n")
            (folder / "result.json").write_text(json.dumps({"status": "complete", "val_accuracy": value} | tested))
            number += 1
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "result.json").write_text(json.dumps({"status": "failed"}))
    assert summary.lines(tmp_path) == [
        "optimizer=sgd: validation accuracy 0.8500 (mean of 2 runs, standard deviation 0.0707, 0.8000 to 0.9000)",
        "optimizer=adamw: validation accuracy 0.6000 (mean of 2 runs, standard deviation 0.1414, 0.5000 to 0.7000)",
        "optimizer=adam: validation accuracy 0.4000 (1 run); test accuracy 0.5000 (1 run)",
    ]
