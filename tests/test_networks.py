"""Networks of timm and torchvision: blocks, weights, and training at every depth."""

import re
import sys
from dataclasses import replace
from importlib.metadata import version

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from tuner import InputError
from tuner.networks.backbone import Backbone
from tuner.networks.weights import resolve


def blocks_of(name, image_size, **options):
    """A network without weights, cut at its last block."""
    probe = {"weights": None, "image_size": image_size, "last_block": "", "frozen": None, "pool": None}
    with pytest.raises(InputError, match="is not a block of") as error:
        Backbone(name, **probe)
    end = re.search("known: ([^;]*)", str(error.value))[1].split(", ")[-1]
    return Backbone(name, **probe | {"last_block": end, "frozen": end} | options)


def message(name, image_size=64, **options):
    defaults = {"weights": None, "last_block": "", "frozen": None, "pool": None}
    with pytest.raises(InputError) as error:
        Backbone(name, image_size=image_size, **defaults | options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "image_size", "blocks"),
    [
        (
            "timm/resnet18",
            64,
            {
                "maxpool": (64, 16, 16),
                "layer1": (64, 16, 16),
                "layer2": (128, 8, 8),
                "layer3": (256, 4, 4),
                "layer4": (512, 2, 2),
            },
        ),
        (
            "timm/convnext_atto",
            64,
            {
                "stem": (40, 16, 16),
                "stages.0": (40, 16, 16),
                "stages.1": (80, 8, 8),
                "stages.2": (160, 4, 4),
                "stages.3": (320, 2, 2),
            },
        ),
        (
            "timm/regnetx_002",
            64,
            {"stem": (32, 32, 32), "s1": (24, 16, 16), "s2": (56, 8, 8), "s3": (152, 4, 4), "s4": (368, 2, 2)},
        ),
        (
            "timm/swin_tiny_patch4_window7_224",  # height, width, channels
            224,
            {
                "patch_embed": (56, 56, 96),
                "layers.0": (56, 56, 96),
                "layers.1": (28, 28, 192),
                "layers.2": (14, 14, 384),
                "layers.3": (7, 7, 768),
            },
        ),
        (
            "timm/vit_tiny_patch16_224",  # tokens, channels; the class token at the end
            224,
            {"patch_embed": (196, 192), **{f"blocks.{k}": (197, 192) for k in range(11)}, "blocks.11": (192,)},
        ),
    ],
)
def test_timms_blocks(name, image_size, blocks):
    backbone = blocks_of(name, image_size)
    assert {name: block.shape for name, block in backbone.blocks.items()} == blocks
    assert list(backbone.blocks) == list(blocks)
    assert {block.channels_last for block in backbone.blocks.values()} == {"swin" in name}


@pytest.mark.parametrize(
    ("name", "block", "pool", "size"),
    [
        ("timm/vit_tiny_patch16_224", "blocks.5", None, 197 * 192),
        ("timm/vit_tiny_patch16_224", "blocks.5", 1, 192),
        ("timm/vit_tiny_patch16_224", "blocks.11", 1, 192),
        ("timm/swin_tiny_patch4_window7_224", "layers.2", 2, 4 * 384),
    ],
)
def test_features_of_tokens_and_of_maps_with_channels_last(name, block, pool, size):
    backbone = blocks_of(name, 224, last_block=block, frozen=block, pool=pool)
    assert backbone.feature_size == size
    images = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    assert backbone.frozen_part(torch.float32)(images).shape == (2, size)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "timm/resnet81",
            {},
            f"model.name=timm/resnet81 is none of the {len(timm.list_models()):,} networks of timm {version('timm')}; "
            "similar names: timm/resnet18, ",
        ),
        ("timm/resnet18.a1_in1k", {}, "model.name=timm/resnet18.a1_in1k is none of the "),
        (
            "resnet81",
            {},
            "model.name=resnet81 is not a classification network of torchvision (those of timm are called timm/NAME); "
            "known: ",
        ),
        (
            "timm/resnet18",
            {"last_block": "layer5"},
            "model.last_block=layer5 is not a block of timm/resnet18; known: maxpool, layer1, layer2, layer3, layer4",
        ),
        (
            "timm/vit_tiny_patch16_224",
            {"image_size": 224, "last_block": "blocks.3", "pool": 2},
            "model.pool=2 does not fit blocks.3's 197 tokens; use 1, their mean, or null for all of them",
        ),
        (
            "timm/vit_tiny_patch16_224",
            {"last_block": "blocks.3"},
            "model.last_block=blocks.3 is not a block of timm/vit_tiny_patch16_224 at model.image_size=64; known: "
            "none; later ones fail (Input height (64) doesn't match model (224).): use the size that the network is "
            "made for, 224 for most",
        ),
        (
            "timm/crossvit_tiny_240",
            {"image_size": 240},
            "model.name=timm/crossvit_tiny_240 can't be cut: its steps depend on the images (symbolically traced "
            "variables cannot be used as inputs to control flow); use another network",
        ),
        (
            "timm/coat_tiny",
            {"image_size": 224},
            "model.name=timm/coat_tiny can't be cut: there is no stage after which everything depends on that stage's "
            "output alone; use another network",
        ),
        (
            "timm/vitamin_small_224",
            {"image_size": 224},
            "model.name=timm/vitamin_small_224 can't be cut: it can't be created without weights (Tensor on device "
            "meta is not on the expected device cpu!); use another network",
        ),
    ],
)
def test_error_messages(name, options, expected):
    assert message(name, **options).startswith(expected)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    expected = "a model.name that begins with timm/ needs timm: pip install 'tuner[timm]'"
    assert message("timm/resnet18", last_block="layer1") == expected
    assert blocks_of("resnet18", 64).blocks


def test_the_key_contains_the_library_and_its_version():
    """If the key changes, all cached features of torchvision's networks are computed again."""
    options = {"weights": None, "image_size": 64, "last_block": "layer3", "frozen": "layer3", "pool": 1}
    key = {
        "network": "resnet18",
        "weights": "random-0",
        "block": "layer3",
        "pool": 1,
        "image_size": 64,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    release = torchvision.__version__.split("+")[0]
    assert Backbone("resnet18", **options).key == key | {"torchvision": release}
    assert Backbone("timm/resnet18", **options).key == key | {"network": "timm/resnet18", "timm": version("timm")}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replaces the hub's download: writes a file or raises an error, and records the requests."""
    requests = []

    def put(state=None, error=None):
        def download(repository, file, revision=None):
            requests.append((repository, file, revision))
            if error:
                raise error
            save_file(state, path := tmp_path / "model.safetensors")
            return str(path)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return requests

    return put


@pytest.mark.parametrize("spec", ["DEFAULT", "a1_in1k"])
def test_timms_weights_come_from_the_hub_as_safetensors(hub, spec):
    torch.manual_seed(1)
    model = timm.create_model("resnet18")
    requests = hub({key: value.clone() for key, value in model.state_dict().items()})
    backbone = Backbone("timm/resnet18", weights=spec, image_size=64, last_block="layer2", frozen="layer2", pool=1)
    assert backbone.key["weights"] == "timm/resnet18.a1_in1k"
    assert requests == []  # nothing is fetched before it is needed
    cfg = timm.models.get_pretrained_cfg("resnet18")
    assert (backbone.mean, backbone.std) == (cfg.mean, cfg.std)

    state = torch.get_rng_state()
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = backbone.frozen_part(torch.float32)(images)
    assert requests == [("timm/resnet18.a1_in1k", "model.safetensors", None)]
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    x = (images.float() / 255 - torch.tensor(cfg.mean).view(3, 1, 1)) / torch.tensor(cfg.std).view(3, 1, 1)
    with torch.no_grad():
        x = model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x))))))
    torch.testing.assert_close(features, x.mean((2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("state", "error", "reason"),
    [
        (None, LocalEntryNotFoundError("no route to the hub\nsecond line"), "no route to the hub"),
        (None, ConnectionError("refused"), "refused"),
        ({"fc.bias": torch.zeros(3)}, None, "Error(s) in loading state_dict for ResNet:"),
    ],
)
def test_a_failed_download_is_reported_in_one_line(hub, state, error, reason):
    hub(state, error)
    with pytest.raises(InputError) as raised:
        resolve("timm/resnet18", "DEFAULT", 0).load()
    assert str(raised.value) == (
        f"model.safetensors of timm/resnet18.a1_in1k could not be downloaded from the Hugging Face hub ({reason}); "
        "set model.weights to a path, or to null (random)"
    )


def test_an_unknown_name_lists_the_weights_of_timm():
    with pytest.raises(InputError) as error:
        resolve("timm/resnet18", "IMAGENET1K_V1", 0)
    assert str(error.value).startswith(
        "model.weights=IMAGENET1K_V1 is neither a readable file (No such file or directory) nor weights of "
        "timm/resnet18; use DEFAULT, "
    )
    assert ", a1_in1k, " in str(error.value)
    assert str(error.value).endswith(", a path, or null (random)")


def test_random_weights_of_timm_depend_on_the_seed_and_can_be_saved(tmp_path):
    first, again, other = (resolve("timm/test_resnet", None, seed).load() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    save_file(first, tmp_path / "own.safetensors")
    loaded = resolve("timm/test_resnet", str(tmp_path / "own.safetensors"), 0).load()
    assert all(torch.equal(first[key], loaded[key]) for key in first)


@pytest.mark.parametrize("frozen", ["${.last_block}", "layer1", "null"])
def test_a_run_with_a_network_of_timm(command, frozen):
    code, output = command(
        *("model=timm", "model.name=timm/test_resnet", "model.weights=null", "model.image_size=32"),
        *("model.last_block=layer2", f"model.frozen={frozen}", "data=synthetic", "epochs=2", "batch_size=32"),
    )
    assert code == 0, output
    assert re.search(r"validation accuracy 0\.\d+ \(64 images, .*\), test accuracy", output)


FAMILIES = {  # a small network of each family -> the image size, if it takes only one
    "cait_xxs24_224": 224,
    "convmixer_768_32": None,
    "convnextv2_atto": None,
    "cspnext_s": None,
    "davit_tiny": None,
    "deit_tiny_patch16_224": 224,
    "densenet121": None,
    "edgenext_xx_small": None,
    "efficientnet_b0": None,
    "eva02_tiny_patch14_224": 224,
    "fasternet_t0": None,
    "fastvit_t8": None,
    "ghostnet_050": None,
    "inception_next_atto": None,
    "mambaout_femto": None,
    "mixer_s32_224": 224,
    "mobilenetv3_small_050": None,
    "mobilevit_xxs": None,
    "nf_regnet_b0": None,
    "poolformer_s12": None,
    "pvt_v2_b0": None,
    "regnetx_002": None,
    "repvit_m1": None,
    "resnet18": None,
    "resnetv2_18": None,
    "skresnet18": None,
    "starnet_s1": None,
    "swin_tiny_patch4_window7_224": 224,
    "swinv2_tiny_window8_256": 256,
    "tiny_vit_5m_224": 224,
    "vgg11": None,
    "vit_tiny_patch16_224": 224,
    "xception41": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_each_family_cut_in_two_equals_the_whole(name):
    backbone = blocks_of(f"timm/{name}", FAMILIES[name] or 64, pool=1)
    images = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state = backbone.weights.load()  # drawn once
    backbone.weights = replace(backbone.weights, load=state.copy)
    whole = backbone.frozen_part(torch.float32)(images)
    assert whole.shape == (2, backbone.feature_size)
    assert whole.std() > 0
    for block in list(backbone.blocks)[:-1:3]:
        backbone.frozen = block
        maps = backbone.frozen_part(torch.float32)(images)
        assert maps.shape == (2, *backbone.cached_shape)
        features = backbone.trained_part().eval()(maps).detach()
        torch.testing.assert_close(features, whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["vgg16", "vgg16_bn", "resnet18", "efficientnet_b0", "timm/convnextv2_atto", "timm/resnet18", "timm/regnetx_002"],
)
def test_every_depth_of_training(name):
    """For each last block and each frozen block up to it, or none: gradients reach every trained block."""
    backbone = blocks_of(name, 64, pool=1)
    images = torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 1])
    state = backbone.weights.load()
    backbone.weights = replace(backbone.weights, load=state.copy)
    names = list(backbone.blocks)
    for k, backbone.last_block in enumerate(names):
        backbone.used, backbone.feature_size = [backbone.last_block], backbone.size_of(backbone.last_block, 1)
        for backbone.frozen in (None, *names[: k + 1]):
            x = images if backbone.frozen is None else backbone.frozen_part(torch.float32)(images)
            trunk, head = backbone.trained_part(), nn.Linear(backbone.feature_size, 3)
            assert (trunk is None) == (backbone.frozen == backbone.last_block)
            trained = list(trunk.parameters()) if trunk else []
            assert sum(p.numel() for p in trained) == backbone.trained_parameters()
            F.cross_entropy(head(trunk(x) if trunk else x), labels).backward()
            gradients = {block: [p.grad for p in block.parameters()] for block in (trunk.blocks if trunk else [])}
            for block, of_block in gradients.items():  # not every parameter: some last norms start with a scale of 0
                assert all(g is not None and g.isfinite().all() for g in of_block)
                assert any(g.any() for g in of_block) or not of_block, (backbone.last_block, backbone.frozen, block)
            assert len(gradients) == (
                0 if trunk is None else k - (names.index(backbone.frozen) if backbone.frozen else -1)
            )
