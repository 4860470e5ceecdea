"""Coordinate-wise median of the sites' changes (Yin et al. 2018, Definition 1).

Fewer than half of the sites, whatever they send, leave each weight between two changes of honest sites. Sites count
alike: a public size is what a site says of itself, and a hostile one could claim more than half of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from common.plugins import Plugin
from common.types import Params
from server.rounds.aggregators import State, Weighted, move_parameters, stack_changes


class Median(Plugin):
    """new = old + learning_rate * median of the sites' changes, weight by weight, whatever the sites' sizes.

    Attributes:
        learning_rate: factor on the median change.
    """

    kind: Literal["median"]
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    min_updates: ClassVar[int] = 1
    needs_sum: ClassVar[bool] = False

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "median", "learning_rate": 0.5}

    def start(self, params: Params) -> State:
        """Returns an empty state."""
        del params
        return {}

    def update(self, params: Params, state: State, deltas: Sequence[Weighted]) -> tuple[Params, State]:
        """Returns the parameters after a step along the median change.

        Args:
            params: parameters that the sites were sent, by name.
            state: what `start` or the last `update` returned.
            deltas: updates, at least one.
        """
        medians = {name: np.median(changes, axis=0) for name, changes in stack_changes(deltas).items()}
        return move_parameters(params, medians, self.learning_rate), state
