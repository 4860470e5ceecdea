"""What every gradient solver minimises, in one place: the sum over units of their tasks' weighted losses.

For one unit: sum over tasks t of scale_t * sum over its labelled records r of weight_r * loss_t(r), where the weight is
1 / (the unit's records in the task's source). A missing label contributes zero and changes no divisor. A step's sum is
divided, per task, by the constant sampling_rate * public_size_t.

A batch is a `Units` whose records count their units from 0 within the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from client.units import TaskRecords, Units
from common.heads import parameters
from common.privacy.noise import NoiseStream
from common.tasks import Task
from common.types import Delta, Heads, Plan, RunFailed


def usable(units: Units) -> Units:
    """The same units without the records that have no label or features that are not finite; weights unchanged.

    Leaving such a record out depends on it alone, so it changes no other unit's part.
    """
    return Units(units.num_units, {name: _usable_records(records) for name, records in units.tasks.items()})


def _usable_records(records: TaskRecords) -> TaskRecords:
    labelled = records.labelled()
    rows_RD = labelled.features_RD.flatten(1)
    # A finite norm says the same of every value, 25 times faster; it may also overflow, so the others are looked at.
    finite_R = torch.isfinite(torch.linalg.vector_norm(rows_RD, dim=1))
    if bool(finite_R.all()):
        return labelled
    finite_R[~finite_R] = torch.isfinite(rows_RD[~finite_R]).all(dim=1)
    return taken(labelled, finite_R.nonzero().squeeze(1), labelled.unit_R)


def participants(units: Units, plan: Plan, stream: NoiseStream) -> Tensor:
    """Indices of the units in one step's Poisson sample: one coin for each unit, whatever tasks it has."""
    if plan.sampling_rate >= 1.0:
        return torch.arange(units.num_units)
    coins_U = torch.from_numpy(stream.coins(units.num_units, plan.sampling_rate))
    return coins_U.nonzero().squeeze(1)


def batch_of(units: Units, members: Tensor) -> Units:
    """The records of some units, sorted by index, which become units 0, 1, ... of the batch."""
    if len(members) == units.num_units:
        return units
    position_U = torch.full((units.num_units,), -1, dtype=torch.long)
    position_U[members] = torch.arange(len(members))
    return Units(
        len(members),
        {name: _records_of(records, position_U.to(records.unit_R.device)) for name, records in units.tasks.items()},
    )


def _records_of(records: TaskRecords, position_U: Tensor) -> TaskRecords:
    position_R = position_U[records.unit_R]
    return taken(records, (position_R >= 0).nonzero().squeeze(1), position_R)


def taken(records: TaskRecords, rows: Tensor, unit_R: Tensor) -> TaskRecords:
    """Some of the records, each with another index of its unit."""
    return TaskRecords(
        records.features_RD[rows], records.labels[rows], records.mask_R[rows], unit_R[rows], records.weight_R[rows]
    )


def loss_sum(heads: Mapping[str, nn.Module], tasks: Mapping[str, Task], batch: Units) -> Tensor | None:
    """The objective of a batch of usable units; None when no task has a record in it."""
    terms = [
        tasks[name].scale
        * (records.weight_R * tasks[name].losses(heads[name](records.features_RD), records.labels)).sum()
        for name, records in sorted(batch.tasks.items())
        if len(records.unit_R)
    ]
    return torch.stack(terms).sum() if terms else None


def expected_units(plan: Plan, public_sizes: Mapping[str, int]) -> dict[str, float]:
    """Task -> the constant divisor of a step's sum. From declared sizes only: the true ones are private."""
    return {name: plan.sampling_rate * size for name, size in public_sizes.items()}


def trainable_copies(heads: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies in training mode, in the order of task names: that order fixes which noise goes where."""
    return {name: copy.deepcopy(heads[name]).train() for name in sorted(heads)}


def difference(new: Mapping[str, nn.Module], old: Mapping[str, nn.Module]) -> Delta:
    """New heads minus old ones. Raises RunFailed as `checked` does."""
    heads = {}
    for name, head in new.items():
        before = parameters(old[name])
        heads[name] = {key: value - before[key] for key, value in parameters(head).items()}
    return checked(heads)


def checked(heads: Heads) -> Delta:
    """Changes of heads as a contribution.

    Raises:
        RunFailed: a value is not finite: the learning rate is too large for the loss.
    """
    for name, values in heads.items():
        if not all(bool((abs(value) < float("inf")).all()) for value in values.values()):
            raise RunFailed(f"{name}: training diverged; a smaller learning_rate is needed")
    return Delta(heads)
