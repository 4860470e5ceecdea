"""Evaluation of heads on held-out units as one noised release.

Every record has a row of bounded statistics for each task (`Task.statistic`), divided by the task's public bound, so
that it has length 1 at most; a unit's records are averaged; sums over units are released with Gaussian noise, all
tasks at once and without sampling.

Guarantee: one unit moves the released vector of T tasks by at most sqrt(T), whatever its records, labels and features
are and however many it has; missing labels only make its part smaller.

# Shapes: R records, S statistics.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from client.data.units import TaskRecords, Units
from common.privacy.accounting import Mechanism
from common.privacy.noise import NoiseStream, release
from common.tasks import NOISED_BUCKETS, Task
from common.types import Heads

SUMS = "sums"
_CHUNK_VALUES = 2**22
"""Statistics held at once (32 MiB)."""

_SLACK = 1.0 + 1e-6
"""A unit's weights add up to 1 in single precision only."""


def noised_sums(
    heads: Mapping[str, nn.Module],
    tasks: Mapping[str, Task],
    units: Units,
    *,
    mechanism: Mechanism,
    stream: NoiseStream,
) -> Heads:
    """Task -> "sums" -> float32 vector, with noise.

    Args:
        heads: to evaluate; those of the tasks are used.
        tasks: same keys.
        units: held-out; there may be none. Their features are what the heads read (`Units.passed`).
        mechanism: what was charged; its noise is added.
        stream: where the noise comes from.
    """
    assert mechanism.sensitivity is not None and mechanism.sensitivity**2 >= len(tasks) * (1.0 - 1e-9)
    deviation = mechanism.noise_multiplier * mechanism.sensitivity
    noised = {}
    for name in sorted(tasks):
        sums_S = unit_sums(heads[name], tasks[name], units.tasks[name])
        noised[name] = {
            SUMS: release(sums_S, deviation, stream.gaussian(tuple(sums_S.shape))).numpy().astype(np.float32)
        }
    return noised


def unit_sums(head: nn.Module, task: Task, records: TaskRecords) -> Tensor:
    """sums_S over units (float64), without noise; one unit's part has length 1 at most."""
    statistic = task.statistic(NOISED_BUCKETS)
    total_S = torch.zeros(statistic.size, dtype=torch.float64)
    rows_at_once = max(1, _CHUNK_VALUES // len(total_S))
    labelled = records.labelled()
    for rows in torch.split(torch.arange(len(labelled.unit_R)), rows_at_once):
        with torch.inference_mode():
            outputs = head(labelled.features_RD[rows])
            rows_RS = bounded(statistic.rows(outputs, labelled.labels[rows]), statistic.bound)
        total_S += (labelled.weight_R[rows].double().unsqueeze(1) * rows_RS).sum(dim=0).cpu()
    return total_S


def bounded(rows_RS: Tensor, norm: float) -> Tensor:
    """Rows / norm, shortened to length 1; zero for a row that is not finite.

    Rows obey their task's bound by themselves; the promise does not rest on it.
    """
    scaled_RS = rows_RS.double() / norm
    length_R = torch.linalg.vector_norm(scaled_RS, dim=1)
    cut_RS: Tensor = scaled_RS / (length_R.clamp(min=1.0) * _SLACK).unsqueeze(1)
    return cut_RS.masked_fill(~torch.isfinite(length_R).unsqueeze(1), 0.0)
