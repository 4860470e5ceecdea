"""How unlike the normal records each record is. Learned from normal records alone; anomalous ones only judge it.

One-class least squares, the linear case of Deep SVDD (Ruff et al. 2018): every normal record is to give the public
value 1, from a head without a bias, for which a constant is out of reach. The score is the distance from 1. A record's
loss comes from that record alone, and is zero where the record is anomalous.

# Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from common.cells import CellName, position
from common.plugins import Plugin
from common.tasks import Example
from common.tasks.classification import Classification
from common.tasks.parts.head import HeadSettings
from common.types import BadRecord

if TYPE_CHECKING:
    from torchmetrics import Metric

_MISSING = -100
_METRICS = ("auroc", "balanced_accuracy", "sensitivity", "specificity")
_MOST_LOGIT = 60.0


@final
class Anomaly(Plugin):
    """Settings of an anomaly score.

    Attributes:
        normal: the label of normal records.
        anomalous: the label of all others.
        threshold: public distance from 1 beyond which a record is called anomalous.
        scale: public factor on this task's loss, applied before joint clipping.
        head_settings: shape of the head, `head` in a file; without a bias.
    """

    kind: Literal["anomaly"] = "anomaly"
    normal: CellName
    anomalous: CellName
    threshold: Annotated[float, Field(gt=0)] = 0.5
    scale: Annotated[float, Field(gt=0)] = 1.0
    head_settings: HeadSettings = Field(default=HeadSettings(bias=False), alias="head")

    @model_validator(mode="after")
    def _is_sound(self) -> Anomaly:
        if position(self.normal, (self.anomalous,)) is not None:
            raise ValueError(f"anomalous: expected another name than that of normal records, got {self.normal!r} twice")
        if self.head_settings.bias:
            raise ValueError("head: expected bias: false; a bias alone would call every record normal")
        return self

    @classmethod
    def example(cls) -> Example:
        """Heartbeats."""
        settings = {"kind": "anomaly", "normal": "sinus", "anomalous": "ischemia"}
        return Example(settings, [["sinus"], ["ischemia"], ["sinus"], ["sinus"]])

    def head(self, feature_dim: int) -> nn.Module:
        """features_BD -> outputs B x 1."""
        return self.head_settings.build(feature_dim, 1)

    def encode(self, cells: Sequence[str]) -> Tensor:
        """0 or 1 (int64): normal or anomalous, from one cell. Raises BadRecord."""
        index = position(cells[0], (self.normal, self.anomalous)) if len(cells) == 1 else None
        if index is None:
            raise BadRecord("expected the task's normal or anomalous label in one column")
        return torch.tensor(index)

    def missing(self) -> Tensor:
        """A mark whose loss is zero."""
        return torch.tensor(_MISSING)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Half the squared distance from 1 of normal records; zero for all others."""
        return torch.where(labels == 0, 0.5 * (outputs.squeeze(1) - 1.0) ** 2, 0.0)

    def obvious(self, features: Tensor, known_features: Tensor, known_labels: Tensor) -> Tensor:
        """B x 1: as far from 1 as the features are from the mean of the normal training records."""
        mean_D = known_features[known_labels == 0].mean(dim=0)
        distance_B1: Tensor = (features - mean_D).norm(dim=1, keepdim=True)
        return 1.0 + distance_B1

    def scores(self, outputs: Tensor) -> Tensor:
        """B x 2: how normal and how anomalous, in [0, 1]; even at the threshold."""
        return self._logits(outputs).softmax(dim=1)

    def metrics(self) -> dict[str, Metric]:
        """AUROC of the distance first; the others at the threshold."""
        metrics = self._judged().metrics()
        return {name: metrics[name] for name in _METRICS}

    def counts(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """As a classification into normal and anomalous."""
        return self._judged().counts(self._logits(outputs), labels)

    def counts_norm(self) -> float:
        """As a classification's."""
        return self._judged().counts_norm()

    def counted(self, sums: Tensor) -> dict[str, float]:
        """The metrics of summed, perhaps noised `counts`."""
        values = self._judged().counted(sums)
        return {name: values[name] for name in _METRICS}

    def decode(self, outputs: Tensor) -> list[str]:
        """Which label the threshold gives each example."""
        return self._judged().decode(self._logits(outputs))

    def _judged(self) -> Classification:
        return Classification(labels=(self.normal, self.anomalous), positive=self.anomalous)

    def _logits(self, outputs: Tensor) -> Tensor:
        """B x 2: zero, and twice the logarithm of distance over threshold: monotone in the distance, never infinite."""
        distance_B = (outputs.detach().squeeze(1).double() - 1.0).abs() / self.threshold
        logit_B = (2.0 * distance_B.log()).clamp(-_MOST_LOGIT, _MOST_LOGIT).float()
        return torch.stack([torch.zeros_like(logit_B), logit_B], dim=1)
