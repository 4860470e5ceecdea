"""The exact sums of the release before the first round (`common.model.moments`), with noise.

Each part is written as what a linear head's gradient would be: features, or the constant 1, times slopes that follow
from the label alone. So the sums are those of `closed_form`, exact in integers and clipped jointly.

# Shapes: R records, U units, D features, C counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from client.data.units import TaskRecords, Units
from client.solvers.parts.closed_form import Inputs, OutputGradient, add_clipped_parts, choose_total_type, split_blocks
from client.solvers.parts.objective import select_usable_records
from common.model.moments import get_backbone, is_mean
from common.privacy.lattice import Lattice, check_unit_count
from common.privacy.noise import NoiseStream
from common.run import RunConfig
from common.tasks import LabelPrior, Task
from common.tasks.parts.adjusted import normalize_rows
from common.types import Params, Plan


def release_moments(
    parts: Mapping[str, float],
    run: RunConfig,
    tasks: Mapping[str, Task],
    units: Units,
    *,
    plan: Plan,
    stream: NoiseStream,
) -> dict[str, Params]:
    """Returns part -> "sum" -> the sum of the parts of all units with noise, divided by the part's factor.

    Args:
        parts: name of each sum that is released -> its factor.
        run: the run.
        tasks: the site's tasks of the run.
        units: its training units.
        plan: the release; its clip norm is the length of all factors together.
        stream: source of the noise.
    """
    check_unit_count(units.num_units)
    inputs, slopes, widths = {}, {}, {}
    for part, factor in sorted(parts.items()):
        inputs[part], slopes[part], widths[part] = _describe(part, factor, run, tasks, units)
    sizes = {part: (widths[part], inputs[part].rows.integers.shape[-1]) for part in inputs}
    zeros = {
        part: [torch.zeros(shape, dtype=torch.double, device=inputs[part].unit_R.device)]
        for part, shape in sizes.items()
    }
    # Without privacy the lattice is that of very little noise, and none is added.
    lattice = Lattice.of(plan.clip_norm or 1.0, plan.noise_multiplier or 1.0)
    kind = choose_total_type(inputs, units.num_units)
    totals = {part: [torch.zeros_like(each[0], dtype=kind)] for part, each in zeros.items()}
    with torch.no_grad():
        for block in split_blocks(inputs, units.num_units, widths):
            add_clipped_parts(block, zeros, slopes, lattice, totals)
    whole = torch.cat([totals[part][0].flatten() for part in inputs])
    if plan.private:
        released = lattice.release(whole, stream.rounded_gaussian(len(whole), lattice.log2_deviation), stream)
    else:
        released = whole.double() * lattice.spacing
    split = torch.split(released, [rows * columns for rows, columns in sizes.values()])
    return {
        part: {"sum": (values / parts[part]).cpu().numpy().astype("float32")}
        for part, values in zip(inputs, split, strict=True)
    }


def _describe(
    part: str, factor: float, run: RunConfig, tasks: Mapping[str, Task], units: Units
) -> tuple[Inputs, OutputGradient, int]:
    """Returns a part's inputs, its slopes, and their number."""
    if is_mean(part):
        records = _pool_features([units.tasks[name] for name in tasks if run.backbone_of(name) == get_backbone(part)])
        head = nn.Linear(records.features_RD.shape[1], 1, bias=False, device="meta")
        return Inputs.from_records(head, records, units.num_units, factor), _return_ones, 1
    task = tasks[part]
    assert isinstance(task, LabelPrior)
    labelled = select_usable_records(units.tasks[part])
    ones = replace(labelled, features_RD=labelled.features_RD.new_ones((len(labelled.unit_R), 1)))
    head = nn.Linear(1, task.num_counts, bias=False, device="meta")
    count_labels = task.count_labels
    return (
        Inputs.from_records(head, ones, units.num_units, factor),
        lambda outputs, labels: count_labels(labels).to(outputs.dtype),
        task.num_counts,
    )


def _return_ones(outputs: Tensor, labels: Tensor) -> Tensor:
    del labels
    return torch.ones_like(outputs)


def _pool_features(tasks: list[TaskRecords]) -> TaskRecords:
    """Returns the records of all tasks on a backbone, one tensor of features once, each divided by its length.

    A unit's records weigh the same; so do those that cannot be used, which add nothing.
    """
    different = list({id(records.features_RD): records for records in tasks}.values())
    unit_R = torch.cat([records.unit_R for records in different])
    features_RD = torch.cat([normalize_rows(records.features_RD) for records in different])
    labels_R, mask_R = torch.zeros_like(unit_R), torch.ones_like(unit_R, dtype=torch.bool)
    num_units = int(unit_R.max()) + 1 if len(unit_R) else 0
    return select_usable_records(TaskRecords.of(features_RD, labels_R, mask_R, unit_R, num_units))
