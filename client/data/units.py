"""A site's units in memory: units x {task: features, labels, label mask}. The type solvers train on.

# Shapes: U units, R records, D features.

A unit may lack some tasks' labels; then that task contributes zero for it. Several records may belong to one unit
(a patient); a record's weight is 1 / (number of that unit's records in the task's source), labelled or not, so that a
missing label changes no divisor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from client.data.quantised import QuantisedRows

_Computed = TypeVar("_Computed")
_ROWS = 256
"""Records that pass a trunk at once outside training."""

_MOST_COMPUTED = 2
"""So much of what is computed from units is kept with them: rounds with other tasks may take turns."""


@dataclass(frozen=True)
class DecodedFeatures:
    """Features as they are kept, beside what they were decoded to.

    Attributes:
        rows: the integers, R x D or R x G x G x D.
        values_RD: the same as float32.
    """

    rows: QuantisedRows = field(repr=False)
    values_RD: Tensor = field(repr=False)

    @classmethod
    def of(cls, rows: QuantisedRows) -> DecodedFeatures:
        """Returns rows with their decoded values."""
        return cls(rows, rows.decode())

    def taken(self, chosen: Tensor) -> DecodedFeatures:
        """Returns some of the rows."""
        return DecodedFeatures(self.rows[chosen], self.values_RD[chosen])

    def to(self, device: torch.device) -> DecodedFeatures:
        """Returns the same rows on a device."""
        return DecodedFeatures(self.rows.to(device), self.values_RD.to(device))


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
        decoded: what the features were decoded from, where it is known. See `rows`.
    """

    features_RD: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    mask_R: Tensor = field(repr=False)
    unit_R: Tensor = field(repr=False)
    weight_R: Tensor = field(repr=False)
    trunk: str | None = None
    decoded: DecodedFeatures | None = field(default=None, repr=False)

    @property
    def rows(self) -> QuantisedRows | None:
        """The features as integers, where they are those of the store; None where others took their place."""
        return self.decoded.rows if self.decoded is not None and self.decoded.values_RD is self.features_RD else None

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
        decoded: DecodedFeatures | None = None,
    ) -> TaskRecords:
        """Returns records with weights derived from their unit's number of records.

        Args:
            features_RD: features of the records, float32 [R, D].
            labels: labels of the records, first dimension R.
            mask_R: bool [R], false where a record has no usable label.
            unit_R: int64 [R], number of each record's unit.
            num_units: number of units on this side, also of those without a record here.
            trunk: name of the trunk that trains on these features, or None.
            decoded: what the features were decoded from, or None.
        """
        counts_U = torch.bincount(unit_R, minlength=num_units)
        weight_R = 1.0 / counts_U[unit_R].to(features_RD.dtype)
        return cls(features_RD, labels, mask_R, unit_R, weight_R, trunk, decoded)

    def labelled(self) -> TaskRecords:
        """Returns a copy of the records that have a label, with unchanged weights.

        Also where all have one: else a single missing label would show in the time.
        """
        return self.taken(self.mask_R.nonzero().squeeze(1), self.unit_R)

    def taken(self, rows: Tensor, unit_R: Tensor) -> TaskRecords:
        """Some of the records, each with another index of its unit."""
        decoded = None if self.rows is None or self.decoded is None else self.decoded.taken(rows)
        return replace(
            self,
            features_RD=self.features_RD[rows] if decoded is None else decoded.values_RD,
            labels=self.labels[rows],
            mask_R=self.mask_R[rows],
            unit_R=unit_R[rows],
            weight_R=self.weight_R[rows],
            decoded=decoded,
        )


@dataclass(frozen=True)
class Units:
    """A site's units of one split. The true number of units is private: it never leaves the client room."""

    num_units: int = field(repr=False)
    tasks: Mapping[str, TaskRecords]
    _computed: dict[object, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    @contextmanager
    def borrow(self, key: object, make: Callable[[], _Computed]) -> Iterator[_Computed]:
        """Yields what is computed from these units alone: made once, kept with them, and had by one thread at a time.

        Only what was had last is kept: who sends other heads each round cannot fill the memory.

        Args:
            key: everything else that it follows from; what another thread has is made anew.
            make: makes it.
        """
        kept = self._computed.pop(key, None)  # In one step: another thread may ask at the same time.
        (computed,) = (make(),) if kept is None else kept
        yield computed
        self._computed[key] = (computed,)
        for old in list(self._computed)[:-_MOST_COMPUTED]:
            self._computed.pop(old, None)

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


def list_versions(units: Units) -> list[int]:
    """Returns torch's numbers of changes in place of all of the units' values."""
    return [
        tensor._version
        for each in units.tasks.values()
        for tensor in (each.features_RD, each.labels, each.mask_R, each.unit_R, each.weight_R, *_list_stored(each))
    ]


def _list_stored(records: TaskRecords) -> tuple[Tensor, ...]:
    return () if records.decoded is None else (records.decoded.rows.integers, records.decoded.rows.scale)


def _some(features_RD: Tensor) -> Tensor:
    """Returns the rows, or one row of zeros if there is none: many networks fail on an empty batch."""
    return features_RD if len(features_RD) else features_RD.new_zeros((1, *features_RD.shape[1:]))
