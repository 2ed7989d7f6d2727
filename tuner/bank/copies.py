"""Copies of images: exact ones by their digests; near ones, resized, cropped, compressed or mirrored, by alignment.

Candidates are the nearest neighbours by features and by small thumbnails, as they are and mirrored. A pair is aligned:
one thumbnail is scaled, stretched and moved by at most 15% until it fits the other (Gauss-Newton; Lucas and Kanade,
IJCAI 1981). What is left, 1 - r of their correlation where they overlap, is the residual of the pair.

The thresholds were measured with benchmarks/audit.py. Between an image of Fashion-MNIST and the most similar other one
the residual is 0.02 (median); between an image and a resized, cropped or compressed copy it is 0.002. Images of some
classes are all alike, so a residual must also be small against those of the image's other candidates. What stands
before a black background has a large correlation with everything of the same outline, so the local contrast must agree,
too: it gives a seam or a print the same weight as the outline.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tuner.bank.neighbours import nearest, unit

BY_FEATURES, BY_THUMBNAILS = 8, 3  # candidates of an image; as many again by mirrored thumbnails
CERTAIN = 0.001  # a residual below is a copy's
POSSIBLE = 0.01  # ... and below this one if it is also less than
SHARE = 0.25  # of the median of the residuals of an image's candidates
TEXTURE = 0.02  # largest residual of the local contrast of a copy
SCREEN = 0.02  # a pair whose residual at the small size is larger is not a copy
SMALL, LARGE = 16, 32  # sides of the thumbnails in pixels
PAIRS = 256  # at a time: their arrays stay in the processor's cache
LARGEST = 0.15  # change of scale, and shift as a share of half an image


@dataclass(frozen=True)
class Copies:
    """Pairs of images that are copies of each other.

    pairs: int64 [P, 2], row numbers, the lower first.   residual: float32 [P], 0 for exact copies.
    mirrored: bool [P].
    """

    pairs: torch.Tensor
    residual: torch.Tensor
    mirrored: torch.Tensor

    def groups(self, count: int) -> torch.Tensor:
        """The group of each of `count` images, int64: the lowest row number that a chain of copies leads to."""
        parent = list(range(count))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        for a, b in self.pairs.tolist():
            first, second = sorted((root(a), root(b)))
            parent[second] = first
        return torch.tensor([root(i) for i in range(count)], dtype=torch.int64)


def copies(
    images: list[torch.Tensor], digests: torch.Tensor, vectors: torch.Tensor, queries: torch.Tensor | None = None
) -> Copies:
    """All pairs of copies among the images of several splits, which are numbered one after another.

    images: uint8 [N, C, H, W] each.   digests: int64 [N] of all.   vectors: neighbours.projected() of their features.
    queries: rows of the images whose copies are searched; None: all.
    """
    first, exact = exact_copies(digests)
    rows = first if queries is None else first[torch.isin(first, queries)]
    if len(first) < 2 or not len(rows):
        return exact
    thumbnails = torch.cat([_thumbnails(chunk) for part in images for chunk in part.split(PAIRS)])
    small = torch.cat([F.avg_pool2d(_blurred(t.float()), 2) for t in thumbnails.mean(1, keepdim=True).split(PAIRS)])
    near = _near(thumbnails, small, vectors, first, rows)
    return Copies(
        torch.cat([exact.pairs, near.pairs]),
        torch.cat([exact.residual, near.residual]),
        torch.cat([exact.mirrored, near.mirrored]),
    )


def exact_copies(digests: torch.Tensor) -> tuple[torch.Tensor, Copies]:
    """The first row of each digest, ascending, and a pair for each further row: the first one and this."""
    _, inverse = digests.unique(return_inverse=True)
    first = torch.full((len(digests),), len(digests)).scatter_reduce(0, inverse, torch.arange(len(digests)), "amin")
    first_of = first[inverse]
    rows = torch.arange(len(digests))
    again = rows[first_of != rows]
    pairs = torch.stack([first_of[again], again], 1)
    return rows[first_of == rows], Copies(pairs, torch.zeros(len(again)), torch.zeros(len(again), dtype=torch.bool))


def _thumbnails(images: torch.Tensor) -> torch.Tensor:
    """float16 [N, C, LARGE, LARGE], in 0..1"""
    resized = F.interpolate(images.float() / 255, (LARGE, LARGE), mode="bilinear", antialias=True)
    return resized.half()


def _near(
    thumbnails: torch.Tensor, small: torch.Tensor, vectors: torch.Tensor, first: torch.Tensor, rows: torch.Tensor
) -> Copies:
    """Near copies among the images `first`, of which `rows` are searched for."""
    flat, mirrored = (unit(t.flatten(1) - t.flatten(1).mean(1, keepdim=True)) for t in (small, small.flip(-1)))
    place = torch.searchsorted(first, rows)
    searches = [
        (unit(vectors[first]), None, BY_FEATURES, False),
        (flat[first], None, BY_THUMBNAILS, False),
        (flat[first], mirrored[first], BY_THUMBNAILS, True),
    ]
    found = []
    for own, others, k, mirror in searches:
        neighbours = first[nearest(own, place, k, others)[0]]
        a = rows[:, None].expand_as(neighbours)
        pair = torch.stack([torch.minimum(a, neighbours), torch.maximum(a, neighbours)], -1).flatten(0, 1)
        found.append(torch.cat([pair, torch.full((len(pair), 1), int(mirror))], 1))
    pairs = torch.cat(found).unique(dim=0)
    parts = [_residuals(chunk, thumbnails, small) for chunk in pairs.split(PAIRS)]
    residual, texture = (torch.cat(values) for values in zip(*parts, strict=True))
    usual = torch.full((len(thumbnails),), torch.inf)  # of an image whose candidates were not searched
    usual[rows] = _medians(pairs[:, :2], residual, len(thumbnails))[rows]
    usual = torch.minimum(usual[pairs[:, 0]], usual[pairs[:, 1]])
    keep = (residual < CERTAIN) | ((residual < POSSIBLE) & (residual < SHARE * usual))
    keep &= texture < TEXTURE
    pairs, residual = pairs[keep], residual[keep]
    return Copies(pairs[:, :2], residual, pairs[:, 2].bool())


def _medians(pairs: torch.Tensor, residual: torch.Tensor, count: int) -> torch.Tensor:
    """The median residual of the pairs of each image, float32 [count]."""
    image, value = pairs.flatten(), residual.repeat_interleave(2)
    order = value.argsort()
    order = order[image[order].argsort(stable=True)]
    counts = torch.bincount(image, minlength=count)
    middle = (counts.cumsum(0) - counts + counts // 2).clamp(max=len(order) - 1)
    return value[order[middle]]


def _residuals(pairs: torch.Tensor, thumbnails: torch.Tensor, small: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual of each pair, and that of the local contrast, float32 [P] each.

    Pairs that differ at the small size are not aligned at the large one: they keep the residual of the small one.
    """
    a, b, mirror = pairs.T
    warp, residual = _aligned(_oriented(small[a], mirror), small[b], torch.zeros(len(pairs), 4))
    texture = torch.ones(len(pairs))
    close = (residual < SCREEN).nonzero().flatten()
    if len(close):
        images_a = _blurred(_oriented(thumbnails[a[close]].float(), mirror[close]), 0.7)
        images_b = _blurred(thumbnails[b[close]].float(), 0.7)
        warp, residual[close] = _aligned(images_a, images_b, warp[close], steps=2)
        likely = residual[close] < POSSIBLE
        warped, inside = _warped(images_a[likely], warp[likely])
        contrasts = _local_contrast(warped), _local_contrast(images_b[likely])
        texture[close[likely]] = 1 - _correlation(*contrasts, inside)
    return residual, texture


def _oriented(images: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    """Images [P, C, S, S], those mirrored for which `mirror` is 1."""
    return torch.where(mirror.bool()[:, None, None, None], images.flip(-1), images)


def _local_contrast(images: torch.Tensor) -> torch.Tensor:
    """Images [P, C, S, S] less their local means, divided by their local standard deviations."""
    high = images - _blurred(images, 2.5)
    deviation = _blurred(high * high, 2.5).clamp(min=0).sqrt()
    return high / (deviation + 0.1)  # noise in flat parts stays small


def _warped(images: torch.Tensor, warp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [P, C, S, S] seen through a warp, and which of their pixels lie inside the original: 0 or 1 [P, S * S]."""
    x, y = _axes(images.shape[-1])
    wide, high, right, down = (column[:, None, None] for column in warp.T)
    grid = torch.stack([x * (1 + wide) + right, y * (1 + high) + down], -1)  # [P, S, S, 2]
    warped = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return warped, (grid.abs() <= 1).all(-1).flatten(1).float()


def _axes(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of each pixel, [S, S] in -1..1."""
    axis = torch.arange(1, 2 * side, 2) / side - 1
    return axis.expand(side, side), axis[:, None].expand(side, side)


def _aligned(a: torch.Tensor, b: torch.Tensor, warp: torch.Tensor, steps: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Warp images a, float [P, C, S, S], to fit b: (warps [P, 4], the smallest residual of `steps` + 1 warps [P]).

    warp: change of width and height, shift to the right and down, in half sides; where the fit starts.
    """
    side, gray_b = a.shape[-1], b.mean(1).flatten(1)
    x, y = _axes(side)
    best, best_warp = torch.full((len(a),), 2.0), warp
    for step in range(steps + 1):
        warped, inside = _warped(a, warp)
        residual = 1 - _correlation(warped, b, inside)
        better = residual < best
        best, best_warp = torch.where(better, residual, best), torch.where(better[:, None], warp, best_warp)
        if step == steps:
            break
        gray = warped.mean(1)
        down_slope, right_slope = (slope * side / 2 for slope in torch.gradient(gray, dim=(1, 2)))
        columns = [gray, torch.ones_like(gray), right_slope * x, down_slope * y, right_slope, down_slope]
        design = torch.stack(columns, 1).flatten(2)  # [P, 6, S * S]
        weighted = design * inside[:, None]
        normal = weighted @ design.transpose(1, 2)
        normal += torch.diag_embed(1e-4 * normal.diagonal(dim1=1, dim2=2) + 1e-4)
        solution = torch.linalg.solve(normal, weighted @ gray_b[..., None])[..., 0]
        warp = (warp + solution[:, 2:] / solution[:, :1].clamp(min=0.3)).clamp(-LARGEST, LARGEST)
    return best_warp, best.clamp(min=0)


def _correlation(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of images [P, C, S, S] over the pixels with weight 1, all channels together: [P]. 0 for images of one colour."""
    a, b = a.flatten(1), b.flatten(1)
    weight = weight.repeat(1, a.shape[1] // weight.shape[1])
    total = weight.sum(1, keepdim=True).clamp(min=1)
    a, b = ((t - (weight * t).sum(1, keepdim=True) / total) * weight for t in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-3)


def _blurred(images: torch.Tensor, sigma: float = 1.5) -> torch.Tensor:
    """Images [N, C, S, S] blurred with a Gaussian, edges repeated: alignment needs smooth slopes."""
    matrix = _blur_matrix(images.shape[-1], sigma)
    return matrix @ images @ matrix.T  # many times as fast as a convolution of so small images


@functools.cache
def _blur_matrix(side: int, sigma: float) -> torch.Tensor:
    """The blur of `side` pixels in a line, as a matrix."""
    radius = round(3 * sigma)
    offsets = torch.arange(-radius, radius + 1)
    weight = torch.exp(-(offsets.float() ** 2) / (2 * sigma**2))
    columns = (torch.arange(side)[:, None] + offsets).clamp(0, side - 1)
    return torch.zeros(side, side).scatter_add(1, columns, (weight / weight.sum()).expand(side, -1))
