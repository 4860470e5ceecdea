"""One of several classes for each example.

# Shapes: B examples, N training records, D features, K classes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, final

import numpy as np
from pydantic import Field, model_validator

from common.events import Outcomes
from common.inputs import CellName, CellNames
from common.plugins import Plugin
from common.tasks import SparseRows, Statistic, TaskExample
from common.tasks.parts.declared import (
    MISSING_CLASS,
    ClassCodec,
    LabelRatios,
    LabelWeights,
    Smoothing,
    TextStart,
    Threshold,
    compute_logit,
    order_by_label,
)
from common.tasks.parts.head import BagHeadSettings
from common.tasks.parts.outcomes import make_confusions, make_scores
from common.tasks.parts.rates import (
    RATE,
    Array,
    average_defined,
    compute_auroc,
    compute_ratio,
    compute_recall,
    compute_specificity,
    count_one_against_rest,
    shrink_counts,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

METRICS = ("accuracy", "balanced_accuracy", "auroc", "sensitivity", "specificity")


@final
class Classification(Plugin):
    """Settings of a classification.

    Attributes:
        labels: the classes, in the order of the head's outputs.
        positive: of two classes the one that AUROC, sensitivity and specificity are about; by default the last.
        threshold: of two classes, probability of the positive one above which it is predicted; by default the more
            probable class is.
        weights: label -> factor from 0.01 to 100 on the loss of its records, before clipping; labels without one have
            1. The head then judges as if a mistake on such a record counted so many times.
        prior: label -> share, the label shares for which the head is served; `uniform`, the default, takes all classes
            for equally frequent.
        start: texts of each label from which a linear head begins, where the backbone reads texts; without them it
            begins at zero.
        smoothing: part of each label, in [0, 1), that the loss shares among all classes alike (label smoothing).
        scale: public factor on this task's loss, applied before joint clipping.
        head_settings: shape of the head, `head` in a file.
    """

    kind: Literal["classification"] = "classification"
    labels: Annotated[CellNames, Field(min_length=2)]
    positive: CellName | None = None
    threshold: Threshold | None = None
    weights: LabelWeights = {}
    prior: LabelRatios | Literal["uniform"] = "uniform"
    start: TextStart | None = None
    smoothing: Smoothing = 0.0
    scale: Annotated[float, Field(gt=0)] = 1.0
    head_settings: BagHeadSettings = Field(default=BagHeadSettings(), alias="head")

    @model_validator(mode="after")
    def _check_positive_is_a_label(self) -> Classification:
        if self.positive is not None and (len(self.labels) != 2 or self.positive not in self.labels):
            raise ValueError(f"positive: expected one of two labels, got {self.positive!r} for {len(self.labels)}")
        return self

    @model_validator(mode="after")
    def _check_declared_numbers(self) -> Classification:
        if self.threshold is not None and len(self.labels) != 2:
            raise ValueError(f"threshold: expected a task of two labels, got one of {len(self.labels)}")
        order_by_label(self.weights, self.labels, "weights", default=1.0)
        if self.prior != "uniform":
            total = math.fsum(order_by_label(self.prior, self.labels, "prior"))
            if abs(total - 1.0) > 1e-6:
                raise ValueError(f"prior: expected shares that add up to 1, got {total:.6g}")
        own = self.head_settings
        if self.list_start_texts() and (own.hidden is not None or own.pooling is not None):
            raise ValueError("start: expected a head without `hidden` and `pooling`, whose rows texts can give")
        return self

    @classmethod
    def example(cls) -> TaskExample:
        """Returns a task of three classes."""
        settings = {"kind": "classification", "labels": ["none", "glioma", "meningioma"]}
        return TaskExample(settings, [["glioma"], ["none"], ["meningioma"], ["none"]])

    @property
    def codec(self) -> ClassCodec:
        """Class indices; the prediction is the most probable class, or by the threshold where there is one."""
        return ClassCodec(self.labels, self._predict)

    @property
    def pools_items(self) -> bool:
        """True where the head pools the items of bags."""
        return self.head_settings.pooling is not None

    def head(self, feature_dim: int) -> nn.Module:
        """Returns a head, features_BD -> logits_BK."""
        return self.head_settings.build(feature_dim, len(self.labels))

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the cross entropy of each example with its smoothed label, times its label's weight."""
        from torch.nn import functional

        if self.smoothing:
            losses_B = functional.cross_entropy(
                outputs, labels, reduction="none", ignore_index=MISSING_CLASS, label_smoothing=self.smoothing
            )
            # torch would weight what is shared by the class that gets it, not by the record's own.
            known_B = labels.clamp(min=0)
            return losses_B * outputs.new_tensor(self._weights())[known_B] if self.weights else losses_B
        weight_K = outputs.new_tensor(self._weights()) if self.weights else None
        return functional.cross_entropy(outputs, labels, weight_K, reduction="none", ignore_index=MISSING_CLASS)

    def loss_gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the probabilities minus the smoothed label's vector, times the label's weight."""
        # Over the first axis torch's softmax is many times faster where classes are few.
        gradient_BK = outputs.mT.contiguous().softmax(dim=0).mT
        labels_B1 = labels.unsqueeze(1)
        gradient_BK = gradient_BK.scatter_add_(
            1, labels_B1, gradient_BK.new_full(labels_B1.shape, self.smoothing - 1.0)
        )
        if self.smoothing:
            gradient_BK = gradient_BK - self.smoothing / len(self.labels)
        return gradient_BK * gradient_BK.new_tensor(self._weights())[labels_B1] if self.weights else gradient_BK

    def list_start_texts(self) -> list[list[str]]:
        """Returns the texts of each class; none where the head begins at zero."""
        return [] if self.start is None else self.start.order(self.labels)

    def served_offset(self) -> list[float]:
        """Returns the logarithm of each class's share in the declared prior, with a mean of 0."""
        if self.prior == "uniform":
            return [0.0] * len(self.labels)
        logarithms = [math.log(share) for share in order_by_label(self.prior, self.labels, "prior")]
        mean = math.fsum(logarithms) / len(logarithms)
        return [logarithm - mean for logarithm in logarithms]

    @property
    def smoothness(self) -> float:
        """Curvature of the cross entropy: that of a softmax is at most 1/2, times the largest weight."""
        return 0.5 * max([1.0, *self._weights()])

    @property
    def first_slope(self) -> float:
        """Length of uniform probabilities minus a unit vector, smoothed."""
        return (1.0 - self.smoothing) * math.sqrt(1.0 - 1.0 / len(self.labels))

    @property
    def tolerated_noise(self) -> float:
        """That of a logit (docs/results.md)."""
        return 0.5

    @property
    def centres(self) -> bool:
        """The mean of features tells no class from another."""
        return True

    @property
    def num_counts(self) -> int:
        """Number of counts."""
        return len(self.labels)

    def count_labels(self, labels: Tensor) -> Tensor:
        """Returns the unit vector of each label's class."""
        from torch.nn import functional

        return functional.one_hot(labels, len(self.labels)).float()

    def compute_offset(self, sums_C: Array, deviation: float) -> Array:
        """Returns the logarithm of each class's share of the smoothed labels, with mean 0.

        Args:
            sums_C: number of records of each class, with noise.
            deviation: deviation of that noise.
        """
        counts_K = shrink_counts(np.asarray(sums_C, np.float64), deviation)
        if self.smoothing:
            counts_K = (1.0 - self.smoothing) * counts_K + self.smoothing * counts_K.mean()
        logarithms_K = np.log(counts_K)
        offset_K: Array = logarithms_K - logarithms_K.mean()
        return offset_K

    def balanced_labels(self) -> Tensor:
        """Returns one record's label of each class."""
        import torch

        return torch.arange(len(self.labels))

    def overconfidence(self, outputs: Tensor, labels: Tensor, offset: Tensor) -> Tensor:
        """Returns the probability of the predicted class, less 1 where that is the example's; 0 without a class.

        Args:
            outputs: [B, K], from which the prediction follows.
            labels: int64 [B].
            offset: [K], added to the outputs of each example before they become probabilities.
        """
        predicted_B = outputs.argmax(dim=1)
        probability_BK = (outputs + offset).softmax(dim=1).nan_to_num(nan=0.0)
        confidence_B = probability_BK.gather(1, predicted_B.unsqueeze(1)).squeeze(1)
        overconfidence_B = confidence_B - (predicted_B == labels).to(confidence_B)
        return overconfidence_B.where(labels != MISSING_CLASS, 0.0)

    def known_part(self, labels: Tensor) -> Tensor:
        """Returns 1 for each example whose class is known."""
        return (labels != MISSING_CLASS).double()

    def name_served(self, num_outputs: int) -> list[str]:
        """Returns the labels: one column for each class's probability."""
        del num_outputs
        return list(self.labels)

    def serve(self, outputs: Tensor) -> Tensor:
        """Returns probability_BK of each class."""
        return outputs.softmax(dim=1)

    def predict_baseline(self, features: Tensor, known_features: Tensor, known_labels: Tensor) -> Tensor:
        """Returns the logarithm of each class's frequency in training, whatever the features: it predicts the majority.

        Args:
            features: [B, D], features of the records to predict.
            known_features: [N, D], unused.
            known_labels: int64 [N], class indices of the training records.
        """
        del known_features
        counts_K = known_labels.bincount(minlength=len(self.labels))
        return counts_K.clamp_min(1e-9).log().to(features).expand(len(features), -1)

    def statistic(self, buckets: int) -> Statistic:
        """Returns the cell of the confusion matrix, and the score's bucket of the positive class or of every class.

        Of two classes the metrics are about the positive one, of more they are means over the classes that occur.
        """
        num_classes, num_scored = len(self.labels), len(self._scored_classes())
        return Statistic(
            size=num_classes**2 + 2 * num_scored * buckets,
            # One cell; all buckets together are weighted to be as long again.
            bound=math.sqrt(2.0),
            entries=partial(self._entries, buckets),
            compute=self._compute,
            ranges=dict.fromkeys(METRICS, RATE),
        )

    def _entries(self, buckets: int, outputs: Tensor, labels: Tensor) -> SparseRows:
        from torch.nn import functional

        from common.tasks.parts.statistics import build_score_rows, join_rows

        num_classes, scored = len(self.labels), self._scored_classes()
        scores_BK = outputs.softmax(dim=1)
        cell_B1 = (labels * num_classes + self._predict(outputs)).unsqueeze(1)
        index_BL, value_BL = build_score_rows(
            scores_BK[:, scored],
            functional.one_hot(labels, num_classes)[:, scored],
            num_classes=num_classes,
            buckets=buckets,
            offset=num_classes**2,
        )
        cells = SparseRows(cell_B1, value_BL.new_ones(cell_B1.shape))
        return join_rows(cells, SparseRows(index_BL, value_BL / math.sqrt(len(scored))))

    def _compute(self, sums_S: Array, clip: bool) -> dict[str, float]:
        num_classes, num_scored, positive = len(self.labels), len(self._scored_classes()), self._positive_index()
        counts_KK = sums_S[: num_classes**2].reshape(num_classes, num_classes)
        counts_K22 = count_one_against_rest(counts_KK)
        area_L = compute_auroc(sums_S[num_classes**2 :] * math.sqrt(num_scored), num_scored, clip=clip)
        recall_K, specificity_K = compute_recall(counts_K22, clip=clip), compute_specificity(counts_K22, clip=clip)
        return {
            "accuracy": float(compute_ratio(counts_KK.trace(), counts_KK.sum(), clip=clip)),
            # The mean of one-against-rest recall over all classes is balanced accuracy.
            "balanced_accuracy": average_defined(recall_K),
            "auroc": average_defined(area_L),
            "sensitivity": average_defined(recall_K) if positive is None else float(recall_K[positive]),
            "specificity": average_defined(specificity_K) if positive is None else float(specificity_K[positive]),
        }

    def count_outcomes(self, sums_S: Array, deviation: float) -> Outcomes:
        """Returns the confusion matrix, and the scores of the positive class or of every class.

        Args:
            sums_S: summed rows of the statistic.
            deviation: standard deviation of the noise in each entry.
        """
        scored = [self.labels[index] for index in self._scored_classes()]
        root = math.sqrt(len(scored))
        return Outcomes(
            confusions=make_confusions(sums_S[: len(self.labels) ** 2], self.labels, deviation),
            scores=make_scores(root * sums_S[len(self.labels) ** 2 :], scored, len(self.labels), root * deviation),
            probabilities=True,
        )

    def _predict(self, outputs: Tensor) -> Tensor:
        """Returns index_B of the predicted class."""
        if self.threshold is None:
            return outputs.argmax(dim=1)
        positive = self._positive_index()
        assert positive is not None
        above_B = outputs[:, positive] - outputs[:, 1 - positive] > compute_logit(self.threshold)
        return above_B.long() if positive == 1 else 1 - above_B.long()

    def _weights(self) -> list[float]:
        return order_by_label(self.weights, self.labels, "weights", default=1.0)

    def _positive_index(self) -> int | None:
        if len(self.labels) != 2:
            return None
        return 1 if self.positive is None else self.labels.index(self.positive)

    def _scored_classes(self) -> list[int]:
        """Returns the classes whose scores are counted; of two classes the scores of one determine the other's."""
        positive = self._positive_index()
        return list(range(len(self.labels))) if positive is None else [positive]
