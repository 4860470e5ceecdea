"""Several labels at once, each present, absent or unknown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from common.cells import CellName, CellNames, position
from common.plugins import Plugin
from common.tasks import Example
from common.tasks.parts.head import HeadSettings
from common.tasks.parts.rates import balanced, rate_of, recall, share_correct, true_negative_rate
from common.tasks.parts.statistics import area_of, bucket_rows, found, recognised, share
from common.types import BadRecord

if TYPE_CHECKING:
    from torchmetrics import Metric

SEPARATOR = "|"
_MISSING = -1


@final
class Multilabel(Plugin):
    """Settings of a multi-label classification.

    Attributes:
        labels: in the order of the head's outputs.
        none: the cell that means "none of the labels", such as `No Finding`, where labels share one column.
        scale: public factor on this task's loss, applied before joint clipping.
        head_settings: shape of the head, `head` in a file.
    """

    kind: Literal["multilabel"] = "multilabel"
    labels: Annotated[CellNames, Field(min_length=2)]
    none: CellName | None = None
    scale: Annotated[float, Field(gt=0)] = 1.0
    head_settings: HeadSettings = Field(default=HeadSettings(), alias="head")

    @model_validator(mode="after")
    def _names_are_readable(self) -> Multilabel:
        if any(SEPARATOR in name for name in self.labels):
            raise ValueError(f"labels: expected names without {SEPARATOR!r}, which separates them in a cell")
        if self.none is not None and position(self.none, self.labels) is not None:
            raise ValueError(f"none: expected a name that is not one of the labels, got {self.none!r}")
        return self

    @classmethod
    def example(cls) -> Example:
        """Two findings."""
        settings = {"kind": "multilabel", "labels": ["edema", "effusion"], "none": "no finding"}
        return Example(settings, [["edema"], ["edema|effusion"], ["no finding"], ["effusion"]])

    def head(self, feature_dim: int) -> nn.Module:
        """features_BD -> logits_BL."""
        return self.head_settings.build(feature_dim, len(self.labels))

    def encode(self, cells: Sequence[str]) -> Tensor:
        """int64 vector of 0, 1 and -1 (unknown), one entry for each label.

        Args:
            cells: one cell with the present labels, separated by `|`; or for each label a cell "1", "0" or empty.

        Raises:
            BadRecord: another number of cells, or a value that is none of these; it is not repeated.
        """
        if len(cells) == 1:
            return self._joined(cells[0])
        if len(cells) != len(self.labels):
            raise BadRecord(f"expected one column, or one for each of the {len(self.labels)} labels")
        return torch.tensor([_one(cell) for cell in cells])

    def missing(self) -> Tensor:
        """Every label unknown."""
        return torch.full((len(self.labels),), _MISSING)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Binary cross entropy, summed over the known labels of each example.

        A sum, not a mean over the known ones: how many labels a record has must not change any divisor.
        """
        known_BL = labels != _MISSING
        truth_BL = labels.clamp(min=0).to(outputs.dtype)
        losses_BL = nn.functional.binary_cross_entropy_with_logits(outputs, truth_BL, reduction="none")
        return torch.where(known_BL, losses_BL, 0.0).sum(dim=1)

    def slopes(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Probability minus truth of each known label, zero of the others."""
        return torch.where(labels != _MISSING, outputs.sigmoid() - labels, 0.0)

    def scores(self, outputs: Tensor) -> Tensor:
        """Probabilities B x L."""
        return outputs.sigmoid()

    def metrics(self) -> dict[str, Metric]:
        """Mean AUROC over labels first, as is usual for findings that are rare; the others at probability 1/2."""
        from common.tasks.parts.metrics import Auroc, LabelRate

        num_labels = len(self.labels)
        return {
            "auroc": Auroc(num_labels, num_classes=2),
            "balanced_accuracy": LabelRate(num_labels, rate_of(balanced, None)),
            "accuracy": LabelRate(num_labels, share_correct),
            "sensitivity": LabelRate(num_labels, rate_of(recall, None)),
            "specificity": LabelRate(num_labels, rate_of(true_negative_rate, None)),
        }

    def counts(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """For each known label the cell of truth and prediction, and the bucket of its score."""
        truth_BL, scores_BL = labels, self.scores(outputs.detach())
        cell_BL = 2 * truth_BL.clamp(min=0) + (scores_BL > 0.5).long()
        cells = nn.functional.one_hot(cell_BL, 4).double() * (truth_BL != _MISSING).unsqueeze(2)
        rows = torch.cat([cells.flatten(1), bucket_rows(scores_BL, truth_BL, num_classes=2)], dim=1)
        return rows / math.sqrt(len(self.labels))

    def counts_norm(self) -> float:
        """Two entries for each known label, weighted by their number."""
        return math.sqrt(2.0)

    def counted(self, sums: Tensor) -> dict[str, float]:
        """The metrics of summed, perhaps noised `counts`."""
        num_labels = len(self.labels)
        sums = sums * math.sqrt(num_labels)
        counts_L22 = sums[: 4 * num_labels].view(num_labels, 2, 2)
        recall_L, negative_L = found(counts_L22), recognised(counts_L22)
        values = {
            "auroc": area_of(sums[4 * num_labels :], num_labels).nanmean(),
            "balanced_accuracy": ((recall_L + negative_L) / 2).nanmean(),
            "accuracy": share(counts_L22.diagonal(dim1=1, dim2=2).sum(), counts_L22.sum()),
            "sensitivity": recall_L.nanmean(),
            "specificity": negative_L.nanmean(),
        }
        return {name: float(value) for name, value in values.items()}

    def decode(self, outputs: Tensor) -> list[list[str]]:
        """The labels of each example whose probability is above 1/2."""
        return [
            [name for name, present in zip(self.labels, row, strict=True) if present] for row in (outputs > 0).tolist()
        ]

    def _joined(self, cell: str) -> Tensor:
        labels_L = torch.zeros(len(self.labels), dtype=torch.int64)
        if self.none is not None and position(cell, (self.none,)) is not None:
            return labels_L
        for name in cell.split(SEPARATOR):
            index = position(name, self.labels)
            if index is None:
                raise BadRecord(f"expected the task's labels, separated by {SEPARATOR!r}")
            labels_L[index] = 1
        return labels_L


def _one(cell: str) -> int:
    if not cell.strip():
        return _MISSING
    value = position(cell, ("0", "1"))
    if value is None:
        raise BadRecord("expected 0, 1 or an empty cell for each label")
    return value
