"""Boxes around objects: from a picture's boxes to what a head should say at each place, and back from what it says.

A place says how probable it is that an object of each label has its centre there, and how wide and high that object is
beside what is usual. Only operations on single values, on pictures one by one, and sums of two: what is computed of a
picture does not depend on the pictures beside it.

# Shapes: B pictures, M boxes of a picture, G places along a side of the grid, K labels, D detections of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.tasks.parts.rates import Array, average_defined, compute_average_precision

NO_BOX, NO_LABEL = -1.0, -2.0
"""Marks in place of a label's index: of boxes that only fill up a picture's number of them, and of a picture whose
boxes are not known."""

FIRST_IGNORED = -3.0
"""In place of the index of a label, this minus the index is an ignored box of that label."""

OVERLAPS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""Least overlaps of a box that counts as found, over which COCO takes the mean."""

_MOST_LOGIT = 1e9
MOST_SIZE = 4.0
"""Largest width or height in multiples of the usual one, and its inverse the least."""


class Targets(NamedTuple):
    """Outputs of a head that would fit the boxes of some pictures.

    Attributes:
        centre_BGGK: 1 at the centre of an object, falling to 0 at a part of its width and height; 0 elsewhere.
        size_BGG2: width and height of the object whose centre is nearest, over the usual ones, minus 1.
        inside_BGG: the largest of `centre_BGGK` over labels: how much the size counts.
        counted_BGGK: 0 at places without an object of the label that lie in an ignored box of it; 1 elsewhere.
    """

    centre_BGGK: Tensor
    size_BGG2: Tensor
    inside_BGG: Tensor
    counted_BGGK: Tensor


def compute_targets(boxes_BM5: Tensor, grid: tuple[int, int], usual_K2: Tensor, reach: float) -> Targets:
    """Returns what a head should say at each place.

    In float32, whatever a head's outputs are.

    Args:
        boxes_BM5: label's index, left, top, right and bottom of each box; NO_BOX and NO_LABEL boxes have no effect,
            ignored ones only on what counts.
        grid: rows and columns of places.
        usual_K2: usual width and height of each label, as fractions of the picture; of the type that is returned.
        reach: part of half the width and height at which a centre has fallen to 0; a place at least.
    """
    like, usual_K2, boxes_BM5 = usual_K2, usual_K2.float(), boxes_BM5.to(usual_K2.device)
    index_BM, left_BM, top_BM, right_BM, bottom_BM = boxes_BM5.unbind(-1)
    there_BM = (index_BM >= 0) & (index_BM < len(usual_K2))
    index_BM = torch.where(there_BM, index_BM, 0.0).long()
    width_BM, height_BM = right_BM - left_BM, bottom_BM - top_BM
    size_BM2 = torch.stack([width_BM, height_BM], dim=-1) / usual_K2[index_BM] - 1.0
    across_BMG = _fall_off((left_BM + right_BM) / 2.0, width_BM * (reach / 2.0), grid[1], there_BM)
    down_BMG = _fall_off((top_BM + bottom_BM) / 2.0, height_BM * (reach / 2.0), grid[0], there_BM)
    # By label, so that one box is one product; each in place, because there are as many steps as boxes.
    own_BMK = (index_BM.unsqueeze(-1) == torch.arange(len(usual_K2), device=index_BM.device)).float()
    centre_BKGG = size_BM2.new_zeros(len(boxes_BM5), len(usual_K2), *grid)
    inside_BGG = size_BM2.new_zeros(len(boxes_BM5), *grid)
    nearest_BGG = torch.zeros_like(inside_BGG, dtype=torch.long)
    value_BGG, value_BKGG = torch.empty_like(inside_BGG), torch.empty_like(centre_BKGG)
    for box in range(boxes_BM5.shape[1]):
        torch.mul(down_BMG[:, box, :, None], across_BMG[:, box, None, :], out=value_BGG)
        torch.mul(value_BGG.unsqueeze(1), own_BMK[:, box, :, None, None], out=value_BKGG)
        torch.maximum(centre_BKGG, value_BKGG, out=centre_BKGG)
        nearest_BGG.masked_fill_(value_BGG > inside_BGG, box)
        torch.maximum(inside_BGG, value_BGG, out=inside_BGG)
    nearest_BP2 = nearest_BGG.flatten(1).unsqueeze(-1).expand(-1, -1, 2)
    size_BGG2 = size_BM2.gather(1, nearest_BP2).view(*inside_BGG.shape, 2)
    size_BGG2 = torch.where(inside_BGG.unsqueeze(-1) > 0.0, size_BGG2, 0.0)
    ignored_BKGG = _find_ignored(boxes_BM5, grid, len(usual_K2))
    counted_BKGG = torch.where(ignored_BKGG & (centre_BKGG == 0.0), 0.0, 1.0)
    return Targets(
        centre_BKGG.movedim(1, -1).to(like),
        size_BGG2.to(like),
        inside_BGG.to(like),
        counted_BKGG.movedim(1, -1).to(like),
    )


def _find_ignored(boxes_BM5: Tensor, grid: tuple[int, int], num_labels: int) -> Tensor:
    """Returns ignored_BKGG, true where an ignored box of the label holds a place's centre."""
    index_BM, left_BM, top_BM, right_BM, bottom_BM = boxes_BM5.unbind(-1)

    def hold(low_BM: Tensor, high_BM: Tensor, places: int) -> Tensor:
        at_G = (torch.arange(places, device=low_BM.device) + 0.5) / places
        return ((low_BM.unsqueeze(-1) <= at_G) & (at_G <= high_BM.unsqueeze(-1))).float()

    own_BMK = (index_BM.unsqueeze(-1) == FIRST_IGNORED - torch.arange(num_labels, device=index_BM.device)).float()
    down_BMG, across_BMG = hold(top_BM, bottom_BM, grid[0]), hold(left_BM, right_BM, grid[1])
    # Counts of boxes, which are exact.
    return torch.einsum("bmk,bmh,bmw->bkhw", own_BMK, down_BMG, across_BMG) > 0.0


def _fall_off(centre_BM: Tensor, radius_BM: Tensor, places: int, there_BM: Tensor) -> Tensor:
    """Returns value_BMG: 1 - (distance / radius)^2 at each place along one axis, at least 0; 0 without a box."""
    at_G = (torch.arange(places, device=centre_BM.device) + 0.5) / places
    # The nearest place is within half a place, and counts.
    radius_BM = radius_BM.clamp(min=0.75 / places)
    value_BMG = 1.0 - ((at_G - centre_BM.unsqueeze(-1)) / radius_BM.unsqueeze(-1)).square()
    return torch.where(there_BM.unsqueeze(-1), value_BMG.clamp(min=0.0), 0.0)


@dataclass(frozen=True)
class Detected:
    """Boxes that a head sees on one picture, the surest first.

    Attributes:
        label_D: int64, index of the label.
        logit_D: logit of the probability.
        box_D4: left, top, right and bottom as fractions of the picture.
    """

    label_D: Tensor
    logit_D: Tensor
    box_D4: Tensor


def detect_boxes(logits_BGGK: Tensor, size_BGG2: Tensor, usual_K2: Tensor, most: int, overlap: float) -> list[Detected]:
    """Returns the boxes of each picture.

    A centre is at a place that no neighbour exceeds; between places it lies where parabolas through its neighbours
    along both axes have their tops.

    Args:
        logits_BGGK: logits of centres.
        size_BGG2: widths and heights over the usual ones, minus 1.
        usual_K2: usual width and height of each label, as fractions of the picture.
        most: most boxes of a picture.
        overlap: overlap with a surer box of the same label above which a box is left out.
    """
    from torchvision.ops import nms

    # Infinite ones have no parabola.
    logits_BKGG = logits_BGGK.movedim(-1, 1).double().nan_to_num(nan=-_MOST_LOGIT).clamp(-_MOST_LOGIT, _MOST_LOGIT)
    times_BGG2 = (size_BGG2.double() + 1.0).nan_to_num(nan=1.0).clamp(1.0 / MOST_SIZE, MOST_SIZE)
    peak_BKGG = logits_BKGG == nn.functional.max_pool2d(logits_BKGG, 3, stride=1, padding=1)
    padded_BKGG = nn.functional.pad(logits_BKGG, (1, 1, 1, 1), mode="replicate")
    grid_2 = logits_BKGG.new_tensor([logits_BKGG.shape[3], logits_BKGG.shape[2]])
    detected = []
    for peak_KGG, padded_KGG, times_GG2 in zip(peak_BKGG, padded_BKGG, times_BGG2, strict=True):
        label_D, row_D, column_D = peak_KGG.nonzero(as_tuple=True)
        logit_D = padded_KGG[label_D, row_D + 1, column_D + 1]
        # A few more than are kept, because some will lie upon each other.
        order_D = torch.argsort(logit_D, descending=True, stable=True)[: 4 * most]
        label_D, row_D, column_D, logit_D = label_D[order_D], row_D[order_D], column_D[order_D], logit_D[order_D]
        across_D = _find_top(padded_KGG[label_D, row_D + 1], column_D)
        down_D = _find_top(padded_KGG[label_D, :, column_D + 1], row_D)
        centre_D2 = (torch.stack([column_D + across_D, row_D + down_D], dim=1) + 0.5) / grid_2
        half_D2 = usual_K2.to(times_GG2)[label_D] * times_GG2[row_D, column_D] / 2.0
        box_D4 = torch.cat([centre_D2 - half_D2, centre_D2 + half_D2], dim=1).clamp(0.0, 1.0)
        # Beside each other, boxes of different labels do not overlap.
        kept = nms(box_D4 + 2.0 * label_D[:, None], logit_D, overlap)[:most]
        detected.append(Detected(label_D[kept], logit_D[kept], box_D4[kept]))
    return detected


def _find_top(lines_DG: Tensor, at_D: Tensor) -> Tensor:
    """Returns where parabolas through three neighbours have their tops, in places from the middle one.

    Args:
        lines_DG: a line of values for each, one value longer at both ends than the places.
        at_D: place of the middle one.
    """
    before_D, middle_D, after_D = (lines_DG.gather(1, at_D[:, None] + apart).squeeze(1) for apart in (0, 1, 2))
    bend_D = 2.0 * middle_D - before_D - after_D
    return torch.where(bend_D > 0.0, (after_D - before_D) / (2.0 * bend_D.clamp(min=1e-12)), 0.0).clamp(-0.5, 0.5)


def find_hits(
    found: Detected, boxes_M5: Tensor, label: int, overlaps: Sequence[float]
) -> tuple[Tensor, NDArray[np.bool_], NDArray[np.bool_]]:
    """Returns which of a picture's detections of a label are true, and which do not count, as COCO decides it.

    The surest first, each takes the box of the label that it overlaps most and that none has taken yet. One that takes
    none does not count where an ignored box of the label covers enough of it.

    Args:
        found: the detections.
        boxes_M5: the picture's boxes as `compute_targets` reads them.
        label: index of the label.
        overlaps: O least overlaps (intersection over union).

    Returns:
        Positions of the label's detections, and twice [O, as many]: true where the detection is true, and where it does
        not count.
    """
    from torchvision.ops import box_iou

    chosen = (found.label_D == label).nonzero().squeeze(1)
    true_M4 = boxes_M5[boxes_M5[:, 0] == label][:, 1:].to(found.box_D4)
    overlap_DM = box_iou(found.box_D4[chosen], true_M4).cpu().numpy()
    hits = np.zeros((len(overlaps), len(chosen)), np.bool_)
    highest_D = overlap_DM.max(axis=1, initial=0.0)
    for level, least in enumerate(overlaps):
        free_DM = overlap_DM.copy()
        # Of the many detections few are near any box.
        for position in (highest_D >= least).nonzero()[0]:
            best = int(free_DM[position].argmax())
            if free_DM[position, best] >= least:
                hits[level, position] = True
                free_DM[:, best] = -1.0
    ignored_M4 = boxes_M5[boxes_M5[:, 0] == FIRST_IGNORED - label][:, 1:].to(found.box_D4)
    covered_D = _cover(found.box_D4[chosen], ignored_M4).cpu().numpy()
    return chosen, hits, ~hits & (covered_D >= np.array(overlaps)[:, None])


def _cover(box_D4: Tensor, other_M4: Tensor) -> Tensor:
    """Returns part_D of each box's area that the one of other boxes covers that covers most; 0 without others."""
    if not len(other_M4):
        return box_D4.new_zeros(len(box_D4))
    corner_DM2 = torch.maximum(box_D4[:, None, :2], other_M4[:, :2])
    side_DM2 = (torch.minimum(box_D4[:, None, 2:], other_M4[:, 2:]) - corner_DM2).clamp(min=0.0)
    area_D = (box_D4[:, 2:] - box_D4[:, :2]).prod(dim=1).clamp(min=1e-12)
    return side_DM2.prod(dim=2).amax(dim=1) / area_D


def compute_mean_precision(found: Sequence[Detected], boxes_BM5: Tensor, num_labels: int) -> Array:
    """Returns mean average precision over labels that some picture has, for each of `OVERLAPS` (Lin et al. 2014).

    Args:
        found: the detections of each picture.
        boxes_BM5: their boxes as `compute_targets` reads them.
        num_labels: K.
    """
    precision_KO = np.full((num_labels, len(OVERLAPS)), np.nan)
    for label in range(num_labels):
        num_true = float((boxes_BM5[..., 0] == label).sum())
        scores, hits = [], [np.zeros((len(OVERLAPS), 0), np.bool_)]
        skipped = list(hits)
        for own, boxes_M5 in zip(found, boxes_BM5, strict=True):
            chosen, own_hits, own_skipped = find_hits(own, boxes_M5, label, OVERLAPS)
            scores.append(own.logit_D[chosen].cpu().numpy())
            hits.append(own_hits)
            skipped.append(own_skipped)
        if not num_true:
            continue
        order = np.argsort(-np.concatenate(scores), kind="stable")
        hits_OD, skipped_OD = (np.concatenate(each, axis=1)[:, order].astype(np.float64) for each in (hits, skipped))
        for level, (hits_D, skipped_D) in enumerate(zip(hits_OD, skipped_OD, strict=True)):
            wrong_D = 1.0 - hits_D - skipped_D
            precision_KO[label, level] = compute_average_precision(hits_D, wrong_D, num_true, clip=True)
    return np.array([average_defined(precision_K) for precision_K in precision_KO.T])
