"""Scorer kinds: what a site's vote on a backbone minimises. One file in this folder is one kind.

A site computes the cost of every candidate on its own training units and releases only which candidate costs least, by
the exponential mechanism (`client.choice.vote`). What one unit can change of a cost is all that the price hangs
on; the number of candidates does not matter.

# Shapes: R rows, D features, C targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.plugins import Spec, resolve

Array = NDArray[np.float64]

MIN_SIGNAL = 25.0
"""Declared units x epsilon / sensitivity below which a vote is mostly noise: where it was reached, the vote's loss
against the best candidate stayed below 2.7 points on five data sets (docs/transfer.md)."""

GRID = 2.0**-15
"""Values of rows are whole multiples of it, rounded toward zero: a unit's bounds hold exactly."""


ROUNDING = 2.0**-18
"""Part of a sensitivity that is left for the vote's own rounding of costs to whole steps."""


@dataclass(frozen=True)
class ScoredRows:
    """Records of a site as one candidate sees them.

    The rows of one unit have, over all of them together, features of an L2 norm of at most 1, and targets too.

    Attributes:
        features_RD: float64 [R, D], features of length 1 times the root of the record's weight within its unit.
        targets_RC: float64 [R, C], labels as vectors of length at most 1 and of mean 0, times the same.
    """

    features_RD: Array = field(repr=False)
    targets_RC: Array = field(repr=False)


class Scorer(Protocol):
    """The members that every plug-in file's class must have.

    Law (tests/contracts/test_scorers.py): whatever the other rows are and however many, also where they are of more
    units than declared, the cost with one unit more less the cost without it lies in one interval of the length
    `sensitivity - ROUNDING`, the same for all rows; what the kind's own arithmetic rounds is part of it. No rows have a
    finite cost.

    Attributes:
        kind: file name of the plug-in.
    """

    kind: str

    @property
    def sensitivity(self) -> float:
        """Length of an interval that holds what one unit can change of all candidates' costs."""

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""

    def compute_cost(self, rows: ScoredRows, public_size: int) -> float:
        """Returns the cost of the candidate that made the rows' features: the smaller, the better it fits.

        Args:
            rows: the site's rows.
            public_size: declared number of units; the true one may be another.
        """


def open_scorer(spec: Spec | Mapping[str, Any], key: str) -> Scorer:
    """Returns the scorer that a setting describes; raises BadInput naming the key where it is wrong."""
    scorer: Scorer = resolve("common.scorers", spec, key)
    return scorer


def compute_min_size(scorer: Scorer, epsilon: float) -> int:
    """Returns the declared number of units from which on a site may vote."""
    return math.ceil(MIN_SIGNAL * scorer.sensitivity / epsilon)


def compute_min_epsilon(scorer: Scorer, public_size: int) -> float:
    """Returns the pure epsilon, in hundredths rounded up, from which on a site of a declared size may vote."""
    return math.ceil(100.0 * MIN_SIGNAL * scorer.sensitivity / public_size) / 100.0
