"""Bounded statistics of predicted classes and scores; `rates.py` turns their sums into metrics.

# Shapes: B examples, L labels (or K classes, each against the rest), T score buckets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.tasks import SparseRows
from common.tasks.parts.outcomes import compute_score_edges


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
    """Returns the edges between buckets of probabilities (`outcomes.compute_score_edges`)."""
    return torch.from_numpy(compute_score_edges(num_classes, buckets)).float()
