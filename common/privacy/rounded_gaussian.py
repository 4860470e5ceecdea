"""Gaussian integers without a floating-point law: floor(2**m X) for a standard normal X.

A Gaussian made from 53-bit uniforms is a set of points, sparse in the tail; what it was added to shows in it (Mironov
2012), and the tail's missing mass belongs into delta. Here an integer has the probability that the true Gaussian gives
its interval. If the sum S it is added to is an integer in the same unit, then S + floor(2**m X) = floor(S + 2**m X):
rounding after the noise. So a release costs exactly what the Gaussian mechanism costs, with no term for arithmetic.

How: |X| falls into one of 800 cells of width 1/64, chosen by inversion with boundaries of 127 bits. Inside its cell a
uniform point of m + 16 bits is accepted with probability exp(-(x**2 - a**2) / 2), where a is the cell's lower end
(von Neumann 1951); where 64 bits cannot decide, 192 do. The sign is one more bit.

Guarantees, each with its test in tests/common/privacy/test_rounded_gaussian.py:
- The distance in total variation between the law of one value and the true one is below `DISTANCE`.
- The number of words read, and so the time, depends on the stream alone, never on what is released.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

Words = Callable[[int], NDArray[np.uint64]]
"""Count -> so many fresh, independent 64-bit words."""

DISTANCE = 2.0**-80
"""Bound on the total variation distance of one value. Beyond the last cell lies less than 2**-116; boundaries add 800
x 2**-127; a point is rounded to 2**-(m + 22), which moves a probability by a relative 12.5**2 * 2**-2(m + 22) / 24."""

MIN_LOG2, MAX_LOG2 = 20, 48
"""Bounds of m: the deviation of the integers is 2**m."""

_CELL_BITS = 6
_WIDTH = 2.0**-_CELL_BITS
_NUM_CELLS = 800
_SPARE_BITS = 22
_GUIDE_BITS = 14
_CHUNK = 8192
"""Values made at once: their words stay in a core's own cache."""

_DOUBTFUL = 2.0**15
"""Distance, of 2**64, within which a word decides nothing: the acceptance probability is computed to 2**-50."""


def draw_rounded_gaussian(words: Words, count: int, log2_deviation: int) -> NDArray[np.int64]:
    """Returns independent integers floor(2**m X), X standard normal.

    Args:
        words: source of fresh 64-bit words.
        count: number of integers.
        log2_deviation: m, from MIN_LOG2 to MAX_LOG2.

    Raises:
        ValueError: m is out of its bounds.
    """
    if not MIN_LOG2 <= log2_deviation <= MAX_LOG2:
        raise ValueError(f"expected a deviation of 2**{MIN_LOG2} to 2**{MAX_LOG2}, got 2**{log2_deviation}")
    samples = np.empty(count, np.int64)
    for start in range(0, count, _CHUNK):
        part = samples[start : start + _CHUNK]
        signs, cells = _draw_cells(words, len(part))
        np.left_shift(cells, log2_deviation - _CELL_BITS, out=part)
        offsets, accepted = _draw_offsets(words, cells, log2_deviation)
        waiting = np.flatnonzero(~accepted)
        offsets[waiting] = 0
        part += offsets
        while len(waiting):
            # A rejected point is drawn again within its own cell: the cell has its probability already.
            offsets, accepted = _draw_offsets(words, cells[waiting], log2_deviation)
            part[waiting[accepted]] += offsets[accepted]
            waiting = waiting[~accepted]
        # floor(-y) = -floor(y) - 1 for every y that is no integer.
        part ^= np.negative(signs, out=signs)
    return samples


def _draw_cells(words: Words, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns a sign bit and the number of a cell of |X| for each value."""
    drawn = words(count)
    high, low = _tails()
    uniform = drawn >> np.uint64(1)
    place = _guide()[(uniform >> np.uint64(63 - _GUIDE_BITS)).view(np.int64)]
    near = np.flatnonzero(place < 0)
    place[near] = np.searchsorted(high, uniform[near], side="right") - 1
    for index in near[uniform[near] == high[place[near]]]:
        # 64 more bits decide, perhaps among several boundaries: all beyond 9 have the same leading bits, zero.
        (more,) = words(1)
        while uniform[index] == high[place[index]] and more < low[place[index]]:
            place[index] -= 1
    return (drawn & np.uint64(1)).view(np.int64), np.subtract(_NUM_CELLS - 1, place, out=place)


def _draw_offsets(
    words: Words, cells: NDArray[np.int64], log2_deviation: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Returns a uniform integer offset within each cell, and whether it is accepted."""
    points = words(len(cells)) >> np.uint64(64 - (log2_deviation - _CELL_BITS + _SPARE_BITS))
    lots = words(len(cells))
    accepted = lots >= _sure_lots()[cells]
    # Most lots accept every point of their cell; the others are compared with their own point's probability.
    close = np.flatnonzero(~accepted)
    distance = (points[close].astype(np.float64) + 0.5) * 2.0 ** -(log2_deviation + _SPARE_BITS)
    rejection = -np.expm1(distance * (distance * -0.5 - cells[close] * _WIDTH)) * 2.0**64
    margin = lots[close].astype(np.float64) - rejection
    accepted[close] = margin >= 0.0
    for index in close[np.abs(margin) < _DOUBTFUL]:
        more = [int(word) for word in words(2)]
        lot = (int(lots[index]) << 128) | (more[0] << 64) | more[1]
        accepted[index] = _accepts(int(points[index]), int(cells[index]), log2_deviation, lot)
    return (points >> np.uint64(_SPARE_BITS)).view(np.int64), accepted


def _accepts(point: int, cell: int, log2_deviation: int, lot: int) -> bool:
    """Decides one acceptance from a lot of 192 bits."""
    from mpmath import mp, mpf

    with mp.workprec(320):
        distance = (mpf(point) + mpf(1) / 2) / mpf(2) ** (log2_deviation + _SPARE_BITS)
        start = mpf(cell) / 2**_CELL_BITS
        return bool(mpf(lot) >= -mp.expm1(-distance * (start + distance / 2)) * mpf(2) ** 192)


@cache
def _tails() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Returns floor(2**127 P(|X| >= i / 64)) for i = 800 to 0, ascending, as high and low 64-bit words."""
    from mpmath import mp, mpf  # Only where noise is drawn; a command that releases nothing does without.

    with mp.workprec(256):
        tails = [int(mp.floor(mp.erfc(mpf(i) / 2**_CELL_BITS / mp.sqrt(2)) * 2**127)) for i in range(_NUM_CELLS)]
    ascending = [0, *reversed(tails)]
    # 2**127 itself, P(|X| >= 0), has 64 high bits: above every uniform number.
    high = np.array([tail >> 64 for tail in ascending], np.uint64)
    return high, np.array([tail & (2**64 - 1) for tail in ascending], np.uint64)


@cache
def _guide() -> NDArray[np.int64]:
    """Returns the last boundary below each bucket of the uniform's leading bits; -1 where one lies inside or on its
    lower end, so that a uniform number there has to be compared."""
    high, _ = _tails()
    starts = np.arange(2**_GUIDE_BITS + 1, dtype=np.uint64) << np.uint64(63 - _GUIDE_BITS)
    below = np.searchsorted(high, starts, side="left") - 1
    return np.where(np.diff(below) > 0, -1, below[:-1])


@cache
def _sure_lots() -> NDArray[np.uint64]:
    """Returns for each cell a lot that accepts all of its points, beyond any doubt: none is rejected more often than
    its upper end."""
    ends = -np.expm1(-_WIDTH * (np.arange(_NUM_CELLS) * _WIDTH + _WIDTH / 2))
    lots: NDArray[np.uint64] = np.ceil(ends * 2.0**64 + 4 * _DOUBTFUL).astype(np.uint64)
    return lots
