"""A network cut in two gives the same output as the whole network, at every cut. Other networks are refused."""

import re
from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torchvision.models import list_models
from torchvision.models.vgg import VGG16_Weights, cfgs, make_layers
from torchvision.transforms.v2 import functional as reference

from tuner import InputError
from tuner.networks.backbone import Backbone
from tuner.networks.blocks import Pool, Preprocess
from tuner.networks.fusion import ConvReLU, fuse_relus
from tuner.networks.weights import BUNDLED

VGG_ENDS = {"block1": 5, "block2": 10, "block3": 17, "block4": 24, "block5": 31}  # of net.features
ALL = list_models(module=torchvision.models)


def vgg16(**options):
    """The real network with the bundled weights, on small images."""
    defaults = {"weights": "bundled", "image_size": 32, "last_block": "block2", "frozen": "block2", "pool": None}
    return Backbone("vgg16", **defaults | options)


def last(name, image_size, **options):
    """A network of torchvision, cut at its last block; random weights."""
    probe = {"weights": None, "image_size": image_size, "last_block": "", "frozen": None, "pool": None}
    with pytest.raises(InputError, match="is not a block of") as error:
        Backbone(name, **probe)
    end = re.search("known: ([^;]*)", str(error.value))[1].split(", ")[-1]
    return Backbone(name, **probe | {"last_block": end, "frozen": end} | options)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (4, 3, 40, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain():
    """torchvision's own VGG16 layers with the bundled weights."""
    layers = make_layers(cfgs["D"], batch_norm=False)
    layers.load_state_dict({k.removeprefix("features."): v.float() for k, v in load_file(BUNDLED).items()})
    return layers.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "image_size", "blocks"),
    [
        (
            "vgg16",
            64,
            {
                "block1": (64, 32, 32),
                "block2": (128, 16, 16),
                "block3": (256, 8, 8),
                "block4": (512, 4, 4),
                "block5": (512, 2, 2),
            },
        ),
        (
            "vgg16_bn",
            64,
            {
                "block1": (64, 32, 32),
                "block2": (128, 16, 16),
                "block3": (256, 8, 8),
                "block4": (512, 4, 4),
                "block5": (512, 2, 2),
            },
        ),
        ("vgg16", 28, {"block1": (64, 14, 14), "block2": (128, 7, 7), "block3": (256, 3, 3), "block4": (512, 1, 1)}),
        ("alexnet", 64, {"block1": (64, 7, 7), "block2": (192, 3, 3), "block3": (256, 1, 1)}),
        (
            "resnet18",
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
            "efficientnet_b0",
            64,
            {
                "features.0": (32, 32, 32),
                "features.1": (16, 32, 32),
                "features.2": (24, 16, 16),
                "features.3": (40, 8, 8),
                "features.4": (80, 4, 4),
                "features.5": (112, 4, 4),
                "features.6": (192, 2, 2),
                "features.7": (320, 2, 2),
                "features.8": (1280, 2, 2),
            },
        ),
        (
            "densenet121",
            64,
            {
                "features.pool0": (64, 16, 16),
                "features.denseblock1": (256, 16, 16),
                "features.transition1": (128, 8, 8),
                "features.denseblock2": (512, 8, 8),
                "features.transition2": (256, 4, 4),
                "features.denseblock3": (1024, 4, 4),
                "features.transition3": (512, 2, 2),
                "features.denseblock4": (1024, 2, 2),
            },
        ),
        (
            "swin_t",  # height, width, channels until its very end
            64,
            {
                "features.0": (16, 16, 96),
                "features.1": (16, 16, 96),
                "features.2": (8, 8, 192),
                "features.3": (8, 8, 192),
                "features.4": (4, 4, 384),
                "features.5": (4, 4, 384),
                "features.6": (2, 2, 768),
                "features.7": (768, 2, 2),
            },
        ),
        ("vit_b_32", 224, {"encoder": (768,)}),
        (
            "regnet_x_400mf",
            64,
            {
                "stem": (32, 32, 32),
                "trunk_output.block1": (32, 16, 16),
                "trunk_output.block2": (64, 8, 8),
                "trunk_output.block3": (160, 4, 4),
                "trunk_output.block4": (400, 2, 2),
            },
        ),
        (
            "googlenet",
            64,
            {
                "conv1": (64, 32, 32),
                "maxpool1": (64, 16, 16),
                "conv2": (64, 16, 16),
                "conv3": (192, 16, 16),
                "maxpool2": (192, 8, 8),
                "inception3a": (256, 8, 8),
                "inception3b": (480, 8, 8),
                "maxpool3": (480, 4, 4),
                "inception4a": (512, 4, 4),
                "inception4b": (512, 4, 4),
                "inception4c": (512, 4, 4),
                "inception4d": (528, 4, 4),
                "inception4e": (832, 4, 4),
                "maxpool4": (832, 2, 2),
                "inception5a": (832, 2, 2),
                "inception5b": (1024, 2, 2),
            },
        ),
    ],
)
def test_blocks(name, image_size, blocks):
    backbone = last(name, image_size)
    assert {name: block.shape for name, block in backbone.blocks.items()} == blocks
    assert list(backbone.blocks) == list(blocks)


@pytest.mark.parametrize(
    ("name", "block", "pool", "size"),
    [
        ("vgg16", "block3", None, 256 * 8 * 8),
        ("vgg16", "block3", 4, 256 * 4 * 4),
        ("vgg16", "block3", 8, 256 * 8 * 8),
        ("vgg16", "block3", 1, 256),
        ("swin_t", "features.5", None, 384 * 4 * 4),
        ("swin_t", "features.5", 2, 384 * 2 * 2),
        ("swin_t", "features.7", 1, 768),
    ],
)
def test_feature_size(name, block, pool, size):
    backbone = last(name, 64, last_block=block, frozen=block, pool=pool)
    assert backbone.feature_size == size
    assert backbone.cached_shape == (size,)


@pytest.mark.parametrize(("name", "fused"), [("vgg16", 13), ("alexnet", 5), ("resnet18", 0)])
def test_a_convolution_and_its_relu_become_one_operation(name, fused, images, monkeypatch):
    def operation(x, weight, bias, *size):  # of cuDNN
        return F.conv2d(x, weight, bias, *size).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", operation)
    network = last(name, 64).frozen_part(torch.float32)
    before = network(images)
    assert fuse_relus(network) == fused
    assert sum(isinstance(module, ConvReLU) for module in network.modules()) == fused
    assert torch.equal(network(images), before)


@pytest.mark.parametrize("channels_last", [False, True])
def test_pooling_averages_over_positions_and_keeps_channels_apart(channels_last):
    maps = torch.rand(2, 3, 4, 4)
    x = maps.permute(0, 2, 3, 1) if channels_last else maps
    assert torch.equal(Pool(None, channels_last)(x), maps.flatten(1))
    torch.testing.assert_close(Pool(1, channels_last)(x), maps.mean((2, 3)))
    torch.testing.assert_close(Pool(2, channels_last)(x), maps.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)).flatten(1))


@pytest.mark.parametrize("block", VGG_ENDS)
def test_features_equal_plain_torchvision(images, plain, block):
    backbone = vgg16(last_block=block, frozen=block)
    preset = VGG16_Weights.IMAGENET1K_FEATURES.transforms()
    x = reference.resize(images.float() / 255, [32, 32], antialias=True)
    x = reference.normalize(x, list(preset.mean), list(preset.std))
    expected = plain[: VGG_ENDS[block]](x).flatten(1)
    features = backbone.frozen_part(torch.float32)(images)
    assert features.shape == (4, backbone.feature_size)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-2)  # pixels minus the mean are up to 150
    assert expected.std() > 1


@pytest.mark.parametrize(("frozen", "features"), [*combinations(VGG_ENDS, 2), *((None, b) for b in VGG_ENDS)])
def test_frozen_part_then_trained_part_equals_the_whole(images, frozen, features):
    whole = vgg16(last_block=features, frozen=features, pool=1).frozen_part(torch.float32)(images)
    cut = vgg16(last_block=features, frozen=frozen, pool=1)
    x = images if frozen is None else cut.frozen_part(torch.float32)(images)
    if frozen is not None:
        assert x.shape[1:] == cut.cached_shape == cut.blocks[frozen].shape
    torch.testing.assert_close(cut.trained_part()(x).detach(), whole, rtol=1e-4, atol=1e-2)


def test_nothing_to_train_below_the_head():
    assert vgg16().trained_part() is None


@pytest.mark.parametrize("name", ["vgg16", "efficientnet_lite0", "resnet18", "densenet121", "swin_t", "vit_b_16"])
def test_features_of_several_blocks_are_normalised_and_joined(images, name):
    size = 224 if name == "vit_b_16" else 64
    names = list(last(name, size, pool=1).blocks)
    used = [names[-1], names[len(names) // 2]] if len(names) > 1 else names

    def backbone(blocks):
        return Backbone(name, weights=None, image_size=size, last_block=blocks, frozen=blocks, pool=1)

    joined = backbone(used)
    parts = [backbone(block).frozen_part(torch.float32)(images) for block in names if block in used]
    expected = parts if len(parts) == 1 else [F.layer_norm(part, part.shape[1:]) for part in parts]
    features = joined.frozen_part(torch.float32)(images)
    assert features.shape[1] == joined.feature_size == sum(part.shape[1] for part in parts)
    assert features.allclose(torch.cat(expected, 1), atol=1e-5)
    assert joined.last_block == joined.frozen == names[-1]
    assert joined.trained_part() is None


def test_a_bank_of_several_blocks_is_another_one():
    one, list_of_one, both = (
        vgg16(last_block=b, frozen=b, pool=1) for b in ("block2", ["block2"], ["block1", "block2"])
    )
    assert one.key == list_of_one.key
    assert both.key == one.key | {"block": "block1+block2"}
    assert vgg16(last_block=["block2", "block1"], frozen=["block2", "block1"], pool=1).key == both.key


@pytest.mark.parametrize("size", [16, 28, 31, 40, 64])
@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 28, 28), (3, 50, 20)])
def test_preprocessing_equals_torchvision(shape, size):
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    preset = VGG16_Weights.IMAGENET1K_FEATURES.transforms()
    x = reference.resize(images.float() / 255, [size, size], antialias=True).expand(-1, 3, -1, -1)
    expected = reference.normalize(x, list(preset.mean), list(preset.std))
    backbone = vgg16(image_size=size, last_block="block1", frozen="block1")
    got = Preprocess(size, backbone.mean, backbone.std, torch.float32)(images)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_a_gray_image_counts_as_three_equal_channels(images):
    network, gray = vgg16().frozen_part(torch.float32), images[:, :1]
    torch.testing.assert_close(network(gray), network(gray.expand(-1, 3, -1, -1)))


def test_given_mean_and_std_replace_those_of_the_weights():
    given = vgg16(mean=[0, 0.5, 1], std=[1, 2, 3])
    assert (given.mean, given.std) == ((0, 0.5, 1), (1, 2, 3))
    bundled = vgg16()
    assert bundled.mean == pytest.approx((0.48235, 0.45882, 0.40784), abs=1e-5)
    assert bundled.std == pytest.approx((1 / 255,) * 3)


def test_only_the_trained_part_has_gradients(images):
    backbone = vgg16(frozen="block1")
    frozen, trained = backbone.frozen_part(torch.float32), backbone.trained_part()
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    maps = frozen(images)
    assert not maps.requires_grad
    trained(maps).sum().backward()
    gradients = [p.grad for p in trained.parameters()]
    assert len(gradients) == 4  # two convolutions
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_parts_share_nothing(images):
    """Making another part, of another precision or to be trained, changes none that was made before."""
    backbone = vgg16(frozen="block1")
    frozen, trained = backbone.frozen_part(torch.float32), backbone.trained_part()
    maps = frozen(images)
    features = trained(maps).detach()
    backbone.frozen_part(torch.bfloat16)
    with torch.no_grad():
        for parameter in backbone.trained_part().parameters():
            parameter.zero_()
    assert torch.equal(frozen(images), maps)
    assert torch.equal(trained(maps), features)


def test_bfloat16_is_close_to_float32(images):
    backbone = vgg16(last_block="block3", frozen="block3")
    exact, rounded = (backbone.frozen_part(dtype)(images) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).norm() / exact.norm()
    assert 0 < error < 0.02


def test_no_weights_are_read_before_a_part_is_requested(tmp_path):
    (tmp_path / "none.safetensors").write_bytes(b"not weights")
    backbone = vgg16(weights=str(tmp_path / "none.safetensors"))
    assert backbone.feature_size == 128 * 8 * 8
    with pytest.raises(InputError, match="cannot be read"):
        backbone.frozen_part(torch.float32)


BLOCKS = "block1, block2, block3, block4, block5"
WHOLE = "must be a whole number of at least 1, or null for the whole map"
PIXELS = "must be a whole number of pixels, at least 1 and at most 4,096"
COLORS = "red, green and blue, of pixels in 0..1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last_block": "layer3"}, f"model.last_block=layer3 is not a block of vgg16; known: {BLOCKS}"),
        ({"frozen": "block6"}, f"model.frozen=block6 is not a block of vgg16; known: {BLOCKS}"),
        ({"last_block": None}, f"model.last_block=None is not a block of vgg16; known: {BLOCKS}"),
        ({"last_block": ["block1", 2]}, f"model.last_block=2 is not a block of vgg16; known: {BLOCKS}"),
        ({"last_block": []}, "model.last_block=[] must be a block, or a list of different blocks"),
        (
            {"last_block": ["block1", "block1"]},
            "model.last_block=['block1', 'block1'] must be a block, or a list of different blocks",
        ),
        *(
            (
                {"last_block": ["block1", "block2"], "frozen": frozen},
                f"model.frozen={frozen} must be null or one block, at most model.last_block; where that is a list, no "
                "block is trained: leave model.frozen at its default",
            )
            for frozen in (None, "block1", ["block1"])
        ),
        (
            {"frozen": ["block1", "block2"]},
            "model.frozen=['block1', 'block2'] must be null or one block, at most model.last_block; where that is a "
            "list, no block is trained: leave model.frozen at its default",
        ),
        (
            {"last_block": ["block1", "block5"], "frozen": ["block1", "block5"], "image_size": 64, "pool": 3},
            "model.pool=3 does not fit block5's map of 2 x 2 at model.image_size=64; use 1 to 2, null for the whole "
            "map, or larger images",
        ),
        (
            {"frozen": "block3"},
            "model.frozen=block3 comes after model.last_block=block2, the last block that is used; the order is "
            f"{BLOCKS}",
        ),
        (
            {"pool": 9},
            "model.pool=9 does not fit block2's map of 8 x 8 at model.image_size=32; use 1 to 8, null for the whole "
            "map, or larger images",
        ),
        *(({"pool": pool}, f"model.pool={pool} {WHOLE}") for pool in (0, -1, 1.5, "2", True)),
        *(({"image_size": size}, f"model.image_size={size} {PIXELS}") for size in (0, -32, 32.0, "abc", None, True)),
        (
            {"image_size": 16, "last_block": "block5"},
            "model.last_block=block5 is not a block of vgg16 at model.image_size=16; known: block1, block2, block3, "
            "block4; later ones fail (Given input size: (512x1x1). Calculated output size: (512x0x0). Output size is "
            "too small): use the size that the network is made for, 224 for most",
        ),
        (
            {"image_size": 1},
            "model.last_block=block2 is not a block of vgg16 at model.image_size=1; known: none; later ones fail "
            "(Given input size: (64x1x1). Calculated output size: (64x0x0). Output size is too small): use the size "
            "that the network is made for, 224 for most",
        ),
        *(
            ({"mean": mean}, f"model.mean={mean} must be three numbers: {COLORS}")
            for mean in ([0.5], 0.5, [], ["a", "b", "c"], "abc", [0, 0, float("nan")], [0, 0, 0, 0])
        ),
        *(
            ({"std": std}, f"model.std={std} must be three numbers above 0: {COLORS}")
            for std in ([1, 1, 0], [-1, 1, 1], [1, 1], [1, 1, float("inf")])
        ),
    ],
)
def test_error_messages(options, message):
    with pytest.raises(InputError) as error:
        vgg16(**options)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["vgg", "maskrcnn_resnet50_fpn", 16, None])
def test_an_unknown_network_name_lists_the_known_names(name):
    with pytest.raises(InputError) as error:
        Backbone(name, weights=None, image_size=64, last_block="block1", frozen=None, pool=None)
    rule = "is not a classification network of torchvision (those of timm are called timm/NAME)"
    assert str(error.value) == f"model.name={name} {rule}; known: {', '.join(sorted([*ALL, 'efficientnet_lite0']))}"


@pytest.mark.parametrize(
    ("name", "image_size", "reason"),
    [("vit_b_32", 64, "Wrong image height! Expected 224"), ("maxvit_t", 64, "shape '.*' is invalid")],
)
def test_a_network_that_takes_only_one_image_size(name, image_size, reason):
    message = f"at model.image_size={image_size}; known: .*; later ones fail \\({reason}.*\\): use the size"
    with pytest.raises(InputError, match=message):
        Backbone(name, weights=None, image_size=image_size, last_block="encoder", frozen=None, pool=None)


ONLY_SIZE = {"inception_v3": 128, **dict.fromkeys(("maxvit_t", *(n for n in ALL if n.startswith("vit"))), 224)}
LARGER = ("alexnet", "convnext_tiny", "inception_v3", "maxvit_t", "swin_t", "swin_v2_t", "vit_b_32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_network_of_torchvision(name):
    """All have blocks. Those with up to 12 million parameters, and one of each other family, also run."""
    backbone = last(name, ONLY_SIZE.get(name, 64))
    assert all(len(block.shape) in (1, 3) and min(block.shape) > 0 for block in backbone.blocks.values())
    if sum(p.numel() for p in backbone._net.parameters()) > 12e6 and name not in LARGER:
        return
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state = backbone.weights.load()  # drawn once
    backbone.weights = replace(backbone.weights, load=state.copy)
    whole = backbone.frozen_part(torch.float32)(images)
    assert whole.std() > 0
    for block in list(backbone.blocks)[1:-1:4]:
        backbone.frozen = block
        maps = backbone.frozen_part(torch.float32)(images)
        assert maps.shape == (2, *backbone.cached_shape)
        features = backbone.trained_part().eval()(maps).detach()
        assert features.shape == whole.shape == (2, backbone.feature_size)
        torch.testing.assert_close(features, whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item())
