"""A site's class mix, the guard, and the head behind an alignment.

# Shapes: C classes, D features, R records.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.aligners import Alignment, SourceMoments
from client.aligners.parts.guard import MOST_NOISE, choose_guarded, compare_hits
from client.aligners.parts.head import UniformHead, keep_head, place_head, read_log_shares
from client.aligners.parts.linear import compute_power
from client.aligners.parts.mix import TIES, compute_evidence, estimate_mix, read_mix
from common.tasks import open_task
from common.types import BadInput

LABELS = ["a", "b", "c"]
SOURCE = SourceMoments(np.eye(3, 4), 0.1 * np.eye(4), np.array([0.5, 0.3, 0.2]))


# --- the mix ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), min_size=2, max_size=6))
def test_the_evidence_is_that_of_labels_drawn_one_after_the_other(counts: list[int]) -> None:
    """Polya's urn: each label has the share that it had so far, prior weights included."""
    weight_C = np.linspace(0.5, 3.0, len(counts))
    seen, logarithm = weight_C.copy(), 0.0
    for number, count in enumerate(counts):
        for _ in range(count):
            logarithm += math.log(seen[number] / seen.sum())
            seen[number] += 1.0
    found = compute_evidence(np.array(counts, np.float64), weight_C)
    assert found == pytest.approx(logarithm, abs=1e-7)


def test_many_labels_say_the_mix_and_few_keep_the_released_shares() -> None:
    shares_C = np.array([0.5, 0.3, 0.2])
    many_C = estimate_mix(np.array([20.0, 180.0, 800.0]), shares_C)
    np.testing.assert_allclose(many_C, [0.02, 0.18, 0.8], atol=0.01)
    same_C = estimate_mix(np.array([5.0, 3.0, 2.0]), shares_C)
    np.testing.assert_allclose(same_C, shares_C, atol=1e-3)
    np.testing.assert_allclose(estimate_mix(np.zeros(3), shares_C), shares_C, atol=1e-12)
    assert len(TIES) == 6


def test_a_mix_of_other_labels_is_refused_with_the_nearest() -> None:
    with pytest.raises(BadInput, match="tasks.t.mix: expected labels of the task, got 'bb' .nearest: 'b'"):
        read_mix({"a": 0.5, "bb": 0.5}, LABELS, "tasks.t.mix")


def test_a_label_that_a_declared_mix_does_not_name_has_next_to_no_share() -> None:
    mix_C = read_mix({"b": 0.25, "a": 0.75}, LABELS, "mix")
    np.testing.assert_allclose(mix_C, [0.75, 0.25, 0.0], atol=2e-4)
    assert mix_C.sum() == pytest.approx(1.0) and mix_C.min() > 0.0


# --- the guard -------------------------------------------------------------------------------------------------------


def test_hits_are_compared_in_standard_errors_over_units() -> None:
    unit_R = np.arange(10)
    hits = np.array([1, 1, 1, 1, 0, 0, 1, 1, 0, 0.0]), np.array([0, 0, 0, 0, 1, 0, 1, 1, 0, 0.0])
    # Four wins and one loss: 3 / sqrt(5).
    assert compare_hits(*hits, unit_R, np.ones(10)) == pytest.approx(3 / math.sqrt(5))
    # The same records of two patients: one has won, one has neither won nor lost.
    two_R = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    weight_R = np.array([0.25] * 4 + [1 / 6] * 6)
    assert compare_hits(*hits, two_R, weight_R) == pytest.approx((1 - 1 / 6) / math.hypot(1, 1 / 6))
    assert compare_hits(hits[0], hits[0], unit_R, np.ones(10)) == 0.0
    assert compare_hits(np.zeros(0), np.zeros(0), np.zeros(0, np.int64), np.zeros(0)) == 0.0


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({"served": 0, "first": 0, "second": 0}, "first"),
        ({"served": 0.1, "first": 0, "second": 0.9}, "served"),
        ({"served": 1.1, "first": 0, "second": 1.5}, "served"),
        ({"served": 1.1, "first": 0, "second": 2.2}, "second"),
        ({"served": 0, "first": 5, "second": 5.5}, "first"),
        ({"served": 0, "first": 5, "second": 6.5}, "second"),
    ],
)
def test_the_first_alignment_stands_unless_it_loses_and_the_next_has_to_win(
    scores: dict[str, float], chosen: str
) -> None:
    def compare(one: str, other: str) -> float:
        return scores[one] - scores[other]

    assert choose_guarded("served", ["first", "second"], compare, noise=MOST_NOISE) == chosen


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({"served": 0, "first": 0.9, "second": 0.9}, "served"),
        ({"served": 0, "first": 1.1, "second": 2.0}, "first"),
        ({"served": 0, "first": 0.5, "second": 1.1}, "second"),
    ],
)
def test_where_moments_are_mostly_noise_an_alignment_has_to_win(scores: dict[str, float], chosen: str) -> None:
    def compare(one: str, other: str) -> float:
        return scores[one] - scores[other]

    assert choose_guarded("served", ["first", "second"], compare, noise=MOST_NOISE + 0.01) == chosen


# --- noise in the moments --------------------------------------------------------------------------------------------


def test_means_are_moved_together_by_what_noise_has_driven_them_apart() -> None:
    """Mean squared error over many releases: next to none of the noise is left where classes have one mean."""
    rng = np.random.default_rng(0)
    for apart, most in ((0.0, 0.35), (0.6, 0.95)):
        true_CD = 0.5 * np.eye(4, 40)[[0, 0, 0, 0]] + apart * np.eye(4, 40, k=3)
        before, after = 0.0, 0.0
        for _ in range(40):
            noise_C = np.array([0.1, 0.1, 0.15, 0.1])
            released_CD = true_CD + noise_C[:, None] * rng.normal(size=(4, 40))
            noisy = SourceMoments(released_CD, np.eye(40), np.full(4, 0.25), noise_C)
            before += float(np.square(noisy.means_CD - true_CD).sum())
            after += float(np.square(noisy.shrink_means().means_CD - true_CD).sum())
        assert after < most * before
    exact = SourceMoments(true_CD, np.eye(40), np.full(4, 0.25))
    np.testing.assert_array_equal(exact.shrink_means().means_CD, true_CD)
    np.testing.assert_allclose(
        SourceMoments(true_CD, np.eye(40), np.full(4, 0.25), np.zeros(4)).shrink_means().means_CD, true_CD, atol=1e-12
    )


def test_the_noise_of_a_mix_is_that_in_the_mean_of_a_records_class() -> None:
    noisy = SourceMoments(np.zeros((2, 9)), np.eye(9), np.full(2, 0.5), np.array([0.1, 0.3]))
    assert noisy.compute_noise(np.array([0.75, 0.25])) == pytest.approx(math.sqrt(9 * (0.75 * 0.01 + 0.25 * 0.09)))
    assert SOURCE.compute_noise(SOURCE.shares_C) == 0.0


# --- heads -----------------------------------------------------------------------------------------------------------


def test_a_head_behind_an_alignment_says_what_the_head_says_of_moved_records_at_another_mix() -> None:
    rng = np.random.default_rng(0)
    head = torch.nn.Linear(4, 3)
    alignment = Alignment(np.array([0.5, 1.0, 2.0, 1.5]), np.array([0.1, 0.0, -0.2, 0.3]))
    mix_C = np.array([0.1, 0.2, 0.7])
    placed = place_head(head, SOURCE, alignment, mix_C, temperature=2.0)
    features = torch.from_numpy(rng.normal(size=(6, 4)).astype(np.float32))
    for row, outputs in zip(features, placed(features), strict=True):
        length = row.norm()
        moved = length * (row / length * torch.tensor([0.5, 1.0, 2.0, 1.5]) + torch.tensor([0.1, 0.0, -0.2, 0.3]))
        wanted = head(moved) / 2.0 + torch.log(torch.tensor(mix_C / SOURCE.shares_C)).float()
        torch.testing.assert_close(outputs, wanted)
    uniform = UniformHead(placed)(features)
    torch.testing.assert_close(uniform + torch.log(torch.tensor(mix_C)).float(), placed(features))


def test_a_head_that_is_served_for_a_prior_is_taken_for_that_prior() -> None:
    task = open_task(
        {
            "kind": "classification",
            "labels": LABELS,
            "head": {"prior": True},
            "prior": {"a": 0.5, "b": 0.25, "c": 0.25},
        },
        "t",
    )
    head = task.head(4)
    with torch.no_grad():
        head.fixed.offset.copy_(torch.tensor(task.served_offset()))  # type: ignore[attr-defined, union-attr, operator]
    np.testing.assert_allclose(np.exp(read_log_shares(head, SOURCE)), [0.5, 0.25, 0.25], rtol=1e-6)
    still = Alignment(np.ones(4), np.zeros(4))
    outputs = place_head(head, SOURCE, still, np.array([0.2, 0.3, 0.5]))(torch.ones(1, 4))
    # The weights are zero: what is left is the mix.
    torch.testing.assert_close(outputs.softmax(dim=1), torch.tensor([[0.2, 0.3, 0.5]]))
    np.testing.assert_allclose(np.exp(read_log_shares(torch.nn.Linear(4, 3), SOURCE)), SOURCE.shares_C)


def test_the_kept_head_says_what_the_head_says() -> None:
    head = torch.nn.Linear(4, 3)
    features = torch.randn(5, 4)
    torch.testing.assert_close(keep_head(head, SOURCE)(features), head(features))


def test_found_means_take_the_place_of_the_head() -> None:
    """Outputs of a discriminant: logarithm of a normal density times the mix, up to a constant of the record."""
    means_CD = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.5, 0.0], [0.0, 0.0, 1.0, 0.2]])
    mix_C = np.array([0.6, 0.3, 0.1])
    placed = place_head(torch.nn.Linear(4, 3), SOURCE, Alignment(np.eye(4), np.zeros(4), means_CD), mix_C)
    row = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    wanted = [
        math.log(share) - 0.5 * np.square([0.6, 0.8, 0, 0] - mean).sum() / 0.1
        for share, mean in zip(mix_C, means_CD, strict=True)
    ]
    outputs = placed(row)[0].double().numpy()
    np.testing.assert_allclose(outputs - outputs[0], np.array(wanted) - wanted[0], atol=1e-5)


def test_powers_of_a_covariance_multiply() -> None:
    spread_DD = np.random.default_rng(1).normal(size=(6, 6))
    covariance_DD = spread_DD @ spread_DD.T
    half_DD = compute_power(covariance_DD, 0.5)
    np.testing.assert_allclose(half_DD @ half_DD, covariance_DD, atol=1e-9)
    np.testing.assert_allclose(compute_power(covariance_DD, -1.0), np.linalg.inv(covariance_DD), rtol=1e-6)
