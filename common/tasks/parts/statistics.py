"""Bounded statistics of predicted classes and scores, and the rates that follow from their sums.

Sums with noise may be negative or add up to nothing: a rate without a positive denominator is undefined (NaN), others
are clamped to [0, 1]. A site that lacks a class is normal here, so that undefined is never counted as 0.

# Shapes: B examples, L labels (or K classes, each against the rest), T score buckets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.tasks import SparseRows


def join_rows(*parts: SparseRows) -> SparseRows:
    """Returns rows with the entries of all parts, whose positions are those of the joined vector already."""
    return SparseRows(torch.cat([part.index_BP for part in parts], 1), torch.cat([part.value_BP for part in parts], 1))


def build_score_rows(scores_BL: Tensor, truth_BL: Tensor, *, num_classes: int, buckets: int, offset: int) -> SparseRows:
    """Returns for each label a 1 in the bucket of the score, in separate histograms of positives and negatives.

    Args:
        scores_BL: probabilities.
        truth_BL: 1 for positive, 0 for negative; any other value means unknown and leaves all the label's entries 0.
        num_classes: number of classes; chance is 1 / num_classes.
        buckets: number of score buckets T of each histogram.
        offset: position of the first of the 2 * L * T entries in the example's vector.

    Returns:
        Rows with one entry for each label; the histograms are ordered [truth, positives first][label][bucket].
    """
    num_labels = scores_BL.shape[1]
    edges = build_score_edges(num_classes, buckets).to(scores_BL.device)
    bucket_BL = torch.bucketize(scores_BL.contiguous(), edges)
    label_L = torch.arange(num_labels, device=scores_BL.device)
    histogram_BL = torch.where(truth_BL == 1, 0, num_labels) + label_L
    known_BL = (truth_BL == 0) | (truth_BL == 1)
    return SparseRows(offset + histogram_BL * buckets + bucket_BL, known_BL.double())


def build_score_edges(num_classes: int, buckets: int) -> Tensor:
    """Returns the edges between buckets of probabilities, evenly spaced in asinh(logit - logit of chance).

    A head trained with privacy may move scores only a little around chance (1 / num_classes), where evenly spaced
    buckets of [0, 1] would see nothing but ties.
    """
    logits_T = 0.1 * torch.sinh(torch.linspace(-5.8, 5.8, buckets - 1, dtype=torch.float64))
    chance = -torch.log(torch.tensor(num_classes - 1.0, dtype=torch.float64))
    return torch.sigmoid(chance + logits_T).float()


def compute_auroc(sums: Tensor, num_labels: int) -> Tensor:
    """Returns area_L: P(score of a positive > score of a negative) + P(same bucket) / 2; NaN where undefined.

    Args:
        sums: [2 * L * T], summed `build_score_rows`, perhaps with noise.
        num_labels: number of labels L.
    """
    positives_TL, negatives_TL = sums.view(2, num_labels, -1).transpose(1, 2)
    below_TL = negatives_TL.cumsum(0) - negatives_TL
    wins_L = (positives_TL * (below_TL + negatives_TL / 2)).sum(0)
    area_L = wins_L / (positives_TL.sum(0) * negatives_TL.sum(0))
    defined_L = (positives_TL.sum(0) > 0) & (negatives_TL.sum(0) > 0)
    return torch.where(defined_L, area_L.clamp(0.0, 1.0), torch.nan)


def count_one_against_rest(counts_KK: Tensor) -> Tensor:
    """Returns counts_K22 ([class][truth][prediction]) of a confusion matrix ([truth][prediction])."""
    hit_K = counts_KK.diagonal()
    missed_K, wrong_K = counts_KK.sum(1) - hit_K, counts_KK.sum(0) - hit_K
    rest_K = counts_KK.sum() - hit_K - missed_K - wrong_K
    return torch.stack([torch.stack([rest_K, wrong_K], 1), torch.stack([missed_K, hit_K], 1)], 1)


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Returns part / whole, clamped to [0, 1]; NaN where the whole is not positive."""
    return torch.where(whole > 0, (part / whole).clamp(0.0, 1.0), torch.nan)


def recall(counts_L22: Tensor) -> Tensor:
    """Returns for each label the ratio of its positives that are predicted positive ([label][truth][prediction])."""
    return ratio(counts_L22[:, 1, 1], counts_L22[:, 1].sum(1))


def specificity(counts_L22: Tensor) -> Tensor:
    """Returns for each label the ratio of its negatives that are predicted negative ([label][truth][prediction])."""
    return ratio(counts_L22[:, 0, 0], counts_L22[:, 0].sum(1))
