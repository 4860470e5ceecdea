"""A site's units in memory: units x {task: features, labels, label mask}. The type solvers train on.

# Shapes: U units, R records, D features.

A unit may lack some tasks' labels; then that task contributes zero for it. Several records may belong to one unit
(a patient); a record's weight is 1 / (number of that unit's records in the task's source), labelled or not, so that a
missing label changes no divisor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskRecords:
    """One task's records.

    Attributes:
        features_RD: outputs at the freeze boundary; tasks on the same input share the tensor.
        labels: R x the task's label shape.
        mask_R: whether the record has a label for this task.
        unit_R: index of the record's unit in [0, U).
        weight_R: the record's share of its unit.
    """

    features_RD: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    mask_R: Tensor = field(repr=False)
    unit_R: Tensor = field(repr=False)
    weight_R: Tensor = field(repr=False)

    @classmethod
    def of(cls, features_RD: Tensor, labels: Tensor, mask_R: Tensor, unit_R: Tensor, num_units: int) -> TaskRecords:
        """Records with weights derived from their unit's number of records."""
        counts_U = torch.bincount(unit_R, minlength=num_units)
        return cls(features_RD, labels, mask_R, unit_R, 1.0 / counts_U[unit_R].to(features_RD.dtype))

    def labelled(self) -> TaskRecords:
        """Only the records that have a label, with unchanged weights."""
        if bool(self.mask_R.all()):
            return self
        keep = self.mask_R
        return TaskRecords(
            self.features_RD[keep], self.labels[keep], self.mask_R[keep], self.unit_R[keep], self.weight_R[keep]
        )


@dataclass(frozen=True)
class Units:
    """A site's units of one split. The true number of units is private: it never leaves the client room."""

    num_units: int = field(repr=False)
    tasks: Mapping[str, TaskRecords]

    def only(self, names: list[str]) -> Units:
        """The same units with some of the tasks."""
        return Units(self.num_units, {name: self.tasks[name] for name in names})
