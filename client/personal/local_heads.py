"""Heads that one party trains alone: what a federation is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import nn

from client.data.units import Units
from client.solvers import Solver
from common.model.parameters import load_parameters, parameters
from common.privacy.noise import Entropy, NoiseStream
from common.process.threads import one_thread
from common.run import Privacy, RunConfig
from common.tasks import Task
from common.types import Heads, Params, Unit

Update = Callable[[str, Params, Params], Params]
"""Task, head, what the round changed -> new head."""


def added(task: str, params: Params, change: Params) -> Params:
    """Head plus change."""
    del task
    return {name: np.asarray(value + change[name], dtype=np.float32) for name, value in params.items()}


def train_alone(
    run: RunConfig,
    modules: Mapping[str, nn.Module],
    solver: Solver,
    privacy: Privacy | None,
    tasks: Mapping[str, Task],
    units: Units,
    public_sizes: Mapping[str, int],
    unit: Unit,
    entropy: Entropy,
    purpose: str,
    update: Update = added,
) -> Heads:
    """Heads trained by one party alone, in as many rounds as the federation takes and from the same initial heads.

    Args:
        run: for the number of rounds.
        modules: the party's entries of the heads before the first round; they are overwritten.
        solver: how to train.
        privacy: requested privacy; None without.
        tasks: the party's tasks.
        units: its training units.
        public_sizes: declared sizes of the tasks, as in the federation.
        unit: what the party's budget protects.
        entropy: where noise keys come from.
        purpose: distinguishes this party's noise.
        update: what a round's change makes of a head.
    """
    heads: dict[str, Params] = {name: parameters(module) for name, module in modules.items()}
    plan = solver.plan(privacy, unit, run.rounds)
    for round_ in range(1, run.rounds + 1):
        for name, params in heads.items():
            load_parameters(modules[name], params)
        stream = NoiseStream(entropy(f"{purpose}/{round_}"))
        with one_thread():
            delta = solver.solve(
                modules, tasks, units, plan=plan, public_sizes=run.parameter_group_sizes(public_sizes), stream=stream
            )
        heads = {name: update(name, params, delta.heads[name]) for name, params in heads.items()}
    return heads
