"""What the package is distributed as: its page on an index, and its container image (which is not built here)."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tuner.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_page_on_an_index_has_no_relative_link_and_names_real_commands():
    text = PROJECT["readme"]["text"]
    assert not re.search(r"\]\((?!https://)", text)
    assert set(re.findall(r"^    tuner (\w+)", text, flags=re.MULTILINE)) <= COMMANDS.keys()


def test_the_dockerfile_passes_the_linter():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if not hadolint:
        pytest.skip("needs hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


def test_the_image_has_a_supported_python_no_root_and_the_command():
    stages = DOCKERFILE.split("\nFROM ")[1:]
    for stage in stages:
        [version] = re.findall(r"^python:([\d.]+)-slim", stage)
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    assert re.findall(r"^USER (\w+)$", stages[-1], flags=re.MULTILINE) == ["1000"]
    assert re.findall(r'^ENTRYPOINT \["(\w+)"\]$', stages[-1], flags=re.MULTILINE) == list(PROJECT["scripts"])


def test_the_image_gets_all_that_the_wheel_is_built_from():
    """And not the runs, caches or virtual environments that lie about in a checkout."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    admitted = {line[1:] for line in lines if line.startswith("!")}
    licences = {name.split("/")[0] for name in PROJECT["license-files"]}
    assert admitted == {"tuner", "conf", "pyproject.toml", "constraints.txt", *licences}
    assert all((ROOT / name).exists() for name in admitted)
