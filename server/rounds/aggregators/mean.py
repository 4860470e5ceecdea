"""Federated averaging of head updates (McMahan et al. 2017, Algorithm 1) by public weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from common.plugins import Plugin
from common.types import Params
from server.rounds.aggregators import State, Weighted, move_parameters, weighted_mean


class Mean(Plugin):
    """new = old + learning_rate * weighted mean of the sites' changes.

    Attributes:
        learning_rate: factor on the mean change.
    """

    kind: Literal["mean"]
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    min_updates: ClassVar[int] = 1
    needs_sum: ClassVar[bool] = True

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "mean", "learning_rate": 0.5}

    def start(self, params: Params) -> State:
        """Returns an empty state."""
        del params
        return {}

    def update(self, params: Params, state: State, deltas: Sequence[Weighted]) -> tuple[Params, State]:
        """Returns the parameters after a step along the mean change.

        Args:
            params: parameters that the sites were sent, by name.
            state: what `start` or the last `update` returned.
            deltas: updates with public weights, at least one.
        """
        return move_parameters(params, weighted_mean(deltas), self.learning_rate), state
