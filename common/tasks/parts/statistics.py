"""Bounded statistics of single examples, whose noised sums still say how good a head is.

A row of statistics belongs to one example and has a public bound on its length; sums of rows are all that is released.
Counts with noise may be negative or add up to nothing: a rate without a positive denominator is undefined (NaN), others
are cut to [0, 1].

Scores fall into BUCKETS public buckets. Noise of standard deviation s in each makes an error of about
s sqrt(BUCKETS / 3) / (number of positives) in AUROC, so few are better; too few take different scores for equal.
Measured with 8 / 16 / 32 / 64, on normal scores of AUROC 0.6 to 0.95 and logits of scale 0.1 to 10: largest error
without noise .081 / .018 / .004 / .001; root mean square error with s = 5 and 200 examples of either truth
.050 / .060 / .076 / .106.

# Shapes: B examples, L labels (or classes against the rest), T score buckets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.tasks.parts.rates import area_under_roc, score_edges

BUCKETS = 16


def bucket_rows(scores_BL: Tensor, truth_BL: Tensor, num_classes: int) -> Tensor:
    """B x (2 * T * L): for each label a 1 in the bucket of the score, apart for positives and negatives.

    Args:
        scores_BL: probabilities.
        truth_BL: 1, 0, or another value for unknown, which leaves all of a label's entries 0.
        num_classes: what chance is one of.
    """
    edges = score_edges(num_classes, BUCKETS).to(scores_BL.device)
    bucket_BL = torch.bucketize(scores_BL.contiguous(), edges)
    hot_BLT = torch.nn.functional.one_hot(bucket_BL, BUCKETS).double()
    both = [hot_BLT * (truth_BL == truth).unsqueeze(2) for truth in (1, 0)]
    return torch.stack(both, dim=1).flatten(1)


def area_of(sums: Tensor, num_labels: int) -> Tensor:
    """area_L of the sums of `bucket_rows`; NaN where undefined."""
    positives_TL, negatives_TL = sums.view(2, num_labels, BUCKETS).transpose(1, 2)
    defined_L = (positives_TL.sum(0) > 0) & (negatives_TL.sum(0) > 0)
    return torch.where(defined_L, area_under_roc(positives_TL, negatives_TL).clamp(0.0, 1.0), torch.nan)


def share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, cut to [0, 1]; NaN where the whole is not positive."""
    return torch.where(whole > 0, (part / whole).clamp(0.0, 1.0), torch.nan)


def found(counts_L22: Tensor) -> Tensor:
    """Per label, the share of its positives that are found ([label][truth][prediction])."""
    return share(counts_L22[:, 1, 1], counts_L22[:, 1].sum(1))


def recognised(counts_L22: Tensor) -> Tensor:
    """Per label, the share of its negatives that are recognised."""
    return share(counts_L22[:, 0, 0], counts_L22[:, 0].sum(1))
