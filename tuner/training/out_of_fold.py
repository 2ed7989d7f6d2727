"""Out-of-fold predictions: each image is scored by a head that was not trained on it; the folds are one stack."""

import logging
from collections.abc import Collection, Mapping

import torch
from tqdm import tqdm

from tuner.config import RunConfig
from tuner.training.setup import Setup
from tuner.training.spec import Metrics, Spec, spec_of
from tuner.training.together import fit_all, trained_head

log = logging.getLogger(__name__)
FOLDS = 5


def folds(labels: torch.Tensor, groups: torch.Tensor, seed: int) -> torch.Tensor:
    """The fold of each image, int64 [N]: stratified by label, and one fold for the images of a group.

    groups: int64 [N]; copies of an image have the same number, or a head would know the image that it scores.
    """
    generator = torch.Generator().manual_seed(seed)
    _, group = groups.unique(return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(labels)).scatter_reduce(0, group, torch.arange(len(labels)), "amin")
    order = torch.randperm(len(first), generator=generator)
    order = order[labels[first[order]].argsort(stable=True)]  # class after class: folds differ by one image of each
    fold_of_group = torch.empty_like(order)
    fold_of_group[order] = torch.arange(len(order)) % FOLDS
    return fold_of_group[group]


def out_of_fold(
    config: RunConfig, setup: Setup, rows: torch.Tensor, fold: torch.Tensor, left_out: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-probabilities of images by heads that were not trained on them, float [N, classes], on the CPU.

    rows: int64 [N], of the pool.   fold: of each.   left_out: bool [N], images that no head is trained on.
    The heads are trained as the config says, for all of its epochs, on equally many images: some folds leave a few
    out, as the heads of a stack have batches in common.
    """
    specs = []
    trained_on = torch.ones_like(fold, dtype=torch.bool) if left_out is None else ~left_out
    kept = [rows[trained_on & (fold != k)] for k in range(FOLDS)]
    least = min(map(len, kept))
    for k, train in enumerate(kept):
        shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed + k))]
        specs.append(spec_of(config, setup, config.seed, shuffled[:least].sort().values, None))
    log_p = torch.empty(len(rows), len(setup.data.classes))
    with tqdm(total=config.epochs, desc=f"{FOLDS} folds", unit="epoch", disable=None) as bar:

        def on_epoch(epoch: int, _metrics: Mapping[Spec, Metrics]) -> Collection[Spec]:
            bar.update(epoch - bar.n)
            return ()

        for spec, fitted in fit_all([(setup, spec) for spec in specs], on_epoch):
            mine = fold == specs.index(spec)
            head = trained_head(setup, spec, fitted)
            log_p[mine] = head.score(setup.x, setup.data.pool.labels, rows[mine])[0]
    return log_p
