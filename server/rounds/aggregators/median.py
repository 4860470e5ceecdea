"""Coordinate-wise median of the sites' changes (Yin et al. 2018, Definition 1).

Fewer than half of the sites, whatever they send, leave each weight between two changes of honest sites. Sites count
alike: a public size is what a site says of itself, and a hostile one could claim more than half of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from server.rounds.aggregators import Stateless, Weighted, stack_changes


class Median(Stateless):
    """new = old + learning_rate * median of the sites' changes, weight by weight, whatever the sites' sizes."""

    kind: Literal["median"]
    min_updates: ClassVar[int] = 1
    needs_sum: ClassVar[bool] = False

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "median", "learning_rate": 0.5}

    def combine(self, deltas: Sequence[Weighted]) -> Mapping[str, NDArray[np.float64]]:
        """Returns the median change of each weight."""
        return {name: np.median(changes, axis=0) for name, changes in stack_changes(deltas).items()}
