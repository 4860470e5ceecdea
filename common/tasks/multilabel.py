"""Several labels for each example, each present, absent or unknown.

# Shapes: B examples, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, final

import numpy as np
from pydantic import Field, model_validator

from common.events import Outcomes
from common.inputs import CellName, CellNames, find_name
from common.plugins import Plugin
from common.tasks import SparseRows, Statistic, TaskExample
from common.tasks.parts.declared import (
    LabelRatios,
    LabelThresholds,
    LabelWeights,
    Smoothing,
    Threshold,
    compute_logit,
    order_by_label,
)
from common.tasks.parts.head import BagHeadSettings
from common.tasks.parts.outcomes import make_label_confusions, make_scores
from common.tasks.parts.rates import (
    RATE,
    Array,
    average_defined,
    compute_auroc,
    compute_ratio,
    compute_recall,
    compute_specificity,
    shrink_counts,
)
from common.types import BadRecord

if TYPE_CHECKING:
    from torch import Tensor, nn

_SEPARATOR = "|"
_UNKNOWN = -1
_METRICS = ("auroc", "balanced_accuracy", "accuracy", "sensitivity", "specificity")


@final
class Multilabel(Plugin):
    """Settings of a multi-label classification.

    Attributes:
        labels: the labels' names, in the order of the head's outputs.
        none: the cell that means "none of the labels", such as `No Finding`, where labels share one column.
        threshold: probability above which a label is predicted, one for all or one for each; 0.5 where none is given.
        weights: label -> factor from 0.01 to 100 on its loss in records that have it, before clipping; labels without
            one have 1. The head then judges as if missing such a label counted so many times.
        prior: label -> ratio of records that have it, for which the head is served; `uniform`, the default, takes every
            label for as often present as absent.
        smoothing: part of each known label, in [0, 1), that the loss takes as present and absent alike (label
            smoothing).
        scale: public factor on this task's loss, applied before joint clipping.
        head_settings: shape of the head, `head` in a file.
    """

    kind: Literal["multilabel"] = "multilabel"
    labels: Annotated[CellNames, Field(min_length=2)]
    none: CellName | None = None
    threshold: Threshold | LabelThresholds = 0.5
    weights: LabelWeights = {}
    prior: LabelRatios | Literal["uniform"] = "uniform"
    smoothing: Smoothing = 0.0
    scale: Annotated[float, Field(gt=0)] = 1.0
    head_settings: BagHeadSettings = Field(default=BagHeadSettings(), alias="head")

    @model_validator(mode="after")
    def _check_names(self) -> Multilabel:
        if any(_SEPARATOR in name for name in self.labels):
            raise ValueError(f"labels: expected names without {_SEPARATOR!r}, which separates them in a cell")
        if self.none is not None and find_name(self.none, self.labels) is not None:
            raise ValueError(f"none: expected a name that is not one of the labels, got {self.none!r}")
        return self

    @model_validator(mode="after")
    def _check_declared_numbers(self) -> Multilabel:
        if isinstance(self.threshold, dict):
            order_by_label(self.threshold, self.labels, "threshold", default=0.5)
        order_by_label(self.weights, self.labels, "weights", default=1.0)
        if self.prior != "uniform":
            order_by_label(self.prior, self.labels, "prior")
        return self

    @classmethod
    def example(cls) -> TaskExample:
        """Returns a task of two findings."""
        settings = {"kind": "multilabel", "labels": ["edema", "effusion"], "none": "no finding"}
        return TaskExample(settings, [["edema"], ["edema|effusion"], ["no finding"], ["effusion"]])

    @property
    def codec(self) -> MultilabelCodec:
        """Vectors of 0, 1 and -1 (unknown); a label is predicted where its probability is above its threshold."""
        given = self.threshold if isinstance(self.threshold, dict) else dict.fromkeys(self.labels, self.threshold)
        thresholds = order_by_label(given, self.labels, "threshold", default=0.5)
        return MultilabelCodec(self.labels, self.none, [compute_logit(threshold) for threshold in thresholds])

    @property
    def pools_items(self) -> bool:
        """True where the head pools the items of bags."""
        return self.head_settings.pooling is not None

    def head(self, feature_dim: int) -> nn.Module:
        """Returns a head, features_BD -> logits_BL."""
        return self.head_settings.build(feature_dim, len(self.labels))

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the binary cross entropy of smoothed labels, summed over the known labels of each example.

        A sum, not a mean over the known ones: how many labels a record has must not change any divisor.
        """
        from torch.nn import functional

        truth_BL = labels.clamp(min=0).to(outputs.dtype)
        if self.smoothing:
            losses_BL = functional.binary_cross_entropy_with_logits(outputs, self._smooth(truth_BL), reduction="none")
            if self.weights:
                losses_BL = (losses_BL * outputs.new_tensor(self._weights())).where(labels == 1, losses_BL)
            return losses_BL.where(labels != _UNKNOWN, 0.0).sum(dim=1)
        weight_L = outputs.new_tensor(self._weights()) if self.weights else None
        losses_BL = functional.binary_cross_entropy_with_logits(
            outputs, truth_BL, pos_weight=weight_L, reduction="none"
        )
        return losses_BL.where(labels != _UNKNOWN, 0.0).sum(dim=1)

    def loss_gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns probability minus smoothed truth of each known label, weighted where it is present; else zero."""
        truth_BL = self._smooth(labels.to(outputs.dtype)) if self.smoothing else labels
        gradient_BL = (outputs.sigmoid() - truth_BL).where(labels != _UNKNOWN, 0.0)
        if not self.weights:
            return gradient_BL
        return (gradient_BL * gradient_BL.new_tensor(self._weights())).where(labels == 1, gradient_BL)

    def served_offset(self) -> list[float]:
        """Returns the logit of each label's ratio in the declared prior."""
        if self.prior == "uniform":
            return [0.0] * len(self.labels)
        return [compute_logit(ratio) for ratio in order_by_label(self.prior, self.labels, "prior")]

    @property
    def smoothness(self) -> float:
        """Curvature of the binary cross entropy: at most 1/4 times the largest weight, and labels are apart."""
        return 0.25 * max([1.0, *self._weights()])

    @property
    def first_slope(self) -> float:
        """Length of as many halves as there are labels, smoothed."""
        return (1.0 - self.smoothing) * math.sqrt(len(self.labels)) / 2.0

    @property
    def tolerated_noise(self) -> float:
        """That of a logit (docs/results.md)."""
        return 0.5

    @property
    def centres(self) -> bool:
        """The mean of features tells no label from another."""
        return True

    @property
    def num_counts(self) -> int:
        """Number of counts."""
        return 2 * len(self.labels)

    def count_labels(self, labels: Tensor) -> Tensor:
        """Returns for each label 1 where it is present, then 1 where it is absent, over sqrt(number of labels)."""
        import torch

        present_BL, absent_BL = (labels == 1).float(), (labels == 0).float()
        return torch.cat([present_BL, absent_BL], dim=1) / math.sqrt(len(self.labels))

    def compute_offset(self, sums_C: Array, deviation: float) -> Array:
        """Returns the logarithm of each smoothed label's odds.

        Args:
            sums_C: sums of `count_labels`, with noise.
            deviation: deviation of that noise.
        """
        root = math.sqrt(len(self.labels))
        counts_2L = root * np.asarray(sums_C, np.float64).reshape(2, -1)
        pairs_L2 = [shrink_counts(pair, root * deviation) for pair in counts_2L.T]
        if self.smoothing:
            pairs_L2 = [(1.0 - self.smoothing) * pair + self.smoothing * pair.mean() for pair in pairs_L2]
        return np.array([present - absent for present, absent in map(np.log, pairs_L2)])

    def balanced_labels(self) -> Tensor:
        """Returns the labels of two records: one with all labels, and one with none."""
        import torch

        return torch.stack([torch.ones(len(self.labels)), torch.zeros(len(self.labels))]).long()

    def overconfidence(self, outputs: Tensor, labels: Tensor, offset: Tensor) -> Tensor:
        """Returns the mean over labels of the probability of what is predicted, less 1 where it is true.

        Args:
            outputs: [B, L]; a label is taken as predicted where its output is above 0.
            labels: int64 [B, L]; unknown ones add 0.
            offset: [L], added to the outputs of each example before they become probabilities.
        """
        predicted_BL = outputs > 0
        probability_BL = (outputs + offset).sigmoid().nan_to_num(nan=0.0)
        confidence_BL = probability_BL.where(predicted_BL, 1.0 - probability_BL)
        correct_BL = (predicted_BL == (labels == 1)).to(confidence_BL)
        return (confidence_BL - correct_BL).where(labels != _UNKNOWN, 0.0).mean(dim=1)

    def known_part(self, labels: Tensor) -> Tensor:
        """Returns the ratio of known labels of each example."""
        return (labels != _UNKNOWN).double().mean(dim=1)

    def join_cells(self, cells: Sequence[str]) -> str:
        """Returns the names of the labels that are present, as one column of labels holds them."""
        present = [name for name, cell in zip(self.labels, cells, strict=True) if cell == "1"]
        return _SEPARATOR.join(present) or self.none or ""

    def name_served(self, num_outputs: int) -> list[str]:
        """Returns the labels: one column for each one's probability."""
        del num_outputs
        return list(self.labels)

    def serve(self, outputs: Tensor) -> Tensor:
        """Returns probability_BL of each label."""
        return outputs.sigmoid()

    def statistic(self, buckets: int) -> Statistic:
        """Returns for each known label the cell of truth and prediction, and the bucket of its score.

        The main metric is the mean AUROC over labels, as is usual for findings that are rare; the others are at
        the labels' thresholds.
        """
        return Statistic(
            size=len(self.labels) * (4 + 2 * buckets),
            # Two entries for each known label, weighted by the number of labels.
            bound=math.sqrt(2.0),
            entries=partial(self._entries, buckets),
            compute=self._compute,
            ranges=dict.fromkeys(_METRICS, RATE),
        )

    def _entries(self, buckets: int, outputs: Tensor, labels: Tensor) -> SparseRows:
        import torch

        from common.tasks.parts.statistics import build_score_rows, join_rows

        num_labels, scores_BL = len(self.labels), outputs.sigmoid()
        cell_BL = 2 * labels.clamp(min=0) + self.codec.predict(outputs)
        first_L = 4 * torch.arange(num_labels, device=scores_BL.device)
        cells = SparseRows(first_L + cell_BL, (labels != _UNKNOWN).double())
        histograms = build_score_rows(scores_BL, labels, num_classes=2, buckets=buckets, offset=4 * num_labels)
        index_BP, value_BP = join_rows(cells, histograms)
        return SparseRows(index_BP, value_BP / math.sqrt(num_labels))

    def count_outcomes(self, sums_S: Array, deviation: float) -> Outcomes:
        """Returns for each label its absences and presences by prediction, and its scores.

        Args:
            sums_S: summed rows of the statistic.
            deviation: standard deviation of the noise in each entry.
        """
        root, cells = math.sqrt(len(self.labels)), 4 * len(self.labels)
        return Outcomes(
            confusions=make_label_confusions(root * sums_S[:cells], self.labels, root * deviation),
            scores=make_scores(root * sums_S[cells:], self.labels, 2, root * deviation),
            probabilities=True,
        )

    def _smooth(self, truth_BL: Tensor) -> Tensor:
        return truth_BL * (1.0 - self.smoothing) + self.smoothing / 2.0

    def _weights(self) -> list[float]:
        return order_by_label(self.weights, self.labels, "weights", default=1.0)

    def _compute(self, sums_S: Array, clip: bool) -> dict[str, float]:
        num_labels = len(self.labels)
        sums_S = sums_S * math.sqrt(num_labels)
        counts_L22 = sums_S[: 4 * num_labels].reshape(num_labels, 2, 2)
        recall_L, specificity_L = compute_recall(counts_L22, clip=clip), compute_specificity(counts_L22, clip=clip)
        return {
            "auroc": average_defined(compute_auroc(sums_S[4 * num_labels :], num_labels, clip=clip)),
            "balanced_accuracy": average_defined((recall_L + specificity_L) / 2),
            "accuracy": float(
                compute_ratio(counts_L22.trace(axis1=1, axis2=2).sum(), counts_L22.sum(), clip=clip),
            ),
            "sensitivity": average_defined(recall_L),
            "specificity": average_defined(specificity_L),
        }


@dataclass(frozen=True)
class MultilabelCodec:
    """Labels are int64 vectors [L] of 0 (absent), 1 (present) and -1 (unknown).

    Attributes:
        names: public names of the labels, in the order of the vector.
        none: the cell that means "none of the labels", or None.
        thresholds: output of each label above which it is predicted.
    """

    names: Sequence[str]
    none: str | None
    thresholds: Sequence[float]

    def encode(self, cells: Sequence[str]) -> Tensor:
        """Returns the vector of one example.

        Args:
            cells: one cell with the present labels, separated by `|`; or for each label a cell "1", "0" or empty.

        Raises:
            BadRecord: another number of cells, or a value that is none of these; it is not repeated.
        """
        import torch

        if len(cells) == 1:
            return torch.tensor(self._split(cells[0]))
        if len(cells) != len(self.names):
            raise BadRecord(f"expected one column, or one for each of the {len(self.names)} labels")
        return torch.tensor([_read_presence(cell) for cell in cells])

    def missing(self) -> Tensor:
        """Returns the vector in which every label is unknown."""
        import torch

        return torch.full((len(self.names),), _UNKNOWN)

    def predict(self, outputs: Tensor) -> Tensor:
        """Returns predicted_BL (int64), 1 where a label's output is above its threshold, else 0."""
        return (outputs > outputs.new_tensor(self.thresholds)).long()

    def decode(self, outputs: Tensor) -> list[list[str]]:
        """Returns for each example one cell for each label, "1" where it is predicted, else "0"."""
        return [[str(present) for present in row] for row in self.predict(outputs).tolist()]

    def _split(self, cell: str) -> list[int]:
        labels = [0] * len(self.names)
        if self.none is not None and find_name(cell, (self.none,)) is not None:
            return labels
        for name in cell.split(_SEPARATOR):
            index = find_name(name, self.names)
            if index is None:
                raise BadRecord(f"expected the task's labels, separated by {_SEPARATOR!r}")
            labels[index] = 1
        return labels


def _read_presence(cell: str) -> int:
    if not cell.strip():
        return _UNKNOWN
    value = find_name(cell, ("0", "1"))
    if value is None:
        raise BadRecord("expected 0, 1 or an empty cell for each label")
    return value
