"""Pictures with what a model says of their places drawn on them: masks as tinted areas, boxes as frames with names.

# Shapes: H and W of a picture.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from common.errors import plain
from common.inputs import (
    Box,
    find_name,
    is_boxes,
    is_mask,
    read_boxes,
    read_mask,
    read_mask_names,
    resize_mask,
)
from common.report.figures import Figure

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

COLOURS = (
    (60, 140, 255),
    (0, 215, 90),
    (255, 200, 0),
    (235, 70, 50),
    (200, 90, 240),
    (0, 200, 210),
    (250, 130, 190),
    (170, 110, 50),
)
"""Colours of labels and of objects, in the order of their names; they begin again after the last."""

_TINT = 0.35
_SHOWN = 256
"""Pixels of the shorter side of a picture on a page."""

_LONGEST = 1024
"""Pixels of the longer side of a picture on a page."""


@dataclass(frozen=True)
class Legend:
    """The names behind the colours of an overlay.

    Attributes:
        names: labels in the order of a mask's whole numbers, or names of objects.
        background: whole number of a mask whose places are left as they are.
    """

    names: Sequence[str] = ()
    background: int = 0

    def find_colour(self, name: str) -> tuple[int, int, int]:
        """Returns the colour of a name; the first one where it is not listed."""
        return COLOURS[(list(self.names).index(name) if name in self.names else 0) % len(COLOURS)]


def is_drawable(cell: str) -> bool:
    """Returns true for a cell that can be drawn on its picture."""
    return is_mask(cell) or is_boxes(cell)


def draw_overlay(picture: Image.Image, cell: str, legend: Legend) -> Image.Image:
    """Returns an RGB picture of the same size with a cell drawn on it.

    Args:
        picture: the picture, RGB.
        cell: a mask or boxes.
        legend: what stands behind the colours.

    Raises:
        BadRecord: the cell cannot be read.
    """
    if is_mask(cell):
        return _draw_mask(picture, resize_mask(_read_indices(cell, legend), picture.height, picture.width), legend)
    return _draw_boxes(picture, read_boxes(cell), legend)


def _read_indices(cell: str, legend: Legend) -> NDArray[np.int64]:
    """Returns a mask as places in the legend; the background where it has no label of that."""
    values_HW, names = read_mask(cell), read_mask_names(cell)
    found = np.unique(values_HW)
    # Masks of two labels are often written in black and white.
    two = names is None and len(legend.names) == 2 and set(found.tolist()) <= {0, 255}
    indices_HW = np.full(values_HW.shape, legend.background)
    for value in found.tolist():
        index = min(value, 1) if two else value
        if names is not None:
            place = find_name(names.get(value, str(value)), legend.names)
            index = legend.background if place is None else place
        if index < len(legend.names):
            indices_HW[values_HW == value] = index
    return indices_HW


def _draw_mask(picture: Image.Image, values_HW: NDArray[np.int64], legend: Legend) -> Image.Image:
    from PIL import Image

    pixels_HW3 = np.asarray(picture).astype(np.float32)
    colours_V3 = np.array(COLOURS, np.float32)[np.arange(int(values_HW.max()) + 1) % len(COLOURS)]
    # The edge is drawn in full colour: a tint alone is lost on a coloured picture.
    share_HW = np.where(_find_edges(values_HW), np.float32(1.0), np.float32(_TINT))
    share_HW1 = np.where(values_HW == legend.background, np.float32(0.0), share_HW)[..., None]
    drawn_HW3 = (1.0 - share_HW1) * pixels_HW3 + share_HW1 * colours_V3[values_HW]
    return Image.fromarray(drawn_HW3.round().astype(np.uint8))


def _find_edges(values_HW: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns true at each place beside one of another value."""
    edges_HW = np.zeros(values_HW.shape, np.bool_)
    for axis in (0, 1):
        other = np.diff(values_HW, axis=axis) != 0
        ends = [(0, 0), (0, 0)]
        for side in ((0, 1), (1, 0)):
            ends[axis] = side
            edges_HW |= np.pad(other, ends)
    return edges_HW


def _draw_boxes(picture: Image.Image, boxes: Sequence[Box], legend: Legend) -> Image.Image:
    from PIL import ImageDraw

    drawn = picture.copy()
    pen, width = ImageDraw.Draw(drawn), max(1, round(min(picture.size) / 200))
    size = max(9, round(min(picture.size) / 32))
    # The surest on top, and every name above all frames: on its own ground, because frames cross it.
    ordered = sorted(boxes, key=lambda box: box.score)
    corners = []
    for box in ordered:
        xs = sorted(round(side * (picture.width - 1)) for side in (box.left, box.right))
        ys = sorted(round(side * (picture.height - 1)) for side in (box.top, box.bottom))
        pen.rectangle((xs[0], ys[0], xs[1], ys[1]), outline=legend.find_colour(box.name), width=width)
        corners.append((xs[0] + width, ys[0] + width))
    for box, corner in zip(ordered, corners, strict=True):
        said = plain(box.name, 30) if box.score == 1.0 else f"{plain(box.name, 30)} {box.score:.2f}"
        pen.rectangle(pen.textbbox(corner, said, font_size=size), fill=legend.find_colour(box.name))
        pen.text(corner, said, fill="black", font_size=size)
    return drawn


def write_png(picture: Image.Image) -> bytes:
    """Returns a picture as PNG."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def show_pictures(pictures: Sequence[Image.Image], caption: str, description: str) -> Figure:
    """Returns pictures of one size side by side, as a figure of a page.

    Args:
        pictures: the pictures.
        caption: what the figure shows.
        description: the same for those who do not see it.
    """
    from PIL import Image

    width, height = pictures[0].size
    factor = min(_SHOWN / min(width, height), _LONGEST / max(width, height))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    row = Image.new("RGB", (sum(size[0] + 4 for _ in pictures) - 4, size[1]), "white")
    for place, picture in enumerate(pictures):
        way = Image.Resampling.BOX if factor < 1.0 else Image.Resampling.NEAREST
        row.paste(picture.resize(size, way), (place * (size[0] + 4), 0))
    data = base64.b64encode(write_png(row)).decode("ascii")
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {row.width} {row.height}" role="img" '
        f'aria-label="{escape(plain(description, 400), quote=True)}">'
        f'<image width="{row.width}" height="{row.height}" href="data:image/png;base64,{data}"/></svg>'
    )
    return Figure(svg, caption)
