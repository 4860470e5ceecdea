"""Exact metrics of a head on units, for the site's own eyes and for simulators only: outside the privacy promise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from client.data.units import Units
from common.events import Metrics
from common.model.parameters import load_parameters
from common.tasks import EXACT_BUCKETS, PairMetrics, Task
from common.types import Params


def compute_exact_sums(params: Params, name: str, task: Task, units: Units) -> Tensor | None:
    """Returns the exact sums of a task's statistic over the labelled records of units.

    Args:
        params: parameters of the task's head.
        name: the task's name.
        task: the task's definition.
        units: units with the features that the head reads.

    Returns:
        sums_S in float64, or None where no record has a label.
    """
    predictions = _predict(params, name, task, units)
    return None if predictions is None else task.statistic(EXACT_BUCKETS).sums(*predictions)


def compute_metrics(task: Task, sums_S: Tensor) -> Metrics:
    """Returns the metrics that follow from the exact sums of a task's statistic; those of several sites add up."""
    return replace_undefined(task.statistic(EXACT_BUCKETS).values(sums_S))


def compute_pair_metrics(params: Params, name: str, task: Task, units: Sequence[Units]) -> Metrics:
    """Returns the metrics over pairs of all labelled records together; none where the task has none.

    Args:
        params: parameters of the task's head.
        name: the task's name.
        task: the task's definition.
        units: units of one or several sites, with the features that the head reads.
    """
    if not isinstance(task, PairMetrics):
        return {}
    predictions = [pair for each in units if (pair := _predict(params, name, task, each)) is not None]
    if not predictions:
        return {}
    outputs, labels = zip(*predictions, strict=True)
    return replace_undefined(task.pair_metrics(torch.cat(outputs), torch.cat(labels)))


def replace_undefined(values: Mapping[str, float]) -> Metrics:
    """Returns the same metrics with None for every value that is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _predict(params: Params, name: str, task: Task, units: Units) -> tuple[Tensor, Tensor] | None:
    """Returns a head's outputs for the labelled records, and their labels; None where there is none."""
    records = units.tasks[name].labelled()
    if len(records.features_RD) == 0:
        return None
    module = task.head(records.features_RD.shape[1])
    load_parameters(module, params)
    with torch.inference_mode():
        return module(records.features_RD), records.labels
