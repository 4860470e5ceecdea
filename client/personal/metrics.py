"""A head's metrics on units, exact: for local eyes and for simulators only, outside the privacy promise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from client.data.units import Units
from common.model.parameters import load_parameters
from common.tasks import EXACT_BUCKETS, PairMetrics, Task
from common.types import Params

Values = Mapping[str, float | None]
"""Metric -> value, the main one first; None where undefined."""


def exact_sums(params: Params, name: str, task: Task, units: Units) -> Tensor | None:
    """Returns the exact sums of a task's statistic over the labelled records of units; None where there is none."""
    found = _outputs(params, name, task, units)
    return None if found is None else task.statistic(EXACT_BUCKETS).sums(*found)


def values_of(task: Task, sums_S: Tensor) -> Values:
    """Returns the metrics that follow from the exact sums of a task's statistic; those of several sites add up."""
    return defined(task.statistic(EXACT_BUCKETS).values(sums_S))


def pair_values(params: Params, name: str, task: Task, units: Sequence[Units]) -> Values:
    """Metrics over pairs of all labelled records together; none where the task has none."""
    found = [pair for own in units if (pair := _outputs(params, name, task, own)) is not None]
    if not isinstance(task, PairMetrics) or not found:
        return {}
    outputs, labels = zip(*found, strict=True)
    return defined(task.pair_metrics(torch.cat(outputs), torch.cat(labels)))


def defined(values: Mapping[str, float]) -> Values:
    """The same, with None for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _outputs(params: Params, name: str, task: Task, units: Units) -> tuple[Tensor, Tensor] | None:
    records = units.tasks[name].labelled()
    if len(records.features_RD) == 0:
        return None
    module = task.head(records.features_RD.shape[1])
    load_parameters(module, params)
    with torch.inference_mode():
        return module(records.features_RD), records.labels
