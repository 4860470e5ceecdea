"""Exact metrics of a head on units, for the site's own eyes and for simulators only: outside the privacy promise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from client.data.units import Units
from common.events import Metrics
from common.model.parameters import load_parameters
from common.tasks import EXACT_BUCKETS, PairMetrics, Task, predict_outputs
from common.types import Params


@dataclass(frozen=True)
class Predictions:
    """A head's outputs for the labelled records of one site, R of them.

    Attributes:
        outputs: R x the task's output shape.
        labels: R x the task's label shape.
        unit_R: int64 [R], number of the unit that each record belongs to.
    """

    outputs: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    unit_R: Tensor = field(repr=False)


def open_head(params: Params, name: str, task: Task, units: Units) -> nn.Module:
    """Returns a task's head with these parameters.

    Args:
        params: parameters of the head.
        name: the task's name.
        task: the task's definition.
        units: units with the features that the head reads.
    """
    module = task.head(units.tasks[name].features_RD.shape[-1])
    load_parameters(module, params)
    return module


def predict(task: Task, head: nn.Module, name: str, units: Units) -> Predictions | None:
    """Returns what a head predicts of the labelled records of units, and their labels; None where there is none.

    Args:
        task: the task's definition.
        head: the task's head.
        name: the task's name.
        units: units with the features that the head reads.
    """
    records = units.tasks[name].labelled()
    if len(records.features_RD) == 0:
        return None
    with torch.inference_mode():
        return Predictions(predict_outputs(task, head, records.features_RD), records.labels, records.unit_R)


def compute_metrics(task: Task, sums_S: Tensor) -> Metrics:
    """Returns the metrics that follow from the exact sums of a task's statistic; those of several sites add up."""
    return replace_undefined(task.statistic(EXACT_BUCKETS).values(sums_S))


def compute_pair_metrics(task: Task, predictions: Sequence[Predictions]) -> Metrics:
    """Returns the metrics over pairs of all labelled records together; none where the task has none."""
    if not isinstance(task, PairMetrics) or not predictions:
        return {}
    outputs = torch.cat([each.outputs for each in predictions])
    labels = torch.cat([each.labels for each in predictions])
    return replace_undefined(task.pair_metrics(outputs, labels))


def replace_undefined(values: Mapping[str, float]) -> Metrics:
    """Returns the same metrics with None for every value that is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
