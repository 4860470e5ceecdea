"""Every task kind found in the folder, each with its own example: losses of single examples, heads Opacus accepts,
metric sums that add up, labels that survive encoding and decoding."""

from __future__ import annotations

import math

import pytest
import torch
from opacus.validators import ModuleValidator
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_sum

from common.plugins import kinds, plugin_class
from common.tasks import Example, Sloped, Task, merge_sums, metric_sums, metric_values, num_counts, open_task
from common.types import BadRecord

FEATURE_DIM = 7


@pytest.fixture(scope="module", params=kinds("common.tasks"))
def example(request: pytest.FixtureRequest) -> Example:
    return plugin_class("common.tasks", request.param).example()


@pytest.fixture(scope="module")
def task(example: Example) -> Task:
    return open_task(example.settings, "task")


@pytest.fixture(scope="module")
def labels(task: Task, example: Example) -> Tensor:
    return torch.stack([task.encode(cells) for cells in example.cells])


def many(task: Task, labels: Tensor, copies: int = 6) -> tuple[Tensor, Tensor]:
    """Random outputs for several copies of the labels."""
    labels = labels.repeat(copies, *[1] * (labels.ndim - 1))
    width = task.head(FEATURE_DIM)(torch.zeros(1, FEATURE_DIM)).shape[1:]
    return torch.randn(len(labels), *width, generator=torch.Generator().manual_seed(3)), labels


def fitted(task: Task, labels: Tensor) -> Tensor:
    """Outputs that fit the labels, found through the task's own loss alone."""
    outputs = torch.zeros_like(many(task, labels, 1)[0]).requires_grad_()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(task.losses(outputs, labels).sum(), outputs)
        outputs = (outputs - gradient).detach().requires_grad_()
    return outputs.detach()


def test_it_fulfils_the_protocol(task: Task) -> None:
    assert isinstance(task, Task)
    assert task.scale == 1.0


def test_the_loss_of_a_batch_is_the_losses_of_its_examples(task: Task, labels: Tensor) -> None:
    outputs, labels = many(task, labels)
    losses_B = task.losses(outputs, labels)
    alone_B = torch.cat([task.losses(outputs[i : i + 1], labels[i : i + 1]) for i in range(len(labels))])
    assert losses_B.shape == (len(labels),)
    torch.testing.assert_close(losses_B, alone_B)
    assert torch.isfinite(losses_B).all()
    assert (losses_B >= 0).all()


def test_a_stated_slope_is_the_one_that_autograd_finds(task: Task, labels: Tensor) -> None:
    outputs, labels = many(task, labels)
    if labels.dim() > 1:
        labels = torch.where(torch.rand(labels.shape, generator=torch.Generator().manual_seed(4)) < 0.3, -1, labels)
    outputs = (5.0 * outputs).requires_grad_()
    (expected,) = torch.autograd.grad(task.losses(outputs, labels).sum(), outputs)
    if isinstance(task, Sloped):
        torch.testing.assert_close(task.slopes(outputs.detach(), labels), expected)
    else:
        assert expected.shape == outputs.shape  # Solvers ask autograd, which knows it.


def test_opacus_validates_linear_and_hidden_heads(task: Task, example: Example) -> None:
    hidden = open_task({**example.settings, "head": {"hidden": 5, "bias": False}}, "task")
    for head in (task.head(FEATURE_DIM), hidden.head(FEATURE_DIM)):
        assert ModuleValidator.validate(head, strict=True) == []
        assert not list(head.buffers())


def test_a_new_head_says_the_same_of_every_record(task: Task) -> None:
    outputs = task.head(FEATURE_DIM)(torch.randn(4, FEATURE_DIM))
    assert torch.equal(outputs, torch.zeros_like(outputs))


def test_every_metric_state_is_a_sum(task: Task) -> None:
    for metric in task.metrics().values():
        assert metric._reductions
        assert all(reduction is dim_zero_sum for reduction in metric._reductions.values())


def test_metric_sums_merge_associatively_into_those_of_the_whole(task: Task, labels: Tensor) -> None:
    outputs, labels = many(task, labels)
    cuts = [slice(0, 3), slice(3, 10), slice(10, len(labels))]
    first, second, third = (metric_sums(task, outputs[cut], labels[cut]) for cut in cuts)
    left = merge_sums(merge_sums(first, second), third)
    right = merge_sums(first, merge_sums(third, second))
    whole = metric_sums(task, outputs, labels)
    for key in whole:
        torch.testing.assert_close(left[key], right[key], rtol=1e-12, atol=0)
        torch.testing.assert_close(left[key], whole[key], rtol=1e-12, atol=0)
    assert metric_values(task, left) == pytest.approx(metric_values(task, whole))


def test_nothing_adds_nothing_and_leaves_every_metric_undefined(task: Task, labels: Tensor) -> None:
    outputs, labels = many(task, labels)
    nothing, sums = metric_sums(task, outputs[:0], labels[:0]), metric_sums(task, outputs, labels)
    merged = merge_sums(nothing, sums)
    assert all(torch.equal(merged[key], sums[key]) for key in sums)
    assert all(math.isnan(value) for value in metric_values(task, nothing).values())


def test_metrics_of_a_perfect_fit_are_finite_and_better_than_of_chance(task: Task, labels: Tensor) -> None:
    perfect = metric_values(task, metric_sums(task, fitted(task, labels), labels))
    outputs, repeated = many(task, labels)
    chance = metric_values(task, metric_sums(task, outputs, repeated))
    assert all(math.isfinite(value) for value in perfect.values())
    main = next(iter(perfect))
    assert abs(perfect[main]) in (pytest.approx(1.0), pytest.approx(0.0, abs=1e-4))
    assert perfect[main] != pytest.approx(chance[main])


def test_scores_are_finite_for_extreme_outputs(task: Task, labels: Tensor) -> None:
    outputs, _ = many(task, labels)
    assert torch.isfinite(task.scores(outputs * 1e4)).all()


def test_decoding_an_encoded_label_returns_it(task: Task, labels: Tensor, example: Example) -> None:
    decoded = task.decode(fitted(task, labels))
    assert len(decoded) == len(example.cells)
    for value, cells in zip(decoded, example.cells, strict=True):
        match value:
            case str():
                assert [value] == list(cells)
            case float():
                assert value == pytest.approx(float(cells[0]), abs=1e-4)
            case list():
                assert "|".join(value) == ("" if torch.all(task.encode(cells) == 0) else cells[0])


def test_a_foreign_label_is_refused_without_repeating_it(task: Task) -> None:
    with pytest.raises(BadRecord) as caught:
        task.encode(["Jane Doe"])
    assert "Jane" not in str(caught.value)
    with pytest.raises(BadRecord):
        task.encode([])


def test_a_missing_label_looks_like_a_label(task: Task, labels: Tensor) -> None:
    missing = task.missing()
    assert missing.shape == labels.shape[1:]
    assert missing.dtype == labels.dtype
    assert torch.isfinite(task.losses(many(task, labels)[0][:1], missing.unsqueeze(0))).all()


def test_an_examples_counts_are_no_longer_than_declared(task: Task, labels: Tensor) -> None:
    """Whatever the head says: nothing, sensible, absurd, or infinite."""
    outputs, labels = many(task, labels)
    for factor in (0.0, 1.0, 1e4, 1e30):
        rows = task.counts(outputs * factor, labels)
        assert rows.dtype == torch.float64 and rows.shape == (len(labels), num_counts(task))
        assert torch.linalg.vector_norm(rows, dim=1).max() <= task.counts_norm() * (1 + 1e-6)


def test_the_declared_length_of_counts_is_not_larger_than_it_has_to_be(task: Task, labels: Tensor) -> None:
    """A bound twice too large would double the noise."""
    outputs, labels = many(task, labels)
    longest = max(float(torch.linalg.vector_norm(task.counts(outputs * f, labels), dim=1).max()) for f in (-1e4, 1e4))
    assert longest >= 0.7 * task.counts_norm()


def test_an_examples_counts_come_from_it_alone(task: Task, labels: Tensor) -> None:
    outputs, labels = many(task, labels)
    rows = task.counts(outputs, labels)
    alone = torch.cat([task.counts(outputs[i : i + 1], labels[i : i + 1]) for i in range(len(labels))])
    torch.testing.assert_close(rows, alone)
    assert task.counts(outputs[:0], labels[:0]).shape == (0, num_counts(task))


def test_summed_counts_give_the_metrics_up_to_buckets_of_scores(task: Task, labels: Tensor) -> None:
    outputs, labels = many(task, labels, copies=500)
    outputs = outputs + fitted(task, labels) / 20  # Neither chance nor perfect.
    counted = task.counted(task.counts(outputs, labels).sum(dim=0))
    truth = metric_values(task, metric_sums(task, outputs, labels))
    assert list(counted) == list(truth)
    for name, value in truth.items():
        assert counted[name] == pytest.approx(value, rel=1e-6, abs=0.02 if name == "auroc" else 1e-9), name


def test_counts_of_nobody_and_noise_alone_give_no_absurd_metric(task: Task) -> None:
    assert all(math.isnan(value) for value in task.counted(torch.zeros(num_counts(task), dtype=torch.float64)).values())
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        noise = 100 * torch.randn(num_counts(task), generator=generator, dtype=torch.float64)
        for name, value in task.counted(noise).items():
            bounded = name in {"accuracy", "balanced_accuracy", "auroc", "sensitivity", "specificity"}
            assert math.isnan(value) or not bounded or 0.0 <= value <= 1.0
