"""Gaussian differential privacy in closed form (Dong, Roth, Su 2022): one parameter mu = sensitivity / noise.

delta(eps) = Phi(-eps/mu + mu/2) - exp(eps) Phi(-eps/mu - mu/2)   (Balle and Wang 2018, Theorem 8)
"""

from __future__ import annotations

import math
from functools import lru_cache

# scipy is imported where it computes: commands that only read a ledger do not need it.


def gdp_delta(epsilon: float, mu: float) -> float:
    """Returns the smallest delta with which a mu-GDP mechanism is (epsilon, delta)-DP."""
    if mu == 0.0:
        return 0.0
    from scipy.special import log_ndtr

    near = log_ndtr(-epsilon / mu + mu / 2.0)
    # In logarithms: exp(epsilon) alone overflows above 709.
    far = epsilon + log_ndtr(-epsilon / mu - mu / 2.0)
    return float(math.exp(near) - math.exp(far)) if far < near else 0.0


@lru_cache(maxsize=1024)
def gdp_epsilon(mu: float, delta: float) -> float:
    """Returns the smallest epsilon >= 0 with which a mu-GDP mechanism is (epsilon, delta)-DP.

    It is exact to 1e-12 relative, from above.
    """
    if gdp_delta(0.0, mu) <= delta:
        return 0.0
    # Phi(-x) <= exp(-x^2/2) bounds the first term, hence epsilon.
    enough = mu * mu / 2.0 + mu * math.sqrt(2.0 * math.log(1.0 / delta))
    from scipy.optimize import brentq

    root = brentq(lambda epsilon: gdp_delta(epsilon, mu) - delta, 0.0, enough, xtol=1e-12, rtol=1e-12)
    return float(root) * (1.0 + 2e-12) + 2e-12


@lru_cache(maxsize=1024)
def gdp_mu(epsilon: float, delta: float) -> float:
    """Returns the largest mu, to 1e-12 relative, whose mechanism is (epsilon, delta)-DP."""
    low = high = epsilon / 1e3
    while gdp_delta(epsilon, high) < delta:
        high *= 2.0
    if high == low:  # Only for deltas below any double that could matter.
        return low
    from scipy.optimize import brentq

    return float(brentq(lambda mu: gdp_delta(epsilon, mu) - delta, low, high, xtol=1e-300, rtol=1e-12))
