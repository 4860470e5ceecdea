"""Coordinate-wise trimmed mean of the sites' changes (Yin et al. 2018, Definition 2).

For each weight the `trim` smallest and the `trim` largest changes are left out, and the mean of the others is taken.
Up to `trim` sites, whatever they send, leave each weight between two changes of honest sites. Sites count alike: a
public size is what a site says of itself, and a hostile one could claim nearly all of the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from server.rounds.aggregators import Stateless, Weighted, stack_changes


class TrimmedMean(Stateless):
    """new = old + learning_rate * mean of the middle changes, weight by weight, whatever the sites' sizes.

    Attributes:
        trim: number of sites that are left out at each end; below half of the updates.
    """

    kind: Literal["trimmed_mean"]
    trim: Annotated[int, Field(ge=1, le=10_000)]
    needs_sum: ClassVar[bool] = False

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "trimmed_mean", "trim": 1, "learning_rate": 0.5}

    @property
    def min_updates(self) -> int:
        """2 * trim + 1: one update at least is left to average."""
        return 2 * self.trim + 1

    def combine(self, deltas: Sequence[Weighted]) -> Mapping[str, NDArray[np.float64]]:
        """Returns the mean of the middle changes of each weight."""
        means = {}
        for name, changes in stack_changes(deltas).items():
            means[name] = np.sort(changes, axis=0)[self.trim : len(deltas) - self.trim].mean(axis=0)
        return means
