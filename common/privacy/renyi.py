"""Renyi differential privacy of Poisson-sampled Gaussians at whole orders, under add/remove of one unit.

# Shapes: O orders, K + 1 numbers of units (0 to K) in a sum of binomial terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

ORDERS_O: tuple[int, ...] = tuple(range(2, 65)) + tuple(round(2.0 ** (step / 4)) for step in range(25, 41))
"""Whole orders, at which the divergence of a sampled Gaussian is a finite sum; 65 to 1024 in steps of 19 %."""

_SLACK = 1e-13
"""Bound on the rounding of one release's divergence; added, so that no sum of many is understated."""


def compute_renyi_epsilon(releases: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Returns an upper bound on epsilon of releases that were fixed in advance, at the best order.

    Args:
        releases: noise multiplier, sampling rate and number of each.
        delta: delta of the epsilon, in (0, 1).
    """
    return min(
        math.fsum(count * compute_divergence(sigma, rate, order) for sigma, rate, count in releases)
        - compute_capacity(order, 0.0, delta)
        for order in ORDERS_O
    )


def compute_capacity(order: int, epsilon: float, delta: float) -> float:
    """Returns the divergence that implies (epsilon, delta): Canonne, Kamath, Steinke 2020, Proposition 12.

    Args:
        order: whole order of the divergence, at least 2.
        epsilon: epsilon of the pair.
        delta: delta of the pair, in (0, 1).
    """
    return epsilon - math.log1p(-1.0 / order) + (math.log(delta) + math.log(order)) / (order - 1)


@lru_cache(maxsize=2**16)
def compute_divergence(sigma: float, rate: float, order: int) -> float:
    """Returns the Renyi divergence of one release: Mironov, Talwar, Zhang 2019, Section 3.3, for whole orders.

    Args:
        sigma: noise multiplier.
        rate: probability with which a unit takes part, in (0, 1].
        order: whole order of the divergence, at least 2.
    """
    if rate == 1.0:
        return order / (2.0 * sigma**2)
    counts_K, log_binomials_K = _list_binomials(order)
    terms_K = (
        log_binomials_K
        + ((order - counts_K) * math.log1p(-rate) + counts_K * math.log(rate))
        + counts_K * (counts_K - 1.0) / (2.0 * sigma**2)
    )
    largest = float(terms_K.max())
    return max(0.0, largest + math.log(float(np.exp(terms_K - largest).sum()))) / (order - 1) + _SLACK


@cache
def _list_binomials(order: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the numbers from 0 to the order and the logarithms of their binomial coefficients."""
    logarithms = [math.log(math.comb(order, count)) for count in range(order + 1)]
    return np.arange(order + 1.0), np.array(logarithms)
