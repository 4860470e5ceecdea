"""Label cells that are more than a name: boxes around objects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.inputs import Box, is_boxes, read_boxes, write_boxes
from common.types import BadRecord

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
