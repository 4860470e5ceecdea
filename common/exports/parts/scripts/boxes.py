"""Finds the boxes in what the exported network tells of a picture; needs numpy only.

A box has its centre where no neighbouring place of its label's map is higher; between places it lies where parabolas
through the neighbours have their tops. Boxes that lie on surer ones of their label are left out.
"""

from typing import Any

import numpy as np

_LEAST = 1e-12


def find_boxes(maps: np.ndarray, stated: dict[str, Any]) -> list[tuple[str, float, list[float]]]:
    """Returns label, probability and left, top, right and bottom of each box, the surest first.

    Args:
        maps: what the network tells of one picture, maps x rows x columns.
        stated: what preprocessing.json says of this output.

    Returns:
        The boxes; their sides are fractions of the picture's width and height.
    """
    labels, rule = stated["maps"][: len(stated["columns"])], stated["boxes"]
    found = []
    for number, label in enumerate(labels):
        certain = np.clip(maps[number].astype(np.float64), _LEAST, 1.0 - _LEAST)
        logits = np.log(certain) - np.log1p(-certain)
        edged = np.pad(logits, 1, mode="edge")
        rows, columns = logits.shape
        around = [edged[y : y + rows, x : x + columns] for y in range(3) for x in range(3)]
        for row, column in zip(*np.nonzero(logits >= np.max(around, axis=0)), strict=True):
            middle = [
                (column + _find_top(edged[row + 1, column : column + 3]) + 0.5) / columns,
                (row + _find_top(edged[row : row + 3, column + 1]) + 0.5) / rows,
            ]
            half = [maps[len(labels) * (1 + axis) + number, row, column] / 2.0 for axis in (0, 1)]
            sides = [middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1]]
            box = [min(max(float(side), 0.0), 1.0) for side in sides]
            found.append((label, float(maps[number, row, column]), box))
    found.sort(key=lambda each: -each[1])
    kept: list[tuple[str, float, list[float]]] = []
    # As many as are looked at before those on surer ones are left out.
    for each in found[: 4 * rule["most"]]:
        if all(each[0] != other[0] or _overlap(each[2], other[2]) <= rule["overlap"] for other in kept):
            kept.append(each)
    return [each for each in kept[: rule["most"]] if each[1] >= rule["threshold"]]


def _find_top(line: np.ndarray) -> float:
    """Returns where a parabola through three neighbours has its top, in places from the middle one."""
    bend = 2.0 * line[1] - line[0] - line[2]
    return float(np.clip((line[2] - line[0]) / (2.0 * bend), -0.5, 0.5)) if bend > 0.0 else 0.0


def _overlap(one: list[float], other: list[float]) -> float:
    """Returns intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / max(sum(areas) - shared, _LEAST)
