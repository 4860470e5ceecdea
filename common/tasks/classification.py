"""One of several classes for each example."""

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
from common.tasks.parts.rates import one_against_rest, rate_of, recall, true_negative_rate
from common.tasks.parts.statistics import area_of, bucket_rows, found, recognised, share
from common.types import BadRecord

if TYPE_CHECKING:
    from torchmetrics import Metric

# PyTorch's own mark of a label that contributes no loss.
_MISSING = -100


@final
class Classification(Plugin):
    """Settings of a classification.

    Attributes:
        labels: the classes, in the order of the head's outputs.
        positive: of two classes the one that AUROC, sensitivity and specificity are about; by default the last.
        scale: public factor on this task's loss, applied before joint clipping.
        head_settings: shape of the head, `head` in a file.
    """

    kind: Literal["classification"] = "classification"
    labels: Annotated[CellNames, Field(min_length=2)]
    positive: CellName | None = None
    scale: Annotated[float, Field(gt=0)] = 1.0
    head_settings: HeadSettings = Field(default=HeadSettings(), alias="head")

    @model_validator(mode="after")
    def _positive_is_a_label(self) -> Classification:
        if self.positive is not None and (len(self.labels) != 2 or self.positive not in self.labels):
            raise ValueError(f"positive: expected one of two labels, got {self.positive!r} for {len(self.labels)}")
        return self

    @classmethod
    def example(cls) -> Example:
        """Three classes."""
        settings = {"kind": "classification", "labels": ["none", "glioma", "meningioma"]}
        return Example(settings, [["glioma"], ["none"], ["meningioma"], ["none"]])

    def head(self, feature_dim: int) -> nn.Module:
        """features_BD -> logits_BK."""
        return self.head_settings.build(feature_dim, len(self.labels))

    def encode(self, cells: Sequence[str]) -> Tensor:
        """Class index (int64) from one cell. Raises BadRecord."""
        index = position(cells[0], self.labels) if len(cells) == 1 else None
        if index is None:
            raise BadRecord("expected one of the task's labels in one column")
        return torch.tensor(index)

    def missing(self) -> Tensor:
        """A mark that cross entropy ignores."""
        return torch.tensor(_MISSING)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of each example."""
        return nn.functional.cross_entropy(outputs, labels, reduction="none", ignore_index=_MISSING)

    def slopes(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Probabilities minus the label's unit vector."""
        slopes_BK = outputs.softmax(dim=1)
        labels_B1 = labels.unsqueeze(1)
        return slopes_BK.scatter_add_(1, labels_B1, slopes_BK.new_full(labels_B1.shape, -1.0))

    def obvious(self, features: Tensor, known_features: Tensor, known_labels: Tensor) -> Tensor:
        """Each class's share of the training records, whatever the features: its decision is the majority's."""
        del known_features
        counts_K = torch.bincount(known_labels, minlength=len(self.labels))
        return counts_K.clamp_min(1e-9).log().to(features).expand(len(features), -1)

    def scores(self, outputs: Tensor) -> Tensor:
        """Probabilities B x K."""
        return outputs.softmax(dim=1)

    def metrics(self) -> dict[str, Metric]:
        """Accuracy first. Of two classes the positive one's, of more the mean over the classes that occur."""
        from common.tasks.parts.metrics import Accuracy, Auroc, ClassRate

        num_classes = len(self.labels)
        positive = self._positive()
        return {
            "accuracy": Accuracy(num_classes=num_classes),
            "balanced_accuracy": ClassRate(num_classes, rate_of(recall, None)),
            "auroc": Auroc(num_classes, num_classes, only=positive),
            "sensitivity": ClassRate(num_classes, rate_of(recall, positive)),
            "specificity": ClassRate(num_classes, rate_of(true_negative_rate, positive)),
        }

    def counts(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The cell of the confusion matrix, and score buckets of the positive class or of each against the rest.

        Buckets are weighted so that all of them together are as long as the cell.
        """
        num_classes, scored = len(self.labels), self._scored()
        scores_BK = self.scores(outputs.detach())
        cell_B = labels * num_classes + scores_BK.argmax(dim=1)
        cells = nn.functional.one_hot(cell_B, num_classes**2).double()
        truth_BK = nn.functional.one_hot(labels, num_classes)
        buckets = bucket_rows(scores_BK[:, scored], truth_BK[:, scored], num_classes)
        return torch.cat([cells, buckets / math.sqrt(len(scored))], dim=1)

    def counts_norm(self) -> float:
        """One cell, and as much again for the buckets."""
        return math.sqrt(2.0)

    def counted(self, sums: Tensor) -> dict[str, float]:
        """The metrics of summed, perhaps noised `counts`."""
        num_classes, scored, positive = len(self.labels), self._scored(), self._positive()
        counts_KK = sums[: num_classes**2].view(num_classes, num_classes)
        counts_K22 = one_against_rest(counts_KK)
        area_L = area_of(sums[num_classes**2 :] * math.sqrt(len(scored)), len(scored))
        recall_K, negative_K = found(counts_K22), recognised(counts_K22)
        values = {
            "accuracy": share(counts_KK.diagonal().sum(), counts_KK.sum()),
            "balanced_accuracy": recall_K.nanmean(),
            "auroc": area_L.nanmean(),
            "sensitivity": recall_K.nanmean() if positive is None else recall_K[positive],
            "specificity": negative_K.nanmean() if positive is None else negative_K[positive],
        }
        return {name: float(value) for name, value in values.items()}

    def decode(self, outputs: Tensor) -> list[str]:
        """The most probable label of each example."""
        return [self.labels[index] for index in outputs.argmax(dim=1).tolist()]

    def _positive(self) -> int | None:
        if len(self.labels) != 2:
            return None
        return 1 if self.positive is None else self.labels.index(self.positive)

    def _scored(self) -> list[int]:
        """Classes whose scores are counted: of two the positive one says all."""
        positive = self._positive()
        return list(range(len(self.labels))) if positive is None else [positive]
