"""FedAdam: Adam at the coordinator over the mean change (Reddi et al. 2021, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from common.plugins import Plugin
from common.types import Params
from server.rounds.aggregators import State, Weighted, weighted_mean


class FedAdam(Plugin):
    """Adaptive step along the weighted mean of the sites' changes; no bias correction, as in the paper.

    Attributes:
        learning_rate: factor on the step.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        tau: constant in the denominator; larger values make the step less adaptive.
    """

    kind: Literal["fedadam"]
    learning_rate: Annotated[float, Field(gt=0)]
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3
    min_updates: ClassVar[int] = 1
    needs_sum: ClassVar[bool] = True

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "fedadam", "learning_rate": 0.5}

    def start(self, params: Params) -> State:
        """Returns a first moment of 0 and a second moment of tau squared."""
        return {
            "first": {name: np.zeros_like(old) for name, old in params.items()},
            "second": {name: np.full_like(old, self.tau**2) for name, old in params.items()},
        }

    def update(self, params: Params, state: State, deltas: Sequence[Weighted]) -> tuple[Params, State]:
        """Returns the parameters after a step along the updated moments, and the moments.

        Args:
            params: parameters that the sites were sent, by name.
            state: what `start` or the last `update` returned.
            deltas: updates with public weights, at least one.
        """
        mean = weighted_mean(deltas)
        first = {name: self.beta1 * state["first"][name] + (1 - self.beta1) * mean[name] for name in params}
        second = {name: self.beta2 * state["second"][name] + (1 - self.beta2) * mean[name] ** 2 for name in params}
        new = {
            name: old + self.learning_rate * first[name] / (np.sqrt(second[name]) + self.tau)
            for name, old in params.items()
        }
        return _to_float32(new), {"first": _to_float32(first), "second": _to_float32(second)}


def _to_float32(arrays: dict[str, np.ndarray]) -> Params:
    return {name: values.astype(np.float32) for name, values in arrays.items()}
