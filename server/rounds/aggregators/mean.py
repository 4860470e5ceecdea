"""Federated averaging of head updates (McMahan et al. 2017, Algorithm 1) by public weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from common.plugins import Plugin
from common.types import Params
from server.rounds.aggregators import State, Weighted, weighted_mean


class Mean(Plugin):
    """new = old + learning_rate * weighted mean of the sites' changes."""

    kind: Literal["mean"]
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    needs_sum: ClassVar[bool] = True

    def start(self, params: Params) -> State:
        """No state."""
        del params
        return {}

    def update(self, params: Params, state: State, deltas: Sequence[Weighted]) -> tuple[Params, State]:
        """Step along the mean change."""
        mean = weighted_mean(deltas)
        return {name: (old + self.learning_rate * mean[name]).astype(np.float32) for name, old in params.items()}, state
