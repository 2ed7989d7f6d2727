"""A job's config comes out as Hydra itself composes it."""

import pickle

import pytest
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from tuner.sweep import plugin
from tuner.sweep.config_cache import CachingConfigLoader
from tuner.train import CONF


@pytest.fixture
def hydra():
    plugin.register()
    yield Hydra.create_main_hydra2("train", create_config_search_path(str(CONF)))
    GlobalHydra.instance().clear()


OVERRIDES = [
    ["optimizer.lr=0.01"],
    ["optimizer=sgd", "optimizer.lr=0.1", "seed=3"],
    ["model.head.width=[512,256]", "model.pool=null"],
    ["+extra=1", "epochs=3"],
    ["~scheduler.start", "scheduler.warmup=0.1"],
    ["data=csv", "data.path='a, b.csv'"],
    ["optimizer.lr=0.01", "hydra.sweep.subdir=best"],
    ["optimizer.lr=0.02"],
]


def test_what_it_composes_is_what_hydra_composes(hydra):
    command = ["hparams_search=optuna", "optimizer.weight_decay=0.5", "hydra.sweeper.n_trials=3", "hydra.mode=MULTIRUN"]
    master = hydra.compose_config("train", command, RunMode.MULTIRUN, activate_config_repository=True)
    name = master.study
    composer = CachingConfigLoader(hydra.config_loader)
    fixed = [line for line in command if not line.startswith("hydra.")]
    for overrides in OVERRIDES:
        overrides = fixed + overrides
        mine = composer.load_sweep_config(master, overrides)
        theirs = hydra.config_loader.load_sweep_config(master, overrides)
        assert OmegaConf.to_container(mine) == OmegaConf.to_container(theirs)
        assert mine.study == theirs.study == name  # a time, which is looked at once
        assert OmegaConf.is_struct(mine) == OmegaConf.is_struct(theirs)
    assert len(composer.cache) < len(OVERRIDES)


def test_one_config_does_not_change_another(hydra):
    master = hydra.compose_config("train", ["hydra.mode=MULTIRUN"], RunMode.MULTIRUN, activate_config_repository=True)
    composer = CachingConfigLoader(hydra.config_loader)
    first = composer.load_sweep_config(master, ["seed=1"])
    composer.load_sweep_config(master, ["seed=2"]).epochs = 99
    assert (first.seed, first.epochs) == (1, master.epochs)
    assert composer.load_sweep_config(master, []).seed == master.seed


@pytest.mark.parametrize("override", ["optimizer.nowhere=1", "optimizer=nowhere", "seed=1,2"])
def test_mistakes_are_hydras(hydra, override):
    master = hydra.compose_config("train", ["hydra.mode=MULTIRUN"], RunMode.MULTIRUN, activate_config_repository=True)
    with pytest.raises(Exception, match=r"nowhere|sweep") as mine:
        CachingConfigLoader(hydra.config_loader).load_sweep_config(master, [override])
    with pytest.raises(type(mine.value)):
        hydra.config_loader.load_sweep_config(master, [override])


def test_it_travels_to_workers(hydra):
    master = hydra.compose_config("train", ["hydra.mode=MULTIRUN"], RunMode.MULTIRUN, activate_config_repository=True)
    composer = CachingConfigLoader(hydra.config_loader)
    composer.load_sweep_config(master, ["seed=1"])
    assert pickle.loads(pickle.dumps(composer)).load_sweep_config(master, ["seed=2"]).seed == 2  # noqa: S301
