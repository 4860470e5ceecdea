"""Aggregators: from the sites' updates to new parameters, one task or trunk at a time. One file is one kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.plugins import Spec, resolve
from common.types import Params

State = Mapping[str, Params]
"""What an aggregator keeps between rounds for one task: name -> arrays; goes into the checkpoint."""


@dataclass(frozen=True)
class Weighted:
    """One site's change of one head or trunk, and its public weight.

    Attributes:
        weight: positive; the site's declared public size.
        delta: new minus old parameters, by name.
    """

    weight: float
    delta: Params


class Aggregator(Protocol):
    """Settings and rule of one aggregation.

    Law (tests/contracts/test_aggregators.py): the order of sites is irrelevant; inputs are not modified, shapes and
    float32 are kept; if `needs_sum`, one update that is the weighted mean of several gives the same result as the
    several.

    Attributes:
        kind: file name of the plug-in.
        needs_sum: whether the weighted sum of the updates is all it reads.
    """

    kind: str
    needs_sum: bool

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings with every required key, which the contract suite runs."""

    def start(self, params: Params) -> State:
        """Returns the state before the first round."""

    def update(self, params: Params, state: State, deltas: Sequence[Weighted]) -> tuple[Params, State]:
        """Returns the new parameters and the new state.

        Args:
            params: parameters that the sites were sent, by name.
            state: what `start` or the last `update` returned.
            deltas: at least one, in any order, each with the names and shapes of `params`.
        """


def open_aggregator(spec: Spec | Mapping[str, Any], key: str) -> Aggregator:
    """Returns the aggregator that a run asks for.

    Raises:
        BadInput: no such kind, or a wrong setting; names the key.
    """
    aggregator: Aggregator = resolve("server.rounds.aggregators", spec, key)
    return aggregator


def weighted_mean(deltas: Sequence[Weighted]) -> dict[str, np.ndarray]:
    """Returns the weighted mean of the changes in float64, by parameter name.

    Changes are added in an order of their own bytes, so that rounding does not depend on which site answered first.
    """
    ordered = sorted(
        deltas, key=lambda item: (item.weight, *(item.delta[name].tobytes() for name in sorted(item.delta)))
    )
    total = sum(item.weight for item in ordered)
    mean: dict[str, np.ndarray] = {}
    for name, first in ordered[0].delta.items():
        mean[name] = np.zeros(first.shape)
        for item in ordered:
            mean[name] += item.weight / total * item.delta[name]
    return mean
