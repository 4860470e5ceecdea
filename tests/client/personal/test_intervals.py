"""Intervals over held-out units: Wilson's where it applies, and coverage where it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.personal.intervals import (
    Estimate,
    average_estimates,
    average_heads,
    compute_difference,
    estimate_metrics,
)
from client.personal.metrics import Predictions
from common.tasks import open_task
from common.tasks.parts.rates import compute_wilson_interval

CLASSES = open_task({"kind": "classification", "labels": ["a", "b"]}, "t")


def predictions_of(right: list[bool], unit_R: list[int] | None = None) -> Predictions:
    """Records of class a that are predicted right or wrong."""
    outputs = torch.tensor([[1.0, 0.0] if each else [0.0, 1.0] for each in right])
    units = torch.tensor(unit_R) if unit_R is not None else torch.arange(len(right))
    return Predictions(outputs, torch.zeros(len(right), dtype=torch.long), units)


def test_wilson_s_interval_is_that_of_the_literature() -> None:
    """81 of 263, 95 %: .2553 to .3662 (Newcombe 1998, method 3)."""
    assert compute_wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    # None of 20 (Newcombe's third example): 0 to .1611.
    assert compute_wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_accuracy_of_one_record_a_unit_has_wilson_s_interval() -> None:
    got = estimate_metrics(CLASSES, [predictions_of([True] * 81 + [False] * 182)])["accuracy"]
    assert got.value == pytest.approx(81 / 263)
    # The bootstrap's spread is within a tenth of the binomial one.
    assert got.interval == pytest.approx(compute_wilson_interval(81 / 263, 263), abs=0.012)


def test_where_all_units_are_right_the_interval_is_not_empty() -> None:
    assert estimate_metrics(CLASSES, [predictions_of([True] * 20)])["accuracy"].interval == pytest.approx(
        (0.8389, 1.0), abs=5e-5
    )


def test_a_patient_s_records_are_one_draw() -> None:
    """Ten records each, alike within a patient: ten times the records tell no more."""
    right, many = [True] * 14 + [False] * 6, [each for each in [True] * 14 + [False] * 6 for _ in range(10)]
    one = estimate_metrics(CLASSES, [predictions_of(right)])["accuracy"]
    ten = estimate_metrics(CLASSES, [predictions_of(many, [unit for unit in range(20) for _ in range(10)])])["accuracy"]
    assert ten.interval == pytest.approx(one.interval)
    assert ten.num_units == 20


@pytest.mark.slow
def test_the_interval_of_a_mean_over_sites_covers_the_truth() -> None:
    """A third of the sites has rate .5, two thirds have .8; 200 repetitions of 30 units a site."""
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(200):
        sites = [predictions_of((rng.random(30) < rate).tolist()) for rate in (0.5, 0.8, 0.8)]
        interval = average_estimates([estimate_metrics(CLASSES, [each]) for each in sites])["accuracy"].interval
        assert interval is not None
        inside += interval[0] <= 0.7 <= interval[1]
    assert inside >= 181, "95 % of 200 minus three standard deviations"


def test_an_undefined_metric_has_neither_value_nor_interval_and_is_left_out_of_the_mean() -> None:
    got = estimate_metrics(CLASSES, [predictions_of([True, False])])
    assert (got["auroc"].value, got["auroc"].interval) == (None, None)
    known = Estimate(0.5, 0.1, 10, is_rate=True)
    assert average_estimates([{"auroc": got["auroc"]}, {"auroc": known}])["auroc"].value == 0.5


def test_a_metric_that_is_no_rate_may_have_an_interval_beyond_one() -> None:
    task = open_task({"kind": "regression", "range": [0, 100]}, "t")
    labels = torch.linspace(0, 100, 41)
    got = estimate_metrics(task, [Predictions(torch.zeros(41, 1), labels, torch.arange(41))])["mae"]
    assert got.value == pytest.approx(float((labels - 50).abs().mean()))
    assert got.interval is not None and got.interval[0] < got.value < got.interval[1]
    # The standard error of a mean of 41 values, to the bootstrap's tenth.
    error = float((labels - 50).abs().std()) / 41**0.5
    assert got.interval[1] - got.interval[0] == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_two_heads_on_the_same_units_are_compared_unit_by_unit() -> None:
    """Agresti and Min (2005), their interval from counts: 12 and 4 of 100 units judged differently."""
    first = [True] * 70 + [True] * 12 + [False] * 4 + [False] * 14
    second = [True] * 70 + [False] * 12 + [True] * 4 + [False] * 14
    one, two = (estimate_metrics(CLASSES, [predictions_of(right)])["accuracy"] for right in (first, second))
    b, c, n = 12.5, 4.5, 102
    half = 1.959963984540054 * ((b + c) - (b - c) ** 2 / n) ** 0.5 / n
    assert compute_difference(one, two) == pytest.approx(((b - c) / n - half, (b - c) / n + half), abs=0.01)
    # The intervals of the two overlap, and would hide a difference twice as large.
    assert one.interval is not None and two.interval is not None and one.interval[0] < two.interval[1]


def test_a_head_does_not_differ_from_itself_and_few_units_are_no_certainty() -> None:
    one = estimate_metrics(CLASSES, [predictions_of([True, True, False])])["accuracy"]
    low, high = compute_difference(one, one) or (1.0, 0.0)
    assert low < 0.0 < high
    two = estimate_metrics(CLASSES, [predictions_of([True, True])])["accuracy"]
    none = estimate_metrics(CLASSES, [predictions_of([False, False])])["accuracy"]
    low, high = compute_difference(two, none) or (0.0, 0.0)
    assert low < 0.0, "two units that agree decide nothing"


def test_heads_of_several_sites_are_averaged_draw_by_draw() -> None:
    right = [True] * 8 + [False] * 12
    one = estimate_metrics(CLASSES, [predictions_of(right)])
    mean = average_heads([one, one])
    assert mean["accuracy"] == one["accuracy"] and mean["accuracy"].draws == one["accuracy"].draws
