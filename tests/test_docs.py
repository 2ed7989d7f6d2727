"""The commands and the Python of README.md and docs/ work as they stand there."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torchvision.models import resnet18

from tuner import train
from tuner.config_reference import CONF
from tuner.data import synthetic

ROOT = Path(train.__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
GENERATED = {DOCS / "reference/config.md", DOCS / "reference/commands.md"}  # by docs/reference_pages.py
COMMAND = re.compile(r"`(python -m tuner\.[a-z]+[^`\n]*)`|^ {4,}(python -m tuner\.[a-z]+(?:.*\\\n)*.*)$", re.MULTILINE)
OTHERS = re.compile(r"^ {4,}(pip|mkdocs|mlflow|tensorboard|sbatch|python3|export|\.venv/bin/\w+) ", re.MULTILINE)
TAGGED = re.compile(r'```\w+ title="(.*?)"\n(.*?)```', re.DOTALL)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def commands(path):
    """The words of each command of tuner on a page, without what the shell does with its output."""
    for found in COMMAND.findall(path.read_text()):
        words = shlex.split("".join(found).replace("\\\n", " "), comments=True)
        end = next((place for place, word in enumerate(words) if word in ("|", ">", "&&")), len(words))
        yield tuple(words[2:end])


QUOTED = sorted({words for path in PAGES for words in commands(path) if "my_conf" not in words})  # see own-parts.md
TRAIN = [words[1:] for words in QUOTED if words[0] == "tuner.train" and "--help" not in words]


@pytest.mark.parametrize("words", TRAIN, ids=" ".join)
def test_a_quoted_run_or_search_composes(words):
    overrides = OverridesParser.create().parse_overrides([word for word in words if word != "-m"])
    searched = [override for override in overrides if override.is_sweep_override()]
    plain = [override.input_line for override in overrides if not override.is_sweep_override()]
    with initialize_config_dir(str(CONF)):
        config = compose("train", plain, return_hydra_config=True)
    for override in searched:
        assert OmegaConf.select(config, override.key_or_group, default=override) is not override


@pytest.mark.parametrize("words", [words for words in QUOTED if words[0] != "tuner.train"], ids=" ".join)
def test_a_quoted_command_takes_its_arguments(words, monkeypatch):
    """Up to the point where it has read them."""

    class Parsed(Exception):  # noqa: N818 - no error
        pass

    for method in ("parse_args", "parse_intermixed_args", "parse_known_args"):
        parse = getattr(argparse.ArgumentParser, method)

        def parsed(self, *arguments, parse=parse, **options):
            parse(self, *arguments, **options)
            raise Parsed

        if method != "parse_known_args":
            monkeypatch.setattr(argparse.ArgumentParser, method, parsed)
    monkeypatch.setattr(sys, "argv", list(words))
    with pytest.raises(Parsed):
        importlib.import_module(words[0]).main()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_command_that_is_not_tested_says_why(path):
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if OTHERS.match(line):
            after = next(line for line in lines[number + 1 :] if line.strip() and not line.startswith("    "))
            assert re.match(r"<!-- not tested: \w.* -->$", after), f"{path}:{number + 1}: {line.strip()}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).resolve() in GENERATED or (path.parent / target).exists(), target


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert sum(line.startswith("!") or "| ![" in line for line in lines) <= 2


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"- (?:.+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    assert listed == {path.relative_to(DOCS).as_posix() for path in {*DOCS.rglob("*.md"), *GENERATED}}


def test_the_page_on_design_lists_each_module_and_package():
    tree = (DOCS / "design.md").read_text().partition("## What is where")[2]
    files = {path.name for path in ROOT.joinpath("tuner").rglob("*.py")}
    named = set(re.findall(r"[\w/]+\.py\b", tree)) - {"reference_pages.py", "quickstart.py"}
    assert named <= files
    commands = re.search(r"((?:\w+, )+\w+) \(\.py\)", tree)[1].split(", ")
    for path in ROOT.joinpath("tuner").iterdir():
        if path.suffix == ".py" and path.name != "__init__.py":
            assert path.name in named or path.stem in commands
        elif (path / "__init__.py").exists():
            assert f"      {path.name}/ " in tree


def test_each_block_of_the_page_on_python_runs(command):
    code, output = command(
        *("-m", "hparams_search=optuna", "study=mine", "hydra.sweeper.n_trials=4", "final.seeds=1"),
        *("data=synthetic", "model=tiny", "epochs=3", "batch_size=32"),
    )
    assert code == 0, output
    assert "look at it: python -m tuner.study " in output
    shown = blocks("inspect.md", "python")
    assert len(shown) >= 8
    names: dict = {}
    for block in shown:
        exec(compile(block, "docs/inspect.md", "exec"), names)
    assert len(names["frame"]) == 5
    assert names["both"]["images"] == 64
    assert Path("curves.png").stat().st_size > 10_000
    assert list(names["study"].trials.number) == [0, 1, 2, 3]


def test_the_lines_of_onnxruntime_give_what_predict_gives(command, call, capfd):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from PIL import Image

    import tuner

    assert command(*TINY, "hydra.run.dir=RUN")[0] == 0
    assert call("export", "RUN", "--format", "onnx")[0] == 0
    image = synthetic.load(size=40).test.images[0, 0].numpy()
    Image.fromarray(image).save("photo.jpg")  # square, so that crop and stretch are the same
    [block] = blocks("how-to/use-a-model.md", "python")
    exec(compile(block, "docs/how-to/use-a-model.md", "exec"), {})
    name, probability = capfd.readouterr().out.split()
    model = tuner.load("RUN", device="cpu", precision="fp32")
    [expected] = model.predict(["photo.jpg"])
    assert name == model.classes[expected.argmax()]
    assert float(probability) == pytest.approx(float(expected.max()), abs=0.001)


def own_parts():
    page = DOCS / "how-to/own-parts.md"
    return [pytest.param(words, id=" ".join(words)) for words in commands(page) if "my_conf" in words]


@pytest.mark.parametrize("words", own_parts())
def test_your_own_parts_run(words, command, tmp_path, monkeypatch):
    page = (DOCS / "how-to/own-parts.md").read_text()
    files = dict(TAGGED.findall(page))
    assert len(files) == 11
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    if "model=mine" in words:
        torch.save(resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TUNER_TRUST", re.search(r"export TUNER_TRUST='(.*)'", page)[1])
    network = [] if {"model=mine", "model=small"} & {*words} else ["model=tiny"]
    search = ["hydra.sweeper.n_trials=2", "final.seeds=0"] if "-m" in words else []
    try:
        code, output = command(*words[1:], "epochs=2", "plots=false", *network, *search)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
            del sys.modules[name]
    assert code == 0, output
    assert ("best value" if search else "validation accuracy") in output
    if not search:
        kappa = [sys.executable, "-m", "mine.kappa", "outputs/latest"]
        assert subprocess.check_output(kappa, text=True).startswith("kappa 0.")
