"""A round of gradient descent at many sites at once, in this process: what `descend` does at each, to the bit.

A unit's clipped part is an integer array that follows from that unit and its site's weights alone, and the sum of a
site's parts is exact: so it does not matter how many sites' records stand in one array. What is shared: features are
quantised and norms bounded once for a run, outputs of a block of sites are computed in one call of compiled code, and
their slopes in one call of torch. What is each site's own: its weights, its noise stream, its update.

A site whose units do not fit this path (too many to add up in double precision, or too many records in one) is not in
`fits`; nor is one whose weights leave the range of exact products in `Trained`: `descend` has the answer for it.

# Shapes: as in closed_form.py; S sites, T tasks, N values of all heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.solvers.parts import objective
from client.solvers.parts.closed_form import (
    BLOCK_OUTPUTS,
    MOST_CANCELLATION,
    MOST_RECORDS,
    Inputs,
    OutputGradient,
    check_affine,
    round_weights,
)
from client.solvers.parts.compiled_step import MOST_OUTPUTS, check_memory
from client.solvers.parts.descent import get_output_gradient, open_inputs
from client.solvers.parts.flat import Flat
from client.solvers.parts.many_units import ManyUnits
from client.solvers.parts.site_rows import SiteBlock, SiteRows
from common.model.parameters import MAX_ROW_NORM
from common.privacy.compiled import open_library
from common.privacy.lattice import MAX_UNITS, Lattice
from common.privacy.noise import NoiseStream
from common.run import Rates
from common.tasks import Task
from common.types import Plan

_BLOCK_VALUES = 2**21
"""Weights of a block of sites: five numbers of each are kept meanwhile, 80 MiB."""


@dataclass(frozen=True)
class Trained:
    """The changes of one block's heads.

    Attributes:
        sites: the sites, by their numbers in `ManySites`.
        change_SN: float32, the change of each site's parameters in the order of `Flat`; meaningless where not `sound`.
        sound: false where a site's weights grew beyond exact products, or are not finite: `descend` decides there.
    """

    sites: NDArray[np.int64]
    change_SN: NDArray[np.float32]
    sound: NDArray[np.bool_]


@final
class ManySites:
    """The units of many sites, opened once for a run and trained on in every round.

    Attributes:
        units: the units.
        fits: bool [S], the sites that `descend_each` can train.
    """

    def __init__(self, heads: Mapping[str, nn.Module], tasks: Mapping[str, Task], units: ManyUnits) -> None:
        """Args: heads: task -> head, of which shapes are used; tasks: their definitions; units: the sites' units."""
        self.units = units
        self._flat = Flat.from_heads(heads)
        self._library = open_library()
        self._scale = {name: tasks[name].scale for name in self._flat.heads}
        self._inputs: dict[str, Inputs] = {}
        self._rows: dict[str, SiteRows] = {}
        self.fits = np.zeros(len(units), np.bool_)
        if self._library is None or not len(units):
            return
        self._inputs = open_inputs(self._flat, tasks, units.units)
        if any(one.positions is not None or one.rows.integers.dtype != torch.int16 for one in self._inputs.values()):
            return
        if any(shapes[0][0] > MOST_OUTPUTS for shapes in self._shapes.values()):
            return
        self._rows = {name: SiteRows.of(one, units.start_S) for name, one in self._inputs.items()}
        most_SN = [rows.most_S for rows in self._rows.values()]
        several = np.any([most > 1 for most in most_SN], axis=0)
        exact = np.where(several, MAX_UNITS // MOST_CANCELLATION, MAX_UNITS)
        self.fits = (np.diff(units.start_S) <= exact) & np.all([most <= MOST_RECORDS for most in most_SN], axis=0)

    @property
    def _shapes(self) -> dict[str, list[torch.Size]]:
        return {name: [each.shape for each in head.parameters()] for name, head in self._flat.heads.items()}

    def list_blocks(self, sites: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Returns the sites, ascending, in blocks that are trained together."""
        if not len(sites):
            return []
        outputs = [self._rows[name].count_S[sites] * shapes[0][0] for name, shapes in self._shapes.items()]
        largest = max(1, int(np.max(outputs)))
        size = max(1, min(BLOCK_OUTPUTS // largest, _BLOCK_VALUES // sum(self._flat.sizes)))
        return [sites[start : start + size] for start in range(0, len(sites), size)]

    def split(self, change_SN: NDArray[np.float32]) -> dict[str, dict[str, NDArray[np.float32]]]:
        """Returns task -> parameter -> its part of sites' changes, each of shape S x the parameter's."""
        parts = iter(np.split(change_SN, np.cumsum(self._flat.sizes)[:-1], axis=1))
        return {
            name: {key: next(parts).reshape(-1, *each.shape) for key, each in head.named_parameters()}
            for name, head in self._flat.heads.items()
        }

    def descend_each(
        self,
        heads: Mapping[str, nn.Module],
        tasks: Mapping[str, Task],
        sites: NDArray[np.int64],
        *,
        plan: Plan,
        public_sizes: Sequence[Mapping[str, int]],
        streams: Sequence[NoiseStream],
        rates: Mapping[str, Rates],
        momentum: float = 0.0,
        solver: str = "dp_gd",
    ) -> Trained:
        """Trains copies of linear heads at each site of a block.

        Args:
            heads: task -> head at the start of the round, the same at all sites.
            tasks: task -> its definition.
            sites: a block of `list_blocks`; all of them in `fits`.
            plan: public numbers of the round.
            public_sizes: for each site, task -> declared number of units.
            streams: for each site, the source of its coins and noise.
            rates: task -> learning rate and weight decay.
            momentum: of the steps on noised means, at least 0 and below 1.
            solver: kind of the solver, for messages.

        Raises:
            BadInput: a head is not affine.
        """
        assert plan.clip_norm is not None and self.fits[sites].all()
        check_affine(heads, solver)
        flat = Flat.from_heads(heads)
        step = _Steps(flat, Lattice.of(plan.clip_norm, plan.noise_multiplier), len(sites))
        step.set_rates(plan, public_sizes, rates, momentum)
        gradients = {name: get_output_gradient(tasks[name]) for name in flat.heads}
        everyone = self._prepare(sites) if plan.sampling_rate >= 1.0 else None
        with torch.no_grad():
            for _ in range(plan.steps):
                block = everyone
                if block is None:
                    block = self._prepare_sample(sites, streams, plan.sampling_rate)
                # In a stream's own order: the coins of a step, then its noise.
                noise_SN = NoiseStream.draw_each(streams, step.size, step.lattice.log2_deviation)
                step.add(block, gradients)
                step.move(noise_SN)
        return Trained(sites, *step.finish())

    def _prepare(self, sites: NDArray[np.int64]) -> dict[str, SiteBlock]:
        inputs, rows = self._inputs, self._rows
        return {name: SiteBlock.of(inputs[name], rows[name], sites, self._width(name)) for name in inputs}

    def _prepare_sample(
        self, sites: NDArray[np.int64], streams: Sequence[NoiseStream], sampling_rate: float
    ) -> dict[str, SiteBlock]:
        """Returns the records of the units in each site's own Poisson sample."""
        first_S, last_S = self.units.start_S[sites], self.units.start_S[sites + 1]
        taken = [
            start + np.flatnonzero(stream.coins(end - start, sampling_rate))
            for start, end, stream in zip(first_S.tolist(), last_S.tolist(), streams, strict=True)
        ]
        # From the first unit of the block to its last: units of other sites between them are not members.
        start, end = int(first_S[0]), int(last_S[-1])
        members = torch.from_numpy(np.concatenate(taken) - start)
        start_S = np.concatenate([[0], np.cumsum([len(own) for own in taken])])
        blocks = {}
        for name, inputs in self._inputs.items():
            sample = inputs.slice(start, end).select(members)
            rows = SiteRows.of(sample, start_S)
            blocks[name] = SiteBlock.of(sample, rows, np.arange(len(sites)), self._width(name))
        return blocks

    def _width(self, name: str) -> int:
        return int(self._shapes[name][0][0])


@final
class _Steps:
    """The weights of a block's sites, and each step's sums."""

    def __init__(self, flat: Flat, lattice: Lattice, num_sites: int) -> None:
        library = open_library()
        assert library is not None  # Else no site fits.
        self._code, self._flat, self.lattice, self.size = library.code, flat, lattice, sum(flat.sizes)
        self._start_N = flat.copy_parameters().double()
        grid_N = round_weights(self._start_N)
        norms = [torch.linalg.vector_norm(weight, dim=1).amax() for weight, *_ in flat.views(grid_N).values()]
        self._sound_S = np.full(num_sites, all(bool(norm <= MAX_ROW_NORM) for norm in norms))
        self._weight_SN = self._start_N.repeat(num_sites, 1)
        self._grid_SN = grid_N.repeat(num_sites, 1)
        self._velocity_SN = torch.zeros_like(self._weight_SN)
        self._total_SN = torch.zeros_like(self._weight_SN)
        self._places = dict(zip(flat.heads, _list_places(flat), strict=True))

    def set_rates(
        self, plan: Plan, public_sizes: Sequence[Mapping[str, int]], rates: Mapping[str, Rates], momentum: float
    ) -> None:
        """Takes the numbers of the update: one of each value, as `Update` has them.

        Args:
            plan: plan of the round.
            public_sizes: for each site, task -> declared number of units.
            rates: task -> learning rate and weight decay.
            momentum: momentum of the steps.
        """
        expand = self._expand
        # Sites with equal declarations share one mapping.
        different = {id(sizes): sizes for sizes in public_sizes}
        self._divisors = {key: expand(objective.compute_divisors(plan, each)) for key, each in different.items()}
        self._divisor_at = [self._divisors[id(sizes)].data_ptr() for sizes in public_sizes]
        self._rate_N = expand({name: group.learning_rate for name, group in rates.items()})
        decay = {name: group.weight_decay for name, group in rates.items()}
        # As in `Update`: where none decays, a weight that is not finite must not become one that is not a number.
        none_decays = set(decay.values()) == {0.0}
        self._decay_N = None if none_decays else expand(decay)
        self._momentum = momentum

    def _expand(self, by_task: Mapping[str, float]) -> Tensor:
        value = self._flat.expand(by_task)
        return value if isinstance(value, Tensor) else torch.full_like(self._start_N, value)

    def add(self, block: Mapping[str, SiteBlock], gradients: Mapping[str, OutputGradient]) -> None:
        """Sums the clipped gradients of each site's units at its weights.

        Args:
            block: task -> the records that take part.
            gradients: task -> gradient of its loss by the head's outputs.
        """
        self._total_SN.zero_()
        row = 8 * self.size * np.arange(len(self._total_SN))
        tables, kept = [], []
        for name in self._flat.heads:
            table, (weight_at, bias_at) = block[name].heads_S.copy(), self._places[name]
            table["weight_KD"] = self._grid_SN.data_ptr() + row + 8 * weight_at
            table["total_KD"] = self._total_SN.data_ptr() + row + 8 * weight_at
            if bias_at is not None:
                table["bias_K"] = self._grid_SN.data_ptr() + row + 8 * bias_at
                table["total_K"] = self._total_SN.data_ptr() + row + 8 * bias_at
            if table["R"].sum():
                check_memory(self._code.compute_block(table.ctypes.data, len(table)))
                slopes = block[name].evaluate_slopes(gradients[name])
                kept.append(slopes)
                at_S = np.cumsum(table["R"]) - table["R"]
                table["slopes_RK"] = slopes.data_ptr() + 8 * slopes.shape[1] * at_S
            tables.append(table)
        # A site's heads side by side; one without a record is left out, as in `split_blocks`.
        heads_ST = np.stack(tables, axis=1)
        there_ST = heads_ST["R"] > 0
        heads = heads_ST[there_ST]
        num_heads_S = there_ST.sum(axis=1)
        at_S = heads.ctypes.data + heads.itemsize * (np.cumsum(num_heads_S) - num_heads_S)
        num_units_S = next(iter(block.values())).num_units_S
        room = np.empty(5 * max(1, int(num_units_S.max())))
        numbers = (self.lattice.bound * (1.0 - 2.0**-36), self.lattice.spacing, 1.0 / MOST_CANCELLATION)
        for at, count, num_units in zip(at_S.tolist(), num_heads_S.tolist(), num_units_S.tolist(), strict=True):
            if count:
                check_memory(self._code.add_block(at, count, num_units, *numbers, room.ctypes.data))

    def move(self, noise_SN: NDArray[np.int64]) -> None:
        """Moves each site's weights by its sum with its noise."""
        row, code, size = 8 * self.size, self._code, self.size
        total, weight, velocity, grid = (
            each.data_ptr() for each in (self._total_SN, self._weight_SN, self._velocity_SN, self._grid_SN)
        )
        rate, noise = self._rate_N.data_ptr(), noise_SN.ctypes.data
        decay = None if self._decay_N is None else self._decay_N.data_ptr()
        spacing, momentum = self.lattice.spacing, self._momentum
        peaks = [
            code.update(
                *(total + at, noise + at, size, spacing, divisor, decay),
                *(momentum, rate, True, weight + at, velocity + at, grid + at),
            )
            for at, divisor in zip(range(0, row * len(noise_SN), row), self._divisor_at, strict=True)
        ]
        self._sound_S &= np.array(peaks) <= MAX_ROW_NORM / math.sqrt(size)

    def finish(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Returns each site's change, and whether it can be relied on."""
        change_SN = (self._weight_SN - self._start_N).float().numpy()
        return change_SN, self._sound_S & np.isfinite(change_SN).all(axis=1)


def _list_places(flat: Flat) -> list[tuple[int, int | None]]:
    """Returns for each head the places of its weight and of its bias, where it has one, in the vector of all values."""
    places, at = [], 0
    for head in flat.heads.values():
        sizes = [each.numel() for each in head.parameters()]
        places.append((at, at + sizes[0] if len(sizes) > 1 else None))
        at += sum(sizes)
    return places
