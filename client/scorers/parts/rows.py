"""The rows that a scorer reads, from a site's records.

# Shapes: R records, D features, C targets.
"""

from __future__ import annotations

from torch import Tensor

from client.data.units import TaskRecords
from client.scorers import GRID, ScoredRows
from client.solvers.parts.objective import select_usable_records
from common.tasks import LabelPrior
from common.tasks.parts.adjusted import normalize_rows

_SHRINK = 1.0 - 2.0**-20
"""More than what float32 weights and the rounding of lengths add to a unit's norm."""


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
