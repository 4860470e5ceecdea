"""Counts of predictions and scores from summed statistics, in NumPy: the coordinator reads noised ones without torch.

# Shapes: L labels (or K classes, each against the rest), T score buckets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.events import ConfusionCounts, Outcomes, ScoreCounts
from common.tasks.parts.rates import Array

MOST_NAMES = 50
"""Classes or labels above which no table is kept: nobody reads it."""

MOST_RANGES = 64
"""Ranges of scores that are kept of exact counts: a curve through so many points is what an eye can tell."""


def compute_score_edges(num_classes: int, buckets: int) -> Array:
    """Returns the edges between buckets of probabilities, evenly spaced in asinh(logit - logit of chance).

    A head trained with privacy may move scores only a little around chance (1 / num_classes), where evenly spaced
    buckets of [0, 1] would see nothing but ties.
    """
    logits_T = 0.1 * np.sinh(np.linspace(-5.8, 5.8, buckets - 1)) - np.log(num_classes - 1.0)
    edges_T: Array = 1.0 / (1.0 + np.exp(-logits_T))
    return edges_T


def make_confusions(counts: Array, names: Sequence[str], deviation: float) -> tuple[ConfusionCounts, ...]:
    """Returns the table of all classes; none where there are too many.

    Args:
        counts: [K * K], ordered [truth][prediction].
        names: the K classes.
        deviation: standard deviation of the noise in each count.
    """
    if len(names) > MOST_NAMES:
        return ()
    rows = tuple(tuple(row) for row in counts.reshape(len(names), -1).tolist())
    return (ConfusionCounts(names=tuple(names), counts=rows, deviation=deviation),)


def make_label_confusions(counts: Array, labels: Sequence[str], deviation: float) -> tuple[ConfusionCounts, ...]:
    """Returns a table of absent and present for each label; none where there are too many.

    Args:
        counts: [L * 4], ordered [label][truth][prediction].
        labels: the L labels.
        deviation: standard deviation of the noise in each count.
    """
    if len(labels) > MOST_NAMES:
        return ()
    return tuple(
        ConfusionCounts(label=label, names=("absent", "present"), counts=tuple(map(tuple, own)), deviation=deviation)
        for label, own in zip(labels, counts.reshape(-1, 2, 2).tolist(), strict=True)
    )


def make_scores(counts: Array, labels: Sequence[str], num_classes: int, deviation: float) -> tuple[ScoreCounts, ...]:
    """Returns the score counts of each label; none where there are too many.

    Args:
        counts: [2 * L * T], ordered [truth, positives first][label][bucket].
        labels: the L labels.
        num_classes: number of classes; chance is 1 / num_classes.
        deviation: standard deviation of the noise in each count.
    """
    if len(labels) > MOST_NAMES:
        return ()
    counts_2LT = counts.reshape(2, len(labels), -1)
    edges = tuple(compute_score_edges(num_classes, counts_2LT.shape[2]).tolist())
    return tuple(
        ScoreCounts(
            label=label,
            edges=edges,
            positives=tuple(counts_2LT[0, index].tolist()),
            negatives=tuple(counts_2LT[1, index].tolist()),
            deviation=deviation,
        )
        for index, label in enumerate(labels)
    )


def join_score_ranges(outcomes: Outcomes) -> Outcomes:
    """Returns exact counts with neighbouring ranges of scores joined until few are left, of about equal numbers."""
    return outcomes.model_copy(update={"scores": tuple(map(_join_ranges, outcomes.scores))})


def _join_ranges(scores: ScoreCounts) -> ScoreCounts:
    positives_T, negatives_T = np.array(scores.positives), np.array(scores.negatives)
    total_T = (positives_T + negatives_T).cumsum()
    if len(total_T) <= MOST_RANGES or total_T[-1] <= 0.0:
        return scores
    # The last bucket of each of as many equal parts; a bucket that holds several parts is a range of its own.
    goals = total_T[-1] * np.arange(1, MOST_RANGES) / MOST_RANGES
    last = np.unique(np.append(np.searchsorted(total_T, goals), len(total_T) - 1))
    first = np.append(0, last[:-1] + 1)
    counts_T = np.add.reduceat(positives_T + negatives_T, first)
    ends_T = np.array([0.0, *scores.edges, 1.0])
    middles_T = (ends_T[1:] + ends_T[:-1]) / 2.0
    sums_T = np.add.reduceat((positives_T + negatives_T) * middles_T, first)
    # The buckets are so narrow that their middles stand for the scores in them.
    means_T = np.where(counts_T > 0.0, sums_T / np.maximum(counts_T, 1e-9), middles_T[last])
    return ScoreCounts(
        label=scores.label,
        edges=tuple(scores.edges[index] for index in last[:-1]),
        positives=tuple(np.add.reduceat(positives_T, first).tolist()),
        negatives=tuple(np.add.reduceat(negatives_T, first).tolist()),
        means=tuple(means_T.tolist()),
    )
