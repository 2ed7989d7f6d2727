"""Nearest neighbours of images, by their features or any other vectors. Memory is bounded; the search is exhaustive."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

DIMENSIONS = 256  # of projected features: distances change by a few percent, and the search is 16 times as fast
CHUNK = 512  # rows at a time


def projected(parts: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    """A random projection of features, float32 [N, DIMENSIONS] or fewer columns, on the CPU.

    parts: of several splits, [N * views, ...] each; the first view of an image is taken.   counts: images of each part.
    Each image's features are normalised as a head does it (layer normalisation), and the mean of the first part is
    subtracted: it would hide what tells images apart.
    """
    flat = [part[:: max(1, len(part) // max(1, n))].flatten(1) for part, n in zip(parts, counts, strict=True)]
    size = flat[0].shape[1]
    total = torch.zeros(size, dtype=torch.float64)
    for chunk in flat[0].split(CHUNK):
        total += _normalised(chunk).double().sum(0)
    mean = (total / max(1, len(flat[0]))).float()
    generator = torch.Generator().manual_seed(0)
    matrix = torch.eye(size)
    if size > DIMENSIONS:
        matrix = torch.randn(size, DIMENSIONS, generator=generator) / DIMENSIONS**0.5
    return torch.cat([(_normalised(chunk) - mean) @ matrix for part in flat for chunk in part.split(CHUNK)])


def _normalised(features: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(features.float().cpu(), features.shape[1:])


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Rows divided by their lengths; zeros stay zeros."""
    return F.normalize(vectors, dim=1)


def nearest(
    vectors: torch.Tensor, rows: torch.Tensor, k: int, base: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest other vectors of some rows: (row numbers int64 [len(rows), k], distances float32), nearest first.

    vectors: float32 [N, D].   base: as many vectors to search instead; a row is never its own neighbour.
    k: at most N - 1 are returned.
    """
    base = vectors if base is None else base
    k = min(k, len(base) - 1)
    half_squares = (base * base).sum(1) / 2
    found = [(torch.empty(0, k, dtype=torch.int64), torch.empty(0, k))]
    for chunk in rows.split(CHUNK):
        own = vectors[chunk]
        closeness = own @ base.T - half_squares  # [CHUNK, N]; |a - b|^2 = |a|^2 - 2 closeness
        closeness[torch.arange(len(chunk)), chunk] = -torch.inf
        best = closeness.topk(k, dim=1)
        squares = (own * own).sum(1, keepdim=True) - 2 * best.values
        found.append((best.indices, squares.clamp(min=0).sqrt()))
    indices, distances = zip(*found, strict=True)
    return torch.cat(indices), torch.cat(distances)


def distance_within_class(vectors: torch.Tensor, labels: torch.Tensor, k: int = 10) -> torch.Tensor:
    """The mean distance of each vector to the k nearest others of its class, float32 [N]; 0 if it has no others.

    An outlier has a large one: Ramaswamy, Rastogi and Shim, SIGMOD 2000.
    """
    distance = torch.zeros(len(vectors))
    for label in labels.unique():
        mine = (labels == label).nonzero().flatten()
        if len(mine) > 1:
            distance[mine] = nearest(vectors[mine], torch.arange(len(mine)), k)[1].mean(1)
    return distance
