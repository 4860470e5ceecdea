"""The price of a multiset of noised releases, composed at once. Epsilons are never added.

Relation: add or remove one unit. Every value returned is an upper bound on the true epsilon; the bounds are

* full batch only: exact Gaussian DP (Dong, Roth, Su 2022), mu_total = sqrt(sum of T / sigma^2);
* a choice by the exponential mechanism: the Gaussian of `common.privacy.exponential`, or its own epsilon on top of all
  else (basic composition), whichever gives less;
* Poisson sampling: the upper end of the PRV accountant (Gopi, Lee, Wutschitz 2021) as implemented in Opacus, never
  above the Renyi bound (Mironov 2017) or the price without amplification, which also bound.

The tests compare with dp_accounting's privacy loss distributions (Doroshenko et al. 2022).

These prices are shown. They are proven for mechanisms fixed in advance. Whether one more release may leave is decided
by `common.privacy.filters`, which is proven for mechanisms chosen one after the other.

Opacus is imported only where sampling is used: accounting of full-batch runs does without it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, Decimal
from functools import cache, lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from common.privacy.exponential import compute_choice_mu
from common.privacy.gaussian import gdp_epsilon
from common.privacy.renyi import compute_renyi_epsilon
from common.types import BadInput, Plan

_History = tuple[tuple[float, float, int], ...]
"""Sampled Gaussians as (noise multiplier, sampling rate, steps), sorted, equal ones merged."""


@dataclass(frozen=True)
class Mechanism:
    """One reservation as the ledger keeps it: `steps` noised sums over Poisson samples of the units, or choices.

    Attributes:
        kind: "gaussian"; "exponential" for a choice among candidates; "none" for a release without noise.
        noise_multiplier: standard deviation of the noise in what becomes visible, divided by `sensitivity`; of a
            choice, the scale of its Gumbel noise divided by it, which is 1 / epsilon.
        sampling_rate: probability with which a unit takes part in a step; 1 is full batch.
        steps: number of releases.
        sensitivity: L2 bound on one unit's part in one release (the clip norm), or a choice's bound on what one unit
            changes of the candidates' costs; None without a bound.
        noise_share: this site's part of the visible noise's standard deviation; 1 when the site adds all of it.
        min_sites: sites that must be summed before anything becomes visible; None when the site is seen alone.
        colluding: how many of them may lie about their noise.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["gaussian", "exponential", "none"]
    noise_multiplier: float
    sampling_rate: float
    steps: int
    sensitivity: float | None
    noise_share: float = 1.0
    min_sites: int | None = None
    colluding: int | None = None

    def __post_init__(self) -> None:
        if (self.kind != "none") != (0.0 < self.noise_multiplier < math.inf):
            raise BadInput(f"noise_multiplier: expected > 0 with noise and 0 for none, got {self.noise_multiplier}")
        if self.kind == "exponential" and (self.sampling_rate, self.noise_share, self.min_sites) != (1.0, 1.0, None):
            raise BadInput("mechanism: expected a choice of one site alone over all of its units")
        if not 0.0 < self.sampling_rate <= 1.0:
            raise BadInput(f"sampling_rate: expected a number in (0, 1], got {self.sampling_rate}")
        if self.steps < 1:
            raise BadInput(f"steps: expected at least 1, got {self.steps}")
        if self.kind != "none" and not 0.0 < (self.sensitivity or 0.0) < math.inf:
            raise BadInput(f"sensitivity: expected a finite number > 0, got {self.sensitivity}")
        honest = (self.min_sites or 1) - (self.colluding or 0)
        # Independent shares add in variance: the honest sites' shares must make up the whole noise by themselves.
        if not 0.0 < self.noise_share <= 1.0 or honest * self.noise_share**2 < 1.0 - 1e-9:
            raise BadInput("noise_share: the honest sites' shares do not add up to the noise that is accounted")

    @classmethod
    def of(cls, plan: Plan) -> Mechanism:
        """Returns the mechanism of one round of a plan."""
        return cls(
            kind="gaussian" if plan.private else "none",
            noise_multiplier=plan.noise_multiplier,
            sampling_rate=plan.sampling_rate,
            steps=plan.steps,
            sensitivity=plan.clip_norm,
        )

    @classmethod
    def of_choice(cls, epsilon: float, sensitivity: float) -> Mechanism:
        """Returns the mechanism of one choice among candidates, at a pure epsilon."""
        return cls("exponential", 1.0 / epsilon, 1.0, 1, sensitivity)

    @property
    def choice_epsilon(self) -> float:
        """The pure epsilon of one choice; only of kind "exponential"."""
        return 1.0 / self.noise_multiplier

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Mechanism:
        """The inverse of `to_dict`.

        Raises:
            BadInput: a key is unknown or missing, or a value has another type; nothing is coerced.
        """
        # Through JSON: pydantic's strict mode takes a mapping for a dataclass only there.
        return _mechanism(json.dumps(dict(values)))


@lru_cache(maxsize=4096)
def _mechanism(text: str) -> Mechanism:
    """A ledger repeats few mechanisms many times; building the validator anew took 2.5 ms each time (measured)."""
    try:
        return _validator().validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"mechanism.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


@cache
def _validator() -> TypeAdapter[Mechanism]:
    return TypeAdapter(Mechanism)


def compute_epsilon(mechanisms: Iterable[Mechanism], delta: float, *, quick: bool = False) -> float:
    """An upper bound on epsilon of all mechanisms together, under add/remove of one unit.

    Infinite as soon as one release has no noise, 0 without any mechanism. Computed once per distinct content.

    Args:
        mechanisms: releases to compose.
        delta: delta of the epsilon, in (0, 1).
        quick: leave out the accountant that takes a third of a second for each different sampled mechanism.

    Raises:
        BadInput: delta is not in (0, 1).
    """
    listed = list(mechanisms)
    choices = [each for each in listed if each.kind == "exponential"]
    together = _compose(listed, delta, quick)
    if not choices:
        return together
    sums = _compose([each for each in listed if each.kind != "exponential"], delta, quick)
    return min(together, sums + math.fsum(each.steps * each.choice_epsilon for each in choices))


def _compose(mechanisms: Iterable[Mechanism], delta: float, quick: bool) -> float:
    history = _history(mechanisms, delta)
    if history is None:
        return math.inf
    return _loose_epsilon(history, delta, True) if quick else _epsilon(history, delta)


def compute_equal_noise(mechanism: Mechanism) -> float:
    """Returns the noise multiplier of a Gaussian that costs what one of a mechanism's releases does, at least."""
    if mechanism.kind != "exponential":
        return mechanism.noise_multiplier
    return 1.0 / (compute_choice_mu(mechanism.choice_epsilon) * (1.0 + 1e-15))


def round_up(value: float, digits: int = 2) -> float:
    """An epsilon for display: never shown smaller than it is."""
    if not math.isfinite(value):
        return value
    return float(Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_CEILING))


# --- composition -----------------------------------------------------------------------------------------------------


_MESH_POINTS = 2.0**20
"""More points cost seconds and let FFT rounding reach small deltas."""

MAX_DISTINCT = 4
"""Different sampled mechanisms that the PRV accountant composes in seconds; beyond, the Renyi bound is shown."""

_SMALLEST_ERROR, _LARGEST_ERROR = 0.002, 0.5
"""Least and most that the PRV accountant may add to epsilon. Opacus' choice of domain is safe for errors below 1."""


def _history(mechanisms: Iterable[Mechanism], delta: float) -> _History | None:
    """Everything that counts, in one form for equal contents; None when a release has no noise."""
    if not 0.0 < delta < 1.0:
        raise BadInput(f"delta: expected a number in (0, 1), got {delta}")
    steps: Counter[tuple[float, float]] = Counter()
    for mechanism in mechanisms:
        if mechanism.kind == "none":
            return None
        steps[compute_equal_noise(mechanism), mechanism.sampling_rate] += mechanism.steps
    full = math.fsum(count / sigma**2 for (sigma, rate), count in steps.items() if rate == 1.0)
    sampled = sorted((sigma, rate, count) for (sigma, rate), count in steps.items() if rate < 1.0)
    # Full-batch Gaussians are one: their inverse variances add up exactly.
    return (*sampled, (full**-0.5, 1.0, 1)) if full > 0.0 else tuple(sampled)


@lru_cache(maxsize=4096)
def _epsilon(history: _History, delta: float) -> float:
    quick = sum(rate < 1.0 for _, rate, _ in history) > MAX_DISTINCT
    loose = _loose_epsilon(history, delta, quick)
    error = _prv_error(loose, delta, sum(count for _, _, count in history))
    if all(rate == 1.0 for _, rate, _ in history) or quick or loose <= _SMALLEST_ERROR or error > _LARGEST_ERROR:
        return loose
    from opacus.accountants import PRVAccountant

    prv = PRVAccountant()
    prv.history = list(history)
    try:
        return min(loose, _of_opacus(lambda: prv.get_epsilon(delta, eps_error=error)))
    except (RuntimeError, ValueError):  # Its mesh cannot hold this history; the loose bound stands.
        return loose


@lru_cache(maxsize=4096)
def _loose_epsilon(history: _History, delta: float, quick: bool) -> float:
    """Exact for full batch; else the smaller of the Renyi bound and the price without amplification."""
    # Sampling never costs more than taking everyone.
    unamplified = gdp_epsilon(math.sqrt(math.fsum(count / sigma**2 for sigma, _, count in history)), delta)
    if all(rate == 1.0 for _, rate, _ in history) or unamplified <= _SMALLEST_ERROR:
        return unamplified
    if quick:
        return max(0.0, min(unamplified, compute_renyi_epsilon(history, delta)))
    from opacus.accountants import RDPAccountant

    renyi = RDPAccountant()
    renyi.history = list(history)
    return min(unamplified, _of_opacus(lambda: renyi.get_epsilon(delta)))


def _of_opacus(bound: Callable[[], float]) -> float:
    """A bound of one of Opacus' accountants; infinite where it computed NaN."""
    # They warn at the last Renyi order and take log(0) at rate 1; both leave the bounds valid.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        value = float(bound())
    return value if value >= 0.0 else math.inf


def _prv_error(loose: float, delta: float, steps: int) -> float:
    """The error to allow the PRV accountant (it is added to epsilon): 0.3 %, more if the mesh grew too fine."""
    mesh_at_error_1 = 2.0 * (1.5 * loose + 3.0) * math.sqrt(steps * math.log(12e3 / delta) / 2.0)
    return max(_SMALLEST_ERROR, 0.003 * loose, mesh_at_error_1 / _MESH_POINTS)
