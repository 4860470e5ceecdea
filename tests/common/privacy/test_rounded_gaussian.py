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
            assert len(words) <= count
            return np.append(words, self._stream._draw_words(count - len(words)))
        return self._stream._draw_words(count)


def point_at(lot: int, point: int) -> int:
    """The word of a point of 42 bits with its lot of 22."""
    return lot << 42 | point


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
    words = NoiseStream(KEY)._draw_words
    drawn = words(400_000)
    points = drawn & np.uint64(2**42 - 1)
    accepted = rounded_gaussian._accept(points, drawn >> np.uint64(42), np.full(len(drawn), 3 * 64), words)
    points = points[accepted] / 2.0**42  # From 0 to 1.
    lower, upper = 3.0, 3.0 + 1 / 64
    mass = math.erf(upper / math.sqrt(2)) - math.erf(lower / math.sqrt(2))
    mean = (math.exp(-(lower**2) / 2) - math.exp(-(upper**2) / 2)) * math.sqrt(2 / math.pi) / mass
    expected = (mean - lower) * 64
    error = math.sqrt(1 / 12 / len(points))
    assert abs(points.mean() - expected) < 5 * error < abs(0.5 - expected)


def test_the_smallest_words_reach_the_tail_and_the_largest_the_middle() -> None:
    tables = rounded_gaussian._tables()
    assert tables.tails[0] == 0 and tables.tails[-1] == 2**127
    certain = point_at(2**22 - 1, 0)
    # 31 zeros tie with every boundary beyond 6; 96 more are in the last cell, from 799/64 on.
    (far,) = draw_rounded_gaussian(Script([0, certain], [0, 0]), 1, 40)
    assert 799 * 2**34 <= far < 800 * 2**34
    (less,) = draw_rounded_gaussian(Script([0, certain], [2**64 - 1, 2**64 - 1]), 1, 40)
    assert 6 * 2**40 < less < 7 * 2**40
    (near,) = draw_rounded_gaussian(Script([2**32 - 2, certain]), 1, 40)
    assert near == 0
    (below,) = draw_rounded_gaussian(Script([2**32 - 1, certain]), 1, 40)
    assert below == -1, "floor of a number just below zero"


def test_a_uniform_on_a_boundary_is_decided_by_96_more_bits() -> None:
    tables = rounded_gaussian._tables()
    place = len(tables.tails) - 1 - 64  # P(|X| >= 1).
    uniform, rest = divmod(tables.tails[place], 2**96)
    for more, cell in ((rest - 1, 64), (rest, 63)):
        words = Script([more >> 32, more % 2**32 << 32])
        assert rounded_gaussian._choose_cells(np.array([uniform], np.uint32), words) == [cell]
        # As a whole, and so for compiled code, which must not decide it.
        half = [uniform << 1, point_at(2**22 - 1, 0)]
        (value,) = draw_rounded_gaussian(Script(half, [more >> 32, more % 2**32 << 32]), 1, 40)
        assert value == cell << 34


def test_boundaries_are_those_of_an_independent_computation() -> None:
    tails = rounded_gaussian._tables().tails
    with mp.workprec(300):
        for cell in (1, 64, 200, 799):
            integral = mp.quad(lambda x: mp.exp(-x * x / 2), [mpf(cell) / 64, mpf(cell) / 64 + 4, 20, 40])
            expected = integral * mp.sqrt(2 / mp.pi) * mpf(2) ** 127
            assert abs(tails[len(tails) - 1 - cell] - expected) < 2


def test_an_acceptance_too_close_to_call_is_decided_by_192_more_bits() -> None:
    cell, point = 64, 2**41
    with mp.workprec(320):
        distance = (mpf(point) + mpf(1) / 2) / mpf(2) ** 48
        exact = int(mp.floor(-mp.expm1(-distance * (1 + distance / 2)) * mpf(2) ** 214))
    for lot, accepted in ((exact + 1, True), (exact, False)):
        words = Script([(lot >> shift) % 2**64 for shift in (128, 64, 0)])
        arrays = np.array([point], np.uint64), np.array([lot >> 192], np.uint64), np.array([cell])
        assert rounded_gaussian._accept(*arrays, words) == [accepted]
        # As a whole, and so for compiled code, which must not decide it; a uniform number just above P(|X| >= 1.02).
        uniform = (rounded_gaussian._tables().tails[800 - cell - 1] >> 96) + 1
        drawn = [uniform << 1, point_at(lot >> 192, point)]
        (value,) = draw_rounded_gaussian(Script(drawn, [(lot >> shift) % 2**64 for shift in (128, 64, 0)]), 1, 40)
        assert value >> 34 == cell and (value == (cell << 34) + (point >> 8)) == accepted


def test_the_series_decides_as_far_from_the_truth_as_is_claimed() -> None:
    """A lot one doubt away from the probability is decided; so its error must be far smaller."""
    with mp.workprec(200):
        for cell in (0, 1, 64, 400, 799):
            for point in (0, 1, 2**41, 2**42 - 1):
                distance = (mpf(point) + mpf(1) / 2) / mpf(2) ** 48
                exact = -mp.expm1(-distance * (mpf(cell) / 64 + distance / 2)) * 2**22
                seen = rounded_gaussian._reject(np.array([point], np.uint64), np.array([cell]))[0]
                assert abs(mpf(float(seen)) - exact) < rounded_gaussian._DOUBTFUL / 1000


def test_a_lot_that_accepts_without_a_look_at_the_point_accepts_every_point_of_its_cell() -> None:
    """Against 320 bits at each cell's upper end, where rejection is most frequent; the slack exceeds any doubt."""
    sure = rounded_gaussian._tables().sure[::-1]
    assert len(sure) == 800
    with mp.workprec(320):
        for cell, lot in enumerate(sure.tolist()):
            most = -mp.expm1(-(mpf(cell) / 64 + mpf(1) / 128) / 64) * mpf(2) ** 22
            assert lot - most > rounded_gaussian._DOUBTFUL
            assert rounded_gaussian._accepts(2**42 - 1, cell, lot << 192)


def test_a_guide_begins_at_or_below_the_boundary_that_is_looked_for() -> None:
    tables = rounded_gaussian._tables()
    width = 2**31 // len(tables.guide)
    for bucket, place in enumerate(tables.guide.tolist()):
        assert tables.leading[place] <= bucket * width
        assert place == 799 or bucket * width < tables.leading[place + 1]


def test_a_rejected_point_is_drawn_again_in_its_own_cell() -> None:
    # Lot 0 rejects a point at a cell's end; the second point, the first of the spare ones, is accepted.
    script = Script([2**31, point_at(0, 2**42 - 1), point_at(2**22 - 1, 5 << 8)])
    (value,) = draw_rounded_gaussian(script, 1, 40)
    (first,) = draw_rounded_gaussian(Script([2**31, point_at(2**22 - 1, 0)]), 1, 40)
    assert len(script.read) == 1 and value == first + 5


def test_points_rejected_more_often_than_spare_words_last_are_drawn_again_all_the_same() -> None:
    rejected = point_at(0, 2**42 - 1)
    count = 1 + 1 + rounded_gaussian._count_spare(1)
    script = Script([2**31] + [rejected] * (count - 1), [rejected], [point_at(2**22 - 1, 5 << 8)])
    (value,) = draw_rounded_gaussian(script, 1, 40)
    (first,) = draw_rounded_gaussian(Script([2**31, point_at(2**22 - 1, 0)]), 1, 40)
    assert script.read == [count, 1, 1] and value == first + 5


def test_the_distance_from_the_true_law_is_below_what_is_claimed() -> None:
    with mp.workprec(300):
        beyond = mp.erfc(mpf(800) / 64 / mp.sqrt(2))
        boundaries = 800 * mpf(2) ** -127
        # The mean over a point's interval differs from its middle by a relative (second derivative) width**2 / 24.
        middle = (mpf(12.5) ** 2 + 1) * mpf(2) ** -96 / 24
        lots = mpf(2) ** -210
        assert beyond + boundaries + middle + lots < DISTANCE


@pytest.mark.parametrize("log2_deviation", [MIN_LOG2 - 1, MAX_LOG2 + 1])
def test_a_deviation_out_of_bounds_is_refused(log2_deviation: int) -> None:
    with pytest.raises(ValueError, match="expected a deviation"):
        draw(1, log2_deviation)
