import os
import shutil
import sys

import pytest
import yaml
from fuzz import mutations, outcome
from omegaconf import OmegaConf
from PIL import Image

from tuner import InputError, resume, yaml_file

LEVELS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
BOMB = f"a0: &a0 [x, x, x, x, x, x, x, x, x]\n{LEVELS}"  # 9 ** 9 values in 430 bytes
CONFIG = """
seed: 0
model: {name: vgg16, pool: null, head: {width: [64, 32], dropout: 0.2}}
optimizer:
  _target_: torch.optim.AdamW
  lr: 1.0e-05
  weight_decay: 1e-2
study: ${now:%Y-%m-%d}
started: 2026-01-31
names: ["süß", 'it''s', "\\u0663", '=1']
test: true
"""


def read(tmp_path, content):
    (tmp_path / "x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    return yaml_file.read(tmp_path / "x.yaml")


def test_reads_what_omegaconf_reads(tmp_path):
    assert read(tmp_path, CONFIG) == OmegaConf.to_container(OmegaConf.create(CONFIG))
    assert read(tmp_path, OmegaConf.to_yaml(OmegaConf.create(CONFIG))) == read(tmp_path, CONFIG)


def test_aliases_are_read_as_yaml_has_them(tmp_path):
    values = [1.0, 2.0]
    text = yaml.safe_dump({"default": values, "solutions": [{"values": values}]})
    assert "&id001" in text  # as a study's results have it, if the default config is on the Pareto front
    assert read(tmp_path, text) == {"default": values, "solutions": [{"values": values}]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB, "with its aliases written out it has more than 1,048,576 bytes"),
        (f"x: &x {'y' * 1000}\nz: [{'*x, ' * 2000}]", "with its aliases written out it has more than 1,048,576 bytes"),
        ("a: &a [*a]", "with its aliases written out it has more than 1,048,576 bytes"),
        ("{a: &a {b: 1}, c: &c {<<: [*a, *a]}, d: &d {<<: *d}}", "with its aliases written out"),
        ("a" * 2**20 + "a", "it has 1,048,577 bytes, and 1,048,576 are allowed"),
        ("[" * 900 + "]" * 900, "its values are nested too deep"),
        ("- " * 2000, "while increasing block level exceeded maximum nesting depth"),
        (f"a: {'9' * 5000}", "Exceeds the limit"),
        ("a: !!int x", "invalid literal for int"),
        ("a: !!timestamp x", "a value does not fit its tag"),
        ("{[1]: 2}", "while constructing a mapping"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: \x1b[31m", "unacceptable character #x001b: control characters"),
        (b"a: \xff", "unacceptable character #x00ff: invalid leading"),
    ],
)
def test_what_it_refuses(tmp_path, content, reason):
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    assert str(error.value).startswith(f"{tmp_path / 'x.yaml'} can't be read: {reason}")
    assert str(error.value).isprintable()


def test_paths_that_are_not_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reasons = {"pipe": "it is not a regular file", ".": "it is not a regular file", "x": "No such file or directory"}
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=rf"can't be read: {reason}$"):
            yaml_file.read(tmp_path / name)


def test_a_file_without_keys(tmp_path):
    for content in ("", "- 1", "text"):
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(InputError, match=r"x\.yaml can't be read: it has no keys$"):
            yaml_file.mapping(tmp_path / "x.yaml")


@pytest.mark.parametrize("n", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutations(tmp_path, n):
    for seed, text in enumerate((CONFIG, BOMB)):
        for i, content in enumerate(mutations(text.encode(), seed, n)):
            outcome(lambda content=content: sys.getsizeof(repr(read(tmp_path, content))), f"seed {seed}, mutation {i}")


def test_every_command_refuses_a_bomb_at_once(trained, call, tmp_path):
    """The config, the overrides, Hydra's config and the results of a study, as somebody else may have written them."""
    for folder in ("run", "other"):
        shutil.copytree(trained(), tmp_path / folder)
    for name in ("config", "hydra", "overrides"):
        (tmp_path / "run" / ".hydra" / f"{name}.yaml").write_text(BOMB)
    (tmp_path / "run" / "conf" / "config.yaml").write_text(BOMB)
    (tmp_path / "run" / "checkpoint.pt").touch()
    (tmp_path / "optimization_results.yaml").write_text(BOMB)
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    large = "with its aliases written out it has more than"
    for command, *arguments in (("evaluate", "run"), ("predict", "run", "a.png"), ("study", ".")):
        code, _, err = call(command, *(tmp_path / argument for argument in arguments))
        assert code == 1
        assert large in err.splitlines()[-1]
        assert "Traceback" not in err
    code, out, err = call("compare", tmp_path)
    assert code == 0
    assert f"run: conf/config.yaml can't be read: {large}" in err
    assert "other" in out
    with pytest.raises(InputError, match=f"config.yaml can't be read: {large}"):
        resume.killed_run(tmp_path / "run")
