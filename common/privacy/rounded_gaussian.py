"""Gaussian integers without a floating-point law: floor(2**m X) for a standard normal X.

A Gaussian made from 53-bit uniforms is a set of points, sparse in the tail; what it was added to shows in it (Mironov
2012), and the tail's missing mass belongs into delta. Here an integer has the probability that the true Gaussian gives
its interval. If the sum S it is added to is an integer in the same unit, then S + floor(2**m X) = floor(S + 2**m X):
rounding after the noise. So a release costs exactly what the Gaussian mechanism costs, with no term for arithmetic.

How: |X| falls into one of 800 cells of width 1/64, chosen by inversion with boundaries of 127 bits. Inside its cell a
uniform point of 42 bits is accepted with probability exp(-(x**2 - a**2) / 2), where a is the cell's lower end (von
Neumann 1951). The sign is one more bit. A value reads 96 bits: 31 choose its cell and 22 accept its point; of a million
values one needs more, 96 bits for its cell or 192 for its point.

Guarantees, each with its test in tests/common/privacy/test_rounded_gaussian.py:
- The distance in total variation between the law of one value and the true one is below `DISTANCE`.
- The number of words read, and so the time, depends on the stream alone, never on what is released.
- What is compiled (`common.privacy.compiled`) returns the same integers from the same words as what is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from common.privacy.compiled import open_library

Words = Callable[[int], NDArray[np.uint64]]
"""Count -> so many fresh, independent 64-bit words."""

DISTANCE = 2.0**-80
"""Bound on the total variation distance of one value. Beyond the last cell lies less than 2**-116; boundaries add 800
x 2**-127; a point is rounded to 2**-48, which moves a probability by a relative 12.5**2 * 2**-96 / 24."""

MIN_LOG2, MAX_LOG2 = 20, 48
"""Bounds of m: the deviation of the integers is 2**m."""

_CELL_BITS = 6
_WIDTH = 2.0**-_CELL_BITS
_NUM_CELLS = 800
_UNIFORM_BITS = 31
_GUIDE_BITS = 12
_POINT_BITS = MAX_LOG2 - _CELL_BITS
_LOT_BITS = 64 - _POINT_BITS
_CHUNK = 8192
"""Values made at once: their words stay in a core's own cache."""

_DOUBTFUL = 2.0**-20
"""Distance, of 2**22, within which a lot decides nothing: the acceptance probability is computed to 2**-50."""

_TERMS = 13
"""Terms of 1 - exp(-t), t below .2: the next is less than 2**-70 of the first."""


@dataclass(frozen=True)
class Tables:
    """Numbers that are looked up for a value.

    Attributes:
        tails: floor(2**127 P(|X| >= i / 64)) for i = 800 to 0, ascending.
        leading: uint32, their leading 31 bits.
        guide: int16, for each leading 12 bits the last boundary whose leading bits are at most these and zeros.
        sure: uint32, for each cell from the last to the first the least lot that accepts all of its points beyond any
            doubt: none is rejected more often than its upper end.
        near: uint64, the same for compiled code: for each leading 12 bits the boundary above the guide's (32 bits), the
            guide's place (10), and the largest lot that is looked at (22), any where several boundaries follow.
    """

    tails: list[int]
    leading: NDArray[np.uint32]
    guide: NDArray[np.int16]
    sure: NDArray[np.uint32]
    near: NDArray[np.uint64]

    @cached_property
    def addresses(self) -> tuple[int, int, int, int]:
        """Places in memory of `near`, `leading`, `guide` and `sure`, for compiled code."""
        return self.near.ctypes.data, self.leading.ctypes.data, self.guide.ctypes.data, self.sure.ctypes.data


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
    library = open_library()
    for start in range(0, count, _CHUNK):
        part = samples[start : start + _CHUNK]
        drawn = words((len(part) + 1) // 2 + len(part) + _count_spare(len(part)))
        # What is compiled gives up where a bit more has to be drawn: once in a few hundred chunks.
        if library is None or not library.draw_gaussian(drawn, _tables(), part, log2_deviation):
            _fill(part, drawn, words, log2_deviation)
    return samples


def draw_many_rounded_gaussians(
    fill: Sequence[Callable[[NDArray[np.uint64]], None]], words: Sequence[Words], count: int, log2_deviation: int
) -> NDArray[np.int64]:
    """Returns what `draw_rounded_gaussian` returns for each of many sources: S x `count` integers.

    Args:
        fill: for each source, writes fresh words into an array: the next ones that its `words` would return.
        words: the sources.
        count: number of integers of each.
        log2_deviation: m, from MIN_LOG2 to MAX_LOG2.

    Raises:
        ValueError: m is out of its bounds.
    """
    library = open_library()
    if library is None or not 0 < count <= _CHUNK or not words:
        rows = [draw_rounded_gaussian(each, count, log2_deviation) for each in words]
        return np.array(rows, np.int64).reshape(len(words), count)
    if not MIN_LOG2 <= log2_deviation <= MAX_LOG2:
        raise ValueError(f"expected a deviation of 2**{MIN_LOG2} to 2**{MAX_LOG2}, got 2**{log2_deviation}")
    samples = np.empty((len(words), count), np.int64)
    drawn = np.empty((len(words), (count + 1) // 2 + count + _count_spare(count)), np.uint64)
    for row, write in zip(drawn, fill, strict=True):
        write(row)
    for undecided in library.draw_many_gaussians(drawn, _tables(), samples, log2_deviation):
        _fill(samples[undecided], drawn[undecided], words[undecided], log2_deviation)
    return samples


def _count_spare(count: int) -> int:
    """Returns the number of words that are drawn for points to be drawn again: 1 of 80 is rejected."""
    return count // 32 + 16


def _fill(samples: NDArray[np.int64], drawn: NDArray[np.uint64], words: Words, log2_deviation: int) -> None:
    """Writes integers made from drawn words: half a word for each cell, one for each point, and spare ones."""
    count = len(samples)
    half = (count + 1) // 2
    heads = drawn[:half].view(np.uint32)[:count]
    spare = drawn[half + count :]
    cells = _choose_cells(heads >> np.uint32(1), words)
    np.left_shift(cells, log2_deviation - _CELL_BITS, out=samples)
    waiting, fresh = np.arange(count), drawn[half : half + count]
    while len(waiting):
        points = fresh & np.uint64(2**_POINT_BITS - 1)
        accepted = _accept(points, fresh >> np.uint64(_POINT_BITS), cells[waiting], words)
        samples[waiting[accepted]] += (points[accepted] >> np.uint64(MAX_LOG2 - log2_deviation)).view(np.int64)
        # A rejected point is drawn again within its own cell: the cell has its probability already.
        waiting = waiting[~accepted]
        fresh, spare = (
            (spare[: len(waiting)], spare[len(waiting) :])
            if len(waiting) <= len(spare)
            else (words(len(waiting)), spare[:0])
        )
    # floor(-y) = -floor(y) - 1 for every y that is no integer.
    samples ^= -(heads & np.uint32(1)).astype(np.int64)


def _choose_cells(uniform: NDArray[np.uint32], words: Words) -> NDArray[np.int64]:
    """Returns the number of a cell of |X| for each uniform number of 31 bits."""
    tables = _tables()
    place = tables.guide[uniform >> np.uint32(_UNIFORM_BITS - _GUIDE_BITS)].astype(np.int64)
    near = np.flatnonzero(uniform >= tables.leading[place + 1])
    place[near] = np.searchsorted(tables.leading, uniform[near], side="right") - 1
    for index in np.flatnonzero(uniform == tables.leading[place]):
        # 96 more bits decide, perhaps among several boundaries: all beyond 6 have the same leading bits, zero.
        first, second = (int(word) for word in words(2))
        whole = (int(uniform[index]) << 96) | (first << 32) | (second >> 32)
        while whole < tables.tails[place[index]]:
            place[index] -= 1
    cells: NDArray[np.int64] = np.subtract(_NUM_CELLS - 1, place, out=place)
    return cells


def _accept(
    points: NDArray[np.uint64], lots: NDArray[np.uint64], cells: NDArray[np.int64], words: Words
) -> NDArray[np.bool_]:
    """Returns whether points of 42 bits within their cells are accepted by lots of 22 bits."""
    accepted = lots >= _tables().sure[_NUM_CELLS - 1 - cells]
    # Most lots accept every point of their cell; the others are compared with their own point's probability.
    close = np.flatnonzero(~accepted)
    rejection = _reject(points[close], cells[close])
    lot = lots[close].astype(np.float64)
    accepted[close] = lot >= rejection + _DOUBTFUL
    for index in close[(lot < rejection + _DOUBTFUL) & (lot + 1.0 > rejection - _DOUBTFUL)]:
        more = [int(word) for word in words(3)]
        whole = (int(lots[index]) << 192) | (more[0] << 128) | (more[1] << 64) | more[2]
        accepted[index] = _accepts(int(points[index]), int(cells[index]), whole)
    return accepted


def _reject(points: NDArray[np.uint64], cells: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the probability, in multiples of a lot, that a point is rejected; the operations are those of exact.c."""
    distance = (points.astype(np.float64) + 0.5) * 2.0**-MAX_LOG2
    exponent = distance * (distance * 0.5 + cells * _WIDTH)
    series = np.ones(len(points))
    for term in range(_TERMS, 1, -1):
        series = 1.0 - exponent * (1.0 / term) * series
    rejection: NDArray[np.float64] = series * (exponent * 2.0**_LOT_BITS)
    return rejection


def _accepts(point: int, cell: int, lot: int) -> bool:
    """Decides one acceptance from a lot of 214 bits."""
    from mpmath import mp, mpf

    with mp.workprec(320):
        distance = (mpf(point) + mpf(1) / 2) / mpf(2) ** MAX_LOG2
        start = mpf(cell) / 2**_CELL_BITS
        return bool(mpf(lot) >= -mp.expm1(-distance * (start + distance / 2)) * mpf(2) ** (_LOT_BITS + 192))


@cache
def _tables() -> Tables:
    """Returns the boundaries of cells and what is looked up of them."""
    from mpmath import mp, mpf  # Only where noise is drawn; a command that releases nothing does without.

    with mp.workprec(256):
        ends = [int(mp.floor(mp.erfc(mpf(i) / 2**_CELL_BITS / mp.sqrt(2)) * 2**127)) for i in range(_NUM_CELLS)]
    tails = [0, *reversed(ends)]
    # 2**127 itself, P(|X| >= 0), is above every uniform number.
    leading = np.array([tail >> (127 - _UNIFORM_BITS) for tail in tails], np.uint32)
    starts = np.arange(2**_GUIDE_BITS, dtype=np.uint32) << np.uint32(_UNIFORM_BITS - _GUIDE_BITS)
    # Never beyond the last but one, so that there is a boundary above; none of bits that are all zero.
    guide = np.maximum(np.searchsorted(leading, starts, side="right") - 1, 0)
    rejected = -np.expm1(-_WIDTH * (np.arange(_NUM_CELLS) * _WIDTH + _WIDTH / 2))
    sure = np.ceil(rejected * 2.0**_LOT_BITS + 2.0 * _DOUBTFUL).astype(np.uint32)[::-1].copy()
    return Tables(tails, leading, guide.astype(np.int16), sure, _join_tables(leading, guide, sure))


def _join_tables(leading: NDArray[np.uint32], guide: NDArray[np.int64], sure: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Returns `Tables.near`: a value below the next boundary, or above it alone, needs nothing else."""
    most = np.append(np.maximum(sure[:-1], sure[1:]), sure[-1]) - np.uint32(1)
    after = np.append(leading, np.uint32(2**_UNIFORM_BITS))[guide + 2]
    ends = np.arange(1, len(guide) + 1) << (_UNIFORM_BITS - _GUIDE_BITS)
    lots = np.where(after < ends, 2**_LOT_BITS - 1, most[guide]).astype(np.uint64)
    places = guide.astype(np.uint64) << np.uint64(_LOT_BITS)
    return leading[guide + 1].astype(np.uint64) << np.uint64(32) | places | lots
