"""Rates from counts and the area under ROC: plain tensor functions, so that training alone loads no torchmetrics.

torchmetrics brings in torchvision and transformers: two seconds in every new process.

# Shapes: B examples, L labels (or K classes, each against the rest), T score buckets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rate = Callable[[Tensor], Tensor]
"""Counts L x 2 x 2 ([label][truth][prediction]) -> a rate, or one for each label."""


def score_edges(num_classes: int, buckets: int) -> Tensor:
    """Edges between buckets of probabilities, even in asinh(logit - logit of chance)."""
    logits_T = 0.1 * torch.sinh(torch.linspace(-5.8, 5.8, buckets - 1, dtype=torch.float64))
    chance = -torch.log(torch.tensor(num_classes - 1.0, dtype=torch.float64))
    return torch.sigmoid(chance + logits_T).float()


def area_under_roc(positives_TL: Tensor, negatives_TL: Tensor) -> Tensor:
    """area_L under the ROC curve from scores' histograms; equal buckets count half."""
    below_TL = negatives_TL.cumsum(0) - negatives_TL
    wins_L = (positives_TL * (below_TL + negatives_TL / 2)).sum(0)
    return wins_L / (positives_TL.sum(0) * negatives_TL.sum(0))


def one_against_rest(counts_KK: Tensor) -> Tensor:
    """K x 2 x 2 counts ([class][truth][prediction]) of a confusion matrix [truth][prediction]."""
    hit_K = counts_KK.diagonal()
    missed_K, wrong_K = counts_KK.sum(1) - hit_K, counts_KK.sum(0) - hit_K
    rest_K = counts_KK.sum() - hit_K - missed_K - wrong_K
    return torch.stack([torch.stack([rest_K, wrong_K], 1), torch.stack([missed_K, hit_K], 1)], 1)


def recall(counts_L22: Tensor) -> Tensor:
    """Per label, the share of its positives that are found; NaN where there are none."""
    return counts_L22[:, 1, 1].double() / counts_L22[:, 1].sum(1)


def true_negative_rate(counts_L22: Tensor) -> Tensor:
    """Per label, the share of its negatives that are recognised; NaN where there are none."""
    return counts_L22[:, 0, 0].double() / counts_L22[:, 0].sum(1)


def balanced(counts_L22: Tensor) -> Tensor:
    """Per label, the mean of recall and true negative rate; NaN where a label has only one truth."""
    return (recall(counts_L22) + true_negative_rate(counts_L22)) / 2


def rate_of(rate_L: Rate, label: int | None) -> Rate:
    """One label's rate, or with None its mean over the labels for which it is defined.

    The mean of `recall` over all classes is balanced accuracy.
    """
    if label is None:
        return lambda counts_L22: rate_L(counts_L22).nanmean()
    return lambda counts_L22: rate_L(counts_L22)[label]


def share_correct(counts_L22: Tensor) -> Tensor:
    """Correct label entries over all known ones."""
    return counts_L22.diagonal(dim1=1, dim2=2).sum().double() / counts_L22.sum()
