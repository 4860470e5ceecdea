"""The embedded digits: each is scattered once, by itself, and stays a digit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from client.sources import Source, open_source
from client.sources._scatter import scatter
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


@given(seed=st.integers(0, 2**32), canvas=st.integers(13, 40))
def test_the_whole_image_stays_on_the_canvas_and_grows_by_at_most_its_scale(seed: int, canvas: int) -> None:
    # A bright disc: the sum of its pixels grows with the square of the scale, and rotation does not matter.
    rows, columns = np.mgrid[:8, :8] - 3.5
    disc = (rows**2 + columns**2 < 6).astype(np.float64)
    rng = np.random.default_rng(seed)
    picture = scatter(disc, canvas, rng) / 255.0
    # Noise clipped to [0, 1] adds 0.04 to a dark pixel on average (0.1 / sqrt(2 pi)).
    growth = (picture - 0.1 / np.sqrt(2 * np.pi)).sum() / disc.sum()
    assert 0.8 < growth < 1.6**2 * 1.25


def test_a_class_that_is_no_digit_is_refused() -> None:
    with pytest.raises(BadInput, match=r"sources\.digits\.classes"):
        digits(classes=[10])
