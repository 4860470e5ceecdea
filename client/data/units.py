"""A site's units in memory: units x {task: features, labels, label mask}. The type solvers train on.

# Shapes: U units, R records, D features.

A unit may lack some tasks' labels; then that task contributes zero for it. Several records may belong to one unit
(a patient); a record's weight is 1 / (number of that unit's records in the task's source), labelled or not, so that a
missing label changes no divisor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

_ROWS = 256
"""Records that pass a trunk at once outside training."""


@dataclass(frozen=True)
class TaskRecords:
    """One task's records.

    Attributes:
        features_RD: outputs at the freeze boundary; tasks on the same input share the tensor.
        labels: R x the task's label shape.
        mask_R: whether the record has a label for this task.
        unit_R: index of the record's unit in [0, U).
        weight_R: the record's share of its unit.
        trunk: entry of the heads that the features still have to pass before the task's own head, the part of a
            backbone that trains; None where they are what the head reads.
    """

    features_RD: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    mask_R: Tensor = field(repr=False)
    unit_R: Tensor = field(repr=False)
    weight_R: Tensor = field(repr=False)
    trunk: str | None = None

    @classmethod
    def of(
        cls,
        features_RD: Tensor,
        labels: Tensor,
        mask_R: Tensor,
        unit_R: Tensor,
        num_units: int,
        *,
        trunk: str | None = None,
    ) -> TaskRecords:
        """Returns records with weights derived from their unit's number of records.

        Args:
            features_RD: features of the records, float32 [R, D].
            labels: labels of the records, first dimension R.
            mask_R: bool [R], false where a record has no usable label.
            unit_R: int64 [R], number of each record's unit.
            num_units: number of units on this side, also of those without a record here.
            trunk: name of the trunk that trains on these features, or None.
        """
        counts_U = torch.bincount(unit_R, minlength=num_units)
        return cls(features_RD, labels, mask_R, unit_R, 1.0 / counts_U[unit_R].to(features_RD.dtype), trunk)

    def labelled(self) -> TaskRecords:
        """Returns a copy of the records that have a label, with unchanged weights.

        Also where all have one: else a single missing label would show in the time.
        """
        return self.taken(self.mask_R.nonzero().squeeze(1), self.unit_R)

    def taken(self, rows: Tensor, unit_R: Tensor) -> TaskRecords:
        """Some of the records, each with another index of its unit."""
        return replace(
            self,
            features_RD=self.features_RD[rows],
            labels=self.labels[rows],
            mask_R=self.mask_R[rows],
            unit_R=unit_R[rows],
            weight_R=self.weight_R[rows],
        )


@dataclass(frozen=True)
class Units:
    """A site's units of one split. The true number of units is private: it never leaves the client room."""

    num_units: int = field(repr=False)
    tasks: Mapping[str, TaskRecords]

    def only(self, names: list[str]) -> Units:
        """The same units with some of the tasks."""
        return Units(self.num_units, {name: self.tasks[name] for name in names})

    def passed(self, heads: Mapping[str, nn.Module]) -> Units:
        """The same units with the features that the tasks' own heads read; each trunk runs once for each input.

        Args:
            heads: the trunks among them.
        """
        done: dict[tuple[str, int], Tensor] = {}
        tasks = {}
        for name, records in self.tasks.items():
            if records.trunk is None:
                tasks[name] = records
                continue
            key = (records.trunk, id(records.features_RD))
            if key not in done:
                with torch.no_grad():
                    parts = [heads[records.trunk](part) for part in torch.split(_some(records.features_RD), _ROWS)]
                done[key] = torch.cat(parts)[: len(records.features_RD)]
            tasks[name] = replace(records, features_RD=done[key], trunk=None)
        return replace(self, tasks=tasks)


def _some(features_RD: Tensor) -> Tensor:
    """Returns the rows, or one row of zeros if there is none: many networks fail on an empty batch."""
    return features_RD if len(features_RD) else features_RD.new_zeros((1, *features_RD.shape[1:]))
