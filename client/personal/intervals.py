"""Metrics with 95 % intervals over held-out units.

The spread of a metric is its standard deviation over a bootstrap of units: each replicate draws as many units as there
are, with replacement, at each site by itself, and all records of a unit with it. A rate's interval is Wilson's score
interval for the number of units that has this spread (Korn and Graubard 1998; Franco et al. 2019): for accuracy with
one record a unit that is Wilson's interval itself; it stays within [0, 1], and is not empty where all units are right.
Other metrics have the value plus and minus 1.96 spreads. Metrics over pairs of records have no interval.

The draws are the same each time, so that two heads that are judged on the same units are compared draw by draw: the
spread of their difference is that of one choice of units for both. Intervals are about the choice of held-out units
alone: not about training or noise.

# Shapes: R records, S entries of a statistic, P entries of it that one record fills.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from client.personal.metrics import Predictions, compute_pair_metrics
from common.events import Interval, Metrics
from common.tasks import EXACT_BUCKETS, Statistic, Task
from common.tasks.parts.rates import NORMAL_95, RATE, compute_wilson_interval

_REPLICATES = 200
"""A standard deviation of so many draws is within 10 % nearly always."""


@dataclass(frozen=True)
class Estimate:
    """A metric of held-out units.

    Attributes:
        value: the metric; None where it is undefined.
        spread: standard deviation over the choice of units; None where it is undefined for much of it.
        num_units: number of units that it is computed from.
        is_rate: whether the metric is a rate.
        draws: the metric of each replicate, NaN where it is undefined; empty where there are none.
    """

    value: float | None
    spread: float | None
    num_units: int
    is_rate: bool
    draws: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval; None where it is undefined."""
        if self.value is None or self.spread is None:
            return None
        if not self.is_rate or not RATE[0] <= self.value <= RATE[1]:
            return self.value - NORMAL_95 * self.spread, self.value + NORMAL_95 * self.spread
        variance = self.value * (1.0 - self.value)
        # Where all units agree the spread is 0, and the number of units says all.
        effective = variance / self.spread**2 if variance * self.spread > 0.0 else float(self.num_units)
        return compute_wilson_interval(self.value, effective)


Estimates = Mapping[str, Estimate]
"""Metric name -> its estimate, the main metric first."""


def estimate_metrics(task: Task, predictions: Sequence[Predictions]) -> dict[str, Estimate]:
    """Returns a task's metrics over the records of all sites together, with their spreads; none without a record.

    Args:
        task: the task.
        predictions: outputs and labels at each site.
    """
    if not predictions:
        return {}
    statistic = task.statistic(EXACT_BUCKETS)
    parts = [_SiteRows.of(statistic, each) for each in predictions]
    num_units = sum(part.num_units for part in parts)

    def add_up(times: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        sums_S = np.zeros(statistic.size)
        for part, times_U in zip(parts, times, strict=True):
            sums_S += part.sum(times_U)
        return sums_S

    values = statistic.values(add_up([np.ones(part.num_units) for part in parts]))
    rng = np.random.default_rng(0)
    draws: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(_REPLICATES):
        for name, value in statistic.values(add_up([part.draw(rng) for part in parts])).items():
            draws[name].append(value)
    estimates = {
        name: Estimate(
            value if math.isfinite(value) else None,
            _compute_spread(draws[name]),
            num_units,
            statistic.ranges.get(name) == RATE,
            tuple(draws[name]),
        )
        for name, value in values.items()
    }
    pairs = compute_pair_metrics(task, predictions)
    return estimates | {name: Estimate(value, None, num_units, is_rate=True) for name, value in pairs.items()}


def average_estimates(estimates: Sequence[Estimates]) -> dict[str, Estimate]:
    """Returns the mean of each metric over the sites where it is defined; their units are drawn independently."""
    return {name: _average([each[name] for each in estimates]) for name in (estimates[0] if estimates else ())}


def average_heads(estimates: Sequence[Estimates]) -> dict[str, Estimate]:
    """Returns the mean of each metric over several heads that are judged on the same units."""
    return {name: _average_draws([each[name] for each in estimates]) for name in (estimates[0] if estimates else ())}


def list_differences(first: Estimates, second: Estimates) -> dict[str, Interval | None]:
    """Returns metric name -> 95 % interval of the first minus the second, judged on the same units."""
    return {name: compute_difference(each, second[name]) for name, each in first.items() if name in second}


def compute_difference(first: Estimate, second: Estimate) -> Interval | None:
    """Returns the 95 % interval of a metric's difference between two heads on the same units; None where undefined.

    Of rates two units are counted that the heads judge differently, one either way (half of each as in Agresti and Min
    2005): few units that happen to agree are no certainty.

    Args:
        first: the metric of one head.
        second: the metric of the other.
    """
    if first.value is None or second.value is None or not first.draws or len(first.draws) != len(second.draws):
        return None
    drawn = np.subtract(first.draws, second.draws)
    spread = _compute_spread(drawn.tolist())
    if spread is None:
        return None
    difference, count = first.value - second.value, first.num_units
    if first.is_rate and second.is_rate:
        # A unit's mean square follows from the spread of the mean; two halves either way add 1 to its sum.
        squares = count * (count * spread**2 + difference**2) + 1.0
        difference, count = difference * count / (count + 2), count + 2
        spread = math.sqrt(max(0.0, squares / count - difference**2) / count)
    return difference - NORMAL_95 * spread, difference + NORMAL_95 * spread


def list_values(estimates: Estimates) -> Metrics:
    """Returns metric name -> value."""
    return {name: each.value for name, each in estimates.items()}


def list_intervals(estimates: Estimates) -> dict[str, Interval | None]:
    """Returns metric name -> 95 % interval, None where it is undefined."""
    return {name: each.interval for name, each in estimates.items()}


def _average(estimates: Sequence[Estimate]) -> Estimate:
    defined = [(each.value, each.spread) for each in estimates if each.value is not None]
    spreads = [spread for _, spread in defined if spread is not None]
    return Estimate(
        sum(value for value, _ in defined) / len(defined) if defined else None,
        math.hypot(*spreads) / len(spreads) if spreads and len(spreads) == len(defined) else None,
        sum(each.num_units for each in estimates),
        all(each.is_rate for each in estimates),
    )


def _average_draws(estimates: Sequence[Estimate]) -> Estimate:
    defined = [each for each in estimates if each.value is not None]
    if not defined:
        return estimates[0]
    draws = tuple(np.mean([each.draws for each in defined], axis=0).tolist()) if defined[0].draws else ()
    value = math.fsum(each.value or 0.0 for each in defined) / len(defined)
    is_rate = all(each.is_rate for each in estimates)
    return Estimate(value, _compute_spread(draws) if draws else None, defined[0].num_units, is_rate, draws)


def _compute_spread(values: Sequence[float]) -> float | None:
    defined = [value for value in values if math.isfinite(value)]
    return float(np.std(defined)) if 2 * len(defined) > len(values) else None


@dataclass(frozen=True)
class _SiteRows:
    """The rows of a statistic of one site's labelled records, and the unit of each, from 0."""

    index_RP: NDArray[np.int64]
    value_RP: NDArray[np.float64]
    unit_R: NDArray[np.int64]
    num_units: int
    size: int

    @classmethod
    def of(cls, statistic: Statistic, predictions: Predictions) -> _SiteRows:
        rows = statistic.entries(predictions.outputs.detach(), predictions.labels)
        units, unit_R = np.unique(predictions.unit_R.cpu().numpy(), return_inverse=True)
        return cls(rows.index_BP.cpu().numpy(), rows.value_BP.cpu().numpy(), unit_R, len(units), statistic.size)

    def draw(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """Returns how often each unit is drawn, if as many are drawn as there are."""
        return rng.multinomial(self.num_units, np.full(self.num_units, 1.0 / self.num_units)).astype(np.float64)

    def sum(self, times_U: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns sums_S over records, each counted as often as its unit."""
        weighted_RP = self.value_RP * times_U[self.unit_R][:, None]
        return np.bincount(self.index_RP.ravel(), weighted_RP.ravel(), minlength=self.size).astype(np.float64)
