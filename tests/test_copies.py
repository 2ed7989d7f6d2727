"""Copies of images are found when they were resized, cropped, compressed or mirrored; other images are not copies."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tuner.bank.copies import copies, exact_copies
from tuner.bank.neighbours import distance_within_class, nearest, projected
from tuner.data import digests, fmnist_small


@pytest.fixture(scope="module")
def images():
    """400 images of Fashion-MNIST, uint8 [400, 1, 28, 28]."""
    return fmnist_small.load().pool.images[:400].clone()


def found(*parts, queries=None):
    """{(row, row): mirrored} of the copies among the images of some splits; the pixels stand for features."""
    joined = torch.cat(parts)
    vectors = projected([part.flatten(1).float() for part in parts], [len(part) for part in parts])
    result = copies(list(parts), digests(joined), vectors, queries)
    return dict(zip(map(tuple, result.pairs.tolist()), result.mirrored.tolist(), strict=True))


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Image.open(file)


CHANGES = {
    "resized": lambda image: image.resize((21, 21), Image.Resampling.LANCZOS).resize(
        (28, 28), Image.Resampling.BICUBIC
    ),
    "cropped": lambda image: image.resize((28, 28), Image.Resampling.BICUBIC, box=(0.5, 1, 27.1, 27.6)),
    "compressed": jpeg,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "darker": lambda image: image.point(lambda value: value * 0.8),
    "the same": lambda image: image,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found(images, change):
    changed = [np.array(CHANGES[change](Image.fromarray(image[0].numpy()))) for image in images[:40]]
    pairs = found(images, torch.from_numpy(np.stack(changed))[:, None], queries=torch.arange(400, 440))
    expected = {(i, 400 + i) for i in range(40)}
    assert len(expected & pairs.keys()) >= 36  # 90%
    assert len(pairs.keys() - expected) <= 2
    if change == "mirrored":
        assert sum(pairs[pair] for pair in expected & pairs.keys()) >= 36


def test_different_images_are_no_copies(images):
    assert len(found(images)) <= 2
    draw = torch.Generator().manual_seed(0)
    assert found(torch.randint(256, (60, 3, 20, 20), generator=draw, dtype=torch.uint8)) == {}


def test_images_in_another_colour_are_no_copies():
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(40, 3, 4, 4, generator=draw)
    images = torch.nn.functional.interpolate(coarse, (24, 24), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)
    assert found(images, images.roll(1, dims=1)) == {}
    assert len(found(images, (images * 0.9).to(torch.uint8))) == 40


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_few_images(count):
    draw = torch.Generator().manual_seed(0)
    assert found(torch.randint(256, (count, 1, 8, 8), generator=draw, dtype=torch.uint8)) == {}


def test_images_of_one_colour_are_copies_only_if_they_are_equal():
    images = torch.tensor([0, 0, 90, 255], dtype=torch.uint8)[:, None, None, None].expand(4, 1, 16, 16).contiguous()
    assert found(images) == {(0, 1): False}


def test_exact_copies_are_pairs_with_the_first():
    first, exact = exact_copies(torch.tensor([7, 5, 7, 7, 9, 5]))
    assert first.tolist() == [0, 1, 4]
    assert exact.pairs.tolist() == [[0, 2], [0, 3], [1, 5]]
    assert exact.groups(6).tolist() == [0, 1, 0, 0, 4, 1]


def test_nearest_is_that_of_an_exhaustive_search():
    vectors = torch.randn(700, 20, generator=torch.Generator().manual_seed(0))
    distance = torch.cdist(vectors, vectors).fill_diagonal_(torch.inf)
    expected = distance.topk(4, largest=False)
    rows, found_distance = nearest(vectors, torch.arange(700), 4)
    assert torch.equal(rows, expected.indices)
    torch.testing.assert_close(found_distance, expected.values, rtol=1e-3, atol=1e-3)


def test_the_distance_is_that_within_the_class():
    vectors = torch.tensor([[0.0], [1.0], [1.5], [100.0]])
    assert distance_within_class(vectors, torch.tensor([0, 0, 1, 2]), k=1).tolist() == [1, 1, 0, 0]
    assert distance_within_class(vectors, torch.zeros(4, dtype=torch.int64), k=1).tolist() == pytest.approx(
        [1, 0.5, 0.5, 98.5]
    )
