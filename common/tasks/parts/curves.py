"""Survival curves and metrics from counts by interval, in NumPy: the coordinator computes them from noised sums.

A record ends in one of 2 K + 1 cells: with an event in interval 0 to K - 1, or censored after it survived 0 to K of the
intervals. All who are at risk in an interval follow from these cells. Sums with noise may be negative: what is divided
by one that is not positive is undefined (NaN).

# Shapes: K intervals, T risk buckets, G groups of intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from common.tasks.parts.rates import Array, compute_ratio


@dataclass(frozen=True)
class Counts:
    """Records by the cell in which they end.

    Attributes:
        events_K: records with an event in the interval.
        censored_S: records censored after so many survived intervals, K + 1 of them.
    """

    events_K: Array
    censored_S: Array

    @classmethod
    def split(cls, cells: Array) -> Counts:
        """Returns the counts of 2 K + 1 cells, or of as many in the last axis: events first."""
        num_intervals = cells.shape[-1] // 2
        return cls(cells[..., :num_intervals], cells[..., num_intervals:])

    @property
    def total(self) -> float:
        """Number of records."""
        return float(self.events_K.sum() + self.censored_S.sum())

    @property
    def alive_K(self) -> Array:
        """Records that are known to be without an event at the end of each interval."""
        later_K = _sum_later(self.events_K) - self.events_K
        return later_K + _sum_later(self.censored_S)[..., 1:]

    def estimate_survival(self, *, clip: bool) -> Array:
        """Returns the probability of no event by the end of each interval (Kaplan and Meier 1958).

        Args:
            clip: whether a hazard that noise moved out of [0, 1] is moved to its end.
        """
        hazard_K = compute_ratio(self.events_K, self.events_K + self.alive_K, clip=clip)
        survival_K: Array = (1.0 - hazard_K).cumprod()
        return survival_K

    def estimate_observed(self, *, clip: bool) -> Array:
        """Returns the probability of not being censored before the end of each interval.

        Who is censored after an interval was observed until its end.

        Args:
            clip: whether a rate that noise moved out of [0, 1] is moved to its end.
        """
        censored_K = self.censored_S[..., :-1]
        known_K = censored_K + self.events_K + self.alive_K
        rate_K = np.nan_to_num(compute_ratio(censored_K, known_K, clip=clip))
        observed_K: Array = (1.0 - rate_K).cumprod()
        return observed_K


def compute_concordance(cells_TC: Array, *, clip: bool) -> float:
    """Returns Harrell's C: of pairs of which one had its event in an earlier interval than all that is known of the
    other, the ratio in which that one's risk is higher; a pair in the same bucket counts half (Harrell et al. 1982).

    Args:
        cells_TC: [T, 2 G + 1], records by the bucket of their risk and the cell in which they end.
        clip: whether a ratio that noise moved out of [0, 1] is moved to its end.
    """
    counts = Counts.split(cells_TC)
    events_TG, alive_TG = counts.events_K, counts.alive_K
    below_TG = alive_TG.cumsum(axis=0) - alive_TG
    wins_G = (events_TG * (below_TG + alive_TG / 2)).sum(axis=0)
    event_G, alive_G = events_TG.sum(axis=0), alive_TG.sum(axis=0)
    # Two negative numbers have a positive product, and no pairs.
    usable_G = (event_G > 0) & (alive_G > 0)
    pairs = (event_G * alive_G)[usable_G].sum()
    return float(compute_ratio(wins_G[usable_G].sum(), pairs, clip=clip))


def compute_brier(counts: Counts, errors_2K: Array, *, clip: bool) -> float:
    """Returns the integrated Brier score, each record weighted by one over the probability that it was not censored.

    It is the mean over the time until the last boundary of the squared distance between the predicted probability of no
    event and 1 for who has had none, 0 for who has (Graf et al. 1999).

    Args:
        counts: records by the cell in which they end.
        errors_2K: summed squared distances, each times the width of its interval in parts of the whole: at the end of
            each interval of who has had no event, then of who had one in the interval, over its end and all later ones.
        clip: whether a score that noise moved out of [0, 1] is moved to its end.
    """
    observed_K = counts.estimate_observed(clip=clip)
    weight_K = np.divide(1.0, observed_K, out=np.zeros_like(observed_K), where=observed_K > 0.0)
    without_K, with_K = errors_2K.reshape(2, -1)
    return float(compute_ratio(weight_K @ (without_K + with_K), np.asarray(counts.total), clip=clip))


def estimate_hazard_logits(counts: Counts, deviation: float) -> Array:
    """Returns the logarithm of each interval's odds of an event, of counts that were released with noise.

    Events of an interval are drawn toward those that the hazard of all intervals together gives, by as much as noise
    drives them apart (James and Stein 1961): where the hazard is constant, noise alone makes no interval look worse.
    Counts that noise has made small or negative are raised to a part of the noise, or of what all intervals give.

    Args:
        counts: records by the cell in which they end, with noise.
        deviation: deviation of the noise in each cell; 0 without any.
    """
    events_K, alive_K = counts.events_K, counts.alive_K
    num_intervals = len(events_K)
    # So many cells add up to those who are left after an interval.
    cells_K = 2.0 * np.arange(num_intervals, 0, -1) - 1.0
    alive_K = np.maximum(alive_K, np.maximum(0.5 * deviation * np.sqrt(cells_K), 0.5))
    events = max(float(events_K.sum()), 0.5 * deviation * math.sqrt(num_intervals), 0.5)
    odds = events / float(alive_K.sum())
    apart_K = events_K - odds * alive_K
    square = float(apart_K @ apart_K)
    kept = max(0.0, 1.0 - (num_intervals - 1) * deviation**2 / square) if square else 0.0
    least_K = np.maximum(np.minimum(0.5 * deviation, 0.5 * odds * alive_K), 0.5)
    events_K = np.maximum(odds * alive_K + kept * apart_K, least_K)
    logits_K: Array = np.log(events_K / alive_K)
    return logits_K


def _sum_later(values: Array) -> Array:
    """Returns for each entry of the last axis the sum of it and all later ones."""
    sums: Array = values[..., ::-1].cumsum(axis=-1)[..., ::-1]
    return sums
