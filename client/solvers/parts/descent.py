"""Gradient descent on exact sums with noise: the computation of `dp_gd` and `head_sum`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.data.units import Units
from client.solvers.parts import objective
from client.solvers.parts.closed_form import (
    Inputs,
    OutputGradient,
    check_affine,
    choose_total_type,
    describe_head,
    round_weights,
    split_blocks,
)
from client.solvers.parts.compiled_step import AddParts, Update, prepare_block
from client.solvers.parts.flat import Flat
from common.model.parameters import MAX_ROW_NORM
from common.plugins import fulfils
from common.privacy.compiled import open_library
from common.privacy.lattice import Lattice, check_unit_count
from common.privacy.noise import NoiseStream
from common.run import Rates
from common.tasks import LossGradient, Task
from common.types import Delta, Plan, RunFailed

_LARGE_DRAW = 2**14
"""Number of values from which on a draw is worth a thread of its own."""


def descend(
    modules: Mapping[str, nn.Module],
    tasks: Mapping[str, Task],
    units: Units,
    *,
    plan: Plan,
    public_sizes: Mapping[str, int],
    stream: NoiseStream,
    rates: Mapping[str, Rates],
    momentum: float = 0.0,
    solver: str = "dp_gd",
) -> Delta:
    """Trains copies of linear heads and returns the change of their parameters.

    Args:
        modules: task -> head.
        tasks: task -> its definition.
        units: training units.
        plan: public numbers of the round.
        public_sizes: task -> declared number of units.
        stream: source of coins and noise.
        rates: task -> learning rate and weight decay.
        momentum: of the steps on noised means, at least 0 and below 1.
        solver: kind of the solver, for messages.

    Raises:
        BadInput: a head is not affine.
        RunFailed: training diverged.
    """
    assert plan.clip_norm is not None  # A private plan has one.
    check_affine(modules, solver)
    check_unit_count(units.num_units)
    lattice = Lattice.of(plan.clip_norm, plan.noise_multiplier)
    flat = Flat.from_heads(modules)
    start = flat.copy_parameters().double()
    update = Update(
        start.clone(),
        divisor=flat.expand(objective.compute_divisors(plan, public_sizes)),
        learning_rate=flat.expand({name: group.learning_rate for name, group in rates.items()}),
        weight_decay=flat.expand({name: group.weight_decay for name, group in rates.items()}),
        momentum=momentum,
    )
    # Of few small samples only the members are read: a unit's part follows from that unit alone.
    is_rare = plan.sampling_rate * plan.steps < 1.0
    parts = flat.views(update.grid_N)
    widths = {name: len(own[0]) for name, own in parts.items()}
    output_gradients = {name: get_output_gradient(tasks[name]) for name in flat.heads}
    with torch.no_grad(), _borrow(flat, tasks, units, None if is_rare else plan) as prepared:
        exact = torch.int64 if is_rare else choose_total_type(prepared.inputs, units.num_units)
        total = torch.zeros_like(start, dtype=exact)
        sums = flat.views(total)
        for members, noise in _draw_steps(units, plan, stream, len(total), lattice):
            blocks: Iterable[AddParts] = prepared.everyone
            if plan.sampling_rate < 1.0:
                sample = {name: one.select(members) for name, one in prepared.inputs.items()}
                if is_rare:
                    sample = open_inputs(flat, tasks, objective.select_batch(units, members))
                blocks = _prepare(sample, len(members), widths)
            # Rows of weights that are all small are short.
            if not update.peak * math.sqrt(len(total)) <= MAX_ROW_NORM:
                _check_weights(parts)
            total.zero_()
            for add_parts in blocks:
                add_parts(parts, output_gradients, lattice, sums)
            update.move(total, noise, lattice, stream)
    return objective.check_update(flat.split_by_task((update.weight_N - start).float()))


def release_sum(
    modules: Mapping[str, nn.Module],
    tasks: Mapping[str, Task],
    units: Units,
    *,
    lattice: Lattice,
    stream: NoiseStream,
    solver: str,
) -> dict[str, dict[str, NDArray[np.int64]]]:
    """Returns the sum of all units' clipped gradients with noise, as whole numbers in steps of a lattice.

    Args:
        modules: task -> head.
        tasks: task -> its definition.
        units: training units.
        lattice: the lattice, with the clip norm as its bound.
        stream: source of the noise.
        solver: kind of the solver, for messages.

    Raises:
        BadInput: a head is not affine.
        RunFailed: the heads' weights are too large for exact products.
    """
    check_affine(modules, solver)
    check_unit_count(units.num_units)
    flat = Flat.from_heads(modules)
    parts = flat.views(round_weights(flat.copy_parameters()))
    _check_weights(parts)
    inputs = open_inputs(flat, tasks, units)
    output_gradients = {name: get_output_gradient(tasks[name]) for name in flat.heads}
    total = torch.zeros_like(flat.copy_parameters(), dtype=choose_total_type(inputs, units.num_units))
    sums = flat.views(total)
    noise = stream.rounded_gaussian(len(total), lattice.log2_deviation)
    with torch.no_grad():
        for add_parts in _prepare(inputs, units.num_units, {name: len(own[0]) for name, own in parts.items()}):
            add_parts(parts, output_gradients, lattice, sums)
        return flat.split_by_task(lattice.add_noise(total, noise, stream))


def open_inputs(flat: Flat, tasks: Mapping[str, Task], units: Units) -> dict[str, Inputs]:
    """Returns the inputs of each head: the usable records of its task, by unit.

    Args:
        flat: the heads.
        tasks: task -> its definition.
        units: training units.
    """
    return {
        name: Inputs.from_records(
            head, objective.select_usable_records(units.tasks[name]), units.num_units, tasks[name].scale
        )
        for name, head in flat.heads.items()
    }


@dataclass(frozen=True)
class _Prepared:
    """Everything that stays the same from step to step and from round to round: it follows from the units alone.

    Attributes:
        inputs: head -> its inputs.
        everyone: the blocks of a step with all units; empty where units are sampled.
    """

    inputs: Mapping[str, Inputs]
    everyone: Sequence[AddParts] = ()


def _borrow(
    flat: Flat, tasks: Mapping[str, Task], units: Units, plan: Plan | None
) -> AbstractContextManager[_Prepared]:
    """Yields what a round's steps begin from; it is kept with the units for the next round.

    Args:
        flat: the heads.
        tasks: task -> its definition.
        units: training units.
        plan: public numbers of the round; None where only the few members of each sample are read.
    """
    if plan is None:
        return nullcontext(_Prepared({}))
    shapes = {name: own[0].shape for name, own in flat.views(flat.copy_parameters()).items()}
    widths = {name: shape[0] for name, shape in shapes.items()}
    full = plan.sampling_rate >= 1.0

    def make() -> _Prepared:
        inputs = open_inputs(flat, tasks, units)
        return _Prepared(inputs, list(_prepare(inputs, units.num_units, widths)) if full else ())

    # What is kept has room for outputs, and is counted by the features' size.
    if any(num_outputs > num_features for num_outputs, num_features in shapes.values()):
        return nullcontext(make())
    heads = [(name, tasks[name].scale, widths[name], *describe_head(head)) for name, head in flat.heads.items()]
    return units.borrow((_Prepared, full, open_library() is None, *heads), make)


def _prepare(inputs: Mapping[str, Inputs], num_units: int, widths: Mapping[str, int]) -> Iterator[AddParts]:
    return (prepare_block(block, widths) for block in split_blocks(inputs, num_units, widths))


def _check_weights(weights: Mapping[str, Sequence[Tensor]]) -> None:
    """Raises RunFailed where weights have grown so large that products with them are not exact."""
    for name, parts in weights.items():
        if not bool((torch.linalg.vector_norm(parts[0], dim=1) <= MAX_ROW_NORM).all()):
            raise RunFailed(f"{name}: training diverged; a smaller learning_rate is needed")


def _draw_steps(
    units: Units, plan: Plan, stream: NoiseStream, size: int, lattice: Lattice
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Yields each step's sample and the noise of `size` values, in the stream's order.

    Much noise is drawn while the step before is computed.
    """

    def draw() -> tuple[Tensor, NDArray[np.int64]]:
        return objective.draw_participants(units, plan, stream), stream.rounded_gaussian(size, lattice.log2_deviation)

    if size < _LARGE_DRAW:
        for _ in range(plan.steps):
            yield draw()
        return
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(draw)
        for _ in range(plan.steps - 1):
            drawn, waiting = waiting.result(), thread.submit(draw)
            yield drawn
        yield waiting.result()


def get_output_gradient(task: Task) -> OutputGradient:
    """Returns the gradient of a task's loss by the head's outputs: the task's own, or autograd's for any other loss."""
    if fulfils(task, LossGradient):
        return task.loss_gradient

    def differentiate(outputs: Tensor, labels: Tensor) -> Tensor:
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            total = task.losses(leaf, labels).sum()
        gradient: Tensor = torch.autograd.grad(total, leaf)[0]
        return gradient

    return differentiate
