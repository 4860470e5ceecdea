"""A weighted sum of many updates that is exact: neither their order nor their division among machines changes a bit.

A float32 times a part of a weight that has 24 bits, or what is left of the weight, is exact in double precision. Each
such product is cut at multiples of 2**32 into digits that are whole numbers below 2**32, and each place's digits are
added up as integers. Sums of several machines are added place by place; only `round` leaves whole numbers, once. The
same idea, without its bound on the range of the summands: Demmel and Hida (2003), "Accurate floating point summation".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray

_DIGIT_BITS = 32
_DIGIT = 2.0**_DIGIT_BITS
_AT_ONCE = 2**18
"""Values that are cut into digits at once (2 MiB), so that they stay in a processor's cache."""


@final
@dataclass
class ExactSum:
    """The sum of some arrays of one shape.

    Attributes:
        shape: their shape.
        places: k -> int64 of that shape, the sum of the digits in multiples of 2**(32 k).
        is_finite: False where a summand was not finite: then nothing is known of the sum.
    """

    shape: tuple[int, ...]
    places: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)
    is_finite: bool = True

    def add(self, weights_S: NDArray[np.float64], values_SN: NDArray[np.float32]) -> None:
        """Adds the weighted values of some updates.

        Args:
            weights_S: weight of each update.
            values_SN: float32, S arrays of this sum's shape; at most 2**20 of them.
        """
        flat_SN = values_SN.reshape(len(weights_S), math.prod(self.shape))
        first_S = weights_S.astype(np.float32).astype(np.float64)
        rows = max(1, _AT_ONCE // max(1, flat_SN.shape[1]))
        for start in range(0, len(flat_SN), rows):
            some = slice(start, start + rows)
            values = flat_SN[some].astype(np.float64)
            for factor_S in (first_S[some], weights_S[some] - first_S[some]):
                if factor_S.any():
                    self._add_digits(values * factor_S[:, None])

    def merge(self, other: ExactSum) -> None:
        """Adds the sum of other updates."""
        self.is_finite &= other.is_finite
        for place, digits in other.places.items():
            self.places[place] = self.places[place] + digits if place in self.places else digits

    def round(self) -> NDArray[np.float64]:
        """Returns the sum in double precision; NaN where a summand was not finite."""
        if not self.is_finite:
            return np.full(self.shape, np.nan)
        if not self.places:
            return np.zeros(self.shape)
        lowest, highest = min(self.places), max(self.places)
        carry = np.zeros(self.shape, np.int64)
        digits = []
        for place in range(lowest, highest + 1):
            carry = carry + self.places.get(place, 0)
            digits.append(carry & (2**_DIGIT_BITS - 1))
            carry = carry >> _DIGIT_BITS  # Rounds down: all digits below the highest are at least 0.
        total = carry.astype(np.float64)
        for digit in reversed(digits):
            total = total * _DIGIT + digit
        return np.ldexp(total, _DIGIT_BITS * lowest)

    def _add_digits(self, products_SN: NDArray[np.float64]) -> None:
        while products_SN.size:
            peak = max(float(products_SN.max()), -float(products_SN.min()))
            if peak == 0.0:
                return
            if not math.isfinite(peak):
                self.is_finite = False
                return
            place = (math.frexp(peak)[1] - 1) // _DIGIT_BITS
            size = math.ldexp(1.0, _DIGIT_BITS * place)
            digits_SN = np.trunc(products_SN * (1.0 / size))
            # Whole numbers below 2**52: their sum is exact.
            total = digits_SN.sum(axis=0).astype(np.int64).reshape(self.shape)
            self.places[place] = self.places[place] + total if place in self.places else total
            digits_SN *= size
            products_SN -= digits_SN


def add_exactly(weights_S: NDArray[np.float64], values: Mapping[str, NDArray[np.float32]]) -> dict[str, ExactSum]:
    """Returns the weighted sum of each parameter.

    Args:
        weights_S: weight of each update.
        values: parameter -> its values in all updates, one after the other along the first axis.
    """
    sums = {}
    for name, values_SN in values.items():
        sums[name] = ExactSum(values_SN.shape[1:])
        sums[name].add(weights_S, values_SN)
    return sums
