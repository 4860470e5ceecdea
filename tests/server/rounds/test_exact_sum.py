"""Exact sums of updates: equal to the bit whatever the order and the division among machines."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from server.rounds.aggregators.parts.exact_sum import ExactSum

NUM = 6
values = npst.arrays(np.float32, (NUM, 3), elements=st.floats(allow_nan=False, allow_infinity=False, width=32))
weights = npst.arrays(np.float64, NUM, elements=st.floats(1e-3, 1e8))


def add_up(weights_S: np.ndarray, values_SN: np.ndarray) -> ExactSum:
    total = ExactSum(values_SN.shape[1:])
    total.add(weights_S, values_SN)
    return total


@settings(deadline=None, max_examples=60)
@given(values_SN=values, weights_S=weights, order=st.permutations(range(NUM)), cuts=st.sets(st.integers(1, NUM - 1)))
def test_a_sum_is_that_of_fractions_in_any_order_and_any_division(
    values_SN: np.ndarray, weights_S: np.ndarray, order: list[int], cuts: set[int]
) -> None:
    parts = [add_up(weights_S[own], values_SN[own]) for own in np.split(np.array(order), sorted(cuts))]
    divided = parts[-1]
    for part in parts[:-1]:
        divided.merge(part)
    whole = add_up(weights_S, values_SN).round()
    assert divided.round().tobytes() == whole.tobytes()
    for column in range(values_SN.shape[1]):
        pairs = zip(weights_S.tolist(), values_SN[:, column].tolist(), strict=True)
        exact = sum((Fraction(weight) * Fraction(value) for weight, value in pairs), Fraction(0))
        assert abs(Fraction(float(whole[column])) - exact) <= abs(exact) * Fraction(1, 2**51)


def test_a_value_that_is_not_finite_leaves_no_number() -> None:
    values_SN = np.array([[1.0, 2.0], [np.inf, 0.0]], np.float32)
    total = add_up(np.ones(1), values_SN[:1])
    total.merge(add_up(np.ones(1), values_SN[1:]))
    assert np.isnan(total.round()).all()


def test_no_updates_at_all_add_nothing() -> None:
    total = ExactSum((2, 3))
    total.add(np.zeros(0), np.zeros((0, 2, 3), np.float32))
    assert total.round().tolist() == [[0.0] * 3] * 2
