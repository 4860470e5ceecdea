"""How contributions become new heads, one task at a time. One file is one kind."""

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
    """One site's change of one head, and its public weight."""

    weight: float
    delta: Params


class Aggregator(Protocol):
    """Settings and rule of one aggregation.

    Law (tests/contracts/test_aggregators.py): the order of sites is irrelevant; if `needs_sum`, one contribution that
    is the weighted sum of several gives the same result as the several.

    Attributes:
        kind: file name of the plug-in.
        needs_sum: whether the weighted sum of the contributions is all it reads.
    """

    kind: str
    needs_sum: bool

    def start(self, params: Params) -> State:
        """The state before the first round."""

    def update(self, params: Params, state: State, deltas: Sequence[Weighted]) -> tuple[Params, State]:
        """New head and state from at least one contribution."""


def open_aggregator(spec: Spec | Mapping[str, Any], key: str) -> Aggregator:
    """The aggregation a run asks for. Raises BadInput naming the key."""
    aggregator: Aggregator = resolve("server.rounds.aggregators", spec, key)
    return aggregator


def weighted_mean(deltas: Sequence[Weighted]) -> dict[str, np.ndarray]:
    """Mean change in float64, by weight.

    Contributions are added in an order of their own bytes, so that rounding does not depend on who answered first.
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
