"""The config of a run: parsed once, into typed objects, every value checked."""

import dataclasses

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tuner import InputError
from tuner.config import CONF, FinalConfig, HeadConfig, OptimizerConfig, RunConfig, parse, parse_part
from tuner.rules import FOLDER_NAME


def composed(*overrides):
    with initialize_config_dir(str(CONF)):
        return compose("train", [*overrides])


def refused(config):
    with pytest.raises(InputError) as error:
        parse(config)
    return str(error.value)


def test_the_defaults_for_older_configs_are_those_of_train_yaml(monkeypatch):
    monkeypatch.delenv("TUNER_CACHE", raising=False)
    config = parse(composed())
    own = {"seed", "model", "data", "optimizer", "scheduler", "augment", "logger", "study", "plain"}
    for field in dataclasses.fields(RunConfig):
        if field.name not in own:
            assert getattr(config, field.name) == field.default, field.name
    assert config.model.head == HeadConfig()
    assert config.final == FinalConfig()
    assert dataclasses.replace(config.optimizer, target=OptimizerConfig().target) == OptimizerConfig()
    assert (config.data.views, config.data.test_views) == (1, 1)


def test_a_config_without_newer_keys_is_read():
    """As an earlier version wrote it."""
    model = {"name": "vgg16", "weights": "bundled", "image_size": 32, "last_block": "block2", "frozen": "block2"}
    config = parse({"seed": 3, "model": model | {"pool": 2}, "data": {"_target_": "tuner.data.synthetic.load"}})
    assert (config.seed, config.data.test_views, config.model.head) == (3, 1, HeadConfig())
    assert config.data.target.build().classes == ("class0", "class1", "class2", "class3")


def test_keys_of_a_target_are_apart_from_the_others():
    config = parse(composed("data=synthetic", "data.views=2"))
    assert config.data.views == 2
    assert "views" not in config.data.target.keywords
    assert config.optimizer.target.keywords["lr"] == 1e-3
    assert "backbone_lr_scale" not in config.optimizer.target.keywords
    assert config.plain["data"]["views"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": True}, "epochs=True must be a whole number of at least 1"),
        ({"recompute": 1}, "recompute=1 must be true or false"),
        ({"keep": None}, "keep=None must be last or best"),
        ({"class_weights": "some"}, "class_weights=some must be balanced, or null"),
        ({"data.views": 0}, "data.views=0 must be a whole number of at least 1"),
        ({"data.test_views": 3}, "data.test_views=3 must be 1, or 2 for the mirror image, too"),
        ({"final.seeds": -1}, "final.seeds=-1 must be a whole number of at least 0"),
        ({"final.epochs": 99}, "final.epochs=99 must be at most epochs=25, and final.seeds=3 at least 1"),
        ({"optimizer.backbone_lr_decay": 2}, "optimizer.backbone_lr_decay=2 must be more than 0 and at most 1"),
        ({"warm_start": "run", "head_first": 1, "model.frozen": None}, "warm_start=run brings a trained head: leave"),
        ({"head_first": 1}, "head_first=1 is for blocks that are trained: set model.frozen below model.last_block"),
        ({"model": None}, "model=None must be a group of keys"),
        ({"model.colour": "red"}, "model.colour is not a key of the config; the keys are budget, frozen, head, "),
        ({"model.head.deep": 1}, "model.head.deep is not a key of the config; the keys are depth, dropout, width"),
        ({"model.features": "block1"}, "model.features is now called model.last_block"),
        ({"data.path": "???"}, "data.path has no default; give it, as in data.path=VALUE"),
        ({"study": "${oc.env:NOT_SET_AT_ALL}"}, "the config cannot be resolved: "),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(changes, message):
    config = composed()
    for key, value in changes.items():
        OmegaConf.update(config, key, value, force_add=True)
    assert refused(config).startswith(message)


def test_a_config_that_lacks_what_has_no_default_is_refused():
    assert refused({"seed": 0}) == "model has no default; give it, as in model=VALUE"
    assert refused({"seed": 0, "model": {"name": "vgg16"}}).startswith("model.weights has no default")


def test_a_part_is_read_without_resolving_the_rest():
    """The last run of a search of 50 epochs, as evaluate reads it; the rest refers to what only its job knew."""
    config = composed("epochs=50", "final.epochs=40", "+data.colour=${nowhere:x}")
    part = parse_part(config, "final")
    assert (part.epochs, part.final.epochs, part.model.name) == (50, 40, "vgg16")
    assert refused(config).startswith("the config cannot be resolved: ")


def test_further_keys_at_the_top_are_allowed():
    assert parse(composed("+note=mine")).plain["note"] == "mine"


@pytest.mark.parametrize(
    "name", ["..", ".", "../x", "a/b", "/abs", "a\\b", ".x", " x", "a\nb", "\x1b[31m", "a\0b", "a" * 201, "ä" * 101, ""]
)
def test_a_study_is_the_name_of_a_folder(name):
    with pytest.raises(InputError, match=r"(?s)^study=.* must be the name of a folder: of at most 200 bytes"):
        FOLDER_NAME.check("study", name)
    for fine in ("2026-11-26_12-00-00-000000", "süß", "my study", "a.b", "-x", "a" * 200):
        FOLDER_NAME.check("study", fine)
