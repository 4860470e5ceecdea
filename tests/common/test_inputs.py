"""Label cells that are more than a name: masks, and boxes around objects."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import inputs
from common.inputs import Box, is_boxes, is_mask, read_boxes, read_mask, resize_mask, write_boxes, write_mask
from common.tasks import open_task
from common.types import BadInput, BadRecord

SIDE = st.integers(-4, 12).map(lambda eighths: eighths / 8)
BOX = st.builds(Box, st.text(max_size=5), SIDE, SIDE, SIDE, SIDE, st.sampled_from([0.25, 1.0]))


@given(st.lists(BOX, max_size=4))
def test_boxes_survive_being_a_cell(boxes: list[Box]) -> None:
    cell = write_boxes(boxes, 1, 1)
    assert is_boxes(cell)
    assert read_boxes(cell) == boxes


def test_boxes_are_read_as_fractions_of_their_picture() -> None:
    assert read_boxes(write_boxes([Box("cell", 64, 24, 128, 48)], 640, 480)) == [Box("cell", 0.1, 0.05, 0.2, 0.1)]


@pytest.mark.parametrize(
    "cell",
    [
        "",
        "x",
        "boxes",
        "boxes []",
        "boxes [0, 1, []]",
        'boxes [1, 1, [["cell", 0, 0, 1]]]',
        "boxes [1, 1, [[3, 0, 0, 1, 1, 1]]]",
        'boxes [1, 1, [["cell", 0, 0, 1, NaN, 1]]]',
        'boxes [1, 1, [["cell", 0, 0, 1, 1e999, 1]]]',
        'boxes [1, 1, [["cell", 0, 0, 1, "1", 1]]]',
        "boxes " + "[" * 100_000,
        "boxes [1, 1, " + str([["cell", 0, 0, 1, 1, 1]] * 10_001).replace("'", '"') + "]",
    ],
    ids=lambda cell: str(cell)[:40],
)
def test_a_cell_of_no_boxes_is_a_bad_record(cell: str) -> None:
    with pytest.raises(BadRecord, match="expected boxes"):
        read_boxes(cell)


def test_a_label_that_begins_like_a_mask_or_boxes_is_none() -> None:
    assert is_mask(write_mask(np.zeros((2, 3), np.uint8)))
    assert not any(map(is_mask, ("mask worn", "mask 2 3", "no mask 1 1 0*1", "mask")))
    assert not any(map(is_boxes, ("boxes of apples", "boxes", "boxes ")))


def test_a_small_file_cannot_ask_for_a_mask_of_any_number_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    chequered = np.indices((4, 5)).sum(0) % 2
    cell = write_mask(chequered)
    assert np.array_equal(read_mask(cell), chequered)
    monkeypatch.setattr(inputs, "MAX_RUNS", 19)
    for work in (lambda: write_mask(chequered), lambda: read_mask(cell)):
        with pytest.raises(BadRecord, match="at most 19 runs"):
            work()


def test_a_place_of_a_resized_mask_has_the_value_of_the_nearest() -> None:
    values = np.array([[0, 1], [2, 3]])
    assert resize_mask(values, 4, 2).tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert resize_mask(np.arange(9).reshape(3, 3), 1, 1).tolist() == [[4]]
    assert np.array_equal(resize_mask(values, 2, 2), values)


@pytest.mark.parametrize("name", ["cell\x1b[2J", "cell\x9b2J", "cell\nother"])
def test_a_name_with_control_characters_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="expected a name without control characters"):
        open_task({"kind": "classification", "labels": ["ground", name]}, "tasks.t")
