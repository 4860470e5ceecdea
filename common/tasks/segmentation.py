"""One of several labels for each place of a picture.

# Shapes: B pictures, G places along a side of the backbone's grid, S along one of the masks', K labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from common.inputs import CellName, CellNames, find_name, read_mask, read_mask_names, resize_mask, write_mask
from common.run import drop_unset
from common.tasks import SparseRows, Statistic, TaskExample
from common.tasks.parts.declared import LabelWeights, order_by_label
from common.tasks.parts.head import PlacesHeadSettings
from common.tasks.parts.places import PicturePlaces, compute_probabilities, gather_slopes, refine
from common.tasks.parts.rates import RATE, Array, average_defined, compute_ratio
from common.types import BadRecord

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

IGNORED = 255
"""Mark of a place without a label."""


@final
class Segmentation(PicturePlaces):
    """Settings of a segmentation.

    Attributes:
        labels: what a place can be, in the order of the head's outputs and of the masks' whole numbers, from 0.
        side: height and width to which masks are brought; outputs on the backbone's grid are refined to as many places.
        background: the label that Dice and IoU leave out; by default the first.
        ignore: whole number of masks that means no label; null for none.
        weights: label -> factor from 0.01 to 100 on the loss of its places; labels without one have 1.
        scale: public factor on this task's loss, applied before joint clipping.
        every: training looks at every so manieth place along each side, which saves memory and time; above 1 only where
            the backbone's grid has as many places as the masks. Evaluation looks at all.
        head_settings: shape of the head, `head` in a file.
    """

    kind: Literal["segmentation"] = "segmentation"
    labels: Annotated[CellNames, Field(min_length=2, max_length=IGNORED)]
    side: Annotated[int, Field(ge=2, le=1024)]
    background: CellName | None = None
    ignore: Annotated[int, Field(ge=0)] | None = None
    weights: LabelWeights = {}
    scale: Annotated[float, Field(gt=0)] = 1.0
    every: Annotated[int, Field(ge=1, le=64)] = 1
    head_settings: PlacesHeadSettings = Field(default=PlacesHeadSettings(), alias="head")

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), ("every",))

    @model_validator(mode="after")
    def _check_names(self) -> Segmentation:
        if self.background is not None and self.background not in self.labels:
            raise ValueError(f"background: expected one of the labels, got {self.background!r}")
        if self.every > self.side:
            raise ValueError(f"every: expected at most the side of {self.side} places, got {self.every}")
        if self.every > 1 and self.head_settings.kernel > 1:
            raise ValueError(f"every: expected 1 beside a head with `kernel`, which reads neighbours, got {self.every}")
        order_by_label(self.weights, self.labels, "weights", default=1.0)
        return self

    @classmethod
    def example(cls) -> TaskExample:
        """Returns pictures of a cell at several places, one of them empty."""
        cell_HW = np.zeros((4, 4), np.uint8)
        cell_HW[1:3, 0:2] = 1
        masks = [each.repeat(2, axis=0).repeat(2, axis=1) for each in (cell_HW, 0 * cell_HW, cell_HW.T, 1 - cell_HW)]
        settings = {"kind": "segmentation", "labels": ["ground", "cell"], "side": 8}
        return TaskExample(settings, [[write_mask(mask)] for mask in masks], grid=(4, 4))

    @property
    def part_names(self) -> tuple[str, ...]:
        """The labels of places."""
        return self.labels

    @property
    def codec(self) -> MaskCodec:
        """Masks of S x S label indices."""
        return MaskCodec(self.labels, self.side, self.ignore)

    def head(self, feature_dim: int) -> nn.Module:
        """Returns a head, features_BGGD -> logits_BGGK."""
        return self.head_settings.build(feature_dim, len(self.labels))

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean cross entropy over each picture's places with a label, times their label's weights."""
        log_BSSK = refine(outputs, labels.shape[1]).log_softmax(dim=-1)
        index_BSS1 = self._clear(labels)
        weight_BSS = self._weigh(labels, log_BSSK)
        return -(log_BSSK.gather(-1, index_BSS1).squeeze(-1) * weight_BSS).sum(dim=(1, 2))

    def loss_gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the probabilities minus the labels' unit vectors, gathered from the masks' places to the outputs'."""
        slope_KBSS = compute_probabilities(refine(outputs, labels.shape[1]))
        index_1BSS = self._clear(labels).movedim(-1, 0)
        slope_KBSS.scatter_add_(0, index_1BSS, slope_KBSS.new_full(index_1BSS.shape, -1.0))
        slope_KBSS *= self._weigh(labels, slope_KBSS)
        return gather_slopes(slope_KBSS.movedim(0, -1), outputs.shape[1])

    @property
    def smoothness(self) -> float:
        """Curvature of the mean cross entropy if all places had the same outputs: 1/2, times the largest weight."""
        return 0.5 * max([1.0, *order_by_label(self.weights, self.labels, "weights", default=1.0)])

    @property
    def first_slope(self) -> float:
        """Length of uniform probabilities minus a unit vector: the mean over places that are alike."""
        return math.sqrt(1.0 - 1.0 / len(self.labels))

    @property
    def later_slope(self) -> float:
        """A quarter of the first: where outputs have the labels' shares, slopes of places differ in their signs.

        Of nuclei on 32 x 32 places from .26 of it in the second round to .14 in the last.
        """
        return 0.25 * self.first_slope

    def name_served(self, num_outputs: int) -> list[str]:
        """Returns the names of what `serve` returns: one column for each label."""
        del num_outputs
        return [f"share {label}" for label in self.labels]

    def serve(self, outputs: Tensor) -> Tensor:
        """Returns share_BK of each label: its mean probability over the places of the picture's mask."""
        return self.serve_maps(outputs).mean(dim=(2, 3))

    @property
    def map_summary(self) -> Literal["mean"]:
        """A share is a mean."""
        return "mean"

    def name_maps(self) -> list[str]:
        """Returns the labels."""
        return list(self.labels)

    def serve_maps(self, outputs: Tensor) -> Tensor:
        """Returns probability_BKSS of each label."""
        return refine(outputs, self.side).softmax(dim=-1).movedim(-1, 1)

    def statistic(self, buckets: int) -> Statistic:
        """Returns Dice and IoU of each label that a picture has or is said to have, and the accuracy of its places."""
        del buckets
        scored = self._scored()
        names = [f"dice {self.labels[index]}" for index in scored] if len(scored) > 1 else []
        return Statistic(
            size=3 * len(scored) + 2,
            # Each entry is at most 1.
            bound=math.sqrt(3.0 * len(scored) + 2.0),
            entries=self._entries,
            compute=self._compute,
            ranges=dict.fromkeys(["dice", "iou", "accuracy", *names], RATE),
        )

    def _entries(self, outputs: Tensor, labels: Tensor) -> SparseRows:
        import torch

        known_BSS = labels != IGNORED
        predicted_BSS = refine(outputs, labels.shape[1]).argmax(dim=-1)
        columns = []
        for index in self._scored():
            own_BSS = (labels == index) & known_BSS
            said_BSS = (predicted_BSS == index) & known_BSS
            both_B = (own_BSS & said_BSS).sum(dim=(1, 2)).double()
            size_B = (own_BSS.sum(dim=(1, 2)) + said_BSS.sum(dim=(1, 2))).double()
            columns += [
                2.0 * both_B / size_B.clamp(min=1.0),
                both_B / (size_B - both_B).clamp(min=1.0),
                (size_B > 0).double(),
            ]
        count_B = known_BSS.sum(dim=(1, 2)).double()
        right_B = ((predicted_BSS == labels) & known_BSS).sum(dim=(1, 2)).double()
        columns += [right_B / count_B.clamp(min=1.0), (count_B > 0).double()]
        values_BP = torch.stack(columns, dim=1)
        return SparseRows(torch.arange(values_BP.shape[1], device=values_BP.device).expand(values_BP.shape), values_BP)

    def _compute(self, sums_S: Array, clip: bool) -> dict[str, float]:
        scored = self._scored()
        of_label = sums_S[:-2].reshape(len(scored), 3)
        dice_K = np.array([float(compute_ratio(dice, count, clip=clip)) for dice, _, count in of_label])
        iou_K = np.array([float(compute_ratio(iou, count, clip=clip)) for _, iou, count in of_label])
        each = {f"dice {self.labels[index]}": float(dice) for index, dice in zip(scored, dice_K, strict=True)}
        return {
            "dice": average_defined(dice_K),
            "iou": average_defined(iou_K),
            "accuracy": float(compute_ratio(sums_S[-2], sums_S[-1], clip=clip)),
            **(each if len(scored) > 1 else {}),
        }

    def _clear(self, labels: Tensor) -> Tensor:
        """Returns index_BSS1 of the labels, 0 where there is none."""
        return labels.long().where(labels != IGNORED, 0).unsqueeze(-1)

    def _weigh(self, labels: Tensor, like: Tensor) -> Tensor:
        """Returns weight_BSS: that of the place's label over the number of places with one; 0 without a label."""
        known_BSS = labels != IGNORED
        weight_BSS = known_BSS.to(like)
        if self.weights:
            weight_K = like.new_tensor(order_by_label(self.weights, self.labels, "weights", default=1.0))
            weight_BSS = weight_BSS * weight_K[self._clear(labels).squeeze(-1)]
        return weight_BSS / known_BSS.sum(dim=(1, 2), keepdim=True).clamp(min=1)

    def _scored(self) -> list[int]:
        background = 0 if self.background is None else self.labels.index(self.background)
        return [index for index in range(len(self.labels)) if index != background]


@dataclass(frozen=True)
class MaskCodec:
    """Labels are S x S indices of names (uint8), IGNORED where a place has no label.

    Attributes:
        names: public names, in the order of their indices.
        side: S.
        ignore: whole number of masks that means no label.
    """

    names: Sequence[str]
    side: int
    ignore: int | None

    def encode(self, cells: Sequence[str]) -> torch.Tensor:
        """Returns a mask brought to S x S, each place the label of the nearest. Raises BadRecord."""
        import torch

        if len(cells) != 1:
            raise BadRecord("expected a mask in one column")
        values_HW = read_mask(cells[0])
        values_SS, found = resize_mask(values_HW, self.side, self.side), np.unique(values_HW).tolist()
        names = read_mask_names(cells[0])
        return torch.from_numpy(
            self._find_indices(values_SS, found) if names is None else self._find_named(values_SS, found, names)
        )

    def _find_named(self, values_SS: NDArray[np.int64], found: list[int], names: dict[int, str]) -> NDArray[np.uint8]:
        indices_SS = np.full(values_SS.shape, IGNORED, np.uint8)
        for value in found:
            name = names.get(value, str(value))
            index = find_name(name, self.names)
            if index is not None:
                indices_SS[values_SS == value] = index
            elif name and value != self.ignore:
                raise BadRecord("expected a mask of the task's labels, got a place with another one")
        return indices_SS

    def _find_indices(self, values_SS: NDArray[np.int64], found: list[int]) -> NDArray[np.uint8]:
        found = [value for value in found if value != self.ignore]
        indices_SS = np.full(values_SS.shape, IGNORED, np.uint8)
        # Masks of two labels are often written in black and white.
        two = len(self.names) == 2 and set(found) <= {0, 255}
        for value in found:
            index = min(value, 1) if two else value
            if index >= len(self.names):
                raise BadRecord(f"expected a mask of whole numbers from 0 to {len(self.names) - 1}, one for each label")
            indices_SS[values_SS == value] = index
        return indices_SS

    def missing(self) -> torch.Tensor:
        """Returns a mask without labels."""
        import torch

        return torch.full((self.side, self.side), IGNORED, dtype=torch.uint8)

    def decode(self, outputs: torch.Tensor) -> list[list[str]]:
        """Returns the mask of the most probable labels of each picture, in one cell."""
        return [[write_mask(mask)] for mask in refine(outputs, self.side).argmax(dim=-1).cpu().numpy()]
