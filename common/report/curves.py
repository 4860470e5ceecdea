"""Curves from counts of scores: receiver operating characteristic, precision over recall, calibration.

Of exact counts a band shows the choice of held-out records (each count drawn again as Poisson), of noised ones the
privacy noise (each drawn again with fresh noise of the same size): 95 % of 200 draws lie in it at each point. What
noise has made unreadable is not drawn. The draws are the same each time.

# Shapes: T ranges of scores, G points of a curve, N draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.events import ScoreCounts
from common.report.figures import Frequency, Series
from common.tasks.parts.rates import NORMAL_95, compute_wilson_interval

_Array = NDArray[np.float64]

_DRAWS = 200
_POINTS = 101
_MOST_GROUPS = 10
"""Points of a calibration figure."""
_FEWEST_NOISES = 3.0
"""Noises that a group of scores must hold at least: its share is then known to about a third."""


@dataclass(frozen=True)
class ScoreCurves:
    """Both curves of one label.

    Attributes:
        roc: true positive rate over false positive rate.
        precision: precision over recall.
        prevalence: share of records with the label, which is the precision of guessing.
    """

    roc: Series
    precision: Series
    prevalence: float


@dataclass(frozen=True)
class _Cell:
    """A range of scores of one label: its ends, its counts, and the deviation of the noise in each."""

    low: float
    high: float
    positives: float
    negatives: float
    deviation: float

    @property
    def mean(self) -> float:
        """The middle of the range."""
        return (self.low + self.high) / 2.0


def trace_curves(scores: ScoreCounts) -> ScoreCurves | None:
    """Returns a label's curves; None where there is no record of one truth, or the noise is too large to tell."""
    positives_T, negatives_T = np.array(scores.positives), np.array(scores.negatives)
    least = max(0.5, 2.0 * scores.deviation * math.sqrt(len(positives_T)))
    if min(positives_T.sum(), negatives_T.sum()) < least:
        return None
    rng = np.random.default_rng(0)
    draws = [(positives_T, negatives_T)] + [
        (_draw(positives_T, scores.deviation, rng), _draw(negatives_T, scores.deviation, rng)) for _ in range(_DRAWS)
    ]
    even_G = np.linspace(0.0, 1.0, _POINTS)
    # Each threshold's own rates are points of the curve.
    grid_G = np.union1d(even_G, _accumulate(negatives_T))
    roc, *drawn_roc = [_trace_roc(*each, grid_G) for each in draws]
    recall_G = np.union1d(even_G, _accumulate(positives_T))[1:]
    precision, *drawn_precision = [_trace_precision(*each, recall_G) for each in draws]
    return ScoreCurves(
        _make_series(scores.label, grid_G, roc, drawn_roc),
        _make_series(scores.label, recall_G, precision, drawn_precision),
        float(positives_T.sum() / (positives_T.sum() + negatives_T.sum())),
    )


def judge_calibration(scores: Sequence[ScoreCounts]) -> list[Frequency]:
    """Returns predicted probabilities beside observed shares, over all labels together, in a few groups of ranges.

    The groups hold about equally many records, and more where noise asks for it. An empty list where all records
    together do not stand out of the noise.
    """
    cells = sorted((cell for each in scores for cell in _list_cells(each)), key=lambda cell: cell.mean)
    goal = _count(cells) / _MOST_GROUPS
    groups, group = [], list[_Cell]()
    for cell in cells:
        group.append(cell)
        if _count(group) >= max(goal, 1.0, _FEWEST_NOISES * _measure_noise(group)):
            groups.append(group)
            group = []
    if groups:
        groups[-1] += group
    return [_judge_group(each) for each in groups]


def _draw(counts_T: _Array, deviation: float, rng: np.random.Generator) -> _Array:
    if deviation > 0.0:
        return counts_T + deviation * rng.normal(size=counts_T.shape)
    return rng.poisson(counts_T).astype(np.float64)


def _accumulate(counts_T: _Array) -> _Array:
    """Returns the share of records above each score, from none to all; never falling, though noise may make it."""
    total_T = np.append(0.0, counts_T[::-1].cumsum())
    rising_T = (np.maximum.accumulate(total_T) + np.minimum.accumulate(total_T[::-1])[::-1]) / 2.0
    shares_T: _Array = (rising_T / max(total_T[-1], 1e-9)).clip(0.0, 1.0)
    shares_T[0], shares_T[-1] = 0.0, 1.0
    return shares_T


def _trace_roc(positives_T: _Array, negatives_T: _Array, grid_G: _Array) -> _Array:
    rates_G: _Array = np.interp(grid_G, _accumulate(negatives_T), _accumulate(positives_T))
    return rates_G


def _trace_precision(positives_T: _Array, negatives_T: _Array, recall_G: _Array) -> _Array:
    # Between two scores both counts are taken to grow evenly; precision itself does not.
    wrong_G = np.interp(recall_G, _accumulate(positives_T), _accumulate(negatives_T)) * max(negatives_T.sum(), 0.0)
    right_G = recall_G * max(positives_T.sum(), 1e-9)
    precision_G: _Array = right_G / (right_G + wrong_G)
    return precision_G


def _make_series(label: str, xs_G: _Array, ys_G: _Array, drawn: Sequence[_Array]) -> Series:
    low_G, high_G = np.quantile(np.stack(drawn), (0.025, 0.975), axis=0)
    return Series(label, xs_G.tolist(), ys_G.tolist(), low_G.tolist(), high_G.tolist())


def _list_cells(scores: ScoreCounts) -> list[_Cell]:
    """Returns the ranges of a label's scores; where the mean score of a range is known, it stands for the range."""
    ends = (0.0, *scores.edges, 1.0)
    cells = []
    for place, (positive, negative) in enumerate(zip(scores.positives, scores.negatives, strict=True)):
        low, high = (scores.means[place],) * 2 if scores.means else (ends[place], ends[place + 1])
        cells.append(_Cell(low, high, positive, negative, scores.deviation))
    return cells


def _count(group: Sequence[_Cell]) -> float:
    return sum(cell.positives + cell.negatives for cell in group)


def _measure_noise(group: Sequence[_Cell]) -> float:
    """Returns the deviation of the noise in the number of records of a group."""
    return math.sqrt(sum(2.0 * cell.deviation**2 for cell in group))


def _judge_group(group: Sequence[_Cell]) -> Frequency:
    total = _count(group)
    share = min(1.0, max(0.0, sum(cell.positives for cell in group) / total))
    weights = [max(cell.positives + cell.negatives, 0.0) for cell in group]
    variance = sum(cell.deviation**2 for cell in group)
    if variance > 0.0:
        half = NORMAL_95 * math.sqrt(variance * (share**2 + (1.0 - share) ** 2)) / total
        interval = (max(0.0, share - half), min(1.0, share + half))
    else:
        interval = compute_wilson_interval(share, total)
    return Frequency(
        min(cell.low for cell in group),
        max(cell.high for cell in group),
        sum(cell.mean * weight for cell, weight in zip(group, weights, strict=True)) / sum(weights),
        share,
        interval,
        total,
    )
