"""What the federated private result is compared with. Simulation only: each needs what no deployed party may see.

| baseline | data | privacy | training |
|---|---|---|---|
| local | each site's own | the run's | the run's solver and rounds, at one site alone |
| non_private | federated | none | `non_private_solver`, same rounds |
| central | all sites' records in one place | none | `non_private_solver`, same rounds |
| random_backbone | federated | the run's | the same run on the same architecture with random weights |
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from client.solvers import Solver, one_thread
from client.units import TaskRecords, Units
from common.config import Privacy, RunConfig
from common.heads import initial_heads, load_parameters, parameters
from common.privacy.noise import Entropy, NoiseStream
from common.tasks import Task
from common.types import Heads, Params, Unit
from server.aggregators import Weighted, open_aggregator


def train_alone(
    run: RunConfig,
    solver: Solver,
    privacy: Privacy | None,
    tasks: Mapping[str, Task],
    units: Units,
    public_sizes: Mapping[str, int],
    unit: Unit,
    entropy: Entropy,
    purpose: str,
) -> Heads:
    """Heads trained by one party alone, in as many rounds as the federation takes.

    Args:
        run: for rounds, seed and aggregation (of one contribution).
        solver: how to train.
        privacy: requested privacy; None without.
        tasks: the party's tasks.
        units: its training units.
        public_sizes: declared sizes, as in the federation.
        unit: what the party's budget protects.
        entropy: where noise keys come from.
        purpose: distinguishes this party's noise.
    """
    dims = {name: units.tasks[name].features_RD.shape[1] for name in tasks}
    modules = initial_heads(tasks, dims, run.seed)
    heads: dict[str, Params] = {name: parameters(module) for name, module in modules.items()}
    aggregator = open_aggregator(run.aggregation, "aggregation")
    states = {name: aggregator.start(params) for name, params in heads.items()}
    plan = solver.plan(privacy, unit, run.rounds)
    for round_ in range(1, run.rounds + 1):
        for name, params in heads.items():
            load_parameters(modules[name], params)
        stream = NoiseStream(entropy(f"{purpose}/{round_}"))
        with one_thread():
            delta = solver.solve(modules, tasks, units, plan=plan, public_sizes=public_sizes, stream=stream)
        for name, change in delta.heads.items():
            heads[name], states[name] = aggregator.update(heads[name], states[name], [Weighted(1.0, change)])
    return heads


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
        )
    return Units(num_units, pooled)
