"""Metrics whose states are plain sums, so that sites' states add up. Undefined is NaN: no warning, no invented 0.

torchmetrics' own rates count a class that does not occur as 0 and its AUROC warns and returns 0 there; a site that
lacks a class is normal here.

# Shapes: B examples, L labels (or K classes, each against the rest), T score buckets.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix, MultilabelConfusionMatrix
from torchmetrics.regression import R2Score

from common.tasks.parts.rates import Rate, area_under_roc, one_against_rest, score_edges

BUCKETS = 2048


@final
class ClassRate(MulticlassConfusionMatrix):
    """A rate of one-against-rest counts; takes probabilities B x K and class indices B."""

    def __init__(self, num_classes: int, rate: Rate) -> None:
        super().__init__(num_classes=num_classes)
        self._rate = rate

    def compute(self) -> Tensor:
        """The rate; NaN where undefined."""
        return self._rate(one_against_rest(self.confmat))


@final
class Accuracy(MulticlassConfusionMatrix):
    """Share of examples whose most probable class is theirs; takes probabilities B x K and class indices B."""

    def compute(self) -> Tensor:
        """Correct over all; NaN without examples."""
        return self.confmat.diagonal().sum().double() / self.confmat.sum()


@final
class KnownAccuracy(Metric):
    """Share of examples whose most probable class is theirs, among those whose class is one of `num_classes`."""

    full_state_update = False
    correct: Tensor
    known: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self._num_classes = num_classes
        for state in ("correct", "known"):
            self.add_state(state, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores_BK: Tensor, labels_B: Tensor) -> None:
        """Count; labels are class indices, those of other classes beyond them or negative."""
        known_B = (labels_B >= 0) & (labels_B < self._num_classes)
        self.known += known_B.sum()
        self.correct += (known_B & (scores_BK.argmax(1) == labels_B)).sum()

    def compute(self) -> Tensor:
        """Correct over known; NaN without any."""
        return self.correct.double() / self.known


@final
class LabelRate(MultilabelConfusionMatrix):
    """A rate over labels at threshold 1/2; takes probabilities B x L and labels B x L of 0, 1 and -1 (missing)."""

    def __init__(self, num_labels: int, rate: Rate) -> None:
        super().__init__(num_labels=num_labels, ignore_index=-1)
        self._rate = rate

    def compute(self) -> Tensor:
        """The rate; NaN where undefined."""
        return self._rate(self.confmat)


@final
class Auroc(Metric):
    """Area under the ROC curve, averaged over the labels for which it is defined.

    The state is a histogram of scores for each label and truth, in fixed public buckets: two scores in one bucket count
    as a tie. Buckets are even in asinh(logit - logit of chance), because a head under privacy may move scores by little
    around chance (1 / num_classes), where even buckets over [0, 1] would see ties only.

    Args:
        num_labels: labels, or classes against the rest.
        num_classes: what chance is one of: the classes, or 2 for independent labels.
        only: index of the single label to report; None averages.
    """

    full_state_update = False
    positives_TL: Tensor
    negatives_TL: Tensor
    edges_T: Tensor

    def __init__(self, num_labels: int, num_classes: int, only: int | None = None) -> None:
        super().__init__()
        self._only = only
        self._num_labels = num_labels
        self.register_buffer("edges_T", score_edges(num_classes, BUCKETS), persistent=False)
        zeros_TL = torch.zeros(BUCKETS, num_labels, dtype=torch.int64)
        self.add_state("positives_TL", zeros_TL, dist_reduce_fx="sum")
        self.add_state("negatives_TL", zeros_TL.clone(), dist_reduce_fx="sum")

    def update(self, scores_BL: Tensor, labels: Tensor) -> None:
        """Count scores; labels are class indices B, or B x L of 0, 1 and -1 (missing)."""
        truth_BL = labels
        if labels.ndim == 1:
            truth_BL = torch.nn.functional.one_hot(labels, self._num_labels)
        bucket_BL = torch.bucketize(scores_BL.contiguous(), self.edges_T)
        place_BL = bucket_BL * self._num_labels + torch.arange(self._num_labels, device=scores_BL.device)
        size = BUCKETS * self._num_labels
        for state, value in ((self.positives_TL, 1), (self.negatives_TL, 0)):
            state += torch.bincount(place_BL[truth_BL == value], minlength=size).view_as(state)

    def compute(self) -> Tensor:
        """P(score of a positive > score of a negative) + P(equal) / 2; NaN where a label has only one truth."""
        area_L = area_under_roc(self.positives_TL.double(), self.negatives_TL.double())
        return area_L.nanmean() if self._only is None else area_L[self._only]


@final
class R2(R2Score):
    """1 - squared error / squared deviation from the mean; NaN where the truth does not vary."""

    def compute(self) -> Tensor:
        """Coefficient of determination."""
        spread = self.sum_squared_error - self.sum_error**2 / self.total
        return torch.where(spread > 0, 1 - self.residual / spread, torch.nan).squeeze()
