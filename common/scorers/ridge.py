"""The ridge objective: how well a linear map of a candidate's features tells the labels apart.

F = min over W with |W| <= B of  sum |e - W'z|^2 + lambda |W|^2,  lambda = penalty x declared size, B = 1 / (2
sqrt(penalty)), |z| <= 1 and |e| <= 1 for each unit.

What one unit changes. More units only add terms: F does not fall. The minimiser without the unit is allowed with it,
where the unit's term is at most (|e| + |W'z|)^2 <= (1 + B)^2: F rises by at most that. It holds for any features, any
labels and any number of units. Up to the declared size the bound on W changes nothing: with n units the free minimiser
has a norm of at most sqrt(n) / (2 sqrt(lambda)). With penalty .06 the bound is 9.2492; `sensitivity` adds a margin.

Rounding. F is evaluated in double precision at a W within the bound, which is the minimiser up to rounding, and an
error of W counts squared: what is computed exceeds the true minimum by less than `MARGIN` and never lies more than that
below it. tests/contracts/test_scorers.py compares with exact arithmetic.

# Shapes: R rows, D features, C targets, K the smaller of R and D.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, final

import numpy as np
from pydantic import Field

from common.plugins import Plugin
from common.scorers import ROUNDING, Array, ScoredRows

MARGIN = 2.0**-14
"""Bound on the rounding of one cost, of at most two million units."""

_STEPS = 120
"""Halvings of the interval that holds the multiplier of the bound on W."""


@final
class Ridge(Plugin):
    """Settings of the ridge objective.

    Attributes:
        penalty: lambda for each declared unit.
    """

    kind: Literal["ridge"] = "ridge"
    penalty: Annotated[float, Field(ge=0.001, le=10)] = 0.06

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "ridge"}

    @property
    def bound(self) -> float:
        """The largest norm of W."""
        return 0.5 / math.sqrt(self.penalty)

    @property
    def sensitivity(self) -> float:
        """The change by one unit, with each cost wrong by up to the margin in either direction, in hundredths."""
        return math.ceil(100.0 * ((1.0 + self.bound) ** 2 + 4.0 * MARGIN + ROUNDING)) / 100.0

    def compute_cost(self, rows: ScoredRows, public_size: int) -> float:
        """Returns F.

        Args:
            rows: the site's rows.
            public_size: declared number of units.
        """
        penalty = self.penalty * public_size
        weights_DC = _minimise(rows.features_RD, rows.targets_RC, penalty, self.bound)
        rest_RC = rows.targets_RC - rows.features_RD @ weights_DC
        return float(np.square(rest_RC).sum() + penalty * np.square(weights_DC).sum())


def _minimise(features_RD: Array, targets_RC: Array, penalty: float, bound: float) -> Array:
    """Returns W with |W| <= bound that minimises |targets - features W|^2 + penalty |W|^2.

    It is (features' features + m)^-1 features' targets for the least m >= penalty with which it is within the bound.
    Where there are fewer rows than features, it is computed from the products of rows with each other.
    """
    wide = features_RD.shape[0] < features_RD.shape[1]
    gram = features_RD @ features_RD.T if wide else features_RD.T @ features_RD
    values_K, vectors_KK = np.linalg.eigh(gram)
    values_K = np.maximum(values_K, 0.0)
    turned_KC = vectors_KK.T @ (targets_RC if wide else features_RD.T @ targets_RC)
    squares_K = np.square(turned_KC).sum(axis=1) * (values_K if wide else 1.0)
    multiplier = _find_multiplier(values_K, squares_K, penalty, bound)
    weights_DC = np.zeros((features_RD.shape[1], targets_RC.shape[1]))
    rest_DC = features_RD.T @ targets_RC
    # The second time for what rounding left over of the first.
    for _ in range(2):
        if wide:
            # (F'F + m)^-1 r = (r - F' (FF' + m)^-1 F r) / m.
            inner_KC = (vectors_KK.T @ (features_RD @ rest_DC)) / (values_K + multiplier)[:, None]
            weights_DC += (rest_DC - features_RD.T @ (vectors_KK @ inner_KC)) / multiplier
        else:
            weights_DC += vectors_KK @ ((vectors_KK.T @ rest_DC) / (values_K + multiplier)[:, None])
        fitted_RC = targets_RC - features_RD @ weights_DC
        rest_DC = features_RD.T @ fitted_RC - multiplier * weights_DC
    length = float(np.linalg.norm(weights_DC))
    fitting: Array = weights_DC * min(1.0, bound * (1.0 - 2.0**-40) / length) if length > 0.0 else weights_DC
    return fitting


def _find_multiplier(values_K: Array, squares_K: Array, penalty: float, bound: float) -> float:
    """Returns the least m >= penalty with sum squares / (values + m)^2 <= bound^2, from above."""
    low, high = penalty, penalty + float(np.sqrt(squares_K.sum())) / bound
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        within = float((squares_K / (values_K + middle) ** 2).sum()) <= bound**2
        low, high = (low, middle) if within else (middle, high)
    return high
