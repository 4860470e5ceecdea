"""What every gradient solver minimises, in one place: the sum over units of their tasks' weighted losses.

For one unit: sum over tasks t of scale_t * sum over its labelled records r of weight_r * loss_t(r), where the weight is
1 / (the unit's records in the task's source). A missing label contributes zero and changes no divisor. A step's sum is
divided, per task, by the constant sampling_rate * public_size_t.

Where a part of a backbone trains, records end at the freeze boundary: the loss is that of head(trunk(record)), and the
trunk is one more entry of the heads, with a public size of its own.

A batch is a `Units` whose records count their units from 0 within the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from client.data.units import TaskRecords, Units
from common.model.parameters import parameters
from common.plugins import Frozen
from common.privacy.noise import NoiseStream
from common.tasks import Task
from common.types import Delta, Heads, Plan, RunFailed


class Rates(Frozen):
    """Step size and decay of one group of parameters."""

    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


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
    return labelled.taken(finite_R.nonzero().squeeze(1), labelled.unit_R)


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
    return records.taken((position_R >= 0).nonzero().squeeze(1), position_R)


def features_of(heads: Mapping[str, nn.Module], batch: Units) -> dict[str, Tensor]:
    """What each task's head reads: its records' features, passed through the trunk that some still have to pass.

    A trunk reads the records of all its tasks in one call: in one call, and only then, are its per-record gradients
    those of single records (see `unit_of`).
    """
    features = {name: records.features_RD for name, records in batch.tasks.items() if records.trunk is None}
    for trunk in sorted({records.trunk for records in batch.tasks.values() if records.trunk is not None}):
        names = _through(trunk, batch)
        counts = [len(batch.tasks[name].unit_R) for name in names]
        if sum(counts):
            passed_RD = heads[trunk](torch.cat([batch.tasks[name].features_RD for name in names]))
            features |= dict(zip(names, torch.split(passed_RD, counts), strict=True))
    return features


def unit_of(entry: str, batch: Units) -> Tensor:
    """The units of the rows that a head or a trunk reads in `features_of`, in their order."""
    if entry in batch.tasks:
        return batch.tasks[entry].unit_R
    return torch.cat([batch.tasks[name].unit_R for name in _through(entry, batch)])


def _through(trunk: str, batch: Units) -> list[str]:
    return sorted(name for name, records in batch.tasks.items() if records.trunk == trunk)


def loss_sum(heads: Mapping[str, nn.Module], tasks: Mapping[str, Task], batch: Units) -> Tensor | None:
    """The objective of a batch of usable units; None when no task has a record in it."""
    features = features_of(heads, batch)
    terms = [
        tasks[name].scale * (records.weight_R * tasks[name].losses(heads[name](features[name]), records.labels)).sum()
        for name, records in sorted(batch.tasks.items())
        if len(records.unit_R)
    ]
    return torch.stack(terms).sum() if terms else None


def expected_units(plan: Plan, public_sizes: Mapping[str, int]) -> dict[str, float]:
    """Task -> the constant divisor of a step's sum. From declared sizes only: the true ones are private."""
    return {name: plan.sampling_rate * size for name, size in public_sizes.items()}


def groups(
    heads: Mapping[str, nn.Module],
    tasks: Mapping[str, Task],
    rates: Rates,
    own_rates: Mapping[str, Rates],
    trunk: Rates | None,
) -> list[dict[str, Any]]:
    """What trains, with its rates, as torch's optimizers take it: one group for each entry, in the entries' order.

    Args:
        heads: entry -> module, trunks among them.
        tasks: an entry that is none of them is a trunk.
        rates: of the heads.
        own_rates: of the heads of some tasks instead.
        trunk: of the trunks; None: the heads'.
    """
    return [
        {
            "params": [parameter for parameter in head.parameters() if parameter.requires_grad],
            "lr": own.learning_rate,
            "weight_decay": own.weight_decay,
        }
        for name, head in heads.items()
        for own in [own_rates.get(name, rates) if name in tasks or trunk is None else trunk]
    ]


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
