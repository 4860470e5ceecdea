"""Labels that are drawn on pictures, masks and boxes: what is left out of them, and their counts for the staff."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from client.config import LabelColumns
from client.data.sources.parts.boundary import try_record
from common.inputs import Box, find_name, is_boxes, is_mask, read_boxes, read_mask, read_mask_names, write_boxes

_FAR, _NEAR, _LEAST = 2.0, 0.01, 1e-6
_MAX_SHOWN = 12


def is_drawn(cell: str) -> bool:
    """Returns true for a cell that holds a mask or boxes."""
    return is_mask(cell) or is_boxes(cell)


def clip_boxes(cell: str) -> tuple[str, int, int]:
    """Returns boxes cut at their picture's edges without those that then have no area, their number, and all boxes'.

    Raises:
        BadRecord: the cell is a damaged one.
    """
    boxes = read_boxes(cell)
    kept = [_clip(box) for box in boxes if _has_area(box)]
    return write_boxes(kept, 1.0, 1.0), len(boxes) - len(kept), len(boxes)


def _clip(box: Box) -> Box:
    left, top, right, bottom = (min(1.0, max(0.0, side)) for side in (box.left, box.top, box.right, box.bottom))
    return replace(box, left=left, top=top, right=right, bottom=bottom)


def _has_area(box: Box) -> bool:
    cut = _clip(box)
    return min(cut.right - cut.left, cut.bottom - cut.top) > _LEAST


@dataclass(frozen=True)
class DrawnCounts:
    """Counts over the masks or boxes of a column.

    Attributes:
        number: number of masks, or of pictures with or without boxes, that were read.
        empty: number of them without an object: no box, or the same value at all places.
        parts: name -> number of its boxes or places; numbers of masks without names are named by their digits.
        records: name -> number of records that have it.
        flat: rows with a box without area on its picture -> the number of such boxes.
        as_fractions: rows of boxes that look like fractions of the picture where pixels were expected.
        as_pixels: rows of boxes that look like pixels where fractions were expected.
        damaged: rows that hold something else, and why.
    """

    number: int
    empty: int
    parts: Mapping[str, int] = field(repr=False)
    records: Mapping[str, int] = field(repr=False)
    flat: Mapping[int, int] = field(repr=False)
    as_fractions: tuple[int, ...] = field(repr=False)
    as_pixels: tuple[int, ...] = field(repr=False)
    damaged: tuple[tuple[int, str], ...] = field(repr=False)

    def describe(self, column: str, missing: int) -> str:
        """Returns one sentence for the site's own screen.

        Args:
            column: name of the column.
            missing: number of records without a label.
        """
        shown = sorted(self.parts.items(), key=lambda item: -item[1])[:_MAX_SHOWN]
        parts = ", ".join(
            f"{name or 'without a label'} {count} in {self.records[name]} record(s)" for name, count in shown
        )
        more = f" and {len(self.parts) - _MAX_SHOWN} more" if len(self.parts) > _MAX_SHOWN else ""
        drawn = f"{self.number} drawn, {self.empty} of them without an object; {missing} without a label"
        return f"{column}: {drawn}; {parts}{more}"

    def list_warnings(self) -> list[tuple[str, str]]:
        """Returns what may be wrong with them and what to do, in words and counts."""
        found = []
        if self.flat:
            found.append(
                (
                    "boxes without area on their picture, which are left out while the pictures are used: "
                    f"{sum(self.flat.values())} ({_list_rows(self.flat)})",
                    "draw them again, or leave it so",
                )
            )
        for rows, looks, wanted in (
            (self.as_fractions, "fractions of the picture", "pixels"),
            (self.as_pixels, "pixels", "fractions of the picture"),
        ):
            if rows:
                detail = f"boxes that look like {looks} where {wanted} are expected: in {len(rows)} record(s)"
                found.append((f"{detail} ({_list_rows(rows)})", "export the boxes in the other unit"))
        if 2 * self.empty > self.number:
            detail = f"{self.empty} of {self.number} have no object"
            found.append((detail, "check that masks and boxes are those of these pictures"))
        return found


def count_drawn(cells: Iterable[tuple[int, str]]) -> DrawnCounts:
    """Returns the counts of a column's masks or boxes, each beside its record's row; they are read one by one."""
    number, empty = 0, 0
    parts, records = Counter[str](), Counter[str]()
    flat: dict[int, int] = {}
    as_fractions, as_pixels, damaged = [], [], []
    for row, cell in cells:
        own, reason = try_record(lambda cell=cell: _count_boxes(cell) if is_boxes(cell) else _count_places(cell))  # type: ignore[misc]
        if own is None:
            damaged.append((row, f"{reason}"))
            continue
        number += 1
        empty += len(own) == (0 if is_boxes(cell) else 1)
        parts.update(own)
        records.update(own.keys())
        if is_boxes(cell):
            _, left_out, _ = clip_boxes(cell)
            flat |= {row: left_out} if left_out else {}
            as_fractions += [row] if _has_fractions(cell) else []
            as_pixels += [row] if _has_pixels(cell) else []
    return DrawnCounts(
        number, empty, parts, records, flat, tuple(as_fractions), tuple(as_pixels), damaged=tuple(damaged)
    )


def _has_fractions(cell: str) -> bool:
    """Returns true for boxes all of which lie within the first pixel of a picture of several."""
    width, height, rows = json.loads(cell.removeprefix("boxes "))
    within = all(max(right, bottom) < 1 + _NEAR for _, _, _, right, bottom, *_ in rows)
    return bool(rows) and max(width, height) > 1 and within


def _has_pixels(cell: str) -> bool:
    """Returns true for boxes in fractions of which one lies far outside the picture."""
    width, height, _ = json.loads(cell.removeprefix("boxes "))
    return max(width, height) <= 1 and any(max(box.right, box.bottom) > _FAR for box in read_boxes(cell))


def find_unknown(parts: Iterable[str], own: LabelColumns, column: str, names: Sequence[str] | None) -> list[str]:
    """Returns local names that neither the site's `values` nor the task knows.

    Args:
        parts: local names of boxes or places.
        own: the site's columns and mapping of values for the task.
        column: name of the column.
        names: names of the task; None where no task is at hand.
    """
    values = own.list_values(column)
    if values is None and names is None:
        return []
    known = [*(values or {}), *((values or {}).values() if names is None else names)]
    # Numbers of a mask that nothing maps are positions of labels, which the task's codec checks.
    asked = [name for name in parts if name and (values is not None or not name.isdigit())]
    return [name for name in asked if find_name(name, known) is None]


def _count_boxes(cell: str) -> Counter[str]:
    return Counter(box.name for box in read_boxes(cell))


def _count_places(cell: str) -> Counter[str]:
    values, counts = np.unique(read_mask(cell), return_counts=True)
    names = read_mask_names(cell) or {}
    own = Counter[str]()
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        own[names.get(value, str(value))] += count
    return own


def _list_rows(rows: Iterable[int]) -> str:
    shown = list(rows)
    return ", ".join(f"row {row}" for row in shown[:3]) + (", ..." if len(shown) > 3 else "")
