"""Every task kind found in the folder, each with its own example: losses of single examples, heads Opacus accepts,
statistics that are bounded and add up, labels that survive encoding and decoding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from opacus.validators import ModuleValidator
from torch import Tensor

from common.backbones import SPEECH
from common.plugins import kinds, plugin_class
from common.tasks import (
    EXACT_BUCKETS,
    NOISED_BUCKETS,
    Calibratable,
    ComparesTexts,
    CountedOutcomes,
    HeardTexts,
    LabelPrior,
    LossGradient,
    PlacesLabels,
    Servable,
    ServedPrior,
    ServesMaps,
    SmoothLoss,
    Task,
    TaskExample,
    WritesTexts,
    open_task,
    select_round,
)
from common.tasks.parts.calibration import make_released_statistic
from common.tasks.parts.outcomes import MOST_RANGES, join_score_ranges
from common.tasks.parts.rates import RATE
from common.types import BadRecord
from tests.loaded import list_loaded
from tests.written import TinyLanguage

FEATURE_DIM = 7

DECLARED = {
    "classification, declared": TaskExample(
        {
            "kind": "classification",
            "labels": ["none", "tumour"],
            "positive": "none",
            "threshold": 0.7,
            "weights": {"tumour": 20.0, "none": 0.5},
            "prior": {"tumour": 0.02, "none": 0.98},
        },
        [["none"], ["tumour"], ["none"], ["tumour"]],
    ),
    "multilabel, declared": TaskExample(
        {
            "kind": "multilabel",
            "labels": ["edema", "effusion"],
            "none": "no finding",
            "threshold": {"effusion": 0.2},
            "weights": {"edema": 20.0},
            "prior": {"edema": 0.02, "effusion": 0.3},
        },
        [["edema"], ["edema|effusion"], ["no finding"], ["effusion"]],
    ),
    "classification, smoothed": TaskExample(
        {"kind": "classification", "labels": ["none", "glioma", "meningioma"], "smoothing": 0.2},
        [["glioma"], ["none"], ["meningioma"], ["none"]],
    ),
    "multilabel, smoothed": TaskExample(
        {"kind": "multilabel", "labels": ["edema", "effusion"], "none": "no finding", "smoothing": 0.2},
        [["edema"], ["edema|effusion"], ["no finding"], ["effusion"]],
    ),
}
"""Kinds that declare numbers for their labels, with all of them."""

SCORED = ("auroc", "c_index", "ap_50")
"""Beginnings of the names of metrics that come from buckets of scores."""


KINDS = kinds("common.tasks")


@pytest.fixture(scope="module", params=[*KINDS, *DECLARED])
def example(request: pytest.FixtureRequest) -> TaskExample:
    if request.param in DECLARED:
        return DECLARED[request.param]
    return plugin_class("common.tasks", request.param).example()


@pytest.fixture(scope="module")
def task(example: TaskExample) -> Task:
    return open_whole(open_task(example.settings, "task"))


def open_whole(task: Task) -> Task:
    """The task with a backbone's language, where it needs one."""
    return task.open_on(TinyLanguage()) if isinstance(task, WritesTexts) else task


@pytest.fixture(scope="module")
def labels(task: Task, example: TaskExample) -> Tensor:
    return torch.stack([task.codec.encode(cells) for cells in example.cells])


def draw_features(task: Task, count: int) -> Tensor:
    """Features as the kind's heads read them."""
    grid = type(task).example().grid
    return torch.randn(count, *grid, FEATURE_DIM, generator=torch.Generator().manual_seed(5))


def many(task: Task, labels: Tensor, copies: int = 6) -> tuple[Tensor, Tensor]:
    """Random outputs for several copies of the labels."""
    labels = labels.repeat(copies, *[1] * (labels.ndim - 1))
    width = task.head(FEATURE_DIM)(draw_features(task, 1)).shape[1:]
    return torch.randn(len(labels), *width, generator=torch.Generator().manual_seed(3)), labels


def fitted(task: Task, labels: Tensor) -> Tensor:
    """Outputs that fit the labels, found through the task's own loss alone."""
    outputs = torch.zeros_like(many(task, labels, 1)[0]).requires_grad_()
    # The loss of places is their mean.
    step = max(1.0, 0.6 * math.prod(type(task).example().grid))
    for _ in range(50):
        (gradient,) = torch.autograd.grad(task.losses(outputs, labels).sum(), outputs)
        outputs = (outputs - step * gradient).detach().requires_grad_()
    return outputs.detach()


def test_it_fulfils_the_protocol(task: Task) -> None:
    assert isinstance(task, Task)
    assert task.scale == 1.0


def test_balanced_labels_need_no_offset(task: Task) -> None:
    if not isinstance(task, LabelPrior):
        pytest.skip("the kind's labels have no frequencies that an offset could express")
    sums_C = task.count_labels(task.balanced_labels()).sum(dim=0).double().numpy()
    assert not task.compute_offset(sums_C, 0.0).any()


def test_the_loss_of_a_batch_is_the_losses_of_its_examples(task: Task, labels: Tensor) -> None:
    outputs, labels = many(task, labels)
    losses_B = task.losses(outputs, labels)
    alone_B = torch.cat([task.losses(outputs[i : i + 1], labels[i : i + 1]) for i in range(len(labels))])
    assert losses_B.shape == (len(labels),)
    torch.testing.assert_close(losses_B, alone_B)
    assert torch.isfinite(losses_B).all()
    assert (losses_B >= 0).all()


def test_a_gradient_changes_by_at_most_the_stated_smoothness(task: Task, labels: Tensor) -> None:
    if not isinstance(task, SmoothLoss):
        pytest.skip("this kind states none")
    outputs, labels = many(task, labels, 40)
    outputs = outputs.double()
    generator = torch.Generator().manual_seed(9)
    for length in (1e-2, 1.0, 10.0):
        step = length * torch.randn(outputs.shape, generator=generator).double()
        slopes = []
        for at in (outputs, outputs + step):
            leaf = at.clone().requires_grad_()
            slopes.append(torch.autograd.grad(task.losses(leaf, labels).sum(), leaf)[0].flatten(1))
        change_B, moved_B = (slopes[1] - slopes[0]).norm(dim=1), step.flatten(1).norm(dim=1)
        assert (change_B <= task.smoothness * moved_B * (1 + 1e-6)).all()
    if getattr(task, "weights", None):
        return  # A scale for clip norms is that of records of weight 1.
    zero = torch.zeros_like(outputs).requires_grad_()
    slopes = torch.autograd.grad(task.losses(zero, labels).sum(), zero)[0]
    grid = type(task).example().grid
    if grid and not isinstance(task, PlacesLabels):
        slopes = slopes.flatten(1, len(grid)).sum(dim=1)  # Places that are alike add up; centred ones are not alike.
    first = slopes.flatten(1).norm(dim=1)
    assert float(first.max()) / 2.5 <= task.first_slope <= 2.5 * float(first.max())


def test_labels_are_counted_in_rows_of_length_one_and_their_offset_is_what_trains_best(
    task: Task, labels: Tensor
) -> None:
    if not isinstance(task, LabelPrior):
        pytest.skip("this kind counts none")
    rows = task.count_labels(labels)
    assert rows.shape == (len(labels), task.num_counts)
    assert (rows.norm(dim=1) <= 1 + 1e-6).all()
    for deviation in (0.0, 5.0, 1e6):
        noise = deviation * np.random.default_rng(3).normal(size=task.num_counts)
        assert np.isfinite(task.compute_offset(rows.double().sum(0).numpy() + noise, deviation)).all()
    if getattr(task, "weights", None):
        return  # With weights, what trains best is no frequency.
    # Without noise, of outputs that are the same for all records these have the smallest loss.
    tail = [1] * (labels.dim() - 1)
    repeated = torch.cat([labels.repeat(50, *tail), labels[:1].repeat(90, *tail)])
    offset = torch.tensor(
        task.compute_offset(task.count_labels(repeated).double().sum(0).numpy(), 0.0)
    ).requires_grad_()
    losses = task.losses(offset.expand(len(repeated), -1), repeated)
    (gradient,) = torch.autograd.grad(losses.mean(), offset)
    assert gradient.abs().max() < 1e-2


def test_a_stated_gradient_is_the_one_that_autograd_computes(task: Task, labels: Tensor) -> None:
    outputs, labels = many(task, labels)
    if labels.dim() > 1:
        labels = torch.where(torch.rand(labels.shape, generator=torch.Generator().manual_seed(4)) < 0.3, -1, labels)
    outputs = (5.0 * outputs).requires_grad_()
    (expected,) = torch.autograd.grad(task.losses(outputs, labels).sum(), outputs)
    if isinstance(task, LossGradient):
        torch.testing.assert_close(task.loss_gradient(outputs.detach(), labels), expected)
    else:
        assert expected.shape == outputs.shape  # Solvers ask autograd, which knows it.


def test_a_placed_label_begins_with_the_label_and_what_lies_behind_a_record_has_no_slope(
    task: Task, labels: Tensor
) -> None:
    if not isinstance(task, PlacesLabels):
        pytest.skip("the kind's labels say nothing of places")
    outputs, labels = many(task, labels)
    outputs.requires_grad_()
    marks_P = torch.full((outputs.shape[1],), SPEECH)
    own = outputs.shape[1] - 2
    marks_P[own:] = 0.0
    placed = torch.stack([task.place_label(label, marks_P) for label in labels])
    assert torch.equal(placed[:, : labels.shape[1]], labels) and placed.dtype == labels.dtype
    for round_ in (1, 2):
        (slopes,) = torch.autograd.grad(
            select_round({"task": task}, round_, 2)["task"].losses(outputs, placed).sum(), outputs
        )
        assert bool(slopes[:, :own].any()) and not slopes[:, own:].any()
    statistic = task.statistic(EXACT_BUCKETS)
    assert torch.equal(statistic.rows(outputs, placed), statistic.rows(outputs, labels))


def test_an_offset_alone_has_the_probabilities_of_the_declared_prior(task: Task) -> None:
    if not isinstance(task, ServedPrior):
        pytest.skip("the task declares no prior")
    offset = torch.tensor(task.served_offset(), dtype=torch.float64)
    assert len(offset) == len(many(task, torch.stack([task.codec.missing()]), 1)[0][0])
    # The prior is what sits in the settings, in the order of the labels.
    prior, labels = task.model_dump()["prior"], task.model_dump()["labels"]
    if task.kind == "multilabel":
        expected = [0.5 if prior == "uniform" else prior[name] for name in labels]
        torch.testing.assert_close(offset.sigmoid(), torch.tensor(expected, dtype=torch.float64))
    else:
        expected = [1 / len(labels) if prior == "uniform" else prior[name] for name in labels]
        torch.testing.assert_close(offset.softmax(0), torch.tensor(expected, dtype=torch.float64))
        assert float(offset.mean()) == pytest.approx(0.0, abs=1e-12)


def test_opacus_validates_linear_and_hidden_heads(task: Task, example: TaskExample) -> None:
    hidden = open_task({**example.settings, "head": {"hidden": 5, "bias": False}}, "task")
    for head in (task.head(FEATURE_DIM), hidden.head(FEATURE_DIM)):
        assert ModuleValidator.validate(head, strict=True) == []
        assert not list(head.buffers())


def test_a_new_head_says_the_same_of_every_record(task: Task) -> None:
    outputs = task.head(FEATURE_DIM)(draw_features(task, 4))
    assert torch.equal(outputs, torch.zeros_like(outputs))


def test_what_is_written_follows_from_the_record_alone_and_stands_in_for_outputs(task: Task, labels: Tensor) -> None:
    if not isinstance(task, WritesTexts):
        pytest.skip("the kind predicts a head's outputs")
    head = task.head(FEATURE_DIM)
    task.start_head(head)
    features = draw_features(task, 40)
    written = task.generate(head, features)
    alone = torch.cat([task.generate(head, row) for row in features.split(1)])
    torch.testing.assert_close(written, alone)
    told = task.codec.decode(written)
    assert len({text for (text,) in told}) > 10
    assert told == [task.codec.decode(row)[0] for row in written.split(1)]
    assert task.serve(written).shape == (40, 1)
    labels = labels.repeat(10, 1)
    assert task.statistic(EXACT_BUCKETS).rows(written, labels).shape == (40, task.statistic(EXACT_BUCKETS).size)


@pytest.mark.parametrize("buckets", [EXACT_BUCKETS, NOISED_BUCKETS])
def test_exact_sums_are_those_of_the_rows_and_those_of_parts_add_up(task: Task, labels: Tensor, buckets: int) -> None:
    outputs, labels = many(task, labels)
    statistic = task.statistic(buckets)
    cuts = [slice(0, 3), slice(3, 10), slice(10, len(labels))]
    first, second, third = (statistic.sums(outputs[cut], labels[cut]) for cut in cuts)
    whole = statistic.sums(outputs, labels)
    for sums in (statistic.rows(outputs, labels).sum(dim=0), (first + second) + third, first + (third + second)):
        torch.testing.assert_close(sums, whole, rtol=1e-12, atol=0)
    assert statistic.values(first + second + third) == pytest.approx(statistic.values(whole))


def test_nothing_adds_nothing_and_leaves_every_metric_undefined(task: Task, labels: Tensor) -> None:
    outputs, _ = many(task, labels)
    statistic = task.statistic(EXACT_BUCKETS)
    nothing = statistic.sums(outputs[:0], labels[:0])
    assert nothing.dtype == torch.float64 and not nothing.any()
    assert all(math.isnan(value) for value in statistic.values(nothing).values())


def test_metrics_of_a_perfect_fit_are_finite_and_better_than_of_chance(task: Task, labels: Tensor) -> None:
    statistic = task.statistic(EXACT_BUCKETS)
    perfect = statistic.values(statistic.sums(fitted(task, labels), labels))
    chance = statistic.values(statistic.sums(*many(task, labels)))
    assert all(math.isfinite(value) for value in perfect.values())
    main = next(iter(perfect))
    assert abs(perfect[main]) in (pytest.approx(1.0), pytest.approx(0.0, abs=1e-4))
    assert perfect[main] != pytest.approx(chance[main])


def test_decoding_an_encoded_label_returns_it(task: Task, labels: Tensor) -> None:
    decoded = task.codec.decode(fitted(task, labels))
    assert all(isinstance(cell, str) for cells in decoded for cell in cells)
    torch.testing.assert_close(torch.stack([task.codec.encode(cells) for cells in decoded]), labels, rtol=0, atol=1e-4)


def test_a_text_is_read_in_the_form_of_a_prediction(task: Task, example: TaskExample, labels: Tensor) -> None:
    if not isinstance(task, ComparesTexts):
        pytest.skip("its predictions are no texts")
    texts = [task.read_text(*cells) for cells in example.cells]
    assert [task.read_text(text) for text in texts] == texts
    said = [cell for (cell,) in task.codec.decode(many(task, labels)[0])]
    assert [task.read_text(text) for text in said] == said


def test_what_a_model_hears_is_judged_as_a_prediction(task: Task, example: TaskExample, labels: Tensor) -> None:
    if not isinstance(task, HeardTexts):
        pytest.skip("no model hears its labels")
    outputs, repeated = many(task, labels)
    said = [cell for (cell,) in task.codec.decode(outputs)]
    meant = [task.read_text(*cells) for cells in example.cells] * (len(repeated) // len(labels))
    statistic = task.statistic(EXACT_BUCKETS)
    rates = statistic.values(statistic.sums(outputs, repeated))
    assert task.compare_heard(list(zip(said, meant, strict=True))) == pytest.approx(rates)
    assert all(value > 0 for value in task.compare_heard([("nothing of it", text) for text in meant]).values())


def test_a_foreign_label_is_refused_without_repeating_it(task: Task) -> None:
    with pytest.raises(BadRecord) as caught:
        task.codec.encode(["Jane Doe"])
    assert "Jane" not in str(caught.value)
    with pytest.raises(BadRecord):
        task.codec.encode([])


def test_a_missing_label_looks_like_a_label(task: Task, labels: Tensor) -> None:
    missing = task.codec.missing()
    assert missing.shape == labels.shape[1:]
    assert missing.dtype == labels.dtype
    assert torch.isfinite(task.losses(many(task, labels)[0][:1], missing.unsqueeze(0))).all()


@pytest.mark.parametrize("buckets", [EXACT_BUCKETS, NOISED_BUCKETS])
def test_an_examples_row_is_no_longer_than_declared(task: Task, labels: Tensor, buckets: int) -> None:
    """Whatever the head returns: zero, usual, very large or infinite outputs."""
    outputs, labels = many(task, labels)
    statistic = task.statistic(buckets)
    for factor in (0.0, 1.0, 1e4, 1e30):
        rows = statistic.rows(outputs * factor, labels)
        assert rows.dtype == torch.float64 and rows.shape == (len(labels), statistic.size)
        assert torch.linalg.vector_norm(rows, dim=1).max() <= statistic.bound * (1 + 1e-6)


@pytest.mark.parametrize("offset", [None, 1e3])
def test_rows_that_tell_the_temperature_are_no_longer_than_declared_and_change_no_metric(
    task: Task, labels: Tensor, offset: float | None
) -> None:
    outputs, labels = many(task, labels)
    offsets = None if offset is None else [offset, *[-offset] * (outputs.shape[1] - 1)]
    plain = task.statistic(NOISED_BUCKETS)
    statistic = make_released_statistic(task, calibrate=True, offset=offsets)
    assert (statistic.size > plain.size) == isinstance(task, Calibratable)
    for factor in (0.0, 1.0, 1e4, 1e30):
        rows = statistic.rows(outputs * factor, labels)
        assert rows.dtype == torch.float64 and rows.shape == (len(labels), statistic.size)
        assert rows.isfinite().all()
        assert torch.linalg.vector_norm(rows, dim=1).max() <= statistic.bound * (1 + 1e-6)
        alone = torch.cat([statistic.rows(outputs[i : i + 1] * factor, labels[i : i + 1]) for i in range(len(labels))])
        torch.testing.assert_close(rows, alone)
    assert statistic.values(statistic.sums(outputs, labels)) == plain.values(plain.sums(outputs, labels))
    assert make_released_statistic(task, calibrate=False).size == plain.size


def test_overconfidence_is_bounded_by_the_known_part(task: Task, labels: Tensor) -> None:
    if not isinstance(task, Calibratable):
        pytest.skip("the task has no probabilities")
    outputs, labels = many(task, torch.cat([labels, task.codec.missing().unsqueeze(0)]))
    known_B = task.known_part(labels)
    assert (known_B >= 0).all() and (known_B <= 1).all() and known_B[-1] == 0
    for offset in (0.0, 3.0):
        shift = offset * torch.arange(outputs.shape[1]) - offset
        for factor in (0.0, 1.0, 1e30, math.inf):
            assert (task.overconfidence(outputs * factor, labels, shift).abs() <= known_B + 1e-6).all()
        growing = torch.stack([task.overconfidence(outputs * factor, labels, shift) for factor in (0.1, 0.5, 1, 3, 9)])
        assert (growing.diff(dim=0) >= -1e-6).all()


def test_a_record_s_served_row_comes_from_its_own_outputs_and_has_a_name_for_each_column(
    task: Task, labels: Tensor
) -> None:
    if not isinstance(task, Servable):
        pytest.skip("the task serves the head's outputs")
    outputs, _ = many(task, labels)
    for factor in (0.0, 1.0, 1e4):
        served_BC = task.serve(outputs * factor)
        assert served_BC.dtype == torch.float32 and served_BC.isfinite().all()
        assert served_BC.shape == (len(outputs), len(task.name_served(outputs.shape[1])))
        alone = torch.cat([task.serve(outputs[i : i + 1] * factor) for i in range(len(outputs))])
        torch.testing.assert_close(served_BC, alone)


def test_maps_come_from_their_record_and_are_summed_up_to_what_is_served(task: Task, labels: Tensor) -> None:
    if not isinstance(task, ServesMaps):
        pytest.skip("the task has no maps")

    class Maps(torch.nn.Module):
        def forward(self, outputs: Tensor) -> Tensor:
            return task.serve_maps(outputs)

    outputs, _ = many(task, labels)
    maps_BCSS, served_BC = task.serve_maps(outputs), task.serve(outputs)  # type: ignore[attr-defined]
    assert maps_BCSS.dtype == torch.float32 and maps_BCSS.isfinite().all()
    assert maps_BCSS.dim() == 4 and maps_BCSS.shape[1] == len(task.name_maps())
    alone = torch.cat([task.serve_maps(outputs[i : i + 1]) for i in range(len(outputs))])
    torch.testing.assert_close(maps_BCSS, alone)
    flat = maps_BCSS.flatten(2)[:, : served_BC.shape[1]]
    summed = flat.mean(dim=2) if task.map_summary == "mean" else flat.amax(dim=2)
    torch.testing.assert_close(summed, served_BC, rtol=1e-5, atol=1e-6)
    program = torch.export.export(Maps(), (outputs,))
    torch.testing.assert_close(program.module()(outputs), maps_BCSS)


def test_what_is_served_can_be_exported(task: Task, labels: Tensor) -> None:
    if not isinstance(task, Servable):
        pytest.skip("the task serves the head's outputs")

    class Served(torch.nn.Module):
        def forward(self, outputs: Tensor) -> Tensor:
            return task.serve(outputs)

    outputs, _ = many(task, labels)
    program = torch.export.export(Served(), (outputs,))
    torch.testing.assert_close(program.module()(outputs), task.serve(outputs))


def test_the_declared_bound_is_not_larger_than_it_has_to_be(task: Task, labels: Tensor) -> None:
    """A bound twice too large would double the noise."""
    outputs, labels = many(task, labels)
    statistic = task.statistic(NOISED_BUCKETS)
    longest = max(
        float(torch.linalg.vector_norm(statistic.rows(outputs * f, labels), dim=1).max()) for f in (-1e4, 1e4)
    )
    assert longest >= 0.7 * statistic.bound


def test_an_examples_row_comes_from_it_alone(task: Task, labels: Tensor) -> None:
    outputs, labels = many(task, labels)
    statistic = task.statistic(NOISED_BUCKETS)
    rows = statistic.rows(outputs, labels)
    alone = torch.cat([statistic.rows(outputs[i : i + 1], labels[i : i + 1]) for i in range(len(labels))])
    torch.testing.assert_close(rows, alone)
    assert statistic.rows(outputs[:0], labels[:0]).shape == (0, statistic.size)


def test_noised_metrics_without_noise_are_the_exact_ones_up_to_buckets_of_scores(task: Task, labels: Tensor) -> None:
    outputs, labels = many(task, labels, copies=100 if type(task).example().grid else 500)
    outputs = outputs + fitted(task, labels) / 20  # Neither chance nor perfect.
    noised, exact = (
        statistic.values(statistic.sums(outputs, labels))
        for statistic in (task.statistic(NOISED_BUCKETS), task.statistic(EXACT_BUCKETS))
    )
    assert list(noised) == list(exact)
    for name, value in exact.items():
        assert noised[name] == pytest.approx(value, rel=1e-6, abs=0.02 if name.startswith(SCORED) else 1e-9), name


def test_noise_alone_gives_no_ratio_outside_its_range(task: Task) -> None:
    statistic, generator = task.statistic(NOISED_BUCKETS), torch.Generator().manual_seed(0)
    for _ in range(50):
        noise = 100 * torch.randn(statistic.size, generator=generator, dtype=torch.float64)
        for name, value in statistic.values(noise).items():
            bounded = statistic.ranges[name] == RATE
            assert math.isnan(value) or not bounded or 0.0 <= value <= 1.0


def test_reading_settings_loads_no_torch() -> None:
    code = "from common.tasks import open_task\nread = lambda own: open_task(own, 'own')"
    settings = {
        **{kind: dict(plugin_class("common.tasks", kind).example().settings) for kind in KINDS},
        **{name: dict(own.settings) for name, own in DECLARED.items()},
    }
    assert list_loaded(code, settings, ("torch", "scipy", "torchmetrics")) == {name: [] for name in settings}


@pytest.mark.parametrize("buckets", [NOISED_BUCKETS, 64])
def test_counts_of_outcomes_are_those_of_the_examples(task: Task, labels: Tensor, buckets: int) -> None:
    """The metrics that follow from the tables are the statistic's own."""
    if not isinstance(task, CountedOutcomes):
        pytest.skip("the task counts no outcomes")
    outputs, labels = many(task, labels)
    statistic = task.statistic(buckets)
    sums = statistic.sums(outputs, labels)
    outcomes = task.count_outcomes(sums.numpy(), 2.0)
    values = statistic.values(sums)
    right = sum(table.counts[index][index] for table in outcomes.confusions for index in range(len(table.names)))
    everything = sum(sum(map(sum, table.counts)) for table in outcomes.confusions)
    if "accuracy" in values:
        assert right / everything == pytest.approx(values["accuracy"])
    areas = []
    for scores in outcomes.scores:
        pairs = [(low, high) for high in enumerate(scores.positives) for low in enumerate(scores.negatives)]
        wins = sum(p * n * (0.5 if i == j else i > j) for (j, n), (i, p) in pairs if p and n)
        areas.append(wins / (sum(scores.positives) * sum(scores.negatives)))
    assert sum(areas) / len(areas) == pytest.approx(values["auroc"])
    assert all(table.deviation >= 2.0 for table in (*outcomes.confusions, *outcomes.scores))
    for scores in outcomes.scores:
        assert len(scores.edges) == buckets - 1 and list(scores.edges) == sorted(scores.edges)
        whole = [round(number, 6) for number in (*scores.positives, *scores.negatives)]
        assert all(number >= 0 and number == int(number) for number in whole)
        assert 0 < sum(whole) <= len(labels)


def test_joined_ranges_keep_the_numbers_and_nearly_the_area(task: Task, labels: Tensor) -> None:
    if not isinstance(task, CountedOutcomes):
        pytest.skip("the task counts no outcomes")
    outputs, labels = many(task, labels)
    exact = task.count_outcomes(task.statistic(EXACT_BUCKETS).sums(outputs, labels).numpy(), 0.0)
    joined = join_score_ranges(exact)
    for whole, few in zip(exact.scores, joined.scores, strict=True):
        assert len(few.positives) == len(few.means) == len(few.edges) + 1 <= MOST_RANGES
        assert list(few.means) == sorted(few.means)
        assert sum(few.positives) == pytest.approx(sum(whole.positives))
        assert sum(few.negatives) == pytest.approx(sum(whole.negatives))
