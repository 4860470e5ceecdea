"""A site's own class mix: from the labels that it has, or as its file declares it.

Labelled records say it for nothing, as everything stays at the site: (count + k x released share) / (labelled units +
k). How far the released shares are trusted, k, is the one of a few multiples of the number of classes under which the
counts are likeliest (Dirichlet-multinomial).

# Shapes: C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from client.aligners import Array
from common.errors import nearest
from common.types import BadInput

TIES = (1.0, 2.5, 5.0, 15.0, 50.0, 500.0)
"""Multiples of the number of classes; the first is also taken where no label is known."""
_LEAST_SHARE = 1e-4
"""Share of a class of which a site has none: its outputs stay finite."""


def estimate_mix(counts_C: Array, shares_C: Array) -> Array:
    """Returns mix_C of a site from its labelled units.

    Args:
        counts_C: number of labelled units of each class.
        shares_C: released share of each class among all sites' units, above 0.
    """
    num_classes = len(counts_C)
    chosen = max(TIES, key=lambda tie: compute_evidence(counts_C, tie * num_classes * shares_C))
    tied_C = chosen * num_classes * shares_C
    return lift_shares((counts_C + tied_C) / (counts_C.sum() + tied_C.sum()))


def compute_evidence(counts_C: Array, weight_C: Array) -> float:
    """Returns the logarithm of the likelihood of labels under a Dirichlet distribution of their shares."""
    before, whole = float(weight_C.sum()), float(counts_C.sum())
    terms = [
        math.lgamma(count + weight) - math.lgamma(weight)
        for count, weight in zip(counts_C.tolist(), weight_C.tolist(), strict=True)
    ]
    return math.lgamma(before) - math.lgamma(before + whole) + math.fsum(terms)


def read_mix(mix: Mapping[str, float], labels: Sequence[str], key: str) -> Array:
    """Returns mix_C of a declared mix; a label that is not named has no share.

    Args:
        mix: label -> share, which add up to 1 (`SiteTask` has checked it).
        labels: the task's labels, in their order.
        key: key of the mix in its file.

    Raises:
        BadInput: a label is none of the task's.
    """
    for label in mix:
        if label not in labels:
            raise BadInput(f"{key}: expected labels of the task, got {label!r}{nearest(label, list(labels))}")
    return lift_shares(np.array([mix.get(label, 0.0) for label in labels]))


def lift_shares(shares_C: Array) -> Array:
    """Returns shares that add up to 1, of which none is zero."""
    lifted_C = np.maximum(shares_C, _LEAST_SHARE)
    result_C: Array = lifted_C / lifted_C.sum()
    return result_C
