"""Data sets that need no files of the user, and the configs of all data sets."""

from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from tuner import InputError
from tuner.data import Data, Samples, csv_file, fashion_mnist, fmnist_small, synthetic

CONF = Path(__file__).parents[2] / "conf" / "data"


def test_the_bundled_images_are_balanced():
    data = fmnist_small.load()
    assert (len(data.train), len(data.val), len(data.test)) == (4200, 600, 1200)
    assert data.pool.images.shape == (4800, 1, 28, 28)
    for labels, per_class in (
        (data.pool.labels[data.train], 420),
        (data.pool.labels[data.val], 60),
        (data.test.labels, 120),
    ):
        assert labels.bincount().tolist() == [per_class] * 10
    assert data.classes == fashion_mnist.CLASSES
    assert data.test_duplicates == 0
    assert len({image.tobytes() for image in torch.cat([data.pool.images, data.test.images]).numpy()}) == 6000
    assert data.pool.images.max() == 255


def test_the_script_draws_a_balanced_part_and_is_reproducible(tmp_path, monkeypatch):
    labels = torch.arange(60) % 10
    whole = Samples(torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2), labels)
    monkeypatch.setattr(fashion_mnist, "read", lambda folder, part: whole)
    monkeypatch.setattr(fmnist_small, "PER_CLASS", 4)
    for name in ("a.csv.xz", "b.csv.xz"):
        fmnist_small.write(tmp_path, tmp_path / name)
    assert (tmp_path / "a.csv.xz").read_bytes() == (tmp_path / "b.csv.xz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv.xz", "b.csv.xz"]
    data = csv_file.load(tmp_path / "a.csv.xz")
    assert (data.pool.labels.bincount() + data.test.labels.bincount()).tolist() == [4] * 10
    for part in (data.pool, data.test):
        assert torch.equal(part.images[:, 0, 0, 0] % 10, part.labels)


def test_synthetic_images_are_separable_but_noisy():
    data = synthetic.load(n=1000, channels=3, size=12)
    images, labels = data.pool.images[data.train].flatten(1).float(), data.pool.labels[data.train]
    means = torch.stack([images[labels == label].mean(0) for label in range(4)])
    nearest = torch.cdist(data.test.images.flatten(1).float(), means).argmin(1)
    assert data.pool.images.shape == (800, 3, 12, 12)
    assert 0.8 < (nearest == data.test.labels).double().mean() <= 1
    assert data.pool.images.double().std() > 60


def test_synthetic_images_do_not_depend_on_the_seed():
    first, same, other = (synthetic.load(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.pool.images, other.pool.images)
    assert torch.equal(first.test.images, other.test.images)
    assert torch.equal(first.val, same.val)
    assert not torch.equal(first.val, other.val)


@pytest.mark.parametrize("name", ["n", "classes", "size"])
def test_synthetic_refuses_zero(name):
    with pytest.raises(InputError, match=f"^data.{name}=0 must be a whole number of at least 1$"):
        synthetic.load(**{name: 0})


@pytest.mark.parametrize("channels", [0, 2, 4, True, 1.0])
def test_synthetic_images_are_gray_or_rgb(channels):
    with pytest.raises(InputError, match=rf"^data\.channels={channels} must be 1 \(gray\) or 3 \(RGB\)$"):
        synthetic.load(channels=channels)


@pytest.mark.parametrize(
    ("name", "changes", "sizes"),
    [
        ("fmnist_small", {}, (4200, 600, 1200)),
        ("synthetic", {"n": 100}, (64, 16, 20)),
        ("csv", {"path": str(fmnist_small.PATH)}, (4200, 600, 1200)),
        ("csv", {"path": str(fmnist_small.PATH), "classes": list(fashion_mnist.CLASSES)}, (4200, 600, 1200)),
    ],
)
def test_configs(name, changes, sizes):
    interpolated = {"seed": 3, "model": {"image_size": 64}, "cache_dir": "cache", "cache_limit": None}
    config = OmegaConf.create(interpolated | {"data": OmegaConf.load(CONF / f"{name}.yaml")})
    config.data.update(changes)
    data = hydra.utils.instantiate(config.data, _execution_whitelist_=["tuner.*"])
    assert isinstance(data, Data)
    assert (len(data.train), len(data.val), len(data.test)) == sizes
    assert config.data.seed == 3


def test_the_configured_share_of_fashion_mnist_is_500_of_the_6000_of_a_class():
    assert round(6000 * OmegaConf.load(CONF / "fashion_mnist.yaml").val_share) == 500
