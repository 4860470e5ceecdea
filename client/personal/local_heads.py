"""Heads that one party trains alone, with which the federation's are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from client.data.units import Units
from client.solvers import Solver
from client.solvers.parts.moments import release_moments
from common.model.moments import NoisedSum, count_units, fix_heads, list_parts, select_parts, serve_heads
from common.model.momentum import adjust_step, read_momentum
from common.model.parameters import load_parameters, parameters
from common.privacy.noise import Entropy, NoiseStream
from common.privacy.shares import plan_moments
from common.process.threads import one_thread
from common.run import RunConfig
from common.tasks import Task, open_tasks, select_round
from common.types import Heads, Params, Plan, select_trained

ApplyUpdate = Callable[[str, Params, Params], Params]
"""(parameter group, its parameters, their change in a round) -> new parameters."""


@dataclass(frozen=True)
class LocalTraining:
    """The training of one party alone.

    Attributes:
        run: the run; without privacy, where the party trains without.
        solver: the solver of every round.
        plan: plan of one round.
        rounds: number of rounds, as in the federation.
        tasks: the party's tasks.
        units: the party's training units.
        public_sizes: parameter group -> declared number of units, as in the federation.
    """

    run: RunConfig
    solver: Solver
    plan: Plan
    rounds: int
    tasks: Mapping[str, Task]
    units: Units
    public_sizes: Mapping[str, int]


def make_local_steps(run: RunConfig, sizes: Mapping[str, int]) -> ApplyUpdate:
    """Returns how a site alone turns its updates into new parameters, as like the run's aggregation as it can be.

    Where the aggregation's settings are those of `Momentum`, the steps are; of all others a site's own update is the
    mean.

    Args:
        run: the run.
        sizes: parameter group -> declared number of units.
    """
    velocity: dict[str, Params] = {}

    def apply_update(group: str, params: Params, change: Params) -> Params:
        momentum = read_momentum(run, group)
        if momentum is None:
            return add_update(group, params, change)
        step, kept = momentum.choose_step(sizes[group], 1)
        before = velocity.get(group, {})
        velocity[group] = {name: kept * before.get(name, 0.0) + each for name, each in change.items()}
        return add_update(group, params, {name: step * each for name, each in velocity[group].items()})

    return adjust_updates(run, apply_update)


def adjust_updates(run: RunConfig, apply_update: ApplyUpdate) -> ApplyUpdate:
    """Returns what turns updates into new parameters with the run's schedule and decay, as its coordinator does.

    Args:
        run: the run.
        apply_update: computes new parameters from a round's change, without both.
    """
    starts: dict[str, Params] = {}
    rounds_done: dict[str, int] = {}

    def apply_adjusted(group: str, params: Params, change: Params) -> Params:
        start = starts.setdefault(group, params)
        rounds_done[group] = round_ = rounds_done.get(group, 0) + 1
        new = apply_update(group, params, change)
        adjustment = run.aggregation.select_adjustment(group)
        return adjust_step(adjustment, params, new, start, round_=round_, rounds=run.rounds)

    return apply_adjusted


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
    drawn: Heads = {name: parameters(module) for name, module in modules.items()}
    heads = dict(_fix_heads(training, drawn, NoiseStream(entropy(f"{purpose}/0"))))
    for round_ in range(1, training.rounds + 1):
        for name, params in heads.items():
            load_parameters(modules[name], params)
        stream = NoiseStream(entropy(f"{purpose}/{round_}"))
        with one_thread():
            update = training.solver.solve(
                modules,
                select_round(training.tasks, round_, training.rounds),
                training.units,
                plan=training.plan,
                public_sizes=training.public_sizes,
                stream=stream,
            )
        heads = {
            name: {**params, **apply_update(name, select_trained(params), update.heads[name])}
            for name, params in heads.items()
        }
    return serve_heads(heads, training.tasks)


def _fix_heads(training: LocalTraining, heads: Heads, stream: NoiseStream) -> Heads:
    """Returns the heads with the fixed numbers that this party's own sums give."""
    run, tasks = training.run, training.tasks
    every = open_tasks(run)
    parts, plan = select_parts(list_parts(run, every), run, tasks), plan_moments(run, training.plan.unit)
    if plan is None or not parts:
        return heads
    units = count_units(parts, run, {name: training.public_sizes[name] for name in tasks})
    with one_thread():
        sums = release_moments(parts, run, tasks, training.units, plan=plan, stream=stream)
    noised = {
        part: NoisedSum(
            sums[part]["sum"].astype(np.float64),
            plan.noise_multiplier / factor,
            units[part],
        )
        for part, factor in parts.items()
    }
    return fix_heads(heads, run, tasks, noised)
