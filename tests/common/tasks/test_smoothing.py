"""Label smoothing: torch's own loss is the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from common.tasks import LossGradient, SmoothLoss, Task, open_task
from common.types import BadInput

SMOOTHING = 0.3
OUTPUTS = 3.0 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
CLASSES = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(1))
PRESENT = torch.randint(-1, 2, (40, 4), generator=torch.Generator().manual_seed(2))


def task(kind: str, **settings: Any) -> Task:
    return open_task({"kind": kind, "labels": ["a", "b", "c", "d"], **settings}, "task")


def test_the_smoothed_cross_entropy_and_its_gradient_are_torchs() -> None:
    own = task("classification", smoothing=SMOOTHING)
    leaf = OUTPUTS.clone().requires_grad_()
    expected = functional.cross_entropy(leaf, CLASSES, reduction="none", label_smoothing=SMOOTHING)
    torch.testing.assert_close(own.losses(OUTPUTS, CLASSES), expected.detach())
    assert isinstance(own, LossGradient)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(own.loss_gradient(OUTPUTS, CLASSES), gradient)


def test_the_smoothed_binary_cross_entropy_is_that_of_softer_labels() -> None:
    own = task("multilabel", smoothing=SMOOTHING)
    softer = PRESENT.double() * (1 - SMOOTHING) + SMOOTHING / 2
    entries = functional.binary_cross_entropy_with_logits(OUTPUTS, softer, reduction="none")
    torch.testing.assert_close(own.losses(OUTPUTS, PRESENT), (entries * (PRESENT >= 0)).sum(1))


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_a_weight_multiplies_the_whole_loss_of_its_records(kind: str) -> None:
    labels = CLASSES if kind == "classification" else (PRESENT > 0).long()
    plain = task(kind, smoothing=SMOOTHING)
    weighted = task(kind, smoothing=SMOOTHING, weights={"a": 5.0, "b": 5.0, "c": 5.0, "d": 5.0})
    heavy = weighted.losses(OUTPUTS, labels)
    if kind == "classification":
        torch.testing.assert_close(heavy, 5.0 * plain.losses(OUTPUTS, labels))
    leaf = OUTPUTS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(weighted.losses(leaf, labels).sum(), leaf)
    assert isinstance(weighted, LossGradient) and isinstance(plain, LossGradient)
    torch.testing.assert_close(weighted.loss_gradient(OUTPUTS, labels), gradient)
    ratio = weighted.loss_gradient(OUTPUTS, labels) / plain.loss_gradient(OUTPUTS, labels)
    heavy_BK = torch.ones(40, 4, dtype=torch.bool) if kind == "classification" else labels == 1
    torch.testing.assert_close(ratio, torch.where(heavy_BK, 5.0, 1.0).double())


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_no_smoothing_is_what_it_was_to_the_bit(kind: str) -> None:
    labels = CLASSES if kind == "classification" else PRESENT
    without, zero = task(kind), task(kind, smoothing=0.0)
    assert torch.equal(without.losses(OUTPUTS, labels), zero.losses(OUTPUTS, labels))
    reference = functional.cross_entropy(OUTPUTS, CLASSES, reduction="none")
    assert kind != "classification" or torch.equal(without.losses(OUTPUTS, labels), reference)


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_the_length_of_a_first_gradient_shrinks_with_smoothing(kind: str) -> None:
    labels = CLASSES if kind == "classification" else (PRESENT > 0).long()
    own = task(kind, smoothing=SMOOTHING)
    assert isinstance(own, SmoothLoss) and isinstance(own, LossGradient)
    lengths = own.loss_gradient(torch.zeros(40, 4), labels).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((40,), own.first_slope))


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 2.0])
def test_a_smoothing_outside_its_range_is_one_sentence(kind: str, smoothing: float) -> None:
    with pytest.raises(BadInput, match=r"task\.smoothing: expected a number (of at least|below) .*, got"):
        task(kind, smoothing=smoothing)
