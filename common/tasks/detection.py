"""Boxes around the objects on a picture.

The head sees one place at a time and says for each label how probable it is that an object has its centre there, and
how wide and high the object is beside what is usual (Zhou et al. 2019, arXiv 1904.07850, without anchors).

# Shapes: B pictures, G places along a side of the backbone's grid, M boxes of a picture, K labels, T score buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, final

import numpy as np
from pydantic import Field, model_validator

from common.inputs import MAX_BOXES, Box, CellName, CellNames, find_name, read_boxes, write_boxes
from common.tasks import BoxRule, SparseRows, Statistic, TaskExample
from common.tasks.parts.declared import LabelWeights, order_by_label
from common.tasks.parts.head import PlacesHeadSettings
from common.tasks.parts.places import PicturePlaces
from common.tasks.parts.rates import RATE, Array, average_defined, compute_average_precision, compute_ratio
from common.types import BadRecord

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from common.tasks.parts.boxes import Detected, Targets

REACH = 0.5
"""Part of half a width and height at which a centre has fallen to 0."""

POSITIVES = 10.0
"""Weight of centres beside that of the many places without one."""

SIZE_STEP = 0.3
"""Change of a size, in parts of the usual one, for an output of 1: noise in outputs moves sizes as much less."""

MOST_LOGIT = 6.0
"""Score buckets are of equal width between logits of this and minus this."""

_BASELINE_SIDE = 32

Fraction = Annotated[float, Field(ge=0.001, le=1.0)]


@final
class Detection(PicturePlaces):
    """Settings of a detection.

    Attributes:
        labels: what an object can be, in the order of the head's outputs.
        sizes: label -> usual width and height of its objects, as fractions of the picture; 0.1 of labels without one.
            Public, as the other numbers are: of the literature or of public pictures, never of a site's records.
        counts: label -> usual number of its objects on a picture; 1 of labels without one.
        learn_sizes: whether the head says how an object differs from the usual size; else all have that.
        weights: label -> factor from 0.01 to 100 on the loss of its centres; labels without one have 1.
        size_weight: factor on the loss of sizes.
        most_boxes: most objects of a picture; a picture with more is a bad record.
        most_detections: most boxes that are said of a picture.
        overlap: overlap with a surer box of the same label above which a box is left out.
        threshold: probability from which a box is predicted; metrics look at all.
        scale: public factor on this task's loss, applied before joint clipping.
        head_settings: shape of the head, `head` in a file.
    """

    kind: Literal["detection"] = "detection"
    labels: Annotated[CellNames, Field(min_length=1, max_length=255)]
    sizes: dict[CellName, tuple[Fraction, Fraction]] = {}
    counts: dict[CellName, Annotated[float, Field(ge=1e-6, le=1000.0)]] = {}
    learn_sizes: bool = True
    weights: LabelWeights = {}
    size_weight: Annotated[float, Field(ge=0.01, le=100.0)] = 4.0
    most_boxes: Annotated[int, Field(ge=1, le=MAX_BOXES)] = 64
    most_detections: Annotated[int, Field(ge=1, le=MAX_BOXES)] = 100
    overlap: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    threshold: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.6
    scale: Annotated[float, Field(gt=0)] = 1.0
    head_settings: PlacesHeadSettings = Field(default=PlacesHeadSettings(), alias="head")

    @model_validator(mode="after")
    def _check_names(self) -> Detection:
        for key in ("sizes", "counts", "weights"):
            order_by_label(dict.fromkeys(getattr(self, key), 1.0), self.labels, key, default=1.0)
        return self

    @classmethod
    def example(cls) -> TaskExample:
        """Returns pictures of two kinds of objects, one of them empty."""
        cell, grain = Box("cell", 0.1875, 0.0625, 0.6875, 0.5625), Box("grain", 0.6875, 0.5625, 0.9375, 0.8125)
        pictures = [[cell, grain], [], [grain], [Box("cell", 0.4375, 0.5625, 0.9375, 0.8125)]]
        settings = {
            "kind": "detection",
            "labels": ["cell", "grain"],
            "sizes": {"cell": [0.5, 0.5], "grain": [0.25, 0.25]},
            "counts": {"cell": 0.5, "grain": 0.5},
            "most_boxes": 3,
        }
        return TaskExample(settings, [[write_boxes(boxes, 1, 1)] for boxes in pictures], grid=(8, 8))

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the objects whose boxes are labels."""
        return self.labels

    @property
    def codec(self) -> BoxCodec:
        """Boxes as M x 5 numbers."""
        return BoxCodec(self)

    def head(self, feature_dim: int) -> nn.Module:
        """Returns a head, features_BGGD -> outputs_BGGO: logits of centres above the usual ones, and sizes."""
        return self.head_settings.build(feature_dim, len(self.labels) + (2 if self.learn_sizes else 0))

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean over places of the cross entropy of centres and of the squared error of sizes.

        A place's error of the size counts by how near a centre is; beyond 1 it is no longer squared.
        """
        from torch.nn import functional

        aim, logits_BGGK, size_BGG2 = self._compare(outputs, labels)
        near_BGGK = POSITIVES * aim.centre_BGGK * functional.softplus(-logits_BGGK)
        entropy_BGGK = near_BGGK + (1.0 - aim.centre_BGGK) * functional.softplus(logits_BGGK)
        losses_BGG = (entropy_BGGK * aim.counted_BGGK * self._weights(outputs)).sum(dim=-1)
        if self.learn_sizes:
            error_BGG2 = functional.smooth_l1_loss(size_BGG2, aim.size_BGG2, reduction="none")
            losses_BGG = losses_BGG + self.size_weight * aim.inside_BGG * error_BGG2.sum(dim=-1)
        return losses_BGG.mean(dim=(1, 2)) * _find_known(labels)

    def loss_gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the probabilities minus the centres, weighted, and the errors of sizes, within 1."""
        import torch

        aim, logits_BGGK, size_BGG2 = self._compare(outputs, labels)
        weight_BGGK = 1.0 + (POSITIVES - 1.0) * aim.centre_BGGK
        slopes_BGGK = (logits_BGGK.sigmoid() * weight_BGGK - POSITIVES * aim.centre_BGGK) * self._weights(outputs)
        slopes = slopes_BGGK * aim.counted_BGGK
        if self.learn_sizes:
            error_BGG2 = (size_BGG2 - aim.size_BGG2).clamp(-1.0, 1.0)
            slopes = torch.cat(
                [slopes, error_BGG2 * (SIZE_STEP * self.size_weight * aim.inside_BGG).unsqueeze(-1)], dim=-1
            )
        part_B = _find_known(labels).to(slopes) / math.prod(outputs.shape[1:3])
        return slopes * part_B.view(-1, 1, 1, 1)

    def _compare(self, outputs: Tensor, labels: Tensor) -> tuple[Targets, Tensor, Tensor]:
        """Returns what a head should say, and what it says."""
        from common.tasks.parts.boxes import compute_targets

        aim = compute_targets(labels, (outputs.shape[1], outputs.shape[2]), self._usual(outputs), REACH)
        return aim, *self._split(outputs)

    def _split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits_BGGK of centres, and size_BGG2 over the usual one, minus 1."""
        logits_BGGK = outputs[..., : len(self.labels)] + outputs.new_tensor(self._usual_logits())
        if not self.learn_sizes:
            return logits_BGGK, outputs.new_zeros(*outputs.shape[:-1], 2)
        return logits_BGGK, SIZE_STEP * outputs[..., len(self.labels) :]

    def _usual_logits(self) -> list[float]:
        """Returns the logit of each label that fits best where nothing is known of a place but the usual numbers."""
        return [math.log(POSITIVES * share / (1.0 - share)) for share in self._shares()]

    def _shares(self) -> list[float]:
        """Returns the mean of each label's centres over the places of a usual picture."""
        counts = order_by_label(self.counts, self.labels, "counts", default=1.0)
        # The mean of what falls off as a parabola is 2/3 along each axis.
        areas = [(2.0 / 3.0 * REACH) ** 2 * width * height for width, height in self._sizes()]
        return [min(count * area, 0.5) for count, area in zip(counts, areas, strict=True)]

    def _weighted_shares(self) -> list[tuple[float, float]]:
        """Returns the weight and the share of each label's centres."""
        weights = order_by_label(self.weights, self.labels, "weights", default=1.0)
        return list(zip(weights, self._shares(), strict=True))

    def _sizes(self) -> list[tuple[float, float]]:
        axes = [
            order_by_label({name: size[axis] for name, size in self.sizes.items()}, self.labels, "sizes", default=0.1)
            for axis in (0, 1)
        ]
        return list(zip(*axes, strict=True))

    def _usual(self, like: Tensor) -> Tensor:
        return like.new_tensor(self._sizes())

    def _weights(self, like: Tensor) -> Tensor:
        return like.new_tensor(order_by_label(self.weights, self.labels, "weights", default=1.0))

    @property
    def smoothness(self) -> float:
        """Curvature of a usual picture's loss where nothing is known of any place, if all had the same outputs."""
        # p (1 - p) times the weight of all places together, with p / (1 - p) = POSITIVES share / (1 - share).
        centres = [
            weight * POSITIVES * share * (1.0 - share) / (1.0 + (POSITIVES - 1.0) * share)
            for weight, share in self._weighted_shares()
        ]
        return max(*centres, self.size_weight * SIZE_STEP**2 * sum(share for _, share in self._weighted_shares()))

    @property
    def first_slope(self) -> float:
        """Length of what a usual picture's centres add to the gradient where nothing is known of any place."""
        return math.hypot(
            *(
                weight * POSITIVES * share * (1.0 - share) / (1.0 + (POSITIVES - 1.0) * share)
                for weight, share in self._weighted_shares()
            )
        )

    @property
    def later_slope(self) -> float:
        """A sixth of the first: the gradients of a picture's objects and of what is beside them soon cancel.

        On blood cells half of it or twice as much was worse under noise (docs/results.md).
        """
        return self.first_slope / 6.0

    def name_served(self, num_outputs: int) -> list[str]:
        """Returns the names of what `serve` returns: one column for each label."""
        del num_outputs
        return [f"highest {label}" for label in self.labels]

    def serve(self, outputs: Tensor) -> Tensor:
        """Returns highest_BK: of each label the highest probability at any place."""
        return self._split(outputs)[0].flatten(1, 2).amax(dim=1).sigmoid()

    @property
    def map_summary(self) -> Literal["max"]:
        """The highest probability at any place."""
        return "max"

    def name_maps(self) -> list[str]:
        """Returns the labels, and the width and the height of an object of each."""
        return [*self.labels, *(f"{side} {label}" for side in ("width", "height") for label in self.labels)]

    def serve_maps(self, outputs: Tensor) -> Tensor:
        """Returns maps_BCGG: probabilities of centres, then widths and heights as fractions of the picture's."""
        import torch

        from common.tasks.parts.boxes import MOST_SIZE

        logits_BGGK, size_BGG2 = self._split(outputs)
        times_BGG12 = (size_BGG2 + 1.0).clamp(1.0 / MOST_SIZE, MOST_SIZE).unsqueeze(-2)
        sizes_BGGK2 = self._usual(outputs) * times_BGG12
        return torch.cat([logits_BGGK.sigmoid(), *sizes_BGGK2.unbind(dim=-1)], dim=-1).movedim(-1, 1)

    @property
    def box_rule(self) -> BoxRule:
        """The threshold, the overlap and the number of a prediction's boxes."""
        return BoxRule(self.threshold, self.overlap, self.most_detections)

    def detect(self, outputs: Tensor) -> list[Detected]:
        """Returns the boxes that a head's outputs say of each picture, whatever their probability is."""
        from common.tasks.parts.boxes import detect_boxes

        logits_BGGK, size_BGG2 = self._split(outputs.detach())
        return detect_boxes(logits_BGGK, size_BGG2, self._usual(outputs), self.most_detections, self.overlap)

    def pair_metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Returns COCO's mean average precision at an overlap of 0.5, and averaged from 0.5 to 0.95."""
        from common.tasks.parts.boxes import compute_mean_precision

        precision_O = compute_mean_precision(self.detect(outputs), labels.cpu(), len(self.labels))
        return {"map_50": float(precision_O[0]), "map": average_defined(precision_O)}

    def predict_baseline(self, features: Tensor, known_features: Tensor, known_labels: Tensor) -> Tensor:
        """Returns for each picture what is usual: how often known pictures have a centre at each of 32 x 32 places.

        Args:
            features: of B records, of which only the number counts.
            known_features: not used.
            known_labels: boxes of the known pictures.
        """
        del known_features
        import torch

        from common.tasks.parts.boxes import compute_targets

        grid, usual_K2 = (_BASELINE_SIDE, _BASELINE_SIDE), self._usual(features)
        share_GGK = usual_K2.new_zeros(*grid, len(self.labels))
        for boxes_BM5 in torch.split(known_labels, 256):
            share_GGK += compute_targets(boxes_BM5, grid, usual_K2, REACH).centre_BGGK.sum(dim=0)
        share_GGK = (share_GGK / max(1, len(known_labels))).clamp(1e-6, 1.0 - 1e-6)
        logits_GGK = (POSITIVES * share_GGK / (1.0 - share_GGK)).log()
        outputs = logits_GGK.new_zeros(len(features), *grid, len(self.labels) + (2 if self.learn_sizes else 0))
        outputs[..., : len(self.labels)] = logits_GGK - logits_GGK.new_tensor(self._usual_logits())
        return outputs

    def statistic(self, buckets: int) -> Statistic:
        """Returns average precision at an overlap of 0.5 and the ratio of objects that are found at all.

        A picture adds, for each label, its true and its other detections by score, and its objects. Where these numbers
        are longer together than usual pictures have them, they are shortened to that: such a picture counts less.
        """
        names = [f"ap_50 {label}" for label in self.labels] if len(self.labels) > 1 else []
        return Statistic(
            size=len(self.labels) * (2 * buckets + 1),
            # Each label's part is at most 1 long.
            bound=math.sqrt(len(self.labels)),
            entries=lambda outputs, labels: self._count(outputs, labels, buckets),
            compute=lambda sums_S, clip: self._compute(sums_S, buckets, clip),
            ranges=dict.fromkeys(["ap_50", "recall_50", *names], RATE),
        )

    def _count(self, outputs: Tensor, labels: Tensor, buckets: int) -> SparseRows:
        import torch

        from common.tasks.parts.boxes import find_hits

        longest_K = self._longest()
        # What is less sure than so many others changes a curve of precision by recall little.
        most_K = [1 + math.ceil(longest) for longest in longest_K]
        size = sum(most_K) + len(self.labels)
        index_BP = np.zeros((len(outputs), size), np.int64)
        value_BP = np.zeros((len(outputs), size))
        edges_T = np.linspace(-MOST_LOGIT, MOST_LOGIT, buckets - 1)
        pictures = zip(self.detect(outputs), labels.cpu(), index_BP, value_BP, strict=True)
        for found, boxes_M5, index_P, value_P in pictures:
            start, first = 0, 0
            for label, (longest, most) in enumerate(zip(longest_K, most_K, strict=True)):
                chosen, (hits,), (skipped,) = find_hits(found, boxes_M5, label, (0.5,))
                chosen, hits = chosen[torch.from_numpy(~skipped).to(chosen.device)], hits[~skipped]
                # From the highest score.
                bucket = buckets - 1 - np.searchsorted(edges_T, found.logit_D[chosen][:most].cpu().numpy())
                where = np.where(hits[:most], bucket, buckets + bucket)
                num_true, num_hits = float((boxes_M5[:, 0] == label).sum()), float(hits[:most].sum())
                # As if all were in one bucket: how many there are must not decide how much a picture counts.
                value = 1.0 / max(longest, math.hypot(num_true, num_hits, len(where) - num_hits))
                index_P[start : start + len(where)] = first + where
                value_P[start : start + len(where)] = value
                index_P[start + most], value_P[start + most] = first + 2 * buckets, num_true * value
                start, first = start + most + 1, first + 2 * buckets + 1
        on = outputs.device
        return SparseRows(torch.from_numpy(index_BP).to(on), torch.from_numpy(value_BP).to(on))

    def _longest(self) -> list[float]:
        """Returns for each label the length of its numbers that usual pictures stay below."""
        return [1.0 + 2.0 * count for count in order_by_label(self.counts, self.labels, "counts", default=1.0)]

    def _compute(self, sums_S: Array, buckets: int, clip: bool) -> dict[str, float]:
        ap_K, recall_K = [], []
        for sums_T in sums_S.reshape(len(self.labels), -1):
            hits_T, wrong_T, num_true = sums_T[:buckets], sums_T[buckets:-1], float(sums_T[-1])
            ap_K.append(compute_average_precision(hits_T, wrong_T, num_true, clip=clip))
            recall_K.append(float(compute_ratio(hits_T.sum(), sums_T[-1], clip=clip)))
        each = {f"ap_50 {label}": ap for label, ap in zip(self.labels, ap_K, strict=True)}
        return {
            "ap_50": average_defined(np.array(ap_K)),
            "recall_50": average_defined(np.array(recall_K)),
            **(each if len(ap_K) > 1 else {}),
        }


def _find_known(labels: Tensor) -> Tensor:
    """Returns known_B, false for a picture whose boxes are not known."""
    from common.tasks.parts.boxes import NO_LABEL

    return labels[:, 0, 0] != NO_LABEL


@dataclass(frozen=True)
class BoxCodec:
    """Labels are M x 5 numbers (float32): label's index, left, top, right and bottom of each box.

    Attributes:
        task: the settings.
    """

    task: Detection

    def encode(self, cells: Sequence[str]) -> torch.Tensor:
        """Returns a picture's boxes, cut off at its border. Raises BadRecord."""
        import torch

        from common.tasks.parts.boxes import NO_BOX

        if len(cells) != 1:
            raise BadRecord("expected boxes in one column")
        boxes = read_boxes(cells[0])
        if len(boxes) > self.task.most_boxes:
            raise BadRecord(f"expected at most {self.task.most_boxes} boxes; `most_boxes` of the task may be more")
        rows = [[NO_BOX, 0.0, 0.0, 0.0, 0.0]] * self.task.most_boxes
        rows[: len(boxes)] = sorted(self._read(box) for box in boxes)
        return torch.tensor(rows, dtype=torch.float32)

    def _read(self, box: Box) -> list[float]:
        from common.tasks.parts.boxes import FIRST_IGNORED

        index = find_name(box.name, self.task.labels)
        if index is None:
            raise BadRecord("expected boxes of the task's labels, got one of another name")
        left, top, right, bottom = (min(max(side, 0.0), 1.0) for side in (box.left, box.top, box.right, box.bottom))
        if not (right - left > 1e-6 and bottom - top > 1e-6):
            raise BadRecord("expected boxes with an area on the picture, got one without")
        return [FIRST_IGNORED - index if box.ignored else float(index), left, top, right, bottom]

    def missing(self) -> torch.Tensor:
        """Returns a picture whose boxes are not known."""
        import torch

        from common.tasks.parts.boxes import NO_LABEL

        return torch.full((self.task.most_boxes, 5), NO_LABEL)

    def decode(self, outputs: torch.Tensor) -> list[list[str]]:
        """Returns the boxes of each picture from the task's threshold on, the surest first, in one cell."""
        names, cells = self.task.labels, []
        for found in self.task.detect(outputs):
            rows = zip(found.label_D.tolist(), found.logit_D.sigmoid().tolist(), found.box_D4.tolist(), strict=True)
            boxes = [
                Box(names[label], *(round(each, 6) for each in (*sides, score)))
                for label, score, sides in rows
                if score >= self.task.threshold
            ]
            cells.append([write_boxes(boxes, 1, 1)])
        return cells
