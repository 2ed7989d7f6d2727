"""What conf/ says about each key, as `--help KEY` and the documentation show it."""

import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from tuner import InputError
from tuner.config_reference import CONF, FROM_PLUGINS, entries, explain, options
from tuner.sweep import plugin

plugin.register()
BUILT = ("_target_", "_partial_")  # not typed on the command line
NOT_USED = {"motpe", "ray_aws"}  # Optuna no longer has the one; the other starts machines that cost money
COMMENTED = {entry.key for entry in entries() if entry.comment}


def keys(config, prefix=""):
    """The dotted keys of a composed config."""
    for name, value in config.items():
        if isinstance(value, dict) and value and f"{prefix}{name}" != "hydra.sweeper.params":
            yield from keys(value, f"{prefix}{name}.")
        elif name not in BUILT:
            yield f"{prefix}{name}"


def composed(*overrides):
    with initialize_config_dir(str(CONF)):
        config = compose("train", list(overrides), return_hydra_config=True)
    return OmegaConf.to_container(config, resolve=False)


def test_each_key_of_the_default_config_has_a_comment():
    config = composed()
    del config["hydra"], config["logger"]  # logger=csv has no keys
    assert set(keys(config)) <= COMMENTED


@pytest.mark.parametrize("search", ["optuna", "optuna_pareto"])
def test_each_key_of_the_sweeper_has_a_comment(search):
    sweeper = composed(f"hparams_search={search}")["hydra"]["sweeper"]
    optuna_defaults = {f"hydra.sweeper.{key}" for key in keys({"sampler": sweeper.pop("sampler")})}
    assert set(keys(sweeper, "hydra.sweeper.")) <= COMMENTED
    assert "hydra.sweeper.sampler.seed" in optuna_defaults & COMMENTED


def test_each_entry_of_each_option_has_a_comment():
    without = {entry.key for entry in entries() if not entry.comment}
    assert {key for key in without if not key.startswith("hydra.job_logging.")} == set()
    assert not any(entry.comment.startswith("#") for entry in entries())


def test_the_default_is_the_text_of_the_file():
    defaults = {(entry.file, entry.key): entry.default for entry in entries()}
    assert defaults["conf/train.yaml", "cache_dir"] == "${oc.env:TUNER_CACHE,'~/.cache/tuner'}"
    assert defaults["conf/optimizer/sgd.yaml", "optimizer.lr"] == "1e-2"
    assert defaults["conf/experiment/tutorial_recipe.yaml", "model.head.width"] == "[1024, 512]"
    assert defaults["conf/hparams_search/grid.yaml", "hydra.sweeper.params"].startswith("{optimizer.lr: choice(5e-4")
    assert defaults["tuner/sweep/plugin.py", "hydra.sweeper.timeout"] == "null"
    assert defaults["tuner/sweep/plugin.py", "hydra.sweeper.baseline"] == "true"


def test_a_comment_goes_on_in_aligned_lines_and_includes_those_above():
    comments = {entry.key: entry.comment for entry in reversed(entries())}
    assert comments["keep"].startswith("which epoch's weights are saved: last | best")
    assert comments["keep"].endswith("(mean of 5 seeds, 600 validation images)")
    assert comments["head_first"].startswith("If blocks of the network are trained")
    assert comments["patience"].startswith("with keep=best")


@pytest.mark.parametrize("group", [*FROM_PLUGINS, "hydra/sweeper/pruner", "data", "model", "optimizer", "augment"])
def test_the_options_of_a_group_are_those_that_hydra_has(group):
    with initialize_config_dir(str(CONF)):
        known = set(GlobalHydra.instance().config_loader().get_group_options(group))
    assert {option.name for option in options() if option.group == group} == known - NOT_USED
    assert all(option.summary for option in options() if option.group == group)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("keep", "keep=last\n    which epoch's weights are saved"),
        ("optimizer", "adamw (default)\n    Adam with decoupled weight decay"),
        ("optimizer=sgd", "optimizer.momentum=0.9"),
        ("hydra/launcher", "fused (default)"),
        ("hydra/sweeper/pruner=hyperband", "hydra.sweeper.pruner.max_resource=auto"),
        ("hydra.sweeper.timeout", "hydra.sweeper.timeout=null\n    the search ends"),
        ("dropout", "Keys that contain dropout:\n\n  model.head.dropout=0.3"),
        ("seed=3", "seed=0\n    validation split"),
    ],
)
def test_it_explains_a_key_a_group_an_option_and_a_part_of_keys(word, expected):
    assert expected in explain([word])


def test_without_a_word_it_lists_groups_and_keys():
    text = explain([])
    assert "  optimizer: adam, adamw, sgd\n" in text
    assert "  batch_size=128  " in text
    assert all(len(line) <= 102 for line in text.splitlines())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dropuot", "dropuot is no config key, group or option; similar: model.head.dropout"),
        ("optimizer=foo", "optimizer=foo: optimizer has no such option; known: adam, adamw, sgd"),
        ("", "--help without a word lists them all"),
    ],
)
def test_an_unknown_word_is_refused_with_similar_ones(word, message):
    with pytest.raises(InputError, match=message):
        explain([word])


def test_it_imports_neither_torch_nor_hydra():
    code = "import sys; from tuner.config_reference import explain; explain(['lr'])"
    code += "; assert not {'torch', 'hydra', 'omegaconf', 'numpy', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
