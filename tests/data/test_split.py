"""Splits are disjoint, cover the pool, and keep each class's share. The seed changes them, except the test split."""

import logging
from dataclasses import replace

import pytest
import torch

from tuner import InputError
from tuner.data import Samples, copies, from_splits, hold_out, split

CLASSES = ("cat", "dog", "owl")


def samples(*counts: int) -> Samples:
    """Different images, counts[i] of class i, in random order."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    images = (
        torch.arange(len(labels))[:, None, None, None] // torch.tensor([256, 1]) % 256
    )  # the image number in two bytes
    return Samples(images.to(torch.uint8), labels)


def counts(labels: torch.Tensor) -> list[int]:
    return torch.bincount(labels, minlength=3).tolist()


@pytest.mark.parametrize(
    ("per_class", "share", "val"),
    [
        ((100, 50, 10), 0.1, [10, 5, 1]),
        ((100, 50, 4), 0.1, [10, 5, 1]),  # at least one
        ((2, 2, 2), 0.01, [1, 1, 1]),
        ((2, 3, 10), 0.99, [1, 2, 9]),  # never all
        ((6, 6, 6), 1 / 3, [2, 2, 2]),
    ],
)
def test_each_class_keeps_its_share(per_class, share, val):
    pool = samples(*per_class)
    data = split(pool, samples(1, 1, 1), CLASSES, val_share=share, seed=0)
    assert counts(pool.labels[data.val]) == val
    assert counts(pool.labels[data.train]) == [n - v for n, v in zip(per_class, val, strict=True)]
    assert sorted(data.train.tolist() + data.val.tolist()) == list(range(len(pool)))
    assert data.train.dtype == data.val.dtype == torch.int64
    assert data.classes == CLASSES


@pytest.mark.parametrize(
    ("per_class", "share", "test"),
    [((100, 50, 10), 0.2, [20, 10, 2]), ((3, 3, 3), 0.01, [1, 1, 1]), ((3, 4, 10), 0.99, [1, 2, 8])],
)
def test_held_out_images_are_a_share_of_each_class(per_class, share, test):
    whole = samples(*per_class)
    pool, held = hold_out(whole, CLASSES, test_share=share)
    assert counts(held.labels) == test
    rows = [tuple(image.flatten().tolist()) for image in (*pool.images, *held.images)]
    assert sorted(rows) == sorted(tuple(image.flatten().tolist()) for image in whole.images)
    assert rows[: len(pool)] == sorted(rows[: len(pool)])  # the file's order


def test_the_seed_draws_validation_and_nothing_else():
    whole = samples(40, 40, 40)
    runs = [split(*hold_out(whole, CLASSES, test_share=0.2), CLASSES, val_share=0.2, seed=s) for s in (1, 1, 2)]
    assert torch.equal(runs[0].val, runs[1].val)
    assert not torch.equal(runs[0].val, runs[2].val)
    for run in runs:
        assert torch.equal(run.test.images, runs[0].test.images)
        assert torch.equal(run.pool.images, runs[0].pool.images)


def test_copies_of_test_images_are_counted_and_logged(caplog):
    pool, test = samples(10, 10, 10), samples(4, 4, 4)
    test.images[:] += 100
    pool.images[(pool.labels == 1).nonzero()[0]] = test.images[(test.labels == 1).nonzero()[0]]
    with caplog.at_level(logging.INFO):
        data = split(pool, test, CLASSES, val_share=0.2, seed=0)
        copies.report(data)
    assert data.test_duplicates == 1
    assert caplog.messages == ["1 of 12 test images have an exact copy in training or validation"]


def test_copies_of_validation_images_are_counted_and_logged(caplog):
    pool = samples(10, 10, 10)
    train, val = (pool.labels < 2).nonzero().flatten(), (pool.labels == 2).nonzero().flatten()
    pool.images[val[3]], pool.labels[val[3]] = pool.images[train[0]], pool.labels[train[0]]
    data = from_splits(pool, Samples(pool.images[:0], pool.labels[:0]), train, val, CLASSES)
    copies.report(data)
    assert (data.val_duplicates, copies.conflicts(data)) == (1, 0)
    assert caplog.messages == ["1 of 10 validation images have an exact copy in training"]


@pytest.mark.parametrize("named", [True, False])
def test_an_image_in_two_classes_is_named(caplog, named):
    pool, test = samples(10, 10, 10), samples(4, 4, 4)
    test.images[:] += 100
    cat, dog = int((pool.labels == 0).nonzero()[0]), int((test.labels == 1).nonzero()[0])
    test.images[dog] = pool.images[cat]
    first, second = f"image {cat}", f"test image {dog}"
    if named:
        first, second = f"cat/{cat}.png", f"dog/{dog}.png"
        pool = replace(pool, names=[f"cat/{i}.png" for i in range(30)])
        test = replace(test, names=[f"dog/{i}.png" for i in range(12)])
    data = split(pool, test, CLASSES, val_share=0.2, seed=0)
    copies.report(data)
    assert copies.conflicts(data) == 2
    assert caplog.messages[-1] == (
        f"2 images have an exact copy in another class; {first} (cat) and {second} (dog) are the same image: correct "
        "the labels"
    )


def test_without_copies_nothing_is_logged(caplog):
    test = samples(4, 4, 4)
    test.images.add_(100)
    with caplog.at_level(logging.INFO):
        data = split(samples(10, 10, 10), test, CLASSES, val_share=0.2, seed=0)
        copies.report(data)
    assert data.test_duplicates == 0
    assert not caplog.messages


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan"), "half", None])
def test_a_share_is_between_0_and_1(share):
    message = f"must lie above 0 and below 1, got {share!r}: 0.2 is usual"
    with pytest.raises(InputError, match=f"^data.val_share {message}$"):
        split(samples(9, 9, 9), samples(1, 1, 1), CLASSES, val_share=share, seed=0)
    with pytest.raises(InputError, match=f"^data.test_share {message}$"):
        hold_out(samples(9, 9, 9), CLASSES, test_share=share)


def test_a_class_needs_an_image_for_each_split():
    with pytest.raises(InputError) as error:
        hold_out(samples(9, 2, 9), CLASSES, test_share=0.2)
    assert str(error.value) == (
        "class 'dog' has 2 images; at least 3 are needed, one each for training, validation and test: add images or "
        "leave the class out"
    )
    with pytest.raises(InputError) as error:
        split(samples(9, 9, 1), samples(1, 1, 1), CLASSES, val_share=0.2, seed=0)
    assert str(error.value) == (
        "class 'owl' has 1 image; at least 2 are needed, one each for training and validation: add images or leave "
        "the class out"
    )


def test_one_class_is_not_enough():
    with pytest.raises(InputError, match=r"^only one class \(cat\): give images of at least two classes$"):
        split(samples(9), samples(1), ("cat",), val_share=0.2, seed=0)
