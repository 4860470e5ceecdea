"""The privacy filter: whether one more release may leave, whoever chose it and whatever was seen before.

A filter bounds the sum of the releases' costs, which whoever asks may choose one after the other in view of all earlier
outputs. Two kinds are proven for that, under add/remove of one unit:

* `gdp`, for full-batch Gaussians: the sum of mu^2 = steps / sigma^2 stays within mu(epsilon, delta)^2 (Smith and
  Thakurta 2022; Koskela, Tobaben, Honkela 2022). It costs nothing beside exact Gaussian DP. A sampled release counts as
  if it took every unit, which is never less than it costs; a choice among candidates as the Gaussian that bounds it
  (`common.privacy.exponential`).
* `renyi`, for Poisson-sampled Gaussians too: the sum of Renyi divergences at one order stays within what (epsilon,
  delta) allows at that order (Feldman and Zrnic 2021; conversion of Canonne, Kamath, Steinke 2020). The order is a
  function of (epsilon, delta) and of the public numbers of the first release: it is fixed before any output exists.

The epsilon that composition of fixed plans would give (`common.privacy.accounting`) is smaller for sampled releases. It
is shown beside; it does not decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from common.privacy.accounting import Mechanism, compute_equal_noise
from common.privacy.exponential import compute_choice_divergence
from common.privacy.gaussian import gdp_mu
from common.privacy.renyi import ORDERS_O, compute_capacity, compute_divergence
from common.run import Privacy
from common.types import DELTAS, EPSILONS, MAX_STEPS, SAMPLING_RATES, BadInput, FilterKind, Range

TOLERANCE = 1.0 + 1e-9
"""Rounding of sums, so that a plan calibrated to the cap is not refused for its last bit."""


@dataclass(frozen=True)
class PrivacyFilter:
    """A bound on the sum of costs.

    Attributes:
        kind: `gdp` or `renyi`.
        order: order of the Renyi divergence; None for `gdp`.
        epsilon: cap on epsilon.
        delta: delta of the cap.
    """

    kind: FilterKind
    order: int | None
    epsilon: float
    delta: float

    @cached_property
    def capacity(self) -> float:
        """Largest sum of costs (mu^2, or a divergence); below 0 where the order allows nothing."""
        if self.order is None:
            return gdp_mu(self.epsilon, self.delta) ** 2
        return compute_capacity(self.order, self.epsilon, self.delta)

    def compute_cost(self, mechanism: Mechanism) -> float:
        """Returns the cost of all steps of a mechanism; infinite without noise."""
        if mechanism.kind == "none":
            return math.inf
        if self.order is None:
            return mechanism.steps / compute_equal_noise(mechanism) ** 2
        if mechanism.kind == "exponential":
            return mechanism.steps * compute_choice_divergence(mechanism.choice_epsilon, self.order)
        return mechanism.steps * compute_divergence(mechanism.noise_multiplier, mechanism.sampling_rate, self.order)

    def compute_share(self, mechanisms: Iterable[Mechanism]) -> float:
        """Returns the part of the capacity that mechanisms cost together; above 1 they are too much."""
        cost = math.fsum(map(self.compute_cost, mechanisms))
        if cost == 0.0:
            return 0.0
        return cost / self.capacity if self.capacity > 0.0 else math.inf

    def covers(self, mechanisms: Iterable[Mechanism]) -> bool:
        """Returns True where mechanisms together stay within the capacity."""
        return self.compute_share(mechanisms) <= TOLERANCE


def choose_filter(first: Mechanism | None, kind: FilterKind | None, epsilon: float, delta: float) -> PrivacyFilter:
    """Returns the filter of a budget.

    Args:
        first: first release that the budget pays for; None before there is one.
        kind: kind that the budget's owner fixed; None: `renyi` where the first release is sampled, else `gdp`.
        epsilon: cap on epsilon, above 0.
        delta: delta of the cap, in (0, 1).
    """
    sampled = first is not None and first.sampling_rate < 1.0
    if kind == "gdp" or (kind is None and not sampled):
        return PrivacyFilter("gdp", None, epsilon, delta)
    sigma, rate = (
        (1.0, 1.0) if first is None or first.kind == "none" else (compute_equal_noise(first), first.sampling_rate)
    )
    return PrivacyFilter("renyi", _choose_order(sigma, rate, epsilon, delta), epsilon, delta)


def choose_noise_multiplier(privacy: Privacy, sampling_rate: float, steps: int) -> float:
    """Returns the noise multiplier that a requested privacy states, or the smallest that reaches its epsilon.

    Args:
        privacy: the requested privacy of all steps together.
        sampling_rate: probability with which a unit takes part, in (0, 1].
        steps: number of releases.

    Raises:
        BadInput: no noise is enough, or an argument is outside its range.
    """
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.target_epsilon is not None  # Privacy holds exactly one of the two.
    return calibrate_noise_multiplier(privacy.target_epsilon, privacy.delta, sampling_rate, steps)


def calibrate_noise_multiplier(target_epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Returns the smallest noise multiplier, to 1e-6, with which a filter of the target covers all steps.

    Args:
        target_epsilon: cap of the filter.
        delta: delta of the cap, in (0, 1).
        sampling_rate: probability with which a unit takes part, in (0, 1].
        steps: number of releases.

    Raises:
        BadInput: an argument is outside its range.
    """
    EPSILONS.check("target_epsilon", target_epsilon)
    DELTAS.check("delta", delta)
    SAMPLING_RATES.check("sampling_rate", sampling_rate)
    Range(1, MAX_STEPS).check("steps", steps)
    enough = math.sqrt(steps) / gdp_mu(target_epsilon, delta) * (1.0 + 1e-7)
    return enough if sampling_rate == 1.0 else _calibrate_sampled(target_epsilon, delta, sampling_rate, steps)


@lru_cache(maxsize=1024)
def _calibrate_sampled(target_epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    def covers(sigma: float) -> bool:
        release = Mechanism("gaussian", sigma, sampling_rate, steps, 1.0)
        return choose_filter(release, "renyi", target_epsilon, delta).covers([release])

    low, high = 1e-2, 1e6
    if not covers(high):
        raise BadInput(f"target_epsilon: no noise is enough for {target_epsilon} at delta {delta} over {steps} steps")
    while high > low * (1.0 + 1e-6):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if covers(middle) else (middle, high)
    return high


@lru_cache(maxsize=4096)
def _choose_order(sigma: float, rate: float, epsilon: float, delta: float) -> int:
    """Returns the order at which the most releases of one kind are covered."""
    return max(
        ORDERS_O,
        key=lambda order: compute_capacity(order, epsilon, delta) / compute_divergence(sigma, rate, order),
    )
