"""Gradient descent with momentum at the coordinator, whose step follows from how much noise the updates hold.

The updates are noised gradients (solver `head_sum`): V <- m V + mean update, W <- W + eta V, with the step and momentum
of `common.model.momentum`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from common.model.momentum import Momentum
from common.plugins import Plugin
from common.types import Params
from server.rounds.aggregators import State, Weighted, move_parameters, weighted_mean


class HeavyBall(Plugin, Momentum):
    """Momentum along the weighted mean of the sites' updates; the settings are those of `Momentum`."""

    kind: Literal["heavy_ball"]
    min_updates: ClassVar[int] = 1
    needs_sum: ClassVar[bool] = True

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "heavy_ball", "rounds": 8, "noise": 2.0}

    def start(self, params: Params) -> State:
        """Returns a velocity of zero."""
        return {"velocity": {name: np.zeros_like(old) for name, old in params.items()}}

    def update(self, params: Params, state: State, deltas: Sequence[Weighted]) -> tuple[Params, State]:
        """Returns the parameters after a step along the velocity, and the velocity.

        Args:
            params: parameters that the sites were sent, by name.
            state: what `start` or the last `update` returned.
            deltas: updates with public weights, at least one.
        """
        num_units = math.fsum(item.weight for item in deltas)
        num_sites = math.fsum(item.sites for item in deltas)
        step, momentum = self.choose_step(num_units, num_sites)
        mean = weighted_mean(deltas)
        velocity = {name: momentum * state["velocity"][name].astype(np.float64) + mean[name] for name in params}
        kept = {name: values.astype(np.float32) for name, values in velocity.items()}
        return move_parameters(params, velocity, step), {"velocity": kept}
