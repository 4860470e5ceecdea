"""The objective of every gradient solver, in one place: the sum over units of their tasks' weighted losses.

For one unit: sum over tasks t of scale_t * sum over its labelled records r of weight_r * loss_t(r), where the weight is
1 / (the unit's records in the task's source). A missing label contributes zero and changes no divisor. A step's sum is
divided, per task, by the constant sampling_rate * public_size_t.

A head or a trunk is a parameter group, by its name. Where a part of a backbone trains, records end at the freeze
boundary and the loss is that of head(trunk(record)); a trunk has a public size of its own.

A batch is a `Units` whose records count their units from 0 within the batch.

# Shapes: R records, U units, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from client.data.units import TaskRecords, Units
from common.backbones.parts.boundary import count_depths
from common.model.parameters import parameters
from common.privacy.noise import NoiseStream
from common.run import Rates, TrunkRates
from common.tasks import Task, force_outputs
from common.types import BadInput, Delta, Heads, Plan, RunFailed, select_trained

# --- units and batches -----------------------------------------------------------------------------------------------


def select_usable(units: Units) -> Units:
    """Returns the same units with the usable records of each task (`select_usable_records`)."""
    return Units(units.num_units, {name: select_usable_records(records) for name, records in units.tasks.items()})


def select_usable_records(records: TaskRecords) -> TaskRecords:
    """Returns a copy of the records that have a label and features of finite norm, by unit; weights unchanged.

    Leaving such a record out depends on it alone, so it changes no other unit's part. All are copied and sorted, also
    where all are usable and sorted already: else one record could show in the time.
    """
    # Of float32: longer than 2**64 is as good as infinite.
    finite_R = torch.isfinite(torch.linalg.vector_norm(records.features_RD.flatten(1), dim=1))
    usable_R = (records.mask_R & finite_R).nonzero().squeeze(1)
    return records.taken(usable_R[torch.argsort(records.unit_R[usable_R], stable=True)], records.unit_R)


def draw_participants(units: Units, plan: Plan, stream: NoiseStream) -> Tensor:
    """Returns the sorted indices of the units in one step's Poisson sample.

    One coin is drawn for each unit, whatever tasks it has; none in full batch.

    Args:
        units: units of the site.
        plan: plan whose sampling rate is used.
        stream: source of the coins.
    """
    if plan.sampling_rate >= 1.0:
        return torch.arange(units.num_units)
    coins_U = torch.from_numpy(stream.coins(units.num_units, plan.sampling_rate))
    return coins_U.nonzero().squeeze(1)


def select_batch(units: Units, members: Tensor) -> Units:
    """Returns the records of some units, given by their sorted indices; they become units 0, 1, ... of the batch."""
    if len(members) == units.num_units:
        return units
    position_U = torch.full((units.num_units,), -1, dtype=torch.long)
    position_U[members] = torch.arange(len(members))
    return Units(
        len(members),
        {name: _select_records(records, position_U.to(records.unit_R.device)) for name, records in units.tasks.items()},
    )


def _select_records(records: TaskRecords, position_U: Tensor) -> TaskRecords:
    position_R = position_U[records.unit_R]
    return records.taken((position_R >= 0).nonzero().squeeze(1), position_R)


# --- losses ----------------------------------------------------------------------------------------------------------


def sum_losses(modules: Mapping[str, nn.Module], tasks: Mapping[str, Task], batch: Units) -> Tensor | None:
    """Returns the objective of a batch of usable units; None when no task has a record in it.

    Args:
        modules: parameter group -> head or trunk.
        tasks: task -> its definition.
        batch: usable units.
    """
    features = compute_features(modules, batch)
    terms = [
        tasks[name].scale
        * (records.weight_R * compute_losses(modules[name], tasks[name], features[name], records)).sum()
        for name, records in sorted(batch.tasks.items())
        if len(records.unit_R)
    ]
    return torch.stack(terms).sum() if terms else None


def compute_losses(head: nn.Module, task: Task, features_RD: Tensor, records: TaskRecords) -> Tensor:
    """Returns the loss of each record.

    Args:
        head: the task's head.
        task: the task.
        features_RD: what the head reads of the records.
        records: the records.
    """
    return task.losses(force_outputs(task, head, features_RD, records.labels), records.labels)


def compute_features(modules: Mapping[str, nn.Module], batch: Units) -> dict[str, Tensor]:
    """Returns what each task's head reads: its records' features, passed through their trunk where they have one.

    A trunk reads the records of all its tasks in one call: in one call, and only then, are its per-record gradients
    those of single records (see `get_unit_indices`).
    """
    features = {name: records.features_RD for name, records in batch.tasks.items() if records.trunk is None}
    for trunk in sorted({records.trunk for records in batch.tasks.values() if records.trunk is not None}):
        names = _list_tasks_of(trunk, batch)
        counts = [len(batch.tasks[name].unit_R) for name in names]
        if sum(counts):
            passed_RD = modules[trunk](torch.cat([batch.tasks[name].features_RD for name in names]))
            features |= dict(zip(names, torch.split(passed_RD, counts), strict=True))
    return features


def get_unit_indices(group: str, batch: Units) -> Tensor:
    """Returns unit_R of the rows that a parameter group reads in `compute_features`, in their order."""
    if group in batch.tasks:
        return batch.tasks[group].unit_R
    return torch.cat([batch.tasks[name].unit_R for name in _list_tasks_of(group, batch)])


def _list_tasks_of(trunk: str, batch: Units) -> list[str]:
    return sorted(name for name, records in batch.tasks.items() if records.trunk == trunk)


# --- steps and updates -----------------------------------------------------------------------------------------------


def compute_divisors(plan: Plan, public_sizes: Mapping[str, int]) -> dict[str, float]:
    """Returns for each parameter group the constant divisor of a step's sum, its expected number of units.

    It follows from declared sizes only: the true ones are private.
    """
    return {name: plan.sampling_rate * size for name, size in public_sizes.items()}


def make_optimizer_groups(
    modules: Mapping[str, nn.Module],
    tasks: Mapping[str, Task],
    rates: Rates,
    task_rates: Mapping[str, Rates],
    trunk_rates: TrunkRates | None,
) -> list[dict[str, Any]]:
    """Returns the parameter groups with their rates as torch's optimizers take them, in the modules' order.

    A trunk with rates of its own for each block is as many groups as it has parameters.

    Args:
        modules: parameter group -> head or trunk.
        tasks: the tasks that have heads; every other parameter group is a trunk.
        rates: rates of all heads that have no rates of their own.
        task_rates: task -> rates of its head.
        trunk_rates: rates of all trunks; None for those of the heads.
    """
    groups = []
    for name, module in modules.items():
        of_trunk = None if name in tasks else trunk_rates
        own = of_trunk or task_rates.get(name, rates)
        trained = {key: parameter for key, parameter in module.named_parameters() if parameter.requires_grad}
        parts = [(list(trained.values()), own.learning_rate)]
        if of_trunk is not None and of_trunk.layer_decay < 1.0:
            depths = count_depths(module)
            parts = [([each], own.learning_rate * of_trunk.layer_decay ** depths[key]) for key, each in trained.items()]
        groups += [{"params": each, "lr": rate, "weight_decay": own.weight_decay} for each, rate in parts]
    return groups


def check_layers(modules: Mapping[str, nn.Module], trunk_rates: TrunkRates | None) -> None:
    """Raises BadInput where rates differ from block to block and a trunk has only one.

    Args:
        modules: parameter group -> head or trunk.
        trunk_rates: rates of all trunks; None for those of the heads.
    """
    if trunk_rates is None or trunk_rates.layer_decay == 1.0:
        return
    for name, module in modules.items():
        if "." in name and not any(count_depths(module).values()):
            raise BadInput(
                f"solver.trunk.layer_decay: expected a trunk in which several blocks train, got {name} with one; leave "
                "it out"
            )


def copy_trainable(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns copies in training mode, sorted by name: this order fixes which noise goes to which parameter."""
    return {name: copy.deepcopy(modules[name]).train() for name in sorted(modules)}


def compute_update(new: Mapping[str, nn.Module], old: Mapping[str, nn.Module]) -> Delta:
    """Returns the new modules' parameters minus the old ones'; raises RunFailed as `check_update` does."""
    changes = {}
    for name, module in new.items():
        before = parameters(old[name])
        changes[name] = {key: value - before[key] for key, value in select_trained(parameters(module)).items()}
    return check_update(changes)


def check_update(changes: Heads) -> Delta:
    """Returns changes of parameters as an update.

    Raises:
        RunFailed: a value is not finite: the learning rate is too large for the loss.
    """
    for name, values in changes.items():
        if not all(bool((abs(value) < float("inf")).all()) for value in values.values()):
            raise RunFailed(f"{name}: training diverged; a smaller learning_rate is needed")
    return Delta(changes)
