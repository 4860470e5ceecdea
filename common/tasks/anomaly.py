"""A score of how unlike the normal records each record is, learned from normal records alone.

One-class least squares, the linear case of Deep SVDD (Ruff et al. 2018): the head is trained to give every normal
record the public value 1, without a bias, so that it cannot be a constant. The score is the distance from 1. A record's
loss comes from that record alone, and is zero where the record is anomalous: anomalous records are for evaluation only.

# Shapes: B examples, N training records, D features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, final

from pydantic import Field, model_validator

from common.events import Outcomes
from common.inputs import CellName, find_name
from common.plugins import Plugin
from common.tasks import Statistic, TaskExample
from common.tasks.classification import Classification
from common.tasks.parts.declared import ClassCodec
from common.tasks.parts.head import HeadSettings
from common.tasks.parts.rates import RATE, Array

if TYPE_CHECKING:
    from torch import Tensor, nn

_METRICS = ("auroc", "balanced_accuracy", "sensitivity", "specificity")
_MAX_LOGIT = 60.0


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
    def _check_names_and_bias(self) -> Anomaly:
        if find_name(self.normal, (self.anomalous,)) is not None:
            raise ValueError(f"anomalous: expected another name than that of normal records, got {self.normal!r} twice")
        if self.head_settings.bias:
            raise ValueError("head: expected bias: false; a bias alone would call every record normal")
        return self

    @classmethod
    def example(cls) -> TaskExample:
        """Returns a task on heartbeats."""
        settings = {"kind": "anomaly", "normal": "sinus", "anomalous": "ischemia"}
        return TaskExample(settings, [["sinus"], ["ischemia"], ["sinus"], ["sinus"]])

    @property
    def codec(self) -> ClassCodec:
        """0 for normal and 1 for anomalous; the prediction is anomalous beyond the threshold."""
        return ClassCodec((self.normal, self.anomalous), lambda outputs: self._logits(outputs).argmax(1))

    def head(self, feature_dim: int) -> nn.Module:
        """Returns a head, features_BD -> outputs [B, 1]."""
        return self.head_settings.build(feature_dim, 1)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns half the squared distance from 1 of normal records, and zero for all others."""
        losses_B = 0.5 * (outputs.squeeze(1) - 1.0) ** 2
        return losses_B.where(labels == 0, 0.0)

    @property
    def smoothness(self) -> float:
        """Curvature of half a squared distance."""
        return 1.0

    @property
    def first_slope(self) -> float:
        """Distance of zero from 1."""
        return 1.0

    @property
    def tolerated_noise(self) -> float:
        """That of a number near 1: a fifth of what a logit bears."""
        return 0.1

    @property
    def centres(self) -> bool:
        """Learns what normal records have in common."""
        return False

    def predict_baseline(self, features: Tensor, known_features: Tensor, known_labels: Tensor) -> Tensor:
        """Returns outputs [B, 1], as far from 1 as the features are from the mean of the normal training records.

        Args:
            features: [B, D], features of the records to predict.
            known_features: [N, D], features of the training records.
            known_labels: int64 [N], 0 for normal and 1 for anomalous.
        """
        mean_D = known_features[known_labels == 0].mean(dim=0)
        distance_B1: Tensor = (features - mean_D).norm(dim=1, keepdim=True)
        return 1.0 + distance_B1

    def name_served(self, num_outputs: int) -> list[str]:
        """Returns the name of the only column."""
        del num_outputs
        return ["distance"]

    def serve(self, outputs: Tensor) -> Tensor:
        """Returns the distance [B, 1] from normal records; beyond the threshold a record is called anomalous."""
        return (outputs - 1.0).abs()

    def statistic(self, buckets: int) -> Statistic:
        """Returns the statistic of a classification into normal and anomalous; AUROC is that of the distance."""
        classes = Classification(labels=(self.normal, self.anomalous), positive=self.anomalous)
        whole = classes.statistic(buckets).compose(self._logits)

        def choose_values(sums_S: Array, clip: bool) -> dict[str, float]:
            values = whole.compute(sums_S, clip)
            return {name: values[name] for name in _METRICS}

        return replace(whole, compute=choose_values, ranges=dict.fromkeys(_METRICS, RATE))

    def count_outcomes(self, sums_S: Array, deviation: float) -> Outcomes:
        """Returns the counts of a classification into normal and anomalous; its scores are no probabilities.

        Args:
            sums_S: summed rows of the statistic.
            deviation: standard deviation of the noise in each entry.
        """
        classes = Classification(labels=(self.normal, self.anomalous), positive=self.anomalous)
        return classes.count_outcomes(sums_S, deviation).model_copy(update={"probabilities": False})

    def _logits(self, outputs: Tensor) -> Tensor:
        """Returns [B, 2]: 0, and 2 log(distance / threshold), which is monotone in the distance and never infinite."""
        import torch

        distance_B = (outputs.detach().squeeze(1).double() - 1.0).abs() / self.threshold
        logit_B = (2.0 * distance_B.log()).clamp(-_MAX_LOGIT, _MAX_LOGIT).float()
        return torch.stack([torch.zeros_like(logit_B), logit_B], dim=1)
