"""The guard: labels at home may veto an alignment. No criterion without labels told which alignments do harm.

# Shapes: R records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from client.aligners import Array

T = TypeVar("T")
LIMIT = 1.0
"""Standard errors by which a head has to be better than another."""
MOST_NOISE = 1.2
"""Noise in the mean of a class beyond which an alignment has to win against the served head, as features have a length
of 1. On training records of three sets alignments gained 1 to 6 points up to 1.2, and lost 1 to 20 from 1.6 on."""


def compare_hits(hit_R: Array, other_R: Array, unit_R: NDArray[np.int64], weight_R: Array) -> float:
    """Returns by how many standard errors one head is right more often than another, over the same units.

    Args:
        hit_R: 1 for each record that the head classifies rightly, else 0.
        other_R: the same of the other head.
        unit_R: number of the unit of each record.
        weight_R: the share of each record in its unit.
    """
    if len(unit_R) == 0:
        return 0.0
    apart_U = np.bincount(unit_R, weights=weight_R * (hit_R - other_R))
    spread = math.sqrt(float(np.square(apart_U).sum()))
    return float(apart_U.sum()) / spread if spread else 0.0


def choose_guarded(served: T, aligned: Sequence[T], compare: Callable[[T, T], float], *, noise: float) -> T:
    """Returns the head that labels at home do not speak against.

    The first aligned head is taken unless it is right less often than the served one, or the moments have much noise;
    each further one has to win clearly against what was taken so far.

    Args:
        served: the run's head as it is.
        aligned: heads in the order in which they are tried, one at least.
        compare: (head, other) -> standard errors by which the head is better; 0 without any label.
        noise: length of the noise in the mean of a record's class (`SourceMoments.compute_noise`).
    """
    trusted = noise <= MOST_NOISE and compare(aligned[0], served) >= 0.0
    chosen = aligned[0] if trusted else served
    for head in aligned[1:] if trusted else aligned:
        if compare(head, chosen) > LIMIT:
            chosen = head
    return chosen
