"""Metrics of sums against scikit-learn and torchmetrics, and where they are undefined."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import Tensor
from torchmetrics.functional.classification import multiclass_auroc

from common.tasks import EXACT_BUCKETS, Task, open_task


def classification(num_classes: int, **changes: Any) -> Task:
    labels = [f"c{index}" for index in range(num_classes)]
    return open_task({"kind": "classification", "labels": labels, **changes}, "task")


def values(task: Task, outputs: Tensor, labels: Tensor) -> dict[str, float]:
    statistic = task.statistic(EXACT_BUCKETS)
    return statistic.values(statistic.sums(outputs, labels))


def logits(count: int, width: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def classes(count: int, num_classes: int, seed: int) -> Tensor:
    extra = torch.randint(num_classes, (count - num_classes,), generator=torch.Generator().manual_seed(seed + 1))
    return torch.cat([torch.arange(num_classes), extra])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), num_classes=st.integers(3, 6))
def test_multiclass_metrics_are_scikit_learns(seed: int, num_classes: int) -> None:
    outputs, labels = logits(60, num_classes, seed), classes(60, num_classes, seed)
    truth, predicted, probabilities = labels.numpy(), outputs.argmax(1).numpy(), outputs.softmax(1).numpy()
    found = values(classification(num_classes), outputs, labels)
    matrices = sk.multilabel_confusion_matrix(truth, predicted)
    assert list(found) == ["accuracy", "balanced_accuracy", "auroc", "sensitivity", "specificity"]
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(truth, predicted))
    assert found["sensitivity"] == pytest.approx(sk.recall_score(truth, predicted, average="macro"))
    assert found["specificity"] == pytest.approx(np.mean(matrices[:, 0, 0] / matrices[:, 0].sum(1)))
    # One-against-rest on the raw columns: scikit-learn's own refuses float32 rows that do not sum to 1.
    areas = [sk.roc_auc_score(truth == k, probabilities[:, k]) for k in range(num_classes)]
    assert found["auroc"] == pytest.approx(np.mean(areas), abs=0.005)


@pytest.mark.parametrize(("positive", "index"), [(None, 1), ("c0", 0), ("c1", 1)])
def test_binary_metrics_are_about_the_positive_label(positive: str | None, index: int) -> None:
    outputs, labels = logits(200, 2, 5), classes(200, 2, 5)
    outputs[:, 1] += labels
    truth, predicted = labels.numpy() == index, outputs.argmax(1).numpy() == index
    found = values(classification(2, positive=positive), outputs, labels)
    assert found["sensitivity"] == pytest.approx(sk.recall_score(truth, predicted))
    assert found["specificity"] == pytest.approx(sk.recall_score(~truth, ~predicted))
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(truth, predicted))
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(truth, outputs.softmax(1)[:, index]), abs=0.003)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.8])
def test_metrics_of_predictions_are_at_the_declared_threshold(threshold: float) -> None:
    outputs, labels = logits(200, 2, 5), classes(200, 2, 5)
    predicted = outputs.softmax(1)[:, 0].numpy() > threshold
    found = values(classification(2, positive="c0", threshold=threshold), outputs, labels)
    truth = labels.numpy() == 0
    assert found["sensitivity"] == pytest.approx(sk.recall_score(truth, predicted))
    assert found["specificity"] == pytest.approx(sk.recall_score(~truth, ~predicted))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))


def test_each_label_has_metrics_at_its_own_threshold() -> None:
    outputs = logits(120, 2, 2)
    labels = (logits(120, 2, 3) + outputs > 0.3).long()
    found = values(
        open_task({"kind": "multilabel", "labels": ["a", "b"], "threshold": {"b": 0.2}}, "t"), outputs, labels
    )
    recalls = [
        sk.recall_score(labels[:, k].numpy(), outputs[:, k].sigmoid().numpy() > threshold)
        for k, threshold in enumerate((0.5, 0.2))
    ]
    assert found["sensitivity"] == pytest.approx(np.mean(recalls))


@pytest.mark.parametrize("scale", [1e-2, 1.0, 5.0])
def test_auroc_is_torchmetrics_exact_one_at_every_scale_of_scores(scale: float) -> None:
    outputs, labels = logits(400, 4, 1), classes(400, 4, 1)
    outputs = scale * (outputs + torch.nn.functional.one_hot(labels, 4))
    exact = float(multiclass_auroc(outputs.softmax(1), labels, num_classes=4))
    assert values(classification(4), outputs, labels)["auroc"] == pytest.approx(exact, abs=0.001)


def test_equal_scores_are_half_an_area() -> None:
    found = values(classification(3), torch.zeros(9, 3), torch.arange(9) % 3)
    assert found["auroc"] == 0.5
    assert found["accuracy"] == pytest.approx(1 / 3)


def test_classes_that_do_not_occur_are_left_out_and_not_counted_as_zero() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    outputs = torch.eye(4)[torch.tensor([0, 2, 1, 1])]
    found = values(classification(4), outputs, labels)
    assert found["balanced_accuracy"] == pytest.approx((0.5 + 1.0) / 2)
    # Class 0 wins two pairs and ties two of four, class 1 wins all; classes 2 and 3 have no positives.
    assert found["auroc"] == pytest.approx((0.75 + 1.0) / 2)


def test_a_single_class_leaves_auroc_undefined_without_a_warning() -> None:
    found = values(classification(2), logits(5, 2, 0), torch.zeros(5, dtype=torch.int64))
    assert math.isnan(found["auroc"])
    assert math.isnan(found["sensitivity"])
    assert math.isfinite(found["specificity"])
    assert math.isfinite(found["balanced_accuracy"])


def test_multilabel_metrics_are_means_over_labels_of_known_entries() -> None:
    outputs = logits(120, 3, 2)
    labels = (logits(120, 3, 3) + outputs > 0.3).long()
    labels[::4, 1] = -1
    task = open_task({"kind": "multilabel", "labels": ["a", "b", "c"]}, "task")
    found = values(task, outputs, labels)
    known = [labels[:, k] >= 0 for k in range(3)]
    truth = [labels[keep, k].numpy() for k, keep in enumerate(known)]
    score = [outputs[keep, k].sigmoid().numpy() for k, keep in enumerate(known)]
    pairs = list(zip(truth, score, strict=True))
    assert next(iter(found)) == "auroc"
    assert found["auroc"] == pytest.approx(np.mean([sk.roc_auc_score(t, s) for t, s in pairs]), abs=0.005)
    assert found["sensitivity"] == pytest.approx(np.mean([sk.recall_score(t, s > 0.5) for t, s in pairs]))
    assert found["specificity"] == pytest.approx(np.mean([sk.recall_score(1 - t, s <= 0.5) for t, s in pairs]))
    assert found["balanced_accuracy"] == pytest.approx(
        np.mean([sk.balanced_accuracy_score(t, s > 0.5) for t, s in pairs])
    )
    correct = np.concatenate([t == (s > 0.5) for t, s in pairs])
    assert found["accuracy"] == pytest.approx(correct.mean())


def test_regression_metrics_are_scikit_learns_in_the_targets_unit() -> None:
    task = open_task({"kind": "regression", "range": [36000, 36010]}, "task")
    labels = torch.stack([task.codec.encode([repr(36004 + 0.01 * index)]) for index in range(100)])
    outputs = ((labels - 36005) / 5).unsqueeze(1) + logits(100, 1, 0, 0.02)
    predicted = np.array([float(cell) for (cell,) in task.codec.decode(outputs)])
    truth = labels.double().numpy()
    found = values(task, outputs, labels)
    assert list(found) == ["mae", "rmse", "r2"]
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(truth, predicted))
    assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(truth, predicted))
    # A spread of 0.3 around 36000: float32 sums of squares would have lost it.
    assert found["r2"] == pytest.approx(sk.r2_score(truth, predicted), abs=1e-4)


def test_a_target_that_does_not_vary_leaves_r2_undefined() -> None:
    task = open_task({"kind": "regression", "range": [0, 1]}, "task")
    for count in (1, 3):
        found = values(task, torch.zeros(count, 1), torch.full((count,), 0.25))
        assert math.isnan(found["r2"])
        assert found["mae"] == pytest.approx(0.25)
