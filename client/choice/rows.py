"""The rows that a scorer reads, from a site's records.

# Shapes: R records, D features, C targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from client.data.units import TaskRecords
from client.solvers.parts.objective import select_usable_records
from common.scorers import GRID, ScoredRows
from common.tasks import LabelPrior
from common.tasks.parts.adjusted import normalize_rows

_SHRINK = 1.0 - 2.0**-20
"""More than what float32 weights and the rounding of lengths add to a unit's norm."""


def make_comparable_rows(task: LabelPrior, candidates: Sequence[TaskRecords]) -> list[ScoredRows]:
    """Returns each candidate's rows of the same units: one of which a candidate reads nothing has features of 0.

    Without them a candidate would cost the less, the fewer records it reads. The rows of a unit follow from that unit
    alone, and are within the bounds of one: its targets are those of the first candidate that reads it.

    Args:
        task: the records' task.
        candidates: the records of the same units as each candidate sees them.
    """
    unit_R = [select_usable_records(records).unit_R.cpu().numpy() for records in candidates]
    rows = [make_rows(task, records) for records in candidates]
    comparable = []
    for own, units in zip(rows, unit_R, strict=True):
        targets_RC, read = [own.targets_RC], units
        for other, others in zip(rows, unit_R, strict=True):
            missing_R = ~np.isin(others, read)
            targets_RC.append(other.targets_RC[missing_R])
            read = np.union1d(read, others)
        targets = np.concatenate(targets_RC)
        nothing_RD = np.zeros((len(targets) - len(units), own.features_RD.shape[1]))
        comparable.append(ScoredRows(np.concatenate([own.features_RD, nothing_RD]), targets))
    return comparable


def make_rows(task: LabelPrior, records: TaskRecords) -> ScoredRows:
    """Returns the rows of the records that have a label and finite features.

    Every step follows from one record alone and is rounded toward zero, so that a unit's rows are the same to the bit
    whatever the others are, and its bounds hold exactly.

    Args:
        task: the records' task.
        records: the records of one side.
    """
    usable = select_usable_records(records)
    roots_R1 = (usable.weight_R.double().sqrt() * _SHRINK)[:, None]
    features_RD = normalize_rows(usable.features_RD.flatten(1).double())
    counts_RC = _truncate(task.count_labels(usable.labels).double())
    # Whole multiples of the grid add up exactly; without its mean a vector is no longer.
    centred_RC = counts_RC - counts_RC.sum(1, keepdim=True) / max(1, counts_RC.shape[1])
    return ScoredRows(_truncate(features_RD * roots_R1).cpu().numpy(), _truncate(centred_RC * roots_R1).cpu().numpy())


def _truncate(values: Tensor) -> Tensor:
    return (values / GRID).trunc() * GRID
