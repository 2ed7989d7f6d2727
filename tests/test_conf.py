"""Every config file composes, and its leaves can be made."""

import optuna
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from tuner import targets
from tuner.config import CONF, parse
from tuner.sweep import conditional_spaces, sampling, search_space
from tuner.sweep.plugin import PRUNERS, register
from tuner.training.model_choice import is_auto
from tuner.training.setup import backbone_of
from tuner.training.spec import head_of

register()  # hydra/sweeper=optuna is ours
FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml") if path.parent != CONF)
MANDATORY = {  # what an option leaves to the user
    "data/csv": ["data.path=images.csv"],
    "data/huggingface": ["data.path=images"],
    "data/image_folder": ["data.root=images"],
    "model/timm": ["model.name=timm/convnext_atto", "model.last_block=stages.2"],
    "model/torchvision": ["model.name=convnext_tiny", "model.last_block=features.5"],
}


def composed(file):
    sweeper = ["hydra/sweeper=optuna"] if file.parts[0] == "hydra" else []
    overrides = [*sweeper, f"{file.parent}={file.name}", *MANDATORY.get(str(file), [])]
    with initialize_config_dir(str(CONF)):
        return compose("train", overrides, return_hydra_config=True)


@pytest.mark.parametrize("file", FILES, ids=map(str, FILES))
def test_it_composes(file):
    cfg = composed(file)
    task = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    config = parse(task)
    assert is_auto(config.model) if file.name == "auto" else backbone_of(config).feature_size > 0
    assert head_of(config.model.head, seed=0)
    assert config.optimizer.target.build()([torch.nn.Parameter(torch.zeros(1))])
    assert 0 < config.scheduler.build()(0.0) <= 1
    assert config.augment.build().mixes == (file.name in ("mix", "finetune_all"))


SEARCHES = [file.name for file in FILES if file.parent.name == "hparams_search" and file.name[0] != "_"]


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_goes_with_every_pruner(search, pruner):
    bound = ["hydra.sweeper.pruner.lower=0.5"] if pruner == "threshold" else []
    with initialize_config_dir(str(CONF)):
        overrides = [f"hparams_search={search}", f"hydra/sweeper/pruner={pruner}", *bound]
        config = compose("train", overrides, return_hydra_config=True).hydra.sweeper.pruner
    made = sampling.build(config, targets.PRUNERS)
    assert f"optuna.pruners.{type(made).__name__}" == PRUNERS[pruner]._target_
    if pruner in ("median", "percentile"):
        assert (made._n_startup_trials, made._n_warmup_steps) == (5, 8)


@pytest.mark.parametrize("search", SEARCHES)
def test_no_search_proposes_what_its_own_checks_refuse(search):
    with initialize_config_dir(str(CONF)):
        cfg = compose("train", [f"hparams_search={search}"], return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        space = search_space.parse([f"{k}={v}" for k, v in cfg.hydra.sweeper.params.items()], loader)
        custom = cfg.hydra.sweeper.custom_search_space
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        drawn = {}
        for _ in range(40 if search == "optuna_model" else 200):  # its networks take longer to trace
            trial = study.ask(space.distributions)
            if custom:
                getattr(conditional_spaces, custom.rpartition(".")[2])(cfg, trial)
            network = {k: v for k, v in trial.params.items() if k.startswith("model.") and "head" not in k}
            drawn[tuple(sorted(network.items()))] = trial.params
        assert len(drawn) >= {"optuna_pareto": 30, "optuna_wide": 20, "optuna_model": 20}.get(search, 1)
        for params in drawn.values():
            config = parse(compose("train", space.overrides(params)))
            backbone_of(config)
            head_of(config.model.head, 0)


@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_goes_with_every_sampler(search):
    with initialize_config_dir(str(CONF)):
        samplers = GlobalHydra.instance().config_loader().get_group_options("hydra/sweeper/sampler")
        assert {"tpe", "random", "grid", "gp", "cmaes", "tpe_multivariate"} <= set(samplers)
        for sampler in set(samplers) - {"motpe"}:  # which Optuna has no longer
            overrides = [f"hparams_search={search}", f"hydra/sweeper/sampler={sampler}"]
            assert compose("train", overrides, return_hydra_config=True).hydra.sweeper.sampler.seed == 0


@pytest.mark.parametrize("file", FILES, ids=map(str, FILES))
def test_it_opens_with_what_it_is(file):
    lines = (CONF / file).with_suffix(".yaml").read_text().splitlines()
    assert any(line.startswith("# ") and "@package" not in line for line in lines[:2])


def test_the_default_config_is_what_the_readme_promises():
    with initialize_config_dir(str(CONF)):
        cfg = compose("train", ["optimizer=sgd", "model.head.width=1024", "data=fashion_mnist"])
    assert cfg.model.name == "vgg16"
    assert cfg.model.weights == "bundled"
    assert cfg.optimizer._target_ == "torch.optim.SGD"
    assert cfg.model.head.width == 1024
    assert cfg.data._target_.startswith("tuner.data.fashion_mnist")
