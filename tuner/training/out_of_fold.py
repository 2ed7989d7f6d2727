"""Out-of-fold predictions: each image is scored by a head that was not trained on it; the folds are one stack."""

import logging
from collections.abc import Collection, Mapping

import torch
from tqdm import tqdm

from tuner.config import RunConfig
from tuner.training.folds import equally_many
from tuner.training.setup import Setup
from tuner.training.spec import Metrics, Spec, spec_of
from tuner.training.together import fit_all, trained_head

log = logging.getLogger(__name__)
FOLDS = 5


def out_of_fold(
    config: RunConfig, setup: Setup, rows: torch.Tensor, fold: torch.Tensor, left_out: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-probabilities of images by heads that were not trained on them, float [N, classes], on the CPU.

    rows: int64 [N], of the pool.   fold: of each.   left_out: bool [N], images that no head is trained on.
    The heads are trained as the config says, for all of its epochs, on equally many images: some folds leave a few
    out, as the heads of a stack have batches in common.
    """
    trained_on = torch.ones_like(fold, dtype=torch.bool) if left_out is None else ~left_out
    kept = equally_many([rows[trained_on & (fold != k)] for k in range(FOLDS)], config.seed)
    specs = [spec_of(config, setup, config.seed, train, None) for train in kept]
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
