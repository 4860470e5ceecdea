"""The exponential mechanism (McSherry and Talwar 2007): releases only which of several candidates costs least.

Candidate i is chosen with a probability proportional to exp(-epsilon c_i / s). That is the candidate of least cost
c_i - (s / epsilon) Gumbel noise, but no Gumbel variable in floating point is drawn, whose rounding can give away what
it was added to (Ilvento 2020): costs are integers, weights have 256 bits, and a uniform integer of 512 bits decides.

Guarantee: if one unit more moves all costs by amounts that lie in one interval of length s, the logarithms of the
ratios of all candidates' probabilities lie in one interval of length epsilon that holds 0. So the release is
epsilon-differentially private, whatever the number of candidates, and has bounded range epsilon (Dong, Durfee, Rogers
2020). Its price beside other releases:

* mu-GDP with mu = 2 Phi^-1(1 / (1 + exp(-epsilon / 2))). The trade-off function of such a pair of distributions is
  nowhere below two lines of slopes -exp(t) and -exp(t - epsilon) for some t in [0, epsilon], and a Gaussian's, which is
  convex, is nowhere above them if it is not above them where they meet. That asks for the most at t = epsilon / 2.
* Renyi divergence of order a: at most a epsilon^2 / 8 (Cesar and Rogers 2021, Section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from common.privacy.rounded_gaussian import Words

DISTANCE = 2.0**-200
"""Bound on the total variation distance of one choice among at most 2**40 from the true law: weights are rounded down
by less than one, their sum is at least 2**256, and a uniform integer of 512 bits is not exactly uniform below it."""

_WEIGHT_BITS = 256
_NUM_WORDS = 8


def choose_least_cost(costs: Sequence[int], sensitivity: int, epsilon: float, words: Words) -> int:
    """Returns the index that the exponential mechanism chooses; the number of words read is always the same.

    Args:
        costs: cost of each candidate.
        sensitivity: s, the length of an interval that holds the changes of all costs by one unit, above 0.
        epsilon: price of the choice, above 0.
        words: source of fresh 64-bit words.
    """
    from mpmath import mp, mpf  # Only where something is released.

    if not costs or sensitivity <= 0 or not 0.0 < epsilon < math.inf:
        raise ValueError("expected at least one cost, and a sensitivity and an epsilon above 0")
    least = min(costs)
    with mp.workprec(2 * _WEIGHT_BITS):
        rate = mpf(epsilon) / sensitivity
        weights = [int(mp.floor(mp.exp(-rate * (cost - least)) * 2**_WEIGHT_BITS)) for cost in costs]
    drawn = int.from_bytes(words(_NUM_WORDS).astype("<u8").tobytes(), "little")
    place = drawn * sum(weights) >> 64 * _NUM_WORDS
    for index, weight in enumerate(weights):
        place -= weight
        if place < 0:
            return index
    raise AssertionError("the place lies below the sum of all weights")


@lru_cache(maxsize=1024)
def compute_choice_mu(epsilon: float) -> float:
    """Returns the least mu, to 1e-12 from above, of which a choice of this epsilon is mu-GDP."""
    from scipy.special import expit, ndtri

    # From the small end, where the difference to 1 is not lost.
    return float(-2.0 * ndtri(expit(-epsilon / 2.0))) * (1.0 + 1e-12)


def compute_choice_divergence(epsilon: float, order: int) -> float:
    """Returns a bound on the Renyi divergence of a choice of this epsilon.

    Args:
        epsilon: price of the choice.
        order: order of the divergence.
    """
    return order * epsilon**2 / 8.0
