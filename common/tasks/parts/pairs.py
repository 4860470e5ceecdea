"""Verification: error rates of deciding by cosine similarity whether two records are of one identity.

# Shapes: B examples, E embedding dimensions, P pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAX_RECORDS = 2000
"""Most records that are compared, evenly spread where there are more: these have two million pairs."""


def compute_verification(embeddings_BE: Tensor, identity_B: Tensor) -> dict[str, float]:
    """Returns `eer`, `tar_at_far_1` and `tar_at_far_10` over all pairs; NaN without genuine or without impostor pairs.

    Args:
        embeddings_BE: embeddings of any length; only their directions are compared.
        identity_B: int64, index of each record's identity.
    """
    keep = torch.linspace(0, max(len(identity_B) - 1, 0), min(len(identity_B), _MAX_RECORDS)).long()
    directions_BE = torch.nn.functional.normalize(embeddings_BE[keep].double(), dim=1)
    first_P, second_P = torch.triu_indices(len(keep), len(keep), offset=1)
    scores_P = (directions_BE @ directions_BE.T)[first_P, second_P]
    genuine_P = identity_B[keep][first_P] == identity_B[keep][second_P]
    genuine, impostor = scores_P[genuine_P].sort().values, scores_P[~genuine_P].sort().values
    if len(genuine) == 0 or len(impostor) == 0:
        return {"eer": math.nan, "tar_at_far_1": math.nan, "tar_at_far_10": math.nan}
    thresholds = torch.cat([genuine, impostor]).sort().values
    false_reject = torch.searchsorted(genuine, thresholds) / len(genuine)
    false_accept = 1.0 - torch.searchsorted(impostor, thresholds) / len(impostor)
    crossing = int((false_reject - false_accept).abs().argmin())
    return {
        "eer": float(false_reject[crossing] + false_accept[crossing]) / 2.0,
        "tar_at_far_1": _true_accept_rate(genuine, impostor, 0.01),
        "tar_at_far_10": _true_accept_rate(genuine, impostor, 0.10),
    }


def _true_accept_rate(genuine: Tensor, impostor: Tensor, false_accept_rate: float) -> float:
    """Returns the ratio of genuine pairs above the lowest threshold that at most so many impostor pairs exceed.

    Args:
        genuine: scores of genuine pairs, sorted.
        impostor: scores of impostor pairs, sorted.
        false_accept_rate: largest ratio of impostor pairs above the threshold.
    """
    threshold = impostor[len(impostor) - 1 - int(false_accept_rate * len(impostor))]
    return float((genuine > threshold).double().mean())
