"""The bundled EfficientNet-Lite0: the network that timm has under this name, at any size."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from tuner.networks.backbone import Backbone
from tuner.networks.efficientnet_lite import EfficientNetLite0, our_name
from tuner.networks.weights import BUNDLES, resolve

FILE = BUNDLES["efficientnet_lite0"]
SHA256 = "0177421d5e6be0460636539e0fa27c2b9b87b2058bc8ae1907514757eb83cd09"
OPTIONS = {"weights": "bundled", "image_size": 64, "last_block": "features.8", "frozen": "features.8", "pool": 1}


def test_the_bundled_file_is_the_one_of_its_source():
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == SHA256


@pytest.mark.parametrize("shape", [(64, 64), (97, 128), (33, 224)])
def test_it_computes_what_timm_does(shape):
    timm = pytest.importorskip("timm")
    state = {name: value.float() for name, value in load_file(FILE).items()}
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    assert set(theirs.load_state_dict(state, strict=False).missing_keys) <= {"classifier.weight", "classifier.bias"}
    ours = EfficientNetLite0().eval()
    ours.load_state_dict({our_name(name): value for name, value in state.items()}, strict=False)
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours.features(x), theirs.forward_features(x))


def test_cuts():
    backbone = Backbone("efficientnet_lite0", **OPTIONS)
    assert list(backbone.blocks) == [f"features.{i}" for i in range(9)]
    assert backbone.feature_size == 1280
    assert (backbone.mean, backbone.std) == ((0.5,) * 3, (0.5,) * 3)
    images = torch.randint(256, (2, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = backbone.frozen_part(torch.float32)(images)
    assert features.shape == (2, 1280)
    lower = Backbone("efficientnet_lite0", **OPTIONS | {"frozen": "features.5"})
    trunk = lower.trained_part()
    assert trunk is not None
    trunk.eval()
    assert torch.allclose(trunk(lower.frozen_part(torch.float32)(images)), features, atol=1e-5)


def test_a_file_may_have_the_names_of_timm(tmp_path):
    (tmp_path / "copy.safetensors").write_bytes(FILE.read_bytes())
    bundled = resolve("efficientnet_lite0", "bundled", 0)
    copy = resolve("efficientnet_lite0", str(tmp_path / "copy.safetensors"), 0)
    assert (copy.key, copy.mean) == (bundled.key, bundled.mean)
    assert copy.load().keys() == bundled.load().keys()
