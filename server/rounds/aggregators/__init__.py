"""Aggregators: from the sites' updates to new parameters, one task or trunk at a time. One file is one kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from common.plugins import Plugin, Spec, resolve
from common.run import RunConfig
from common.types import BadInput, Params
from server.rounds.aggregators.parts.exact_sum import ExactSum

_AT_ONCE = 64
"""Updates that are added up in one array."""

State = Mapping[str, Params]
"""The arrays, by name, that an aggregator keeps between rounds for one task; they go into the checkpoint."""


@dataclass(frozen=True)
class Weighted:
    """One site's change of one head or trunk, and its public weight.

    Attributes:
        weight: positive; the site's declared public size.
        delta: new minus old parameters, by name; float32, or float64 where it is the mean of several sites' changes.
        sites: number of sites whose changes it is the weighted mean of, each with noise of its own; of a secure sum,
            the variance of its noise in multiples of one site's.
    """

    weight: float
    delta: Params
    sites: float = 1


class Aggregator(Protocol):
    """Settings and rule of one aggregation.

    Law (tests/contracts/test_aggregators.py): the order of sites is irrelevant; inputs are not modified, shapes and
    float32 are kept; if `needs_sum`, one update that is the weighted mean of several, and says of how many,
    gives the same result as the several.

    Attributes:
        kind: file name of the plug-in.
        needs_sum: whether the weighted sum of the updates is all it reads.
    """

    kind: str
    needs_sum: bool

    @property
    def min_updates(self) -> int:
        """The number of updates without which it has no result: with fewer a head keeps its parameters."""

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
            deltas: at least `min_updates`, in any order, each with the names and shapes of `params`.
        """


class Stateless(Plugin):
    """Base of aggregations that keep nothing between rounds: new = old + learning_rate * `combine` of the changes.

    Attributes:
        learning_rate: factor on the combined change.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1.0

    def combine(self, deltas: Sequence[Weighted]) -> Mapping[str, NDArray[np.float64]]:
        """Returns one change of each parameter for the changes of all sites, at least `min_updates`, in any order."""
        raise NotImplementedError

    def start(self, params: Params) -> State:
        """Returns an empty state."""
        del params
        return {}

    def update(self, params: Params, state: State, deltas: Sequence[Weighted]) -> tuple[Params, State]:
        """Returns the parameters after a step along the combined change, and the empty state.

        Args:
            params: parameters that the sites were sent, by name.
            state: what `start` or the last `update` returned.
            deltas: updates, at least `min_updates`.
        """
        return move_parameters(params, self.combine(deltas), self.learning_rate), state


def open_aggregator(spec: Spec | Mapping[str, Any], key: str) -> Aggregator:
    """Returns the aggregator that a run asks for.

    Raises:
        BadInput: no such kind, or a wrong setting; names the key.
    """
    aggregator: Aggregator = resolve("server.rounds.aggregators", spec, key)
    return aggregator


def check_trust(run: RunConfig, key: str) -> None:
    """Checks that an aggregation does with the sum of all updates where that is all that the coordinator sees.

    Raises:
        BadInput: it compares updates with each other.
    """
    if run.trust is not None and not open_aggregator(run.aggregation_of(None), key).needs_sum:
        raise BadInput(
            f"{key}.kind: expected a kind that needs only the sum of updates with `trust: secure_sum`, which hides "
            f"each of them, got {run.aggregation.kind}; take mean, fedadam or heavy_ball"
        )


def count_required_updates(run: RunConfig) -> int:
    """Returns the number of updates without which a round leaves a head or trunk as it is.

    Raises:
        BadInput: the aggregator's settings are wrong.
    """
    return max(run.cohort.min_replies_per_task, open_aggregator(run.aggregation_of(None), "aggregation").min_updates)


def sort_updates(deltas: Sequence[Weighted]) -> list[Weighted]:
    """Returns the updates in an order of their own bytes, so that a choice does not depend on who answered first."""
    return sorted(deltas, key=lambda item: (item.weight, *(item.delta[name].tobytes() for name in sorted(item.delta))))


def weighted_mean(deltas: Sequence[Weighted]) -> dict[str, NDArray[np.float64]]:
    """Returns the weighted mean of the changes, by parameter name: the exact sum rounded once, over all weights.

    It is the same to the bit in any order, and where parts of the updates were added up elsewhere
    (`server.rounds.aggregators.parts.exact_sum`). Changes in float64 are a mean already, which is returned as it is.
    """
    only = deltas[0].delta if len(deltas) == 1 else {}
    if only and all(change.dtype == np.float64 for change in only.values()):
        return {name: np.array(change, np.float64) for name, change in only.items()}
    total = math.fsum(item.weight for item in deltas)
    sums = {name: ExactSum(first.shape) for name, first in deltas[0].delta.items()}
    for start in range(0, len(deltas), _AT_ONCE):
        some = deltas[start : start + _AT_ONCE]
        weights_S = np.array([item.weight for item in some], np.float64)
        for name, own in sums.items():
            own.add(weights_S, np.stack([np.asarray(item.delta[name], np.float32) for item in some]))
    return {name: own.round() / total for name, own in sums.items()}


def stack_changes(deltas: Sequence[Weighted]) -> dict[str, NDArray[np.float64]]:
    """Returns for each parameter the changes of all updates, one after the other along the first axis, in float64."""
    return {
        name: np.stack([np.asarray(item.delta[name], np.float64) for item in deltas])
        for name in sorted(deltas[0].delta)
    }


def move_parameters(params: Params, changes: Mapping[str, NDArray[np.float64]], learning_rate: float) -> Params:
    """Returns old + learning_rate * change for each parameter, as float32.

    Args:
        params: parameters before the step, by name.
        changes: change of each parameter.
        learning_rate: factor on the change.
    """
    return {name: (old + learning_rate * changes[name]).astype(np.float32) for name, old in params.items()}
