"""The time until an event, of records some of which are censored: followed for a while without an event.

Time is cut at public boundaries. A head tells for each interval the hazard, which is the probability of an event there
of who had none before; a record's loss is the sum of binary cross entropies over the intervals in which it is known
(Brown 1975; Gensheimer and Narasimhan 2019, arXiv 1805.00917). It follows from that record alone, unlike Cox's partial
likelihood, which compares records.

The hazards' logits share most of what they say about a record, as in a proportional model, because events of one
interval are few: logit_k = v z_k + (1 - v) mean(z) of the outputs z, with the public number `variation` v. A head of K
outputs then learns of noised gradients nearly what a head of one output would, and keeps K offsets for the baseline.

# Shapes: B examples, N training records, D features, K intervals, G groups of intervals.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, final

import numpy as np
from pydantic import Field, field_validator

from common.inputs import find_name, parse_number
from common.plugins import Plugin
from common.tasks import SparseRows, Statistic, TaskExample
from common.tasks.parts.curves import Counts, compute_brier, compute_concordance, estimate_hazard_logits
from common.tasks.parts.head import BagHeadSettings
from common.tasks.parts.rates import RATE, Array
from common.types import BadRecord

if TYPE_CHECKING:
    from torch import Tensor, nn

_UNKNOWN = -1
_METRICS = ("c_index", "brier", "calibration_error", "predicted_risk", "observed_risk")
_BUCKETS_OF_GROUP = 4
"""Score buckets for each group of intervals: with 16 buckets pairs are compared over 4 groups, because every cell of
bucket and group has noise of its own."""
_LESS = 0.5
"""Weight of all parts of a statistic but the risks' buckets, whose metric suffers most from noise: of Cox's predictions
for 527 records of ACTG 175, 129 of them with an event, noise of 1 is an error of .031 in the C-index and not .048, and
of .020 in the Brier score and not .015."""
_NO_CLIPPING = 1.0 / 0.6
"""Clip norms are 0.6 of a slope (`common.model.auto`); of this one, they leave an event's gradient whole. Records
without one have short gradients: to clip those of events alone would teach a lower hazard. On synthetic records at
epsilon 3 the distance of predictions from the curve was .008 and .005 instead of .029 and .011 with 10 and 3 % events,
and the same with 30 and 50 %; the C-index changed by less than its error, .002 to .012."""
_MIDDLE_RISK, _RISK_SPREAD = -1.2, 1.25
"""Middle and spread of the logits of risks for which score buckets are made: most are finer than 0.5 between risks of
3 % and 70 %."""


@final
class Survival(Plugin):
    """Settings of a time until an event.

    Attributes:
        boundaries: ends of the intervals, in the unit of the task's times; the first interval begins at 0. An event at
            a boundary is in the interval that ends there.
        outside: what a time after the last boundary means: `censor`, no event until there, or `refuse` the record.
        variation: how much of what is told of an interval is its own, and not shared by all of them: near 0 odds of
            the hazard are proportional, as a Cox model's hazards are, and 1 is a model for each interval.
        scale: public factor on this task's loss, applied before joint clipping.
        head_settings: shape of the head, `head` in a file.
    """

    kind: Literal["survival"] = "survival"
    boundaries: Annotated[tuple[float, ...], Field(min_length=1, max_length=100)]
    outside: Literal["censor", "refuse"] = "censor"
    variation: Annotated[float, Field(ge=0.01, le=1.0)] = 0.1
    scale: Annotated[float, Field(gt=0)] = 1.0
    head_settings: BagHeadSettings = Field(default=BagHeadSettings(), alias="head")

    @field_validator("boundaries")
    @classmethod
    def _check_order(cls, ends: tuple[float, ...]) -> tuple[float, ...]:
        if not all(low < high for low, high in zip((0.0, *ends[:-1]), ends, strict=True)):
            raise ValueError(f"expected times above 0 in ascending order, got {list(ends)}")
        return ends

    @classmethod
    def example(cls) -> TaskExample:
        """Returns a task on four years after an operation."""
        settings = {"kind": "survival", "boundaries": [365, 730, 1095, 1460], "variation": 0.5}
        return TaskExample(settings, [["200", "1"], ["1460", "0"], ["1000", "1"], ["2000", "0"]])

    @property
    def cell_names(self) -> tuple[str, ...]:
        """The time, and 1 where it ends with an event or 0 where it is censored."""
        return ("time", "event")

    @property
    def codec(self) -> SurvivalCodec:
        """Vectors of what is known of each interval; the prediction is the median time."""
        return SurvivalCodec(self.boundaries, refuses=self.outside == "refuse", variation=self.variation)

    @property
    def pools_items(self) -> bool:
        """True where the head pools the items of bags."""
        return self.head_settings.pooling is not None

    def head(self, feature_dim: int) -> nn.Module:
        """Returns a head, features_BD -> outputs_BK."""
        return self.head_settings.build(feature_dim, len(self.boundaries))

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the binary cross entropy of each example, summed over the intervals that are known of it."""
        from torch.nn import functional

        truth_BK = labels.clamp(min=0).to(outputs.dtype)
        logits_BK = mix(outputs, self.variation)
        losses_BK = functional.binary_cross_entropy_with_logits(logits_BK, truth_BK, reduction="none")
        return losses_BK.where(labels != _UNKNOWN, 0.0).sum(dim=1)

    def loss_gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns hazard minus event in each known interval and zero in the others, mixed as the outputs are."""
        slopes_BK = (mix(outputs, self.variation).sigmoid() - labels).where(labels != _UNKNOWN, 0.0)
        # The mixing is symmetric.
        return mix(slopes_BK, self.variation)

    @property
    def smoothness(self) -> float:
        """Curvature of the binary cross entropy: at most 1/4, intervals are apart and the mixing lengthens nothing."""
        return 0.25

    @property
    def first_slope(self) -> float:
        """More than the length of an event's gradient where hazards are small, as they are from the first round on."""
        return _NO_CLIPPING * self._mix_length

    @property
    def tolerated_noise(self) -> float:
        """That of a logit: mixing shortens noise by as much as a unit vector."""
        return 0.5 / self._mix_length

    @property
    def centres(self) -> bool:
        """The mean of features tells no interval from another."""
        return True

    @property
    def num_counts(self) -> int:
        """Number of counts: events in each interval, and records censored after each."""
        return 2 * len(self.boundaries)

    def count_labels(self, labels: Tensor) -> Tensor:
        """Returns 1 in the cell in which the record ends (see `curves.Counts`); nothing where no interval is known.

        A record that enters late, at risk from an interval after the first, is a negative one that is censored before:
        all of its row is divided by 2.
        """
        import torch

        event_BK, alive_BK = (labels == 1).float(), (labels == 0).float()
        zero_B1 = event_BK.new_zeros(len(labels), 1)
        censored_BS = torch.cat([zero_B1, alive_BK], 1) - torch.cat([event_BK + alive_BK, zero_B1], 1)
        rows_BC = torch.cat([event_BK, censored_BS[:, 1:]], dim=1)
        return rows_BC / rows_BC.abs().sum(dim=1, keepdim=True).clamp(min=1.0)

    def compute_offset(self, sums_C: Array, deviation: float) -> Array:
        """Returns the outputs that give the baseline: each interval's odds of an event, whatever the features.

        Args:
            sums_C: sums of `count_labels`, with noise.
            deviation: deviation of that noise.
        """
        # Who was never at risk is not counted.
        events_K, censored_K = np.split(np.asarray(sums_C, np.float64), 2)
        logits_K = estimate_hazard_logits(Counts(events_K, np.concatenate([[0.0], censored_K])), deviation)
        return self._unmix(logits_K)

    def balanced_labels(self) -> Tensor:
        """Returns for each interval the labels of two records that are known there only, one with an event."""
        import torch

        known = torch.eye(len(self.boundaries), dtype=torch.bool)
        return torch.cat([torch.where(known, truth, _UNKNOWN) for truth in (1, 0)])

    def predict_baseline(self, features: Tensor, known_features: Tensor, known_labels: Tensor) -> Tensor:
        """Returns the outputs of the training records' own baseline, whatever the features.

        Args:
            features: [B, D], features of the records to predict.
            known_features: [N, D], unused.
            known_labels: int64 [N, K], labels of the training records.
        """
        del known_features
        sums_C = self.count_labels(known_labels).double().sum(dim=0).numpy()
        return features.new_tensor(self.compute_offset(sums_C, 0.0)).expand(len(features), -1)

    def join_cells(self, cells: Sequence[str]) -> str:
        """Returns the median time, with `>` before it where it lies after the last boundary."""
        time, event = cells
        return time if event == "1" else f">{time}"

    def name_served(self, num_outputs: int) -> list[str]:
        """Returns `risk`, then one column for each boundary."""
        del num_outputs
        return ["risk", *(f"survival_{end:.12g}" for end in self.boundaries)]

    def serve(self, outputs: Tensor) -> Tensor:
        """Returns the part of the time that is expected to be lost, then the probability of no event until each end."""
        import torch

        survival_BK = self.codec.predict_survival(outputs)
        return torch.cat([self.codec.compute_risk(survival_BK).unsqueeze(1), survival_BK], dim=1).float()

    def statistic(self, buckets: int) -> Statistic:
        """Returns the cell in which a record ends, its risk's bucket in that cell, squared distances and predictions.

        The main metric is the C-index. `brier` is the integrated Brier score; `calibration_error` the mean over time of
        the distance between the mean predicted probability of an event and that which was seen (Kaplan and Meier 1958);
        `predicted_risk` and `observed_risk` are these two at the last boundary.
        """
        num_intervals, groups = len(self.boundaries), self._count_groups(buckets)
        return Statistic(
            size=5 * num_intervals + 1 + buckets * (2 * groups + 1),
            # Four parts, each of length 1 at most before its weight: widths in parts of the whole add up to 1.
            bound=math.sqrt(1.0 + 3.0 * _LESS**2),
            entries=partial(self._entries, buckets),
            compute=partial(self._compute, buckets),
            ranges=dict.fromkeys(_METRICS, RATE),
            errors=frozenset({"brier", "calibration_error"}),
        )

    def _entries(self, buckets: int, outputs: Tensor, labels: Tensor) -> SparseRows:
        import torch

        num_intervals, groups = len(self.boundaries), self._count_groups(buckets)
        survival_BK = self.codec.predict_survival(outputs)
        width_K = survival_BK.new_tensor(self._widths())
        is_event_B, ended_B = (labels == 1).any(dim=1), (labels == 0).sum(dim=1)
        group_S = torch.tensor(self._group_intervals(groups), device=labels.device)
        cell_B = ended_B.where(is_event_B, num_intervals + ended_B)
        group_B = group_S[ended_B].where(is_event_B, groups + group_S[ended_B])
        bucket_B = (compute_position(self.codec.compute_risk(survival_BK)) * buckets).long().clamp(0, buckets - 1)
        one_B1, at_K = survival_BK.new_ones(len(labels), 1), torch.arange(num_intervals, device=labels.device)
        alive_BK = at_K < ended_B.unsqueeze(1)
        after_BK = is_event_B.unsqueeze(1) & ~alive_BK
        without_BK = (width_K * (1.0 - survival_BK) ** 2).where(alive_BK, 0.0)
        with_B1 = (width_K * survival_BK**2).where(after_BK, 0.0).sum(dim=1, keepdim=True)
        predicted_BK = (1.0 - survival_BK) * (width_K / width_K.norm())
        first = 2 * num_intervals + 1
        index_BP = torch.cat(
            [
                cell_B.unsqueeze(1),
                (first + at_K).expand(len(labels), -1),
                (first + num_intervals + ended_B.clamp(max=num_intervals - 1)).unsqueeze(1),
                (first + 2 * num_intervals + at_K).expand(len(labels), -1),
                (first + 3 * num_intervals + bucket_B * (2 * groups + 1) + group_B).unsqueeze(1),
            ],
            dim=1,
        )
        other_BP = _LESS * torch.cat([one_B1, without_BK, with_B1, predicted_BK], dim=1)
        return SparseRows(index_BP, torch.cat([other_BP, one_B1], dim=1))

    def _compute(self, buckets: int, sums_S: Array, clip: bool) -> dict[str, float]:
        num_intervals, width_K = len(self.boundaries), np.array(self._widths())
        ends = np.cumsum([2 * num_intervals + 1, 2 * num_intervals, num_intervals])
        cells_C, errors_2K, predicted_K, cells_TC = np.split(sums_S, ends)
        cells_C, errors_2K, predicted_K = cells_C / _LESS, errors_2K / _LESS, predicted_K / _LESS
        counts = Counts.split(cells_C)
        if counts.total <= 0.0:
            return dict.fromkeys(_METRICS, math.nan)
        observed_K = 1.0 - counts.estimate_survival(clip=clip)
        predicted_K = predicted_K / (counts.total * width_K / np.linalg.norm(width_K))
        known_K = ~np.isnan(observed_K)
        distances_K = (width_K * np.abs(predicted_K - observed_K))[known_K]
        values = {
            "c_index": compute_concordance(cells_TC.reshape(buckets, -1), clip=clip),
            "brier": compute_brier(counts, errors_2K, clip=clip),
            "calibration_error": float(distances_K.sum() / width_K[known_K].sum()) if known_K.any() else math.nan,
            "predicted_risk": float(predicted_K[-1]),
            "observed_risk": float(observed_K[-1]),
        }
        return {
            name: min(max(value, 0.0), 1.0) if clip and not math.isnan(value) else value
            for name, value in values.items()
        }

    @property
    def _mix_length(self) -> float:
        """Length of a unit vector after mixing."""
        num_intervals = len(self.boundaries)
        return math.sqrt(self.variation**2 * (1.0 - 1.0 / num_intervals) + 1.0 / num_intervals)

    def _widths(self) -> list[float]:
        """Returns the width of each interval in parts of the whole."""
        return self.codec.widths

    def _count_groups(self, buckets: int) -> int:
        """Returns the number of groups of intervals over which pairs are compared."""
        return min(len(self.boundaries), max(1, buckets // _BUCKETS_OF_GROUP))

    def _group_intervals(self, groups: int) -> list[int]:
        """Returns the group of each interval and, of who survived all, the number of groups."""
        num_intervals = len(self.boundaries)
        return [at * groups // num_intervals for at in range(num_intervals + 1)]

    def _unmix(self, logits_K: Array) -> Array:
        """Returns the outputs that are mixed to these logits."""
        mean = logits_K.mean()
        outputs_K: Array = mean + (logits_K - mean) / self.variation
        return outputs_K


@dataclass(frozen=True)
class SurvivalCodec:
    """Labels are int64 vectors [K] of 0 (no event), 1 (the event) and -1 (unknown: after the event, or censored).

    Attributes:
        boundaries: ends of the intervals.
        refuses: whether a time after the last boundary is refused; otherwise it is censored there.
        variation: how much of an output is its interval's own.
    """

    boundaries: Sequence[float]
    refuses: bool
    variation: float

    @property
    def widths(self) -> list[float]:
        """Width of each interval in parts of the whole."""
        starts = (0.0, *self.boundaries[:-1])
        return [(end - start) / self.boundaries[-1] for start, end in zip(starts, self.boundaries, strict=True)]

    def encode(self, cells: Sequence[str]) -> Tensor:
        """Returns the vector of one example from its time and 1 or 0 for the event.

        An interval in which a record is censored counts as survived where at least half of it was (Gensheimer and
        Narasimhan 2019).

        Raises:
            BadRecord: another number of cells, no time from 0 on, or no 0 or 1; none is repeated.
        """
        import torch

        if len(cells) != 2:
            raise BadRecord("expected two columns, a time and 1 for an event or 0 for none")
        time, event = parse_number(cells[0]), find_name(cells[1], ("0", "1"))
        if time is None:
            raise BadRecord("expected a number as the time")
        if time < 0.0:
            raise BadRecord("expected a time of 0 or more, got a negative one")
        if event is None:
            raise BadRecord("expected 1 for an event or 0 for none")
        known = bisect.bisect_left(self.boundaries, time)
        if known == len(self.boundaries):
            if self.refuses:
                raise BadRecord("expected a time until the task's last boundary")
            event = 0
        label = torch.full((len(self.boundaries),), _UNKNOWN)
        label[:known] = 0
        if event:
            label[known] = 1
        elif known < len(self.boundaries):
            start = self.boundaries[known - 1] if known else 0.0
            if time - start >= (self.boundaries[known] - start) / 2:
                label[known] = 0
        return label

    def missing(self) -> Tensor:
        """Returns the vector in which nothing is known."""
        import torch

        return torch.full((len(self.boundaries),), _UNKNOWN)

    def predict_survival(self, outputs: Tensor) -> Tensor:
        """Returns survival_BK (float64): the probability of no event by the end of each interval."""
        from torch.nn import functional

        logarithm_BK = functional.logsigmoid(-mix(outputs.double(), self.variation)).cumsum(dim=1)
        return logarithm_BK.exp().nan_to_num(nan=0.0)

    def compute_risk(self, survival_BK: Tensor) -> Tensor:
        """Returns risk_B: the part of the time until the last boundary that is expected to be lost.

        It is one minus the restricted mean survival time over that time; survival is linear within an interval.
        """
        import torch

        before_BK = torch.cat([torch.ones_like(survival_BK[:, :1]), survival_BK[:, :-1]], dim=1)
        return 1.0 - ((before_BK + survival_BK) / 2 * survival_BK.new_tensor(self.widths)).sum(dim=1)

    def decode(self, outputs: Tensor) -> list[list[str]]:
        """Returns the median time of each example and 1; the last boundary and 0 where it is later."""
        rows = self.predict_survival(outputs).tolist()
        return [self._find_median(row) for row in rows]

    def _find_median(self, survival: Sequence[float]) -> list[str]:
        at = next((index for index, value in enumerate(survival) if value <= 0.5), None)
        if at is None:
            return [repr(float(self.boundaries[-1])).removesuffix(".0"), "0"]
        start, before = (self.boundaries[at - 1], survival[at - 1]) if at else (0.0, 1.0)
        end = self.boundaries[at]
        # An event at the start would be one of the interval before.
        part = max((before - 0.5) / (before - survival[at]), 1e-6)
        time = min(start + part * (end - start), end)
        text = f"{time:.6g}"
        return [text if start < float(text) <= end else repr(time), "1"]


def mix(values_BK: Tensor, variation: float) -> Tensor:
    """Returns variation x value + (1 - variation) x mean of the row, of rows of one value for each interval.

    A row's are the same to the bit wherever the row stands: values are added one after the other.
    """
    columns = values_BK.unbind(1)
    total_B = columns[0]
    for column_B in columns[1:]:
        total_B = total_B + column_B
    return variation * values_BK + ((1.0 - variation) / len(columns) * total_B).unsqueeze(1)


def compute_position(risk_B: Tensor) -> Tensor:
    """Returns where each risk lies among all, from 0 to 1: evenly spread where its logit is logistic."""
    import torch

    logit_B = torch.logit(risk_B.clamp(1e-12, 1.0 - 1e-12))
    return torch.sigmoid((logit_B - _MIDDLE_RISK) / _RISK_SPREAD)
