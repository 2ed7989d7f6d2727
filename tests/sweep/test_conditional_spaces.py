"""The space of hparams_search=optuna_model: what it draws fits together, and what the command line gives is kept."""

import functools
from pathlib import Path

import optuna
import pytest
from helpers import result
from hydra import compose, initialize_config_dir
from optuna.trial import TrialState

from tuner import InputError
from tuner.config import CONF
from tuner.sweep.conditional_spaces import BLOCKS, MOST_FEATURES, MOST_MACS, NETWORK_OF, cut, largest_size, model
from tuner.sweep.plugin import register

register()  # hydra/sweeper=optuna is ours


@functools.cache
def composed(*overrides):
    with initialize_config_dir(str(CONF)):
        return compose("train", ["hparams_search=optuna_model", *overrides], return_hydra_config=True)


def draw(study, *overrides, **given):
    """A trial of the space. given: what the command line fixes: `model_pool` is model.pool."""
    trial = study.ask()
    trial.suggest_int("model.head.depth", 0, 2)
    for name, value in given.items():
        trial.set_user_attr(name.replace("model_", "model."), value)
    model(composed(*overrides), trial)
    return trial


@pytest.fixture
def study():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def test_the_network_follows_from_the_block(study):
    assert len(NETWORK_OF) == sum(map(len, BLOCKS.values()))  # no block has two networks
    drawn = [draw(study, model_image_size=64).params for _ in range(60)]
    assert {p["model.last_block"] for p in drawn} == set(NETWORK_OF)
    assert all(p["model"] == NETWORK_OF[p["model.last_block"]] for p in drawn)


@pytest.mark.parametrize(
    ("network", "last_block", "size", "expected"),
    [
        ("vgg16", "block3", 64, (256, 8, 762)),
        ("vgg16", "block5", 96, (512, 3, 2818)),
        ("vgg16", "[block4,block5]", 96, (1024, 3, 2818)),
        ("efficientnet_lite0", "features.8", 224, (1280, 7, 383)),
        ("vit_b_16", "encoder", 224, (768, 1, 17563)),
    ],
)
def test_a_cut(network, last_block, size, expected):
    channels, side, macs = cut(network, last_block, size)
    assert (channels, side, macs // 10**6) == expected


def test_images_are_as_large_as_a_block_can_afford():
    sizes = {block: largest_size(network, block) for block, network in NETWORK_OF.items()}
    vgg16 = {"block2": 224, "block3": 160, "block4": 128, "block5": 128, "[block3,block4]": 128, "[block4,block5]": 128}
    assert sizes == vgg16 | dict.fromkeys(BLOCKS["efficientnet_lite0"], 224)
    for block, size in vgg16.items():
        assert cut("vgg16", block, size).macs <= MOST_MACS
        assert size == 224 or cut("vgg16", block, size + 32).macs > MOST_MACS


def test_the_pool_fits_the_map_and_the_features(study):
    largest = {}
    for size in (64, 128):
        for _ in range(200):
            p = draw(study, model_image_size=size).params
            at = cut(p["model"], p["model.last_block"], size)
            assert p["model.pool"] <= at.side
            assert at.channels * p["model.pool"] ** 2 <= MOST_FEATURES
            place = size, p["model.last_block"]
            largest[place] = max(largest.get(place, 0), p["model.pool"])
    assert (largest[64, "block3"], largest[64, "block5"], largest[128, "block5"]) == (4, 2, 4)
    assert (largest[64, "features.5"], largest[128, "features.8"]) == (4, 2)


def test_only_hidden_layers_have_a_width_and_dropout(study):
    for _ in range(10):
        p = draw(study, model_image_size=64).params
        hidden = p["model.head.depth"] > 0
        assert ("model.head.width" in p, "model.head.dropout" in p) == (hidden, hidden)


def test_a_fixed_network_has_its_own_blocks(study):
    for option, network in (("efficientnet_lite0", "efficientnet_lite0"), ("tiny", "vgg16")):
        own = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        drawn = [draw(own, f"model={option}", model=option, model_image_size=64).params for _ in range(20)]
        assert {p["model.last_block"] for p in drawn} == set(BLOCKS[network])
        assert not any("model" in p for p in drawn)


def test_a_fixed_block_has_its_network(study):
    p = draw(study, model_last_block="features.5", model_pool=3).params
    assert p["model"] == "efficientnet_lite0"
    assert {"model.last_block", "model.pool"}.isdisjoint(p)


def test_any_network_may_be_given_with_its_block(study):
    p = draw(study, "model=resnet18", model="resnet18", model_last_block="layer3").params
    assert 64 <= p["model.image_size"] <= 224
    with pytest.raises(InputError, match=r"^this search knows no blocks of resnet18: give model\.last_block yourself$"):
        draw(study, "model=resnet18", model="resnet18")


def test_the_network_alone_is_not_searched(study):
    trial = study.ask()
    trial.suggest_categorical("model", ["vgg16", "efficientnet_lite0"])
    with pytest.raises(
        InputError, match=r"^this search draws model with model\.last_block: fix model, or give blocks as"
    ):
        model(composed(), trial)


def test_a_search_over_networks_runs_and_resumes(command, call):
    small = ("data=synthetic", "data.n=60", "epochs=1", "model.image_size=range(32,65,step=32)", "final.seeds=1")
    search = ("-m", "hparams_search=optuna_model", "study=mine", *small)
    code, output = command(*search, "hydra.sweeper.n_trials=4")
    assert code == 0, output
    code, output = command(*search, "hydra.sweeper.n_trials=6")
    assert code == 0, output
    assert "continuing after 4 of 6 trials" in output
    study = optuna.load_study(study_name="mine", storage="sqlite:///multirun/optuna.db")
    assert len(study.trials) == 6
    assert {trial.state for trial in study.trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(0 <= trial.user_attrs["cut_score"] <= 1 for trial in study.trials)
    assert {trial.params["model"] for trial in study.trials} == set(BLOCKS)
    best = result(Path("multirun/mine/best"))
    assert best["trial"] == study.best_trial.number
    code, out, err = call("study", "multirun/mine", "--json")
    assert code == 0, err
    assert '"model.last_block"' in out
