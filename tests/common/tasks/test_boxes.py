"""Boxes: what a head should say of them, what it says, and how that is judged."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.inputs import Box, read_boxes, write_boxes
from common.tasks import open_task
from common.tasks.detection import Detection
from common.tasks.parts.boxes import Detected, compute_mean_precision, compute_targets
from common.tasks.parts.rates import compute_average_precision
from common.types import BadInput, BadRecord

USUAL_K2 = torch.tensor([[0.5, 0.25], [0.25, 0.25]], dtype=torch.double)


def make_task(**changes: Any) -> Detection:
    task = open_task({"kind": "detection", "labels": ["cell", "grain"], "most_boxes": 4, **changes}, "tasks.t")
    assert isinstance(task, Detection)
    return task


def draw_boxes(rng: np.random.Generator, count: int) -> list[Box]:
    """Boxes of a few places and sizes, so that many overlap."""
    corners = rng.integers(0, 5, (count, 2)) / 8
    sides = rng.integers(2, 4, (count, 2)) / 8
    names = rng.choice(["cell", "grain"], count)
    return [
        Box(str(name), left, top, left + width, top + height)
        for name, (left, top), (width, height) in zip(names, corners.tolist(), sides.tolist(), strict=True)
    ]


def encode(task: Detection, boxes: list[Box]) -> Tensor:
    return task.codec.encode([write_boxes(boxes, 1, 1)])


def test_places_near_a_centre_have_its_label_and_the_size_of_the_nearest_object() -> None:
    # A cell of 1/2 x 1/4 around the place in row 2 and column 4 of 8 x 8, and a grain two rows below.
    cell, grain = [0.0, 5 / 16, 3 / 16, 13 / 16, 7 / 16], [1.0, 7 / 16, 5 / 16, 11 / 16, 9 / 16 + 1 / 8]
    boxes_BM5 = torch.tensor([[cell, grain, [-1.0, 0, 0, 0, 0]], [[-2.0] * 5] * 3])
    aim = compute_targets(boxes_BM5, (8, 8), USUAL_K2, reach=1.0)
    assert aim.centre_BGGK.shape == (2, 8, 8, 2) and not aim.centre_BGGK[1].any()
    # The radius is two places along a row and one along a column.
    expected = torch.zeros(8, dtype=torch.double)
    expected[3:6] = torch.tensor([0.75, 1.0, 0.75])
    torch.testing.assert_close(aim.centre_BGGK[0, 2, :, 0], expected)
    assert not aim.centre_BGGK[0, [0, 1, 3, 4], :, 0].any()
    # The grain's centre is at the border between two rows, and its radius is 1.5 rows.
    torch.testing.assert_close(aim.centre_BGGK[0, 3, 4, 1], torch.tensor(1.0 - (0.5 / 1.5) ** 2, dtype=torch.double))
    torch.testing.assert_close(aim.size_BGG2[0, 2, 4], torch.tensor([0.0, 0.0], dtype=torch.double))
    torch.testing.assert_close(aim.size_BGG2[0, 4, 4], torch.tensor([0.0, 0.5], dtype=torch.double))
    assert torch.equal(aim.inside_BGG, aim.centre_BGGK.amax(dim=-1))


def test_a_small_object_counts_at_the_place_nearest_to_its_centre() -> None:
    boxes_BM5 = torch.tensor([[[0.0, 0.49, 0.51, 0.491, 0.511]]])
    aim = compute_targets(boxes_BM5, (4, 4), USUAL_K2, reach=0.5)
    assert aim.centre_BGGK[0, 2, 1, 0] == aim.inside_BGG.max() > 0.3


def test_an_ignored_box_trains_its_label_s_places_to_nothing_but_around_an_object() -> None:
    task = make_task(sizes={"cell": [0.25, 0.25], "grain": [0.25, 0.25]})
    ignored, cell = Box("cell", 0.0, 0.0, 0.5, 1.0, ignored=True), Box("cell", 0.0, 0.0, 0.25, 0.25)
    labels = torch.stack([encode(task, boxes) for boxes in ([ignored], [], [ignored, cell], [cell])])
    outputs = torch.randn(1, 8, 8, 4, generator=torch.Generator().manual_seed(0)).double().expand(4, -1, -1, -1)
    alone, nothing, both, only = task.loss_gradient(outputs, labels)
    assert not alone[:, :4, 0].any() and torch.equal(alone[:, 4:], nothing[:, 4:]) and nothing[:, :4, 0].all()
    assert torch.equal(alone[..., 1:], nothing[..., 1:])
    # The object's own places count, the others of the ignored box do not.
    near_GG = compute_targets(labels[3:], (8, 8), USUAL_K2, reach=0.5).centre_BGGK[0, ..., 0] > 0
    assert near_GG.any() and torch.equal(both[near_GG], only[near_GG]) and not both[4:, :4, 0].any()
    leaf = outputs.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(task.losses(leaf, labels).sum(), leaf)
    torch.testing.assert_close(found, torch.stack([alone, nothing, both, only]))


def test_a_detection_that_an_ignored_box_covers_counts_neither_way() -> None:
    task = make_task(counts={"cell": 4, "grain": 4})
    true, crowd = Box("cell", 0.0, 0.0, 0.25, 0.25), Box("cell", 0.5, 0.5, 1.0, 1.0, ignored=True)
    box_D4 = torch.tensor([[0.5, 0.5, 0.75, 0.75], [0.0, 0.0, 0.25, 0.25]]).double()
    found = Detected(torch.tensor([0, 0]), torch.tensor([2.0, 1.0]).double(), box_D4)
    other = Detected(torch.tensor([1, 0]), torch.tensor([2.0, 1.0]).double(), box_D4)
    for boxes, labels, expected in (
        ([true, crowd], found, 1.0),
        ([true], found, 0.5),  # The surest is wrong.
        ([true, replace(crowd, left=0.7)], found, 0.5),  # Covers a fifth of it.
        ([true, crowd, Box("grain", 0.0, 0.5, 0.25, 0.75)], other, 0.5),  # Of another label: wrong, and one missed.
    ):
        precision_O = compute_mean_precision([labels], encode(task, boxes)[None], 2)
        assert precision_O[0] == pytest.approx(expected, abs=1e-9)


def test_the_statistic_too_leaves_out_what_an_ignored_box_covers() -> None:
    task = make_task(counts={"cell": 20, "grain": 20}, sizes={"cell": [0.25, 0.25], "grain": [0.25, 0.25]})
    true, crowd = Box("cell", 0.0625, 0.0625, 0.3125, 0.3125), Box("cell", 0.5, 0.5, 1.0, 1.0, ignored=True)
    outputs = torch.full((1, 8, 8, 4), -9.0).double()
    outputs[..., 2:], outputs[0, 5, 5, 0], outputs[0, 1, 1, 0] = 0.0, 9.0, 8.0
    statistic = task.statistic(64)
    for boxes, low, high in (([true, crowd], 0.99, 1.0), ([true], 0.4, 0.6)):
        labels = encode(task, boxes)[None]
        ap = statistic.values(statistic.sums(outputs, labels))["ap_50 cell"]
        assert low <= ap <= high and ap == pytest.approx(task.pair_metrics(outputs, labels)["map_50"], abs=0.01)


def test_what_a_picture_trains_is_the_same_to_the_bit_beside_any_other() -> None:
    task, rng = make_task(), np.random.default_rng(0)
    labels = torch.stack([encode(task, draw_boxes(rng, count % 5)) for count in range(9)])
    outputs = 4.0 * torch.randn(9, 8, 8, 4, generator=torch.Generator().manual_seed(0)).double()
    whole = task.loss_gradient(outputs, labels)
    order = torch.tensor([3, 8, 1, 0, 4, 7, 2, 6, 5])
    assert torch.equal(task.loss_gradient(outputs[order], labels[order]), whole[order])
    assert all(
        torch.equal(task.loss_gradient(outputs[at : at + 1], labels[at : at + 1])[0], whole[at]) for at in range(9)
    )


def test_slopes_are_bounded_whatever_a_head_says() -> None:
    task, rng = make_task(weights={"grain": 4.0}, size_weight=2.0), np.random.default_rng(0)
    labels = torch.stack([encode(task, draw_boxes(rng, 4)) for _ in range(8)])
    for factor in (1.0, 1e4, 1e30):
        slopes = task.loss_gradient(factor * torch.randn(8, 8, 8, 4), labels) * 64
        assert slopes[..., 0].abs().max() <= 10.0 and slopes[..., 1].abs().max() <= 40.0
        assert slopes[..., 2:].abs().max() <= 2.0


def test_the_smallest_numbers_of_a_file_leave_slopes_finite() -> None:
    least = {"sizes": {"cell": [0.001, 0.001]}, "counts": {"cell": 1e-6}, "weights": {"cell": 0.01}}
    task, generator = make_task(**least), torch.Generator().manual_seed(0)
    outputs = torch.randn(1, 8, 8, 4, generator=generator)
    label = encode(task, [Box("cell", 0, 0, 1, 1), Box("cell", 0, 0, 2e-6, 1)])[None]
    assert bool(torch.isfinite(task.loss_gradient(outputs, label)).all())
    assert 0.0 < task.first_slope < task.smoothness + 1.0


def test_a_picture_without_known_boxes_has_no_loss_and_one_without_objects_has() -> None:
    task = make_task()
    labels = torch.stack([task.codec.missing(), encode(task, [])])
    outputs = torch.randn(2, 8, 8, 4).requires_grad_()
    losses_B = task.losses(outputs, labels)
    (gradient,) = torch.autograd.grad(losses_B.sum(), outputs)
    assert losses_B[0] == 0.0 < losses_B[1] and not gradient[0].any() and gradient[1].any()
    assert torch.equal(task.loss_gradient(outputs, labels)[0], torch.zeros(8, 8, 4))


def test_a_head_without_sizes_predicts_the_usual_ones() -> None:
    task = make_task(learn_sizes=False, sizes={"cell": [0.5, 0.25]}, threshold=0.5)
    outputs = torch.full((1, 8, 8, 2), -9.0)
    assert task.head(3)(torch.zeros(1, 8, 8, 3)).shape == outputs.shape
    outputs[0, 3, 4, 0], outputs[0, 6, 1, 1] = 9.0, 9.0
    found = read_boxes(task.codec.decode(outputs)[0][0])
    assert {box.name for box in found} == {"cell", "grain"}
    cell = next(box for box in found if box.name == "cell")
    assert [cell.left, cell.top, cell.right, cell.bottom] == pytest.approx([5 / 16, 5 / 16, 13 / 16, 9 / 16])


def test_of_boxes_that_lie_upon_each_other_only_the_surest_of_a_label_is_left() -> None:
    task = make_task(learn_sizes=False, sizes={"cell": [0.75, 0.5], "grain": [0.5, 0.5]}, overlap=0.4)
    outputs = torch.full((1, 8, 8, 2), -9.0)
    outputs[0, 3, 3, 0], outputs[0, 3, 5, 0], outputs[0, 3, 3, 1] = 8.0, 9.0, 7.0
    found = read_boxes(task.codec.decode(outputs)[0][0])
    assert [(box.name, round(box.left, 4)) for box in found] == [("cell", 5 / 16), ("grain", 3 / 16)]
    assert found[0].score > found[1].score


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([write_boxes([Box("cell", 0, 0, 0, 1)], 1, 1)], "with an area on the picture"),
        ([write_boxes([Box("cell", 1.2, 0, 1.4, 1)], 1, 1)], "with an area on the picture"),
        ([write_boxes([Box("Jane", 0, 0, 1, 1)], 1, 1)], "of the task's labels"),
        ([write_boxes([Box("cell", 0, 0, 1, 1)] * 5, 1, 1)], "at most 4 boxes"),
        (["mask 1 1 0*1"], "expected boxes"),
        ([], "in one column"),
    ],
)
def test_bad_boxes_are_refused_in_a_sentence_without_their_content(cells: list[str], said: str) -> None:
    with pytest.raises(BadRecord, match=said) as caught:
        make_task().codec.encode(cells)
    assert "Jane" not in str(caught.value)


def test_boxes_are_read_in_any_order_and_cut_off_at_the_picture() -> None:
    task = make_task()
    one, two = Box("grain", 0.5, 0.5, 1.25, 1.0), Box("cell", -0.1, 0.0, 0.5, 0.5, score=0.3)
    label_M5 = encode(task, [one, two])
    assert torch.equal(label_M5, encode(task, [two, one]))
    assert label_M5.tolist() == [[0, 0, 0, 0.5, 0.5], [1, 0.5, 0.5, 1, 1], [-1, 0, 0, 0, 0], [-1, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sizes": {"Zell": [0.1, 0.1]}}, "sizes: expected each name to be another one of the task's labels"),
        ({"counts": {"cell": 1, "Cell": 2}}, "counts: expected each name"),
        ({"head": {"centre": True}}, "head: expected no `centre`"),
        ({"sizes": {"cell": [1e-200, 0.1]}}, "sizes.cell.0: expected a number of at least 0.001"),
        ({"counts": {"cell": 1e-300}}, "counts.cell: expected"),
    ],
)
def test_a_number_of_a_strange_label_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        make_task(**changes)


def draw_detections(rng: np.random.Generator, boxes_M5: Tensor) -> Detected:
    """Some of the true boxes, moved, and others, of scores that are all different."""
    kept_M5 = boxes_M5[(boxes_M5[:, 0] >= 0) & torch.from_numpy(rng.random(len(boxes_M5)) < 0.8)].double()
    moved = kept_M5[:, 1:] + torch.from_numpy(rng.normal(0, 0.02, (len(kept_M5), 4)))
    # No overlap is exactly one of those that decide.
    others = torch.from_numpy(rng.uniform(0, 0.4, (3, 4))) + torch.tensor([0.0, 0.0, 0.5, 0.5])
    box_D4 = torch.cat([moved, others])
    label_D = torch.cat([kept_M5[:, 0].long(), torch.from_numpy(rng.integers(0, 2, 3))])
    logit_D = torch.from_numpy(rng.normal(0, 1, len(box_D4))).sort(descending=True).values
    order_D = torch.from_numpy(rng.permutation(len(box_D4)))
    return Detected(label_D[order_D], logit_D, box_D4[order_D])


@pytest.mark.slow
def test_mean_average_precision_is_that_of_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = pytest.importorskip("torchmetrics.detection._mean_ap")
    # It asks for a library that it needs for masks only.
    monkeypatch.setattr(reference, "_PYCOCOTOOLS_AVAILABLE", True)
    for name in ("pycocotools", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    task, rng = make_task(most_boxes=8), np.random.default_rng(1)
    labels = torch.stack([encode(task, draw_boxes(rng, int(rng.integers(0, 8)))) for _ in range(40)])
    found = [draw_detections(rng, boxes_M5) for boxes_M5 in labels]
    metric = reference.MeanAveragePrecision()
    metric.update(
        [{"boxes": each.box_D4, "scores": each.logit_D.sigmoid(), "labels": each.label_D} for each in found],
        [
            {"boxes": true[true[:, 0] >= 0][:, 1:].double(), "labels": true[true[:, 0] >= 0][:, 0].long()}
            for true in labels
        ],
    )
    expected = metric.compute()
    precision_O = compute_mean_precision(found, labels, 2)
    assert precision_O[0] == pytest.approx(float(expected["map_50"]), abs=1e-6)
    assert precision_O.mean() == pytest.approx(float(expected["map"]), abs=1e-6)
    assert 0.3 < precision_O[0] < 0.95 and precision_O[0] > 1.5 * precision_O.mean()


def test_the_statistic_s_precision_is_that_of_the_pictures_where_none_is_unusual() -> None:
    task, rng = (
        make_task(counts={"cell": 20, "grain": 20}, sizes={"cell": [0.3, 0.3], "grain": [0.3, 0.3]}),
        np.random.default_rng(2),
    )
    labels = torch.stack([encode(task, draw_boxes(rng, int(rng.integers(0, 5)))) for _ in range(40)])
    aim = compute_targets(labels, (8, 8), torch.tensor(task._sizes()).double(), reach=0.5)
    outputs = torch.cat([6.0 * aim.centre_BGGK - 3.0, aim.size_BGG2 / 0.3], dim=-1)
    outputs = outputs + torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))
    statistic = task.statistic(2048)
    values = statistic.values(statistic.sums(outputs, labels))
    assert values["ap_50"] == pytest.approx(task.pair_metrics(outputs, labels)["map_50"], abs=0.01)
    assert 0.1 < values["ap_50"] < 0.9


def test_a_picture_with_unusually_many_objects_counts_no_more_than_a_usual_one() -> None:
    task = make_task(most_boxes=64, counts={"cell": 1, "grain": 1})
    labels = torch.stack([encode(task, [Box("cell", 0.4, 0.4, 0.6, 0.6)] * 60)])
    row_S = task.statistic(16).rows(torch.zeros(1, 8, 8, 4), labels)[0]
    assert float(row_S[:33].norm()) == pytest.approx(1.0)
    # 60 objects and the 4 detections that are counted.
    assert float(row_S[32]) == pytest.approx(60 / np.hypot(60, 4))


def test_the_baseline_says_of_every_picture_what_known_ones_have_in_common() -> None:
    task = make_task(sizes={"cell": [0.25, 0.25], "grain": [0.25, 0.25]})
    always, once = Box("cell", 0.25, 0.25, 0.5, 0.5), Box("grain", 0.5, 0.5, 0.75, 0.75)
    known = torch.stack([encode(task, boxes) for boxes in ([always], [always], [always], [always, once])])
    outputs = task.predict_baseline(torch.zeros(2, 5), torch.zeros(4, 5), known)
    assert outputs.shape == (2, 32, 32, 4) and torch.equal(outputs[0], outputs[1])
    first, second = (read_boxes(cells[0]) for cells in task.codec.decode(outputs))
    assert first == second and [box.name for box in first] == ["cell", "grain"]
    assert [first[0].left, first[0].bottom] == pytest.approx([0.25, 0.5], abs=0.01)
    assert first[0].score > 0.95 > first[1].score


@pytest.mark.parametrize(
    ("hits", "wrong", "num_true", "expected"),
    [
        ([1, 1, 0], [0, 0, 5], 2, 1.0),
        # Precision 1 up to a recall of .5, then 2 / 4: 51 recalls of 1 and 50 of .5.
        ([1, 1], [0, 2], 2, (51 + 50 * 0.5) / 101),
        ([0, 0], [3, 1], 2, 0.0),
        # Half of the objects are never found.
        ([1, 0], [0, 0], 2, 51 / 101),
    ],
)
def test_average_precision_by_hand(hits: list[float], wrong: list[float], num_true: float, expected: float) -> None:
    found, others = np.array(hits, float), np.array(wrong, float)
    assert compute_average_precision(found, others, num_true, clip=True) == pytest.approx(expected)
    assert np.isnan(compute_average_precision(found, others, 0.0, clip=True))
