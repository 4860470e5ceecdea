"""The state of a run before its first round: new heads and trunks, which only torch can draw.

A deployed run's process never loads torch: its state is made before it starts (`server.deployment.preparation`).
"""

from __future__ import annotations

from collections.abc import Mapping

from common.model.backbones import Backbone
from common.model.parameters import parameters
from common.model.trunks import create_modules
from common.run import RunConfig
from common.tasks import open_tasks
from common.types import select_trained
from server.rounds.aggregators import State, open_aggregator
from server.rounds.checkpoint import Checkpoint


def create_initial_state(run: RunConfig, run_id: str, backbones: Mapping[str, Backbone]) -> Checkpoint:
    """Returns the state before the first round, reproducible from the run's seed.

    Args:
        run: the run.
        run_id: the run's unique id.
        backbones: the run's open backbones by name.

    Raises:
        BadInput: a task, what trains of a backbone, or the aggregation cannot be opened.
    """
    tasks = open_tasks(run)
    heads = {name: parameters(module) for name, module in create_modules(run, tasks, backbones).items()}
    states: dict[str, State] = {
        name: open_aggregator(run.aggregation_of(name), "aggregation").start(select_trained(params))
        for name, params in heads.items()
    }
    return Checkpoint(run_id, 0, heads, states, dict.fromkeys(heads, 0))
