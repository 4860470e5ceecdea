"""Rounded Gaussians: the law cell by cell, both ways of deciding a tie, the tail, and the bound on the distance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from mpmath import mp, mpf
from numpy.typing import NDArray
from scipy.stats import binomtest, chisquare, kstest

from common.privacy import rounded_gaussian
from common.privacy.noise import NoiseStream
from common.privacy.rounded_gaussian import DISTANCE, MAX_LOG2, MIN_LOG2, draw_rounded_gaussian

KEY = bytes(range(32))
ALARM = 1e-6


def draw(count: int, log2_deviation: int = 40) -> NDArray[np.int64]:
    return NoiseStream(KEY).rounded_gaussian(count, log2_deviation)


class Script:
    """Words that are written down, then a real stream's."""

    def __init__(self, *calls: Sequence[int]) -> None:
        self._calls = [np.array(words, np.uint64) for words in calls]
        self._stream = NoiseStream(KEY)
        self.read: list[int] = []

    def __call__(self, count: int) -> NDArray[np.uint64]:
        self.read.append(count)
        if self._calls:
            words = self._calls.pop(0)
            assert len(words) == count
            return words
        return self._stream._draw_words(count)


@pytest.mark.parametrize("log2_deviation", [MIN_LOG2, 37, MAX_LOG2])
def test_the_integers_are_normal_on_their_scale(log2_deviation: int) -> None:
    draws = draw(400_000, log2_deviation) / 2.0**log2_deviation
    assert kstest(draws, "norm").pvalue > ALARM
    assert kstest(1.02 * draws, "norm").pvalue < ALARM


def test_every_cell_has_its_probability_and_both_signs_are_alike() -> None:
    draws = draw(1_000_000)
    cells = (np.where(draws < 0, -draws - 1, draws) >> 34).clip(max=200)  # 2**40 / 64; the last holds the tail.
    tails = np.array([math.erfc(index / 64 / math.sqrt(2)) for index in range(201)])
    expected = np.append(tails[:-1] - tails[1:], tails[-1]) * len(draws)
    assert chisquare(np.bincount(cells, minlength=201), expected).pvalue > ALARM
    assert binomtest(int((draws < 0).sum()), len(draws), 0.5).pvalue > ALARM


def test_points_within_a_cell_follow_the_density_not_a_uniform_law() -> None:
    """In the cell from 3 to 3 + 1/64 the density falls by 4.6 %: 2 million draws there would tell; here by its mean."""
    cells = np.full(400_000, 3 * 64)
    offsets, accepted = rounded_gaussian._draw_offsets(NoiseStream(KEY)._draw_words, cells, 40)
    points = offsets[accepted] / 2.0**34  # From 0 to 1.
    lower, upper = 3.0, 3.0 + 1 / 64
    mass = math.erf(upper / math.sqrt(2)) - math.erf(lower / math.sqrt(2))
    mean = (math.exp(-(lower**2) / 2) - math.exp(-(upper**2) / 2)) * math.sqrt(2 / math.pi) / mass
    expected = (mean - lower) * 64
    error = math.sqrt(1 / 12 / len(points))
    assert abs(points.mean() - expected) < 5 * error < abs(0.5 - expected)


def test_the_smallest_words_reach_the_tail_and_the_largest_the_middle() -> None:
    high, low = rounded_gaussian._tails()
    assert high[0] == 0 and low[0] == 0 and high[-1] == 2**63
    # 64 zeros tie with every boundary beyond 9; 64 more are in the last cell, from 799/64 on.
    (far,) = draw_rounded_gaussian(Script([0], [0], [0], [2**64 - 1]), 1, 40)
    assert 799 * 2**34 <= far < 800 * 2**34
    (less,) = draw_rounded_gaussian(Script([0], [2**64 - 1], [0], [2**64 - 1]), 1, 40)
    assert 9 * 2**40 < less < 10 * 2**40
    (near,) = draw_rounded_gaussian(Script([2**64 - 2], [0], [2**64 - 1]), 1, 40)
    assert near == 0
    (below,) = draw_rounded_gaussian(Script([2**64 - 1], [0], [2**64 - 1]), 1, 40)
    assert below == -1, "floor of a number just below zero"


def test_a_uniform_on_a_boundary_is_decided_by_64_more_bits() -> None:
    high, low = rounded_gaussian._tails()
    place = len(high) - 1 - 64  # P(|X| >= 1).
    word = int(high[place]) << 1
    for more, cell in ((int(low[place]) - 1, 64), (int(low[place]), 63)):
        signs, cells = rounded_gaussian._draw_cells(Script([word], [more]), 1)
        assert (signs[0], cells[0]) == (0, cell)


def test_boundaries_are_those_of_an_independent_computation() -> None:
    high, low = rounded_gaussian._tails()
    with mp.workprec(300):
        for cell in (1, 64, 200, 799):
            integral = mp.quad(lambda x: mp.exp(-x * x / 2), [mpf(cell) / 64, mpf(cell) / 64 + 4, 20, 40])
            expected = integral * mp.sqrt(2 / mp.pi) * mpf(2) ** 127
            place = len(high) - 1 - cell
            assert abs((int(high[place]) << 64) + int(low[place]) - expected) < 2


def test_an_acceptance_too_close_to_call_is_decided_by_128_more_bits() -> None:
    cell, point = 64, 2**49
    with mp.workprec(320):
        distance = (mpf(point) + mpf(1) / 2) / mpf(2) ** 62
        exact = int(mp.floor(-mp.expm1(-distance * (1 + distance / 2)) * mpf(2) ** 192))
    for lot, accepted in ((exact + 1, True), (exact, False)):
        words = [[point << 8], [lot >> 128], [(lot >> 64) % 2**64, lot % 2**64]]
        offsets, accepts = rounded_gaussian._draw_offsets(Script(*words), np.array([cell]), 40)
        assert accepts[0] == accepted and offsets[0] == point >> 22


def test_a_lot_that_accepts_without_a_look_at_the_point_accepts_every_point_of_its_cell() -> None:
    """Against 320 bits at each cell's upper end, where rejection is most frequent; the slack exceeds any doubt."""
    sure = rounded_gaussian._sure_lots()
    assert len(sure) == 800
    with mp.workprec(320):
        for cell, lot in enumerate(sure.tolist()):
            most = -mp.expm1(-(mpf(cell) / 64 + mpf(1) / 128) / 64) * mpf(2) ** 64
            assert lot - most > 2 * rounded_gaussian._DOUBTFUL
            assert rounded_gaussian._accepts(2**56 - 1, cell, 40, lot << 128)


def test_only_buckets_without_a_boundary_decide_alone() -> None:
    high, _ = rounded_gaussian._tails()
    guide = rounded_gaussian._guide()
    width = 2**63 // len(guide)
    inside = {int(boundary) // width for boundary in high[:-1]}
    for bucket, place in enumerate(guide.tolist()):
        assert (place < 0) == (bucket in inside)
        assert place < 0 or (int(high[place]) < bucket * width and (bucket + 1) * width <= int(high[place + 1]))


def test_a_rejected_point_is_drawn_again_in_its_own_cell() -> None:
    # Lot 0 rejects a point at a cell's end; the second point is accepted.
    script = Script([2**62], [2**64 - 1], [0], [5 << 30], [2**64 - 1])
    (value,) = draw_rounded_gaussian(script, 1, 40)
    (first,) = draw_rounded_gaussian(Script([2**62], [0], [2**64 - 1]), 1, 40)
    assert script.read == [1, 1, 1, 1, 1] and value >> 34 == first >> 34


def test_the_distance_from_the_true_law_is_below_what_is_claimed() -> None:
    with mp.workprec(300):
        beyond = mp.erfc(mpf(800) / 64 / mp.sqrt(2))
        boundaries = 800 * mpf(2) ** -127
        # The mean over a point's interval differs from its middle by a relative (second derivative) width**2 / 24.
        middle = (mpf(12.5) ** 2 + 1) * mpf(2) ** (-2 * (MIN_LOG2 + 22)) / 24
        lots = mpf(2) ** -190
        assert beyond + boundaries + middle + lots < DISTANCE


@pytest.mark.parametrize("log2_deviation", [MIN_LOG2 - 1, MAX_LOG2 + 1])
def test_a_deviation_out_of_bounds_is_refused(log2_deviation: int) -> None:
    with pytest.raises(ValueError, match="expected a deviation"):
        draw(1, log2_deviation)
