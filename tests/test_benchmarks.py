"""The commands that the documents quote start, and each benchmark's smallest form runs to its end."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from tuner.config import CONF
from tuner.data import image_folder

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
DOCUMENTS = [ROOT / "README.md", BENCHMARKS / "README.md", BENCHMARKS / "RESULTS.md"]
DOCUMENTS += [path for path in sorted((ROOT / "docs").rglob("*.md")) if "python benchmarks/" in path.read_text()]
DOCUMENTS += sorted((CONF / "experiment").glob("*.yaml"))
# In backticks, or the rest of an indented line or of a comment.
COMMAND = re.compile(r"`(python benchmarks/[^`]+)`|^#? {4,}(python benchmarks/.+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def load():
    """Imports a benchmark by name. The benchmarks import each other as scripts do, from their own folder."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


def commands(text):
    """Without the comments that follow some."""
    return [" ".join("".join(groups).split("#")[0].split()) for groups in COMMAND.findall(text)]


QUOTED = sorted({command for path in DOCUMENTS for command in commands(path.read_text())})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_mention_of_a_benchmark_in_the_documents_is_a_command_that_is_tested(path):
    text = path.read_text()
    assert len(commands(text)) == text.count("python benchmarks/")


def test_the_documents_quote_every_benchmark():
    scripts = {path.name for path in BENCHMARKS.glob("*.py")} - {"results.py", "small_sets.py"}
    assert {Path(command.split()[1]).name for command in QUOTED} == scripts


@pytest.mark.parametrize("command", QUOTED)
def test_a_quoted_command_starts(command, load):
    _, script, *words = shlex.split(command)
    args = load(Path(script).stem).arguments().parse_args(words)
    with initialize_config_dir(str(CONF)):
        compose("train", getattr(args, "overrides", []))


def test_a_benchmark_keeps_a_python_path_that_is_set(load, tmp_path, monkeypatch):
    sweep = load("sweep")
    for given, expected in [("/a:/b", f"{ROOT}:/a:/b"), ("", str(ROOT)), (None, str(ROOT))]:
        if given is None:
            monkeypatch.delenv("PYTHONPATH")
        else:
            monkeypatch.setenv("PYTHONPATH", given.replace(":", os.pathsep))
        printed = sweep.command(["-c", "import os; print(os.environ['PYTHONPATH'])"], tmp_path)
        assert printed.strip() == expected.replace(":", os.pathsep)


def test_a_table_replaces_the_one_with_its_heading(load, tmp_path, monkeypatch, capsys):
    results = load("results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "new" / "tables.md")
    for name, value in [("speed", "1"), ("memory", "2"), ("speed", "3")]:
        results.write(name, torch.device("cpu"), [["what", "value"], ["row", value]])
    assert tables(results.RESULTS) == {"speed": {"row": ["3"]}, "memory": {"row": ["2"]}}


def test_the_distance_to_the_best_recipe_in_hindsight_is_paired_over_the_test_images(load):
    recipes = load("recipes")

    def outcome(*correct, seconds=1.0):
        return recipes.Outcome(np.array(correct, dtype=bool), [{"seconds": seconds}] * len(correct))

    of_set = {
        "default: a network": outcome([1, 0, 0, 1], [1, 0, 0, 0]),
        "another": outcome([1, 1, 0, 1], [1, 1, 0, 1]),
        "auto": outcome([1, 1, 1, 1], [1, 1, 0, 1], seconds=7.4),  # never the one to compare with
        **{baseline: outcome([1, 1, 1, 1], [1, 1, 1, 1]) for baseline in recipes.BASELINES},
    }
    header, row = recipes.distances({"shells": of_set}, {"shells": "4 + 4, 2 classes"})
    by_column = dict(zip(header, row, strict=True))
    assert by_column["best recipe in hindsight"] == "another"
    assert (by_column["accuracy"], by_column["best baseline"], by_column["auto, s"]) == ("0.750", "1.000", "7")
    error = np.std([0, 1, 0, 0.5], ddof=1) / 2
    assert by_column["default is behind by"] == f"0.375 ({error:.3f})"
    assert by_column["auto is behind by"] == f"-0.125 ({np.std([0, 0, -0.5, 0], ddof=1) / 2:.3f})"
    assert recipes.table({"shells": of_set})[1] == ["default: a network", "0.375 (0.177)", "0.375", "1"]


@pytest.mark.parametrize("name", ["digits", "letters", "fonts", "symbols", "textures", "photos"])
def test_a_small_set_is_the_same_each_time(name, load):
    draws = [list(islice(load("small_sets").SETS[name](), 20)) for _ in range(2)]
    assert len({image.tobytes() for _, _, image in draws[0]}) == 20
    for first, second in zip(*draws, strict=True):
        assert first[:2] == second[:2]
        assert first[2].tobytes() == second[2].tobytes()


def test_a_small_set_is_written_as_a_folder_that_runs_read(load, tmp_path):
    root = load("small_sets").write("digits", tmp_path)
    data = image_folder.load(root, size=[1, 8, 8], cache_dir=tmp_path / "cache")
    assert (len(data.pool), len(data.test), data.classes) == (300, 300, tuple("0123456789"))


PLAIN = "plain pipeline, channels_last"
SMALLEST = {  # command -> rows of each of its tables
    "audit.py": {
        "planted faults": ["synthetic: labels swapped, 5%", "digits: 20 near copies", "digits: 20 foreign images"],
        "copies of images": ["JPEG, quality 75", "mirror image"],
    },
    "bank.py": {
        "extraction": ["bare loop", "bank"],
        "epoch": ["network in the loop, float32", "cached features"],
    },
    "finetune.py": {
        "blocks on cached maps": ["fp32", "bf16"],
        "memory of fine-tuning all blocks": ["as it is", "micro_batch=16", "recompute=true"],
    },
    "gpu.py": {
        "one GPU": [
            *("copy on the device", "pytest -m gpu", "default run, from nothing", "default run, features cached"),
            *("search, 2 trials", "... training of the stacks", "... best validation accuracy"),
            *("step, K = 1, 256 features", "step, K = 2, 256 features"),
            *("extraction of 64 images, 32 px, the bank's path", "all blocks trained, 32 px, no augmentation"),
            "experiment=finetune_all, 1 of its 30 epochs",
        ]
    },
    "heads.py": {"heads": ["1", "2", "4"]},
    "images.py": {"a folder of images": ["100"]},
    "networks.py": {"networks": ["vgg16", "resnet18"]},
    "proposals.py": {"proposals of a search": ["one at a time", "all at once", "rounds, at random"]},
    "recipes.py": {
        "recipes on small sets": ["tiny", "tiny, linear head", "scikit-learn: SVM with RBF kernel on pixels"],
        "recipes on small sets, the best in hindsight": ["digits"],
    },
    "scale.py trial": {"a trial of a large study, in memory": ["TPE, 20", "random, 20", "rules, 20"]},
    "scale.py workers": {"trials per second, sqlite": ["sqlite", "sqlite, through the proxy"]},
    "selection.py": {"what a search's pick is worth": ["heads", "networks"]},
    "sweep.py overhead": {"overhead of a trial": ["in memory", "SQLite", "journal"]},
    "sweep.py memory": {"memory of a search": ["2"]},
    "sweep.py search": {
        "search of 2 trials": [
            *("tuner, from nothing", "tuner, features cached", "hydra-optuna-sweeper, features cached"),
            *(f"{PLAIN}, float32, scaled", f"{PLAIN}, float32, scaled to as many epochs"),
            *(f"{PLAIN}, bf16 autocast, scaled", f"{PLAIN}, bf16 autocast, scaled to as many epochs"),
        ]
    },
    "sweep.py where": {"where a search's time goes": ["imports", "training: steps", "all"]},
}
PRINTED = {  # command of a benchmark that only prints -> what its lines begin with
    "accuracy.py": ["official test: skipped", "   0 ", "   1 ", "mean ", " std "],
    "compare.py": ["run folders: 1,", "run folders: 20,"],
    "pruning.py": ["| basic | none |", "| basic | median |"],
    "pruning.py curves": ["| none |", "| median, warm-up 8 |", "| hyperband, from epoch 3 |", "| wilcoxon |"],
    "sweep.py overhead --profile": ["tuner's sweeper, SQLite:", "ask: ", "rest "],
}


def smallest(command, folder):
    """Run a benchmark's smallest form; returns what it printed, and its tables."""
    script, *words = shlex.split(command)
    if script == "sweep.py" and "where" in words and not shutil.which("py-spy"):
        pytest.skip("needs py-spy")
    path = folder / "results.md"
    words = [sys.executable, str(BENCHMARKS / script), *words, "--smallest", "--results", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # threads cost more than they save on so little work
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, tables(path) if path.exists() else {}


def tables(path):
    """heading -> first column -> the other columns of its row. Of rows with the same first column the last counts."""
    found = {}
    for section in path.read_text().split("\n## ")[1:]:
        heading, *lines = section.splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        found[heading.rpartition(", ")[0]] = {row[0]: row[1:] for row in rows[2:]}  # the header, and a line below it
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", SMALLEST)
def test_the_smallest_form_writes_its_tables(command, tmp_path):
    _, written = smallest(command, tmp_path)
    assert written.keys() == SMALLEST[command].keys()
    for heading, rows in SMALLEST[command].items():
        assert set(rows) <= set(written[heading])
        for name in rows:
            numbers = re.findall(r"\d+", " ".join(written[heading][name]))
            assert any(map(int, numbers)), (heading, name, written[heading][name])
            assert "nan" not in " ".join(written[heading][name])


@pytest.mark.slow
@pytest.mark.parametrize("command", PRINTED)
def test_the_smallest_form_prints_its_figures(command, tmp_path):
    printed, written = smallest(command, tmp_path)
    assert not written
    for start in PRINTED[command]:
        [line] = [line for line in printed.splitlines() if line.startswith(start)]
        assert "skipped" in line or re.search(r"\d", line.removeprefix(start))


def test_without_py_spy_where_says_what_it_needs(load, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["sweep.py", "where", "--smallest"])
    with pytest.raises(SystemExit, match="pip install py-spy"):
        load("sweep").main()
