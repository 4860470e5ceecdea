"""Curves against direct counts, their bands against repeated draws, and what noise hides."""

from __future__ import annotations

import numpy as np
import pytest

from common.events import Outcomes, ScoreCounts
from common.report.curves import judge_calibration, trace_curves
from common.report.outcome_sections import ShownOutcomes, show_ranking


def count(scores: np.ndarray, truth: np.ndarray, edges: list[float], deviation: float = 0.0) -> ScoreCounts:
    """Counts of scores in ranges."""
    ends = [0.0, *edges, 1.0]
    positives, negatives = (np.histogram(scores[truth == value], ends)[0].astype(float) for value in (1, 0))
    return ScoreCounts(
        label="a", edges=tuple(edges), positives=tuple(positives), negatives=tuple(negatives), deviation=deviation
    )


RNG = np.random.default_rng(4)
SCORES = RNG.random(4000)
TRUTH = (RNG.random(4000) < SCORES).astype(int)
EDGES = [number / 20 for number in range(1, 20)]


def test_a_curve_goes_through_the_rates_of_every_threshold() -> None:
    found = trace_curves(count(SCORES, TRUTH, EDGES))
    assert found is not None
    for threshold in EDGES:
        above = threshold <= SCORES
        wrong, right = above[TRUTH == 0].mean(), above[TRUTH == 1].mean()
        assert np.interp(wrong, found.roc.xs, found.roc.ys) == pytest.approx(right, abs=0.001)
        precision = TRUTH[above].mean()
        assert np.interp(right, found.precision.xs, found.precision.ys) == pytest.approx(precision, abs=0.001)
    assert found.prevalence == pytest.approx(TRUTH.mean())
    assert found.precision.ys[-1] == pytest.approx(TRUTH.mean()), "at full recall nothing is left out"


def test_the_area_is_that_of_pairs() -> None:
    found = trace_curves(count(SCORES, TRUTH, EDGES))
    assert found is not None
    positives, negatives = SCORES[TRUTH == 1], SCORES[TRUTH == 0]
    pairs = (positives[:, None] > negatives[None, :]).mean()
    assert np.trapezoid(found.roc.ys, found.roc.xs) == pytest.approx(pairs, abs=0.01)


def test_a_band_of_noised_counts_holds_the_exact_curve() -> None:
    exact = count(SCORES, TRUTH, EDGES)
    truth = trace_curves(exact)
    assert truth is not None
    inside = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noised = ScoreCounts(
            label="a",
            edges=exact.edges,
            positives=tuple(np.add(exact.positives, 15 * rng.normal(size=20))),
            negatives=tuple(np.add(exact.negatives, 15 * rng.normal(size=20))),
            deviation=15.0,
        )
        found = trace_curves(noised)
        assert found is not None
        middle = slice(10, -10)
        exact_ys = np.interp(found.roc.xs, truth.roc.xs, truth.roc.ys)
        low, high, ys = (np.array(values)[middle] for values in (found.roc.low, found.roc.high, exact_ys))
        inside.append(np.mean((low <= ys) & (ys <= high)))
        assert all(np.diff(found.roc.ys) >= -1e-12), "noise makes no curve fall"
    assert np.mean(inside) > 0.85


def test_noise_that_hides_a_label_leaves_no_curve() -> None:
    assert trace_curves(count(SCORES[:50], TRUTH[:50], EDGES, deviation=30.0)) is None
    assert trace_curves(count(SCORES, np.ones(4000, int), EDGES)) is None, "no negative, no curve"
    assert judge_calibration([count(SCORES[:50], TRUTH[:50], EDGES, deviation=30.0)]) == []


def test_calibrated_scores_are_on_the_diagonal_and_others_are_not() -> None:
    points = judge_calibration([count(SCORES, TRUTH, EDGES)])
    assert len(points) >= 8 and sum(point.count for point in points) == pytest.approx(4000)
    assert sum(point.interval[0] <= point.predicted <= point.interval[1] for point in points) >= len(points) - 1
    assert all(point.low < point.predicted < point.high for point in points)
    sure = judge_calibration([count(np.where(SCORES > 0.5, 0.97, 0.03), TRUTH, EDGES)])
    assert all(not point.interval[0] <= point.predicted <= point.interval[1] for point in sure)


def test_noised_groups_are_as_large_as_their_noise_asks_for() -> None:
    exact, noised = count(SCORES, TRUTH, EDGES), count(SCORES, TRUTH, EDGES, deviation=100.0)
    assert 1 <= len(judge_calibration([noised])) < len(judge_calibration([exact]))
    assert all(point.count >= 3 * 100.0 for point in judge_calibration([noised]))


def test_where_mean_scores_are_known_a_point_stands_at_them() -> None:
    """Scores just above .5 are predicted as such, though their range reaches to 1."""
    counts = ScoreCounts(
        label="a", edges=(0.5,), positives=(10.0, 60.0), negatives=(90.0, 40.0), means=(0.1, 0.6), deviation=0.0
    )
    low, high = judge_calibration([counts])
    assert (low.predicted, low.observed) == (pytest.approx(0.1), pytest.approx(0.1))
    assert (high.predicted, high.observed, high.low, high.high) == (pytest.approx(0.6),) * 4


def test_curves_through_noise_have_bands_however_many_labels_there_are() -> None:
    exact = [count(SCORES, TRUTH, EDGES).model_copy(update={"label": name}) for name in "abc"]
    noised = [each.model_copy(update={"deviation": 5.0}) for each in exact]
    together = show_ranking([ShownOutcomes("t", Outcomes(scores=tuple(exact)))])
    apart = show_ranking([ShownOutcomes("t", Outcomes(scores=tuple(noised)))])
    assert len(together.figures) == 2 and not any("fill-opacity" in figure.svg for figure in together.figures)
    assert len(apart.figures) == 6 and all("fill-opacity" in figure.svg for figure in apart.figures)
    assert "standard deviation of 5.0 records" in apart.remarks[0]
