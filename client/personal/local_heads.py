"""Heads that one party trains alone, with which the federation's are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from client.data.units import Units
from client.solvers import Solver
from common.model.parameters import load_parameters, parameters
from common.privacy.noise import Entropy, NoiseStream
from common.process.threads import one_thread
from common.tasks import Task
from common.types import Heads, Params, Plan

ApplyUpdate = Callable[[str, Params, Params], Params]
"""(parameter group, its parameters, their change in a round) -> new parameters."""


@dataclass(frozen=True)
class LocalTraining:
    """The training of one party alone.

    Attributes:
        solver: the solver of every round.
        plan: plan of one round.
        rounds: number of rounds, as in the federation.
        tasks: the party's tasks.
        units: the party's training units.
        public_sizes: parameter group -> declared number of units, as in the federation.
    """

    solver: Solver
    plan: Plan
    rounds: int
    tasks: Mapping[str, Task]
    units: Units
    public_sizes: Mapping[str, int]


def add_update(group: str, params: Params, change: Params) -> Params:
    """Returns the parameters of a group plus their change.

    Args:
        group: name of the parameter group; not used.
        params: the group's parameters.
        change: their change in a round.
    """
    del group
    return {name: np.asarray(value + change[name], dtype=np.float32) for name, value in params.items()}


def train_alone(
    training: LocalTraining,
    modules: Mapping[str, nn.Module],
    *,
    entropy: Entropy,
    purpose: str,
    apply_update: ApplyUpdate = add_update,
) -> Heads:
    """Returns the parameters after all rounds of one party alone, which takes as many as the federation.

    Args:
        training: the solver, its plan and the party's data.
        modules: parameter group -> head or trunk before the first round, as in the federation; overwritten.
        entropy: source of the keys of coins and noise.
        purpose: distinguishes this party's keys from those of others.
        apply_update: computes new parameters from a round's change.
    """
    heads: dict[str, Params] = {name: parameters(module) for name, module in modules.items()}
    for round_ in range(1, training.rounds + 1):
        for name, params in heads.items():
            load_parameters(modules[name], params)
        stream = NoiseStream(entropy(f"{purpose}/{round_}"))
        with one_thread():
            update = training.solver.solve(
                modules,
                training.tasks,
                training.units,
                plan=training.plan,
                public_sizes=training.public_sizes,
                stream=stream,
            )
        heads = {name: apply_update(name, params, update.heads[name]) for name, params in heads.items()}
    return heads
