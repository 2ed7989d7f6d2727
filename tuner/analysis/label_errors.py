"""Labels that are probably wrong, from out-of-fold predictions: confident learning.

Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels, JAIR 70 (2021).
"""

from dataclasses import dataclass

import torch

FEWEST = 5  # images of a class whose labels are judged: each fold then has one of them


@dataclass(frozen=True)
class LabelErrors:
    """Images whose label is suspected, the most suspicious first.

    suspects: int64 [S], their numbers.   suggested: int64 [S], the class that they seem to be of.
    margin: float [S], probability of the label less that of the most probable other class, -1..1, ascending.
    joint: float [classes, classes], the estimated share of images with label i that are of class j; adds up to 1.
    """

    suspects: torch.Tensor
    suggested: torch.Tensor
    margin: torch.Tensor
    joint: torch.Tensor

    @property
    def noise(self) -> torch.Tensor:
        """The estimated share of wrong labels of each class, float [classes]; 0 for a class without images."""
        total = self.joint.sum(1)
        return torch.where(total > 0, 1 - self.joint.diagonal() / total.clamp(min=1e-12), 0.0)


def label_errors(p: torch.Tensor, labels: torch.Tensor) -> LabelErrors:
    """Images whose out-of-fold prediction contradicts their label.

    p: out-of-fold probabilities, float [N, classes].   labels: int64 [N].
    An image is counted as one of class j if its probability of j is at least the mean probability of j of the images
    with label j; if that holds for several classes, the most probable one counts. Images that are counted as another
    class than their label are suspects. Those of a class with fewer than FEWEST images are not.
    """
    num_classes = p.shape[1]
    counts = torch.bincount(labels, minlength=num_classes)
    own = p.gather(1, labels[:, None])[:, 0]
    thresholds = torch.zeros(num_classes).index_add(0, labels, own) / counts.clamp(min=1)
    thresholds[counts < FEWEST] = torch.inf
    confident = torch.where(p >= thresholds, p, -torch.inf)
    best, counted = confident.max(1)
    known = torch.isfinite(best)
    joint = torch.zeros(num_classes, num_classes).index_put(
        (labels[known], counted[known]), torch.ones(int(known.sum())), accumulate=True
    )
    others = p.scatter(1, labels[:, None], -torch.inf)
    margin = own - others.max(1).values
    suspects = (known & (counted != labels) & (counts[labels] >= FEWEST)).nonzero().flatten()
    suspects = suspects[margin[suspects].argsort()]
    return LabelErrors(suspects, counted[suspects], margin[suspects], _calibrated(joint, counts))


def _calibrated(joint: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Counts as shares, those of a label scaled to the number of its images. A label nobody is counted for is right."""
    empty = joint.sum(1) == 0
    joint = joint + torch.diag(empty.float())
    shares = joint / joint.sum(1, keepdim=True) * counts[:, None]
    return shares / shares.sum().clamp(min=1)
