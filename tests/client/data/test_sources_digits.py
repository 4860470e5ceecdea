"""The embedded digits: each is scattered once, by itself, and stays a digit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from client.data.sources import Source, open_source
from client.data.sources.parts.scatter import scatter
from common.types import BadInput


def digits(**settings: Any) -> Source:
    return open_source({"kind": "digits", "classes": [4, 6], **settings}, "sources.digits").open()


def test_both_columns_say_what_the_picture_shows() -> None:
    target = load_digits().target
    index = digits(classes=list(range(10))).index()
    assert [record.cells["digit"] for record in index] == [str(digit) for digit in target]
    loops = {record.cells["digit"]: record.cells["loop"] for record in index}
    assert {digit for digit, loop in loops.items() if loop == "yes"} == {"0", "6", "8", "9"}
    assert set(loops.values()) == {"yes", "no"}


def test_a_digit_is_the_same_whatever_others_are_chosen() -> None:
    few, many = digits(classes=[6]), digits(classes=[4, 5, 6])
    positions = {record.key: position for position, record in enumerate(many.index())}
    for position, record in enumerate(few.index()[:50]):
        np.testing.assert_array_equal(few.load(position), many.load(positions[record.key]))


def test_another_seed_or_canvas_is_other_content() -> None:
    assert len({digits().digest(), digits(seed=1).digest(), digits(canvas=24).digest()}) == 3
    picture = digits(canvas=24).load(0)
    assert picture.shape == (24, 24)
    assert picture.dtype == np.uint8


@pytest.mark.parametrize("canvas", [13, 20, 40])
def test_the_whole_image_stays_on_the_canvas_at_a_scale_of_1_to_1_6(canvas: int) -> None:
    # A bright disc: its area grows with the square of the scale, and rotation does not matter.
    rows, columns = np.mgrid[:8, :8] - 3.5
    disc = (rows**2 + columns**2 < 6).astype(np.float64)
    pictures = np.stack([scatter(disc, canvas, np.random.default_rng(seed)) for seed in range(800)]) / 255.0
    # Noise of deviation 0.1 that is clipped at 0 or 1 moves a dark or bright pixel by 0.1 / sqrt(2 pi) on average.
    shift = 0.1 / np.sqrt(2 * np.pi)
    growth = (pictures - shift).sum(axis=(1, 2)) / disc.sum()
    mean_square_scale = (1.6**3 - 1.0) / (3 * 0.6)
    standard_error = growth.std() / np.sqrt(len(growth))
    assert abs(growth.mean() - mean_square_scale * (1 - 2 * shift)) < 4 * standard_error


def test_a_class_that_is_no_digit_is_refused() -> None:
    with pytest.raises(BadInput, match=r"sources\.digits\.classes"):
        digits(classes=[10])
