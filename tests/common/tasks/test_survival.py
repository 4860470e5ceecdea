"""Survival: what cells say, hazards and baselines, and metrics against definitions that compare records one by one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.tasks import EXACT_BUCKETS, NOISED_BUCKETS, Task, open_task
from common.tasks.parts.curves import compute_concordance
from common.tasks.survival import mix
from common.types import BadInput, BadRecord

ENDS = [10.0, 20.0, 50.0, 100.0]


def survival(**changes: Any) -> Task:
    return open_task({"kind": "survival", "boundaries": ENDS, **changes}, "tasks.death")


@pytest.mark.parametrize(
    ("time", "event", "label"),
    [
        ("0", "1", [1, -1, -1, -1]),
        ("10", "1", [1, -1, -1, -1]),
        ("10.5", "1.0", [0, 1, -1, -1]),
        ("100", "1", [0, 0, 0, 1]),
        ("100.1", "1", [0, 0, 0, 0]),
        ("1e9", "0", [0, 0, 0, 0]),
        ("0", "0", [-1, -1, -1, -1]),
        ("4.9", "0", [-1, -1, -1, -1]),
        ("5", "0", [0, -1, -1, -1]),
        ("10", "0", [0, -1, -1, -1]),
        ("34", "0", [0, 0, -1, -1]),
        ("35", "0", [0, 0, 0, -1]),
    ],
)
def test_a_record_is_known_until_its_event_or_half_of_the_interval_in_which_it_was_censored(
    time: str, event: str, label: list[int]
) -> None:
    assert survival().codec.encode([time, event]).tolist() == label


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["-0.5", "1"], "expected a time of 0 or more, got a negative one"),
        (["777x", "1"], "expected a number as the time"),
        (["inf", "1"], "expected a number as the time"),
        (["", "1"], "expected a number as the time"),
        (["7", "2"], "expected 1 for an event or 0 for none"),
        (["7", ""], "expected 1 for an event or 0 for none"),
        (["7"], "expected two columns"),
        (["7", "1", "0"], "expected two columns"),
    ],
)
def test_a_bad_record_is_told_in_a_sentence_without_its_content(cells: list[str], said: str) -> None:
    with pytest.raises(BadRecord, match=said) as caught:
        survival().codec.encode(cells)
    assert "7" not in str(caught.value)


def test_a_time_after_the_last_boundary_is_refused_where_the_task_says_so() -> None:
    task = survival(outside="refuse")
    assert task.codec.encode(["100", "1"]).tolist() == [0, 0, 0, 1]
    with pytest.raises(BadRecord, match="until the task's last boundary"):
        task.codec.encode(["100.5", "1"])


@pytest.mark.parametrize("ends", [[0, 1], [2, 1], [1, 1], [-1, 1], []])
def test_boundaries_ascend_from_above_zero(ends: list[float]) -> None:
    with pytest.raises(BadInput, match="boundaries"):
        survival(boundaries=ends)


def test_the_loss_is_the_likelihood_of_what_is_known() -> None:
    task, outputs = survival(variation=1.0), torch.tensor([[-1.0, 0.5, 2.0, 0.3]], dtype=torch.float64)
    hazard = outputs.sigmoid()[0].tolist()
    for label, likelihood in (
        ([1, -1, -1, -1], hazard[0]),
        ([0, 0, 1, -1], (1 - hazard[0]) * (1 - hazard[1]) * hazard[2]),
        ([0, 0, -1, -1], (1 - hazard[0]) * (1 - hazard[1])),
        ([-1, -1, -1, -1], 1.0),
    ):
        assert float(task.losses(outputs, torch.tensor([label]))) == pytest.approx(-math.log(likelihood))


def test_mixing_keeps_the_mean_and_shortens_what_differs_between_intervals() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0]])
    assert mix(values, 0.5).tolist() == [[2.0, 2.5, 4.5]]
    torch.testing.assert_close(mix(values, 0.01).mean(), values.mean())
    assert mix(values, 1.0).tolist() == values.tolist()


def count(task: Any, labels: Tensor) -> np.ndarray[Any, Any]:
    return task.count_labels(labels).double().sum(dim=0).numpy()


def draw(task: Task, num_records: int, seed: int, horizon: float = 130.0) -> tuple[list[list[str]], Tensor]:
    rng = np.random.default_rng(seed)
    times, events = rng.exponential(60.0, num_records).clip(0, horizon), rng.random(num_records) < 0.6
    cells = [[f"{time:.3f}", str(int(event))] for time, event in zip(times, events, strict=True)]
    return cells, torch.stack([task.codec.encode(each) for each in cells])


def test_a_record_counts_once_wherever_it_ends() -> None:
    task = survival()
    rows = task.count_labels(draw(task, 300, 0)[1])
    assert set(rows.sum(dim=1).tolist()) == {0.0, 1.0} and (rows >= 0).all()


def test_no_label_whatever_is_known_of_it_counts_more_than_one_record() -> None:
    labels = torch.tensor(list(itertools.product((-1, 0, 1), repeat=len(ENDS))))
    assert float(survival().count_labels(labels).norm(dim=1).max()) == 1.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_outputs_that_are_no_numbers_are_bounded_too(value: float) -> None:
    task = survival()
    outputs = torch.zeros(3, len(ENDS))
    outputs[0, 1], outputs[1] = value, value
    labels = torch.stack([task.codec.encode(["60", "1"])] * 3)
    for buckets in (NOISED_BUCKETS, EXACT_BUCKETS):
        rows = task.statistic(buckets).rows(outputs, labels)
        assert rows.isfinite().all() and float(rows.norm(dim=1).max()) <= task.statistic(buckets).bound
    assert task.codec.decode(outputs)[2] == ["10", "1"]


def test_the_baseline_is_the_observed_hazard_of_each_interval() -> None:
    task = survival(variation=0.2)
    labels = draw(task, 500, 1)[1]
    offset = torch.tensor(task.compute_offset(count(task, labels), 0.0))
    hazard = mix(offset.unsqueeze(0), 0.2).sigmoid()[0]
    for interval in range(len(ENDS)):
        known = labels[:, interval][labels[:, interval] >= 0]
        assert float(hazard[interval]) == pytest.approx(float(known.double().mean()))


def test_noise_draws_the_baseline_toward_one_hazard_and_leaves_it_near_the_truth() -> None:
    task, rng = survival(boundaries=[10.0 * at for at in range(1, 11)]), np.random.default_rng(2)
    labels = draw(task, 1500, 2)[1]
    sums = count(task, labels)
    truth = mix(torch.tensor(task.compute_offset(sums, 0.0)).unsqueeze(0), task.variation)[0]
    errors = {}
    for deviation in (1.0, 40.0):
        found = [
            mix(torch.tensor(task.compute_offset(sums + deviation * rng.normal(size=20), deviation)).unsqueeze(0), 0.1)
            for _ in range(50)
        ]
        errors[deviation] = float((torch.cat(found) - truth).square().mean().sqrt())
    assert errors[1.0] < 0.05 and errors[40.0] < 0.6


def test_the_prediction_is_the_median_time() -> None:
    task = survival(variation=1.0)
    hazards = torch.tensor([[0.25, 1 / 3, 0.9, 0.5], [0.5, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1], [0.3, 0.5, 0.1, 0.1]])
    cells = task.codec.decode(torch.logit(hazards.double()))
    # 0.75, 0.5; 0.5; never; 0.7, 0.35 of which 0.5 lies 4/7 of the way.
    assert [event for _, event in cells] == ["1", "1", "0", "1"]
    assert [float(time) for time, _ in cells] == pytest.approx([20.0, 10.0, 100.0, 10.0 + 10.0 * 4 / 7])


def test_people_read_a_time_and_whether_it_lies_later() -> None:
    task: Any = survival(variation=1.0)
    cells = task.codec.decode(torch.tensor([[1.0, 0.0, 0.0, 0.0], [-9.0, -9.0, -9.0, -9.0]]))
    assert [task.join_cells(each) for each in cells] == ["6.8394", ">100"]  # 5 / sigmoid(1)


def test_what_is_served_is_the_lost_part_of_the_time_and_the_curve() -> None:
    task: Any = survival(variation=1.0)
    assert task.name_served(4) == ["risk", "survival_10", "survival_20", "survival_50", "survival_100"]
    served = task.serve(torch.logit(torch.tensor([[0.5, 0.2, 0.25, 0.0001]])))[0].tolist()
    assert served[1:] == pytest.approx([0.5, 0.4, 0.3, 0.29997])
    # Of 100: 7.5, 4.5, 10.5 and 15 are lived, as areas under straight lines.
    assert served[0] == pytest.approx(1 - (7.5 + 4.5 + 10.5 + 14.99925) / 100)


# --- metrics against definitions -------------------------------------------------------------------------------------


def find_end(label: list[int]) -> tuple[int, bool]:
    """The number of intervals that a record survived, and whether its event followed."""
    return label.count(0), 1 in label


def compare_pairs(labels: list[list[int]], risks: list[float]) -> float:
    won = pairs = 0.0
    for (one, first), (other, second) in itertools.permutations(zip(labels, risks, strict=True), 2):
        survived, event = find_end(one)
        if event and other[survived] == 0:
            pairs += 1
            won += 1.0 if first > second else 0.5 if first == second else 0.0
    return won / pairs


def estimate_curve(labels: list[list[int]]) -> list[float]:
    """Kaplan and Meier's curve of events."""
    curve, left = [], 1.0
    for at in range(len(ENDS)):
        known = [label[at] for label in labels if label[at] >= 0]
        left *= 1.0 - sum(known) / len(known)
        curve.append(left)
    return curve


def estimate_censoring(labels: list[list[int]]) -> list[float]:
    """The probability of being observed until the end of each interval; censoring comes before events."""
    curve, left = [], 1.0
    for at in range(len(ENDS)):
        ends = [find_end(label) for label in labels]
        begun = [(survived, event) for survived, event in ends if survived >= at]
        left *= 1.0 - sum(survived == at and not event for survived, event in begun) / len(begun)
        curve.append(left)
    return curve


def score_by_brier(labels: list[list[int]], survival_BK: np.ndarray[Any, Any]) -> float:
    observed, widths, total = estimate_censoring(labels), np.diff([0.0, *ENDS]) / ENDS[-1], 0.0
    for label, predicted in zip(labels, survival_BK, strict=True):
        survived, event = find_end(label)
        for at in range(len(ENDS)):
            if at < survived:
                total += widths[at] * (1.0 - predicted[at]) ** 2 / observed[at]
            elif event:
                total += widths[at] * predicted[at] ** 2 / observed[survived]
    return total / len(labels)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), variation=st.sampled_from([0.05, 0.5, 1.0]))
def test_metrics_are_those_of_their_definitions(seed: int, variation: float) -> None:
    task = survival(variation=variation)
    labels = torch.cat([draw(task, 60, seed)[1], torch.tensor([[0, 0, 0, 0], [1, -1, -1, -1]])])
    outputs = torch.randn(len(labels), len(ENDS), generator=torch.Generator().manual_seed(seed)) - 1.0
    curves = task.codec.predict_survival(outputs).numpy()
    begun = np.concatenate([np.ones((len(curves), 1)), curves[:, :-1]], axis=1)
    risks = (1.0 - (begun + curves) / 2 @ (np.diff([0.0, *ENDS]) / ENDS[-1])).tolist()
    rows = labels.tolist()
    statistic = task.statistic(EXACT_BUCKETS)
    found = statistic.values(statistic.sums(outputs, labels))
    assert list(found) == ["c_index", "brier", "calibration_error", "predicted_risk", "observed_risk"]
    assert found["c_index"] == pytest.approx(compare_pairs(rows, risks), abs=0.005)
    assert found["brier"] == pytest.approx(score_by_brier(rows, curves))
    seen = np.array(estimate_curve(rows))
    assert found["observed_risk"] == pytest.approx(1 - seen[-1])
    assert found["predicted_risk"] == pytest.approx(float(1 - curves[:, -1].mean()))
    distance = np.abs(curves.mean(axis=0) - seen) @ (np.diff([0.0, *ENDS]) / ENDS[-1])
    assert found["calibration_error"] == pytest.approx(float(distance))


def test_without_censoring_the_brier_score_is_a_mean_of_squares() -> None:
    task = survival()
    times = np.random.default_rng(4).exponential(40.0, 200)
    labels = torch.stack([task.codec.encode([str(time), "1"]) for time in times])
    outputs = torch.randn(200, len(ENDS), generator=torch.Generator().manual_seed(4))
    squares = (task.codec.predict_survival(outputs).numpy() - (times[:, None] > np.array(ENDS))) ** 2
    statistic = task.statistic(EXACT_BUCKETS)
    expected = squares.mean(axis=0) @ (np.diff([0.0, *ENDS]) / ENDS[-1])
    assert statistic.values(statistic.sums(outputs, labels))["brier"] == pytest.approx(float(expected))


def test_a_baseline_tells_no_record_from_another_and_is_calibrated() -> None:
    task = survival()
    labels = draw(task, 400, 5)[1]
    outputs = task.predict_baseline(torch.zeros(400, 3), torch.zeros(400, 3), labels)
    statistic = task.statistic(EXACT_BUCKETS)
    found = statistic.values(statistic.sums(outputs, labels))
    assert found["c_index"] == 0.5
    assert found["calibration_error"] == pytest.approx(0.0, abs=1e-6)
    assert found["predicted_risk"] == pytest.approx(found["observed_risk"])


def test_pairs_of_one_group_of_intervals_are_not_compared_where_noise_is_added() -> None:
    task = survival(boundaries=[float(at) for at in range(1, 9)])
    assert task.statistic(NOISED_BUCKETS).size == 5 * 8 + 1 + 16 * (2 * 4 + 1)
    # The one with a higher risk has its event first, in the same group of two intervals: no pair there.
    labels = torch.stack([task.codec.encode([time, "1"]) for time in ("1", "2")])
    outputs = torch.tensor([[3.0] * 8, [-3.0] * 8])
    for buckets, expected in ((EXACT_BUCKETS, 1.0), (NOISED_BUCKETS, math.nan)):
        statistic = task.statistic(buckets)
        found = statistic.values(statistic.sums(outputs, labels))["c_index"]
        assert found == pytest.approx(expected, nan_ok=True)


def test_numbers_of_events_and_of_others_that_noise_made_negative_are_no_pairs() -> None:
    # In the first interval -2 events; in the second 4, which are riskier, and 2 others.
    cells = np.array([[-1.0, 0.0, 0.0, 0.0, 2.0], [-1.0, 4.0, 0.0, 0.0, 0.0]])
    assert compute_concordance(cells, clip=True) == 1.0
    # -4 events and -2 others have a positive product.
    assert math.isnan(compute_concordance(np.array([[0.0, 0.0, -2.0], [-4.0, 0.0, 0.0]]), clip=True))


def test_a_site_without_events_has_no_c_index() -> None:
    task = survival()
    labels = torch.stack([task.codec.encode(["70", "0"]), task.codec.encode(["1000", "0"])])
    statistic = task.statistic(EXACT_BUCKETS)
    found = statistic.values(statistic.sums(torch.randn(2, 4), labels))
    assert math.isnan(found["c_index"]) and found["observed_risk"] == 0.0
