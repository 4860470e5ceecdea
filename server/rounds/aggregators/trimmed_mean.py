"""Coordinate-wise trimmed mean of the sites' changes (Yin et al. 2018, Definition 2).

For each weight the `trim` smallest and the `trim` largest changes are left out, and the mean of the others is taken.
Up to `trim` sites, whatever they send, leave each weight between two changes of honest sites. Sites count alike: a
public size is what a site says of itself, and a hostile one could claim nearly all of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from common.plugins import Plugin
from common.types import Params
from server.rounds.aggregators import State, Weighted, move_parameters, stack_changes


class TrimmedMean(Plugin):
    """new = old + learning_rate * mean of the middle changes, weight by weight, whatever the sites' sizes.

    Attributes:
        trim: number of sites that are left out at each end; below half of the updates.
        learning_rate: factor on the mean change.
    """

    kind: Literal["trimmed_mean"]
    trim: Annotated[int, Field(ge=1, le=10_000)]
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    needs_sum: ClassVar[bool] = False

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "trimmed_mean", "trim": 1, "learning_rate": 0.5}

    @property
    def min_updates(self) -> int:
        """2 * trim + 1: one update at least is left to average."""
        return 2 * self.trim + 1

    def start(self, params: Params) -> State:
        """Returns an empty state."""
        del params
        return {}

    def update(self, params: Params, state: State, deltas: Sequence[Weighted]) -> tuple[Params, State]:
        """Returns the parameters after a step along the trimmed mean.

        Args:
            params: parameters that the sites were sent, by name.
            state: what `start` or the last `update` returned.
            deltas: updates, at least `min_updates`.
        """
        means = {}
        for name, changes in stack_changes(deltas).items():
            means[name] = np.sort(changes, axis=0)[self.trim : len(deltas) - self.trim].mean(axis=0)
        return move_parameters(params, means, self.learning_rate), state
