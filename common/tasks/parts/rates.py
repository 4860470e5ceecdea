"""Rates that follow from summed statistics, in NumPy: the coordinator computes them from noised sums without torch.

Sums with noise may be negative or add up to nothing: a rate without a positive denominator is undefined (NaN). Others
are clipped to [0, 1] where asked for; without clipping they show how far noise has moved them. A site that lacks a
class is normal here, so that undefined is never counted as 0.

# Shapes: L labels (or K classes, each against the rest), T score buckets.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RATE = (0.0, 1.0)
"""The range of every rate."""

NORMAL_95 = 1.959963984540054
"""Standard deviations to either side between which 95 % of a normal distribution lie."""


def compute_auroc(sums: Array, num_labels: int, *, clip: bool) -> Array:
    """Returns area_L: P(score of a positive > score of a negative) + P(same bucket) / 2; NaN where undefined.

    Args:
        sums: [2 * L * T], summed rows of `statistics.build_score_rows`, perhaps with noise.
        num_labels: number of labels L.
        clip: whether an area that noise moved out of [0, 1] is moved to its end.
    """
    positives_LT, negatives_LT = sums.reshape(2, num_labels, -1)
    below_LT = negatives_LT.cumsum(axis=1) - negatives_LT
    wins_L = (positives_LT * (below_LT + negatives_LT / 2)).sum(axis=1)
    positive_L, negative_L = positives_LT.sum(axis=1), negatives_LT.sum(axis=1)
    # Two negative numbers have a positive product, and no area.
    pairs_L = np.where((positive_L > 0) & (negative_L > 0), positive_L * negative_L, 0.0)
    return compute_ratio(wins_L, pairs_L, clip=clip)


def count_one_against_rest(counts_KK: Array) -> Array:
    """Returns counts_K22 ([class][truth][prediction]) of a confusion matrix ([truth][prediction])."""
    hit_K = counts_KK.diagonal()
    missed_K, wrong_K = counts_KK.sum(axis=1) - hit_K, counts_KK.sum(axis=0) - hit_K
    rest_K = counts_KK.sum() - hit_K - missed_K - wrong_K
    return np.stack([np.stack([rest_K, wrong_K], 1), np.stack([missed_K, hit_K], 1)], 1)


def compute_ratio(part: Array, whole: Array, *, clip: bool) -> Array:
    """Returns part / whole; NaN where the whole is not positive.

    Args:
        part: numerators.
        whole: denominators, of the same shape.
        clip: whether a ratio outside [0, 1] is moved to its end.
    """
    ratios = np.full(np.shape(whole), math.nan)
    np.divide(part, whole, out=ratios, where=np.asarray(whole > 0))
    return ratios.clip(*RATE) if clip else ratios


def compute_wilson_interval(rate: float, count: float) -> tuple[float, float]:
    """Returns Wilson's 95 % score interval of a rate that was seen in so many trials (Wilson 1927)."""
    square = NORMAL_95**2 / count
    middle = (rate + square / 2) / (1 + square)
    half = math.sqrt(square * (rate * (1 - rate) + square / 4)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def compute_recall(counts_L22: Array, *, clip: bool) -> Array:
    """Returns for each label the ratio of its positives that are predicted positive ([label][truth][prediction])."""
    return compute_ratio(counts_L22[:, 1, 1], counts_L22[:, 1].sum(axis=1), clip=clip)


def compute_specificity(counts_L22: Array, *, clip: bool) -> Array:
    """Returns for each label the ratio of its negatives that are predicted negative ([label][truth][prediction])."""
    return compute_ratio(counts_L22[:, 0, 0], counts_L22[:, 0].sum(axis=1), clip=clip)


def compute_average_precision(hits_T: Array, wrong_T: Array, num_true: float, *, clip: bool) -> float:
    """Returns the mean over 101 recalls of the best precision at that recall or beyond (Lin et al. 2014, COCO).

    Args:
        hits_T: number of true detections in each range of scores, from the highest; perhaps with noise.
        wrong_T: number of others.
        num_true: number of objects, found or not; of one that is not positive there is no precision (NaN).
        clip: whether a precision that noise moved out of [0, 1] is moved to its end.
    """
    if not num_true > 0.0:
        return math.nan
    found_T, said_T = hits_T.cumsum(), (hits_T + wrong_T).cumsum()
    # Noise may let a recall fall where more is said, or leave nothing that was said.
    recall_T = np.maximum.accumulate(found_T / num_true)
    precision_T = np.nan_to_num(compute_ratio(found_T, said_T, clip=clip))
    best_T = np.append(np.maximum.accumulate(precision_T[::-1])[::-1], 0.0)
    # COCO compares to recalls that are computed as multiples of 0.01.
    return float(best_T[np.searchsorted(recall_T, np.linspace(0.0, 1.0, 101))].mean())


def average_defined(values_L: Array) -> float:
    """Returns the mean of the values that are defined; NaN where none is."""
    defined = values_L[~np.isnan(values_L)]
    return float(defined.mean()) if len(defined) else math.nan


def shrink_counts(counts_K: Array, deviation: float) -> Array:
    """Returns positive estimates of counts that were released with noise.

    They are drawn toward their mean by as much as noise drives them apart (James and Stein 1961): where labels are
    equally frequent, noise alone makes none look frequent. A count that is less than its noise is taken as half of it.

    Args:
        counts_K: counts of some labels, with noise.
        deviation: deviation of the noise in each; 0 without any.
    """
    mean = max(float(counts_K.mean()), deviation, 1.0)
    apart_K = counts_K - float(counts_K.mean())
    square = float(apart_K @ apart_K)
    kept = max(0.0, 1.0 - (len(counts_K) - 1) * deviation**2 / square) if square else 0.0
    estimates_K: Array = np.maximum(mean + kept * apart_K, max(0.5 * deviation, 0.5))
    return estimates_K
