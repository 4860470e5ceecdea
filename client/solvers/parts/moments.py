"""The exact sums of the release before the first round (`common.model.moments`), with noise.

Each part is written as what a linear head's gradient would be: features, or the constant 1, times slopes that follow
from the record's label, or are its features. So the sums are those of `closed_form`, exact in integers and clipped
jointly.

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
from common.model.moments import CLASSES, SCATTER, get_subject, is_of_backbone
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
    subject = get_subject(part)
    if is_of_backbone(part):
        records = pool_features([units.tasks[name] for name in tasks if run.backbone_of(name) == subject])
        slopes, width = _return_ones, 1
        if part.endswith(SCATTER):
            # The products of features with each other: a record's slopes are its features.
            records = replace(records, labels=records.features_RD)
            slopes, width = _return_labels, records.features_RD.shape[1]
    else:
        task = tasks[subject]
        assert isinstance(task, LabelPrior)
        records = select_usable_records(units.tasks[subject])
        if part.endswith(CLASSES):
            records = replace(records, features_RD=normalize_rows(records.features_RD))
        else:
            records = replace(records, features_RD=records.features_RD.new_ones((len(records.unit_R), 1)))
        count_labels, width = task.count_labels, task.num_counts

        def slopes(outputs: Tensor, labels: Tensor) -> Tensor:
            return count_labels(labels).to(outputs.dtype)

    head = nn.Linear(records.features_RD.shape[1], width, bias=False, device="meta")
    return Inputs.from_records(head, records, units.num_units, factor), slopes, width


def _return_ones(outputs: Tensor, labels: Tensor) -> Tensor:
    del labels
    return torch.ones_like(outputs)


def _return_labels(outputs: Tensor, labels: Tensor) -> Tensor:
    return labels.to(outputs.dtype)


def pool_features(tasks: list[TaskRecords]) -> TaskRecords:
    """Returns the records of all tasks on a backbone, one tensor of features once, each divided by its length.

    Features of places are those of tasks that are not centred, and are left out.

    A unit's records weigh the same; so do those that cannot be used, which add nothing.
    """
    different = list({id(records.features_RD): records for records in tasks if records.features_RD.dim() == 2}.values())
    unit_R = torch.cat([records.unit_R for records in different])
    features_RD = torch.cat([normalize_rows(records.features_RD) for records in different])
    labels_R, mask_R = torch.zeros_like(unit_R), torch.ones_like(unit_R, dtype=torch.bool)
    num_units = int(unit_R.max()) + 1 if len(unit_R) else 0
    return select_usable_records(TaskRecords.of(features_RD, labels_R, mask_R, unit_R, num_units))
