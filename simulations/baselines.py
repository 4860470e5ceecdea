"""What the federated private result is compared with. Simulation only: each needs what no deployed party may see.

| baseline | data | privacy | training |
|---|---|---|---|
| baseline_prediction | all records in one place | none | none: majority, distance to the mean normal record, features |
| local | each site's own | the run's | the run's solver and rounds, at one site alone |
| non_private | federated | none | `non_private_solver`, same rounds |
| central | all sites' records in one place | none | `non_private_solver`, same rounds |
| random_backbone | federated | the run's | the same run on the same architecture with random weights |
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from client.data.units import TaskRecords, Units
from client.personal.local_heads import ApplyUpdate
from common.run import RunConfig
from common.tasks import Task
from common.types import Params
from server.rounds.aggregators import State, Weighted, open_aggregator


def aggregated_alone(run: RunConfig) -> ApplyUpdate:
    """The run's own aggregation, of one contribution: what makes a head trained alone comparable."""
    aggregator = open_aggregator(run.aggregation, "aggregation")
    states: dict[str, State] = {}

    def update(task: str, params: Params, change: Params) -> Params:
        state = states[task] if task in states else aggregator.start(params)
        new, states[task] = aggregator.update(params, state, [Weighted(1.0, change)])
        return new

    return update


def pool(units: Mapping[str, Units], tasks: Mapping[str, Task]) -> Units:
    """All sites' units in one place. Records of different sites are different units."""
    num_units = sum(own.num_units for own in units.values())
    pooled = {}
    for name in tasks:
        parts, offset = [], 0
        for own in units.values():
            if name in own.tasks:
                parts.append((own.tasks[name], offset))
            offset += own.num_units
        pooled[name] = TaskRecords(
            torch.cat([part.features_RD for part, _ in parts]),
            torch.cat([part.labels for part, _ in parts]),
            torch.cat([part.mask_R for part, _ in parts]),
            torch.cat([part.unit_R + start for part, start in parts]),
            torch.cat([part.weight_R for part, _ in parts]),
            parts[0][0].trunk,
        )
    return Units(num_units, pooled)
