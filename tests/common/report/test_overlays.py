"""Masks and boxes on a picture: where they are and nowhere else, in colours that follow from names."""

from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from common.inputs import Box, write_boxes, write_mask
from common.report.overlays import COLOURS, Legend, draw_overlay, is_drawable, show_pictures
from common.report.page import ReportPage, Section, write_report

GREY = Image.new("RGB", (20, 10), (100, 100, 100))


def find_changed(drawn: Image.Image) -> np.ndarray:
    return (np.asarray(drawn) != np.asarray(GREY)).any(axis=2)


@pytest.mark.parametrize(
    ("values", "names", "legend"),
    [
        ([[0, 1]], None, Legend(("ground", "cell"))),
        ([[0, 255]], None, Legend(("ground", "cell"))),
        ([[7, 3]], {7: "ground", 3: "cell"}, Legend(("ground", "cell"))),
        ([[7, 3]], {7: "", 3: "cell"}, Legend(("ground", "cell"))),
        ([[0, 1]], None, Legend(("ground", "cell", "fat"))),
        ([[2, 1]], None, Legend(("fat", "cell", "ground"), background=2)),
    ],
)
def test_a_mask_is_drawn_where_it_is_no_background(
    values: list[list[int]], names: dict[int, str] | None, legend: Legend
) -> None:
    drawn = draw_overlay(GREY, write_mask(np.array(values), names), legend)
    changed_HW = find_changed(drawn)
    assert drawn.size == GREY.size and changed_HW[:, 10:].all() and not changed_HW[:, :10].any()
    inside, edge = np.asarray(drawn)[5, 15], np.asarray(drawn)[5, 10]
    assert tuple(edge) == COLOURS[1]
    assert tuple(inside) == tuple(round(0.65 * 100 + 0.35 * part) for part in COLOURS[1])


def test_a_box_is_a_frame_in_the_colour_of_its_name() -> None:
    legend = Legend(("red", "white"))
    picture = Image.new("RGB", (200, 100), (100, 100, 100))
    drawn = np.asarray(draw_overlay(picture, write_boxes([Box("white", 0.25, 0.2, 0.75, 0.8)], 1, 1), legend))
    for place in ((20, 100), (79, 100), (50, 50), (50, 149)):
        assert tuple(drawn[place]) == COLOURS[1], place
    assert (drawn[:19] == 100).all() and (drawn[:, :49] == 100).all() and (drawn[81:] == 100).all()
    assert np.array_equal(np.asarray(draw_overlay(picture, write_boxes([], 1, 1), legend)), np.asarray(picture))


def test_labels_are_not_drawn() -> None:
    assert not any(map(is_drawable, ("cell", "", "mask worn", "1.5")))


def test_a_page_holds_pictures_and_loads_none() -> None:
    hostile = '"><script>alert(1)</script>'
    figure = show_pictures([GREY, GREY], hostile, hostile)
    page = write_report(ReportPage("t", "i", "q", [], [Section("Pictures", "lead", [figure])], "f"))
    assert "<script" not in page and "img-src data:" in page and "default-src 'none'" in page
    (image,) = [each for each in ElementTree.fromstring(figure.svg) if each.tag.endswith("image")]
    kind, data = re.fullmatch(r"data:(image/png);base64,(.*)", image.attrib["href"]).groups()  # type: ignore[union-attr]
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "image/png" and shown.size == (512 * 2 + 4, 256)
