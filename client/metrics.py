"""A head's metrics on units, exact: for local eyes and for simulators only, outside the privacy promise."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from client.units import Units
from common.heads import load_parameters
from common.tasks import Task, metric_sums, metric_values
from common.types import Params

Values = Mapping[str, float | None]
"""Metric -> value, the main one first; None where undefined."""


def exact_sums(params: Params, name: str, task: Task, units: Units) -> dict[str, Tensor] | None:
    """State of a task's metrics over the labelled records of units; None where there is none."""
    records = units.tasks[name].labelled()
    if len(records.features_RD) == 0:
        return None
    module = task.head(records.features_RD.shape[1])
    load_parameters(module, params)
    with torch.inference_mode():
        return metric_sums(task, module(records.features_RD), records.labels)


def values_of(task: Task, sums: Mapping[str, Tensor]) -> Values:
    """The metrics that sums amount to."""
    values = metric_values(task, dict(sums))
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
