"""Are two records of the same identity? Error rates of cosine similarity over all pairs.

# Shapes: B examples, E embedding dimensions, P pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MOST_RECORDS = 2000
"""Of more, evenly spread ones are compared: their pairs are two million."""


def verification(embeddings_BE: Tensor, identity_B: Tensor) -> dict[str, float]:
    """`eer`, `tar_at_far_1` and `tar_at_far_10`: NaN where there are no equal or no unequal pairs.

    Args:
        embeddings_BE: of any length; only directions are compared.
        identity_B: whose they are.
    """
    keep = torch.linspace(0, max(len(identity_B) - 1, 0), min(len(identity_B), _MOST_RECORDS)).long()
    directions_BE = torch.nn.functional.normalize(embeddings_BE[keep].double(), dim=1)
    first_P, second_P = torch.triu_indices(len(keep), len(keep), offset=1)
    scores_P = (directions_BE @ directions_BE.T)[first_P, second_P]
    equal_P = identity_B[keep][first_P] == identity_B[keep][second_P]
    genuine, impostor = scores_P[equal_P].sort().values, scores_P[~equal_P].sort().values
    if len(genuine) == 0 or len(impostor) == 0:
        return {"eer": math.nan, "tar_at_far_1": math.nan, "tar_at_far_10": math.nan}
    thresholds = torch.cat([genuine, impostor]).sort().values
    rejected = torch.searchsorted(genuine, thresholds) / len(genuine)
    accepted = 1.0 - torch.searchsorted(impostor, thresholds) / len(impostor)
    crossing = int((rejected - accepted).abs().argmin())
    return {
        "eer": float(rejected[crossing] + accepted[crossing]) / 2.0,
        "tar_at_far_1": _accepted(genuine, impostor, 0.01),
        "tar_at_far_10": _accepted(genuine, impostor, 0.10),
    }


def _accepted(genuine: Tensor, impostor: Tensor, rate: float) -> float:
    """Share of equal pairs above the threshold that at most `rate` of the unequal ones exceed."""
    threshold = impostor[len(impostor) - 1 - int(rate * len(impostor))]
    return float((genuine > threshold).double().mean())
