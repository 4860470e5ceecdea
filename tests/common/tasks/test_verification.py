"""Embeddings and anomaly scores: losses of single records, and error rates worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn

from common.tasks import EXACT_BUCKETS, BaselinePrediction, PairMetrics, open_task
from common.tasks.parts.pairs import compute_verification
from common.types import BadInput


def embedding(**settings: Any) -> Any:
    return open_task({"kind": "embedding", "labels": ["ann", "bob", "cem"], "unseen": ["eve", "fay"], **settings}, "t")


def anomaly(**settings: Any) -> Any:
    return open_task({"kind": "anomaly", "normal": "ok", "anomalous": "ill", **settings}, "t")


def test_error_rates_of_three_records_by_hand() -> None:
    # Pairs: (0, 1) equal with cosine .8; (0, 2) and (1, 2) unequal with cosines 0 and .6.
    vectors = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 5.0]])
    values = compute_verification(vectors, torch.tensor([7, 7, 8]))
    assert values == {"eer": 0.0, "tar_at_far_1": 1.0, "tar_at_far_10": 1.0}
    swapped = compute_verification(vectors, torch.tensor([7, 8, 7]))
    assert swapped["eer"] == 1.0 or swapped["eer"] == 0.75
    assert swapped["tar_at_far_10"] == 0.0


def test_error_rates_are_those_of_the_roc_curve() -> None:
    rng = np.random.default_rng(0)
    identity = rng.integers(0, 6, 300)
    vectors = rng.normal(size=(6, 5))[identity] + 1.2 * rng.normal(size=(300, 5))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    first, second = np.triu_indices(300, 1)
    far, tar, _ = roc_curve(identity[first] == identity[second], (unit @ unit.T)[first, second])
    values = compute_verification(torch.from_numpy(vectors), torch.from_numpy(identity))
    assert values["eer"] == pytest.approx(far[np.argmin(np.abs(far - (1 - tar)))], abs=2e-3)
    assert values["tar_at_far_10"] == pytest.approx(np.interp(0.10, far, tar), abs=2e-3)
    assert values["tar_at_far_1"] == pytest.approx(np.interp(0.01, far, tar), abs=2e-3)


def test_without_pairs_of_both_sorts_error_rates_are_undefined() -> None:
    for identities in ([], [1], [1, 1], [1, 2]):
        values = compute_verification(torch.randn(len(identities), 3), torch.tensor(identities, dtype=torch.int64))
        assert all(math.isnan(value) for value in values.values())


def test_a_head_that_starts_from_features_is_at_first_as_good_as_they_are_and_then_better() -> None:
    """Identities differ in a few directions, records of one identity in others, where new identities differ too."""
    rng = np.random.default_rng(0)
    names = [f"p{number}" for number in range(40)]
    task = embedding(labels=names[:30], unseen=names[30:], start="features", head={"bias": False})
    identity = np.repeat(np.arange(40), 12)
    rows = np.concatenate([rng.normal(size=(40, 8))[identity], 2.0 * rng.normal(size=(480, 8))], axis=1)
    features = nn.functional.normalize(torch.from_numpy(rows).float(), dim=1)
    labels = torch.from_numpy(identity)
    head = task.head(16)
    assert torch.equal(head(features), features)
    before = task.pair_metrics(head(features), labels)
    assert before == compute_verification(features[360:], labels[360:])
    optimizer = torch.optim.SGD(head.parameters(), lr=2.0)
    for _ in range(200):
        optimizer.zero_grad()
        task.losses(head(features), labels)[:360].mean().backward()
        optimizer.step()
    assert task.pair_metrics(head(features), labels)["eer"] < 0.6 * before["eer"]


@pytest.mark.parametrize("settings", [{"dim": 3, "head": {"bias": False}}, {"head": {"bias": True}}, {}])
def test_a_head_that_starts_from_features_is_square_and_linear(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"start: features: expected `head: \{bias: false\}`"):
        embedding(start="features", **settings)


def test_an_unseen_identity_has_no_loss_no_gradient_and_no_part_in_accuracy() -> None:
    task = embedding()
    outputs = torch.randn(4, 3, requires_grad=True)
    labels = torch.stack([task.codec.encode([name]) for name in ("ann", "eve", "fay", "cem")])
    losses = task.losses(outputs, labels)
    losses.sum().backward()
    assert losses[1] == losses[2] == 0.0 and losses[0] > 0
    assert outputs.grad is not None and not outputs.grad[1:3].any() and outputs.grad[0].any()
    statistic = task.statistic(EXACT_BUCKETS)
    assert statistic.rows(outputs, labels)[:, 0].tolist() == [1, 0, 0, 1]
    assert float(statistic.sums(outputs, labels)[0]) == 2.0


def test_the_margin_makes_the_loss_larger_and_a_new_head_has_a_finite_gradient() -> None:
    outputs, labels = torch.zeros(1, 3, requires_grad=True), torch.tensor([1])
    plain, strict = embedding(margin=0.0), embedding(margin=0.3)
    assert float(plain.losses(outputs, labels).detach()) == pytest.approx(math.log(3))
    assert float(strict.losses(outputs, labels).detach()) == pytest.approx(
        math.log(1 + 2 * math.exp(0.3 * 8)), rel=1e-5
    )
    strict.losses(outputs, labels).sum().backward()
    assert outputs.grad is not None and 0 < float(outputs.grad.norm()) < 12


def test_directions_are_a_simplex_where_it_fits_and_unit_vectors_where_not() -> None:
    corners = embedding()._directions(3)
    torch.testing.assert_close(corners @ corners.T, 1.5 * torch.eye(3, dtype=torch.float64) - 0.5)
    crowded = embedding(dim=2)._directions(2)
    assert crowded.shape == (3, 2)
    torch.testing.assert_close(crowded.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_identities_that_are_seen_and_unseen_are_refused() -> None:
    with pytest.raises(BadInput, match="unseen: expected identities that are not among labels, got 'ann'"):
        embedding(unseen=["ann"])


def test_training_brings_records_of_unseen_identities_together() -> None:
    """Identity lies in few of many directions; the rest is loud."""
    generator = torch.Generator().manual_seed(0)
    task = open_task({"kind": "embedding", "labels": [f"s{i}" for i in range(12)], "unseen": ["u", "v", "w"]}, "t")
    centres = torch.randn(15, 4, generator=generator)
    labels = torch.arange(15).repeat(40)
    features = torch.cat([centres[labels], 1.5 * torch.randn(600, 16, generator=generator)], dim=1)
    features[:, :4] += 0.3 * torch.randn(600, 4, generator=generator)
    assert isinstance(task, PairMetrics)
    before = compute_verification(features[labels >= 12], labels[labels >= 12])["eer"]
    head = task.head(20)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        task.losses(head(features), labels).mean().backward()
        optimizer.step()
    after = task.pair_metrics(head(features), labels)["eer"]
    assert after < 0.6 * before


def test_only_normal_records_teach_and_the_distance_from_one_is_the_score() -> None:
    task = anomaly()
    outputs = torch.tensor([[0.9], [0.9], [1.7], [-0.2]], requires_grad=True)
    labels = torch.tensor([0, 1, 0, 1])
    losses = task.losses(outputs, labels)
    torch.testing.assert_close(losses.detach(), torch.tensor([0.005, 0.0, 0.245, 0.0]))
    losses.sum().backward()
    assert outputs.grad is not None and outputs.grad[[1, 3]].abs().sum() == 0
    assert task.codec.decode(outputs) == [["ok"], ["ok"], ["ill"], ["ill"]]


def test_auroc_is_that_of_the_distance() -> None:
    task, generator = anomaly(), torch.Generator().manual_seed(0)
    outputs = 1 + torch.randn(500, 1, generator=generator) * torch.linspace(0.1, 1.0, 500)[:, None]
    labels = (torch.rand(500, generator=generator) < torch.linspace(0, 1, 500)).long()
    expected = roc_auc_score(labels, (outputs[:, 0] - 1).abs())
    statistic = task.statistic(EXACT_BUCKETS)
    assert statistic.values(statistic.sums(outputs, labels))["auroc"] == pytest.approx(expected, abs=2e-3)


def test_a_bias_is_refused_because_it_alone_would_call_every_record_normal() -> None:
    with pytest.raises(BadInput, match="expected bias: false"):
        anomaly(head={"bias": True})
    with pytest.raises(BadInput, match="expected another name"):
        anomaly(anomalous="ok")
    head = anomaly().head(3)
    assert isinstance(head, nn.Linear) and head.bias is None


def test_a_baseline_predicts_the_majority_the_distance_to_the_mean_normal_record_and_the_features() -> None:
    known = torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]])
    features = torch.tensor([[1.0, 0.0], [4.0, 4.0]])
    counted = open_task({"kind": "classification", "labels": ["a", "b", "c"]}, "t")
    assert isinstance(counted, BaselinePrediction)
    guesses = counted.predict_baseline(features, known, torch.tensor([1, 1, 2]))
    assert counted.codec.decode(guesses) == [["b"], ["b"]]
    torch.testing.assert_close(guesses.softmax(dim=1)[0], torch.tensor([0.0, 2 / 3, 1 / 3]))
    score = anomaly()
    assert isinstance(score, BaselinePrediction)
    # The third training record is anomalous: the mean of the others is (1, 0), and (4, 4) is 5 away.
    torch.testing.assert_close(
        score.predict_baseline(features, known, torch.tensor([0, 0, 1])) - 1.0, torch.tensor([[0.0], [5.0]])
    )
    task = embedding()
    assert isinstance(task, BaselinePrediction)
    assert torch.equal(task.predict_baseline(features, known, torch.tensor([0, 1, 0])), features)
