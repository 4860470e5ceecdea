"""Outputs of places, and masks as cells."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional

from common.inputs import is_mask, read_mask, write_mask
from common.tasks import EXACT_BUCKETS, open_task
from common.tasks.parts.places import gather_slopes, refine
from common.types import BadInput, BadRecord

SEGMENTATION = open_task({"kind": "segmentation", "labels": ["ground", "cell", "edge"], "side": 4, "ignore": 9}, "t")


@pytest.mark.parametrize(("grid", "side"), [(4, 16), (5, 8), (3, 3), (1, 4), (8, 6)])
def test_refined_outputs_lie_on_straight_lines_and_slopes_come_back_along_them(grid: int, side: int) -> None:
    outputs = torch.randn(2, grid, grid, 3, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    expected = functional.interpolate(outputs.movedim(-1, 1), size=(side, side), mode="bilinear", align_corners=False)
    torch.testing.assert_close(refine(outputs, side), expected.movedim(1, -1))
    slopes = torch.randn(2, side, side, 3, generator=torch.Generator().manual_seed(1)).double()
    (gradient,) = torch.autograd.grad((expected.movedim(1, -1) * slopes).sum(), outputs)
    torch.testing.assert_close(gather_slopes(slopes, grid), gradient)


def test_a_record_s_slopes_are_the_same_bits_beside_any_others() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(70, 8, 8, 3, generator=generator).double()
    labels = torch.randint(0, 3, (70, 4, 4), generator=generator).to(torch.uint8)
    whole = SEGMENTATION.loss_gradient(outputs, labels)  # type: ignore[attr-defined]
    for first, last in ((0, 1), (3, 20), (69, 70)):
        alone = SEGMENTATION.loss_gradient(outputs[first:last], labels[first:last])  # type: ignore[attr-defined]
        assert torch.equal(alone, whole[first:last])


@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 3)))
def test_a_mask_survives_being_a_cell(values_HW: np.ndarray) -> None:
    cell = write_mask(values_HW)
    assert is_mask(cell)
    np.testing.assert_array_equal(read_mask(cell), values_HW)


@pytest.mark.parametrize(
    "cell", ["", "mask", "mask 2 2 0*3", "mask 2 2 0*5", "mask 0 2 0*0", "mask 2 2 -1*4", "mask 99999 99999 0*1", "x"]
)
def test_a_text_that_is_no_mask_is_refused(cell: str) -> None:
    with pytest.raises(BadRecord):
        read_mask(cell)


def test_black_and_white_masks_are_of_two_labels_and_other_numbers_are_refused() -> None:
    two = open_task({"kind": "segmentation", "labels": ["ground", "cell"], "side": 2}, "t")
    assert two.codec.encode([write_mask(np.array([[0, 255], [255, 0]]))]).tolist() == [[0, 1], [1, 0]]
    for wrong in (np.array([[0, 2]]), np.array([[1, 255]])):
        with pytest.raises(BadRecord, match="whole numbers from 0 to 1"):
            two.codec.encode([write_mask(wrong)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": {"hidden": 4, "kernel": 2}}, "kernel: expected an odd number of places, got 2"),
        ({"head": {"kernel": 3}}, "hidden: expected a number of channels beside `kernel`"),
        ({"head": {"centre": True}}, "no `centre` and no `prior`"),
        ({"head": {"hidden": 4, "kernel": 3}, "every": 2}, "every: expected 1 beside a head with `kernel`"),
    ],
)
def test_heads_that_cannot_read_places_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        open_task({"kind": "segmentation", "labels": ["ground", "cell"], "side": 4, **changes}, "t")


def test_a_head_with_a_kernel_sees_a_square_around_each_place_and_nothing_else() -> None:
    settings = {"kind": "segmentation", "labels": ["ground", "cell"], "side": 9, "head": {"hidden": 4, "kernel": 3}}
    head = open_task(settings, "t").head(5)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    features = torch.randn(1, 9, 9, 5, generator=torch.Generator().manual_seed(0))
    changed = features.clone()
    changed[0, 4, 4] += 1.0
    moved = (head(changed) != head(features)).any(dim=-1)[0]
    square = torch.zeros(9, 9, dtype=torch.bool)
    square[2:7, 2:7] = True
    assert torch.equal(moved, square)


def test_places_without_a_label_count_nowhere() -> None:
    labels = SEGMENTATION.codec.encode([write_mask(np.array([[0, 9, 1, 1]] * 4))])[None]
    assert (labels[0, :, 1] == 255).all()
    outputs = torch.randn(1, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    changed = outputs.clone()
    changed[:, :, 1] += torch.tensor([5.0, -3.0, 1.0])
    torch.testing.assert_close(SEGMENTATION.losses(outputs, labels), SEGMENTATION.losses(changed, labels))
    statistic = SEGMENTATION.statistic(EXACT_BUCKETS)
    assert torch.equal(statistic.sums(outputs, labels), statistic.sums(changed, labels))


def test_dice_is_the_mean_over_pictures_that_have_the_label_or_are_said_to() -> None:
    truth = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[0, 1], [0, 0]]], dtype=torch.uint8)
    said = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [0, 0]], [[1, 0], [0, 0]]])
    task = open_task({"kind": "segmentation", "labels": ["ground", "cell"], "side": 2}, "t")
    statistic = task.statistic(EXACT_BUCKETS)
    values = statistic.values(statistic.sums(functional.one_hot(said, 2).float(), truth))
    # 2/3 and 0; the second picture has no cell and none is found.
    assert values == pytest.approx({"dice": (2 / 3 + 0) / 2, "iou": (1 / 2 + 0) / 2, "accuracy": (3 + 4 + 2) / 12})
