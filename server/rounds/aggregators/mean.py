"""Federated averaging of head updates (McMahan et al. 2017, Algorithm 1) by public weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from server.rounds.aggregators import Stateless, Weighted, weighted_mean


class Mean(Stateless):
    """new = old + learning_rate * weighted mean of the sites' changes."""

    kind: Literal["mean"]
    min_updates: ClassVar[int] = 1
    needs_sum: ClassVar[bool] = True

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "mean", "learning_rate": 0.5}

    def combine(self, deltas: Sequence[Weighted]) -> Mapping[str, NDArray[np.float64]]:
        """Returns the mean change by public weights."""
        return weighted_mean(deltas)
