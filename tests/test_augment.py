"""Augmentation: each operation, separate draws for each image, and reproducible results."""

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandAugment

from tuner import InputError
from tuner.data.augmentation import OPERATIONS, SIGNED, UNSIGNED, Augment, views

SHAPES = [(1, 1, 28, 28), (5, 3, 28, 28), (7, 1, 33, 20), (130, 3, 8, 9), (3, 3, 3, 1)]
KINDS = [
    {"flip": 1.0},
    {"crop": 0.125},
    {"crop": 0.5},
    {"randaugment": 3, "magnitude": 30},
    {"erase": 1.0},
    {"flip": 0.5, "crop": 0.25, "randaugment": 1, "erase": 0.5},
]


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def noise(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_shape_and_type_stay_and_the_input_is_not_modified(kind, shape):
    x = noise(*shape)
    before = x.clone()
    out = Augment(**kind).images(x)
    assert out.shape == x.shape
    assert out.dtype == torch.uint8
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_memory_format_does_not_matter(kind):
    x = noise(6, 20, 16, 3).permute(0, 3, 1, 2)
    state = torch.get_rng_state()
    out = Augment(**kind).images(x)
    torch.set_rng_state(state)
    assert torch.equal(out, Augment(**kind).images(x.contiguous()))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_image_leaks_into_another(kind):
    """With the same draws, a change of one image changes only its own result."""
    x = noise(16, 3, 12, 12)
    state = torch.get_rng_state()
    out = Augment(**kind).images(x)
    x[5] = 255 - x[5]
    torch.set_rng_state(state)
    again = Augment(**kind).images(x)
    same = (out == again).flatten(1).all(1)
    assert same[torch.arange(16) != 5].all()


def test_the_default_changes_nothing_and_draws_nothing():
    none, x, targets = Augment(), noise(4, 3, 8, 8), torch.arange(4)
    state = torch.get_rng_state()
    assert none.images(x) is x
    assert none.mix(x, targets) == (x, targets, 1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not none.changes_images
    assert not none.mixes


@pytest.mark.parametrize(
    ("kind", "changes", "mixes"),
    [
        ({"flip": 0.1}, True, False),
        ({"crop": 0.1}, True, False),
        ({"erase": 0.1}, True, False),
        ({"randaugment": 1}, True, False),
        ({"magnitude": 20}, False, False),
        ({"mixup": 0.2}, False, True),
        ({"cutmix": 1}, False, True),
        ({"flip": 1, "cutmix": 1}, True, True),
    ],
    ids=str,
)
def test_changes_images_and_mixes(kind, changes, mixes):
    assert (Augment(**kind).changes_images, Augment(**kind).mixes) == (changes, mixes)


@pytest.mark.parametrize(("p", "least", "most"), [(1.0, 1000, 1000), (0.5, 430, 570), (0.1, 60, 140)])
def test_flip_mirrors_left_and_right_with_its_probability(p, least, most):
    x = noise(1000, 1, 3, 4)
    out = Augment(flip=p).images(x)
    flipped = (out == x.flip(3)).flatten(1).all(1)
    assert (flipped | (out == x).flatten(1).all(1)).all()
    assert least <= flipped.sum() <= most


@pytest.mark.parametrize(("share", "rows", "columns"), [(0.125, 4, 2), (0.5, 16, 8), (0.01, 0, 0)])
def test_crop_moves_each_image_by_up_to_the_padding(share, rows, columns):
    """The pixels are their own coordinates, which show where each pixel comes from."""
    h, w = 32, 16
    x = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).to(torch.uint8)
    x = x.expand(600, 2, h, w)
    out = Augment(crop=share).images(torch.cat([x, x[:, :1]], 1)).long()
    for channel, axis, n, padding in ((0, 2, h, rows), (1, 1, w, columns)):
        indices = torch.arange(n) + torch.arange(-padding, padding + 1)[:, None]
        shifted = n - 1 - (n - 1 - indices.abs()).abs()  # reflected at the edge
        line = out[:, channel].select(axis, 0)  # constant along the other axis
        matches = (line[:, None] == shifted).all(2)  # [B, shifts]
        assert matches.any(1).all()
        assert matches.any(0).all()


def test_erase_fills_a_box_of_noise_with_its_probability():
    x = torch.full((2000, 3, 30, 20), 77, dtype=torch.uint8)
    out = Augment(erase=0.4).images(x)
    changed = (out != x).any(1)  # [B, H, W]
    chosen = changed.flatten(1).any(1)
    assert 0.35 < chosen.float().mean() < 0.45
    changed, out = changed[chosen], out[chosen]
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    area = rows * columns / 600
    assert area.min() > 0.01
    assert area.max() < 0.36
    assert 0.12 < area.mean() < 0.2  # a little below 0.175, because boxes longer than the image are cut off
    assert (changed.flatten(1).sum(1) / 600 / area).min() > 0.95  # the whole box: few pixels of noise are 77
    assert 120 < out[changed[:, None].expand_as(out)].float().mean() < 135
    assert len(out.flatten(1).unique(dim=0)) == len(out)


@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED])
@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_the_operations_equal_torchvisions(name, magnitude):
    x = noise(3, 3, 17, 22)
    theirs = RandAugment(interpolation=InterpolationMode.BILINEAR)
    magnitudes, signed = RandAugment._AUGMENTATION_SPACE[name]
    assert signed == (name in SIGNED)
    values = magnitudes(31, 17, 22)
    for sign in (1, -1) if signed else (1,):
        value = 0.0 if values is None else sign * float(values[magnitude])
        options = {"interpolation": InterpolationMode.BILINEAR, "fill": theirs._fill}
        expected = theirs._apply_image_or_video_transform(x, name, value, **options)
        out = {**SIGNED, **UNSIGNED}[name](x, sign * magnitude / 30)
        assert (out.int() - expected.int()).abs().max() <= 1  # the last bit of a factor can change the rounding
    assert RandAugment._AUGMENTATION_SPACE.keys() == {*SIGNED, *UNSIGNED}


def test_randaugment_draws_for_each_image():
    x = noise(1, 3, 24, 24).expand(400, 3, 24, 24)
    out = Augment(randaugment=1, magnitude=15).images(x)
    # All operations are drawn, and their results differ.
    assert len(out.flatten(1).unique(dim=0)) >= len(OPERATIONS) + len(SIGNED) - 1
    assert (
        5 <= (out == x).flatten(1).all(1).sum() <= 80
    )  # Identity, and AutoContrast, because the image has full contrast


def test_randaugment_treats_a_gray_image_as_three_equal_channels():
    x = noise(64, 1, 16, 16)
    augment = Augment(randaugment=2)
    state = torch.get_rng_state()
    gray = augment.images(x)
    torch.set_rng_state(state)
    three = augment.images(x.expand(64, 3, 16, 16))
    assert (three[:, :1] == three).all(1).float().mean() > 0.99
    close = (gray.int() - three[:, :1].int()).abs() <= 2
    assert close.flatten(1).float().mean(1).median() == 1
    assert close.float().mean() > 0.99


def test_mixup_is_convex():
    x, targets = torch.rand(50, 3, 6, 6), torch.arange(50)
    lams = []
    for _ in range(20):
        mixed, others, lam = Augment(mixup=1.0).mix(x, targets)
        torch.testing.assert_close(mixed, lam * x + (1 - lam) * x[others])
        assert sorted(others.tolist()) == targets.tolist()
        lams.append(lam)
    assert 0 <= min(lams) < 0.3 < 0.7 < max(lams) <= 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [{"mixup": 0.4}, {"cutmix": 1.0}], ids=str)
def test_mixing_keeps_the_type(kind, dtype):
    x = noise(8, 3, 7, 5).to(dtype)
    mixed, others, lam = Augment(**kind).mix(x, torch.arange(8))
    assert (mixed.dtype, mixed.shape) == (dtype, x.shape)
    bounds = torch.minimum(x, x[others]), torch.maximum(x, x[others])
    assert (bounds[0] <= mixed).all()
    assert (mixed <= bounds[1]).all()
    if kind == {"mixup": 0.4}:
        exact = lam * x.double() + (1 - lam) * x[others].double()
        assert (mixed.double() - exact).abs().max() <= (0.501 if dtype == torch.uint8 else 0.6)


def test_cutmix_takes_one_box_from_the_other_image_and_lam_is_the_rest():
    x = (torch.arange(6.0).view(6, 1, 1, 1) + 1).expand(6, 3, 33, 20)
    lams = []
    for _ in range(200):
        mixed, others, lam = Augment(cutmix=1.0).mix(x, torch.arange(6))
        moved = others != torch.arange(6)
        cut = (mixed != x)[moved]
        assert torch.equal(mixed[moved][cut], x[others][moved][cut])
        assert (cut == cut[:1, :1]).all()  # the same box in all channels and images
        if len(cut):
            box = cut[0, 0]
            assert box.sum() == box.any(0).sum() * box.any(1).sum()
            assert math.isclose(lam, 1 - box.sum().item() / (33 * 20))
        lams.append(lam)
    assert min(lams) < 0.2
    assert max(lams) > 0.95
    assert 0.5 < sum(lams) / len(lams) < 0.75  # above 0.5, because boxes are cut off at the border


def test_mixup_or_cutmix_is_drawn_for_each_batch():
    x = (torch.arange(16.0).view(16, 1, 1, 1) ** 2).expand(16, 1, 8, 8)
    cut = 0
    for _ in range(100):
        mixed, others, _ = Augment(mixup=1.0, cutmix=1.0).mix(x, torch.arange(16))
        cut += bool(((mixed == x) | (mixed == x[others])).all())
    assert 30 < cut < 70


def test_one_image_is_mixed_with_itself():
    x = noise(1, 3, 5, 5)
    for kind in ({"mixup": 1.0}, {"cutmix": 1.0}):
        mixed, others, _ = Augment(**kind).mix(x, torch.tensor([3]))
        assert torch.equal(mixed, x)
        assert others.tolist() == [3]


def test_the_same_generator_state_gives_the_same_result():
    x, everything = noise(40, 3, 16, 16), Augment(0.5, 0.125, 2, 9, 0.5, 0.2, 1.0)

    def run():
        mixed, others, lam = everything.mix(everything.images(x), torch.arange(40))
        return mixed, others, torch.tensor(lam)

    first = run()
    state = torch.get_rng_state()
    second = run()
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(second, run(), strict=True))
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    ("key", "values", "rule"),
    [
        ("flip", [2, -0.1, "x", None, True, math.nan], "a probability, 0 to 1"),
        ("crop", [0.6, -1], "a share of the image's side, 0 to 0.5"),
        ("erase", [1.5], "a probability, 0 to 1"),
        ("randaugment", [-1, 1.0, True], "a whole number of operations, 0 to 100"),
        ("magnitude", [31, -1, 2.5], "a whole number, 0 to 30"),
        ("mixup", [-0.2, math.inf], "a number from 0.001 to 1000, or 0, which is off"),
        ("cutmix", [-1, "1"], "a number from 0.001 to 1000, or 0, which is off"),
    ],
)
def test_a_value_out_of_range_is_refused(key, values, rule):
    for value in values:
        with pytest.raises(InputError) as error:
            Augment(**{key: value})
        assert str(error.value) == f"augment.{key}={value} must be {rule}"


STRONG = Augment(flip=0.5, crop=0.125, randaugment=1, erase=0.25)


@pytest.mark.parametrize("count", [1, 64, 150])
@pytest.mark.parametrize("n", [1, 3])
def test_views_are_adjacent_to_their_image(count, n):
    images = noise(count, 1, 10, 10)
    out = torch.cat([*views(images, STRONG, n, seed=0)])
    assert (out.shape, out.dtype) == ((count * n, 1, 10, 10), torch.uint8)
    assert torch.equal(out[::n], images)
    apart = (out.view(count, n, -1)[:, 1:] != images.view(count, 1, -1)).any(2)
    assert count < 64 or n == 1 or apart.float().mean() > 0.8


def test_views_depend_only_on_the_seed():
    images = noise(100, 3, 10, 10)
    state = torch.get_rng_state()
    first = torch.cat([*views(images, STRONG, 3, seed=0)])
    assert torch.equal(torch.get_rng_state(), state)

    torch.manual_seed(5)
    drawn = [torch.rand(3) for _ in views(images, STRONG, 3, seed=0)]
    torch.manual_seed(5)
    assert torch.equal(torch.stack(drawn), torch.rand(2, 3))

    batches = []
    for batch in views(images, STRONG, 4, seed=0):
        torch.rand(7)
        batches.append(batch)
    more = torch.cat(batches).view(100, 4, 3, 10, 10)
    assert torch.equal(more[:, :3].flatten(0, 1), first)
    other = torch.cat([*views(images, STRONG, 3, seed=1)])
    assert not torch.equal(other, first)
    assert not torch.equal(more[:, 2], more[:, 3])
