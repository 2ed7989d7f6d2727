"""Ridge regression in closed form: how well features tell classes apart, without training anything."""

import torch

LAMBDAS = torch.logspace(-5, 2, 15, dtype=torch.float64)  # in units of the mean eigenvalue of the Gram matrix


def leave_one_out(gram: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[torch.Tensor, float]:
    """What ridge regression on the other images predicts for each image: (classes int64 [N], mean squared error).

    gram: products of the features of each pair of images, [N, N].   labels: int64 [N].
    The targets are one-hot, the intercept is not penalised, and the penalty is that of the least squared error. The N
    regressions are solved by one eigendecomposition: Allen, Technometrics 16 (1974), 125-127.
    """
    n = len(labels)
    targets = torch.nn.functional.one_hot(labels, classes).double()
    mean = targets.mean(0)
    gram = gram.double()
    gram = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    rotated = vectors.T @ (targets - mean)
    best, least = targets, float("inf")
    for penalty in LAMBDAS * values.mean().clamp(min=1e-12):
        shrunk = values / (values + penalty)
        fitted = mean + vectors @ (shrunk[:, None] * rotated)
        leverage = 1 / n + (vectors**2 @ shrunk)  # of each image on its own prediction
        errors = (targets - fitted) / (1 - leverage).clamp(min=1e-9)[:, None]
        if (loss := float((errors**2).sum())) < least:
            best, least = targets - errors, loss
    return best.argmax(1), least / n
