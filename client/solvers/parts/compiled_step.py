"""A block's part of a step, and the update behind it, in compiled code (`common/privacy/exact.c`).

What `add_clipped_parts` and `descend` do with torch, to the bit (tests/client/solvers/test_compiled.py). A task's
slopes are torch's in both.

# Shapes: as in closed_form.py; N values of all heads.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.solvers.parts.closed_form import (
    MOST_CANCELLATION,
    MOST_RECORDS,
    Inputs,
    OutputGradient,
    add_clipped_parts,
    bound_rounding,
    evaluate_slopes,
    pad_rows,
    round_weights,
)
from common.privacy.compiled import Library, open_library
from common.privacy.lattice import Lattice
from common.privacy.noise import NoiseStream

Weights = Mapping[str, Sequence[Tensor]]
AddParts = Callable[[Weights, Mapping[str, OutputGradient], Lattice, Weights], None]
"""Weights, gradients of losses by outputs, lattice and totals -> None, as `add_clipped_parts` of one block."""

MOST_OUTPUTS = 4096
"""Squares of so many slopes of 20 bits add exactly."""

_COUNTS = ("R", "D", "K", "Q", "P", "padded", "several")
_POINTERS = (
    *("integers_RD", "scale_R", "factor_R", "reach_R", "unit_R", "start_U", "pairs_3Q", "product_Q", "offset_K"),
    *("weight_KD", "bias_K", "slopes_RK"),
    *("outputs_RK", "whole_RK", "weighted_RK", "sizes_2R", "norm_R", "total_KD", "total_K"),
    *("gradient_UKD", "gradient_UK", "worth_2U"),
)


HEAD_FIELDS: tuple[tuple[str, Any], ...] = (
    *((name, ctypes.c_int64) for name in _COUNTS),
    *((name, ctypes.c_void_p) for name in _POINTERS),
    *((name, ctypes.c_double) for name in ("rounding", "slack")),
)
"""The fields of `Head` in exact.c, of eight bytes each."""


class _Head(ctypes.Structure):
    _fields_ = list(HEAD_FIELDS)


def prepare_block(block: Mapping[str, Inputs], widths: Mapping[str, int]) -> AddParts:
    """Returns what adds a block's clipped gradients to totals: compiled where that can be, else torch's operations.

    Args:
        block: task -> its inputs, of the same units.
        widths: task -> K.
    """
    library = open_library()
    if library is None or not block or not all(_is_plain(inputs, widths[name]) for name, inputs in block.items()):
        return partial(add_clipped_parts, block)
    return _CompiledBlock(block, widths, library).add


def _is_plain(inputs: Inputs, width: int) -> bool:
    integers = inputs.rows.integers
    narrow = integers.dtype == torch.int16 and integers.device.type == "cpu" and integers.is_contiguous()
    if inputs.positions is None:
        return narrow and inputs.most_records <= MOST_RECORDS and width <= MOST_OUTPUTS
    # The gradients of a block's units, which are kept from step to step, need no more room than their features.
    return narrow and width <= math.prod(inputs.positions)


@final
class _CompiledBlock:
    """A block's inputs as compiled code reads them, and its room, kept from step to step."""

    def __init__(self, block: Mapping[str, Inputs], widths: Mapping[str, int], library: Library) -> None:
        self._block = block
        self._code = library.code
        self._heads = (_Head * len(block))()
        self._labels: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._kept: list[Tensor] = []
        for head, (name, inputs) in zip(self._heads, block.items(), strict=True):
            head.R, head.D, head.K = len(inputs.labels), inputs.rows.integers.shape[-1], widths[name]
            head.P, head.Q = math.prod(inputs.positions or ()), inputs.pairs_3Q.shape[1]
            head.several = inputs.most_records > 1
            head.rounding, head.slack = bound_rounding(head.K)
            self._labels[name] = pad_rows(inputs.labels, inputs.lanes)
            head.padded = len(self._labels[name])
            self._outputs[name] = torch.empty((head.padded, *inputs.rows.scale.shape[1:], head.K), dtype=torch.double)
            formed = inputs.positions is not None
            # Slopes of all records, or of a unit's places.
            rows = max(1, inputs.most_records) * head.P if formed else head.R
            room_2RK = torch.empty(2, rows, head.K, dtype=torch.double)
            sizes_3R = torch.empty(3, rows, dtype=torch.double)
            gradients = torch.empty(inputs.num_units if formed else 0, head.K * (head.D + 1) + 2, dtype=torch.double)
            gradient_UKD, gradient_UK, worth_2U = (
                part.contiguous() for part in torch.split(gradients, [head.K * head.D, head.K, 2], dim=1)
            )
            values = {
                "integers_RD": inputs.rows.integers,
                "scale_R": inputs.rows.scale,
                "factor_R": inputs.factor_R,
                "reach_R": inputs.reach_R,
                "unit_R": inputs.unit_R,
                "start_U": inputs.start_U,
                "pairs_3Q": inputs.pairs_3Q.contiguous(),
                "product_Q": inputs.product_Q,
                "offset_K": inputs.offset_K,
                "outputs_RK": self._outputs[name],
                "whole_RK": room_2RK[0],
                "weighted_RK": room_2RK[1],
                "sizes_2R": sizes_3R,
                "norm_R": sizes_3R[2],
                "gradient_UKD": gradient_UKD if formed else None,
                "gradient_UK": gradient_UK,
                "worth_2U": worth_2U,
            }
            for field, value in values.items():
                if value is not None:
                    assert value.is_contiguous()
                    self._kept.append(value)
                    setattr(head, field, value.data_ptr())
        self._room_5U = torch.empty(5 * next(iter(block.values())).num_units, dtype=torch.double)

    def add(
        self,
        weights: Weights,
        output_gradients: Mapping[str, OutputGradient],
        lattice: Lattice,
        totals: Weights,
    ) -> None:
        """Does what `add_clipped_parts` does with this block.

        Args:
            weights: task -> weight_KD and, where there is one, bias_K, on the grid.
            output_gradients: task -> gradient of its loss by the head's outputs.
            lattice: of the release.
            totals: task -> sums of the weights' shapes; changed in place.
        """
        sums = {name: _open_sums(totals[name]) for name in self._block}
        for head, (name, inputs) in zip(self._heads, self._block.items(), strict=True):
            head.weight_KD, head.total_KD = weights[name][0].data_ptr(), sums[name][0].data_ptr()
            if inputs.bias:
                head.bias_K, head.total_K = weights[name][1].data_ptr(), sums[name][1].data_ptr()
        check_memory(self._code.compute_block(self._heads, len(self._heads)))
        slopes = {
            name: evaluate_slopes(inputs, self._outputs[name], self._labels[name], output_gradients[name]).contiguous()
            for name, inputs in self._block.items()
        }
        for head, slopes_RK in zip(self._heads, slopes.values(), strict=True):
            head.slopes_RK = slopes_RK.data_ptr()
        check_memory(
            self._code.add_block(
                *(self._heads, len(self._heads), len(self._room_5U) // 5, lattice.bound * (1.0 - 2.0**-36)),
                *(lattice.spacing, 1.0 / MOST_CANCELLATION, self._room_5U.data_ptr()),
            )
        )
        for name, parts in sums.items():
            for total, part in zip(totals[name], parts, strict=True):
                if part is not total:
                    total.add_(part.long())


def check_memory(done: int) -> None:
    """Raises MemoryError where compiled code found too little memory to compute in."""
    if not done:
        raise MemoryError("expected memory for digits of weights and parts, got none; close other programs")


def _open_sums(totals: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns totals in double precision, which a block's parts are added to."""
    return [total if total.is_floating_point() else torch.zeros_like(total, dtype=torch.double) for total in totals]


@final
class Update:
    """The step of gradient descent on a noised sum: torch's `SGD`, in double precision, and weights on their grid.

    Attributes:
        weight_N: the weights.
        grid_N: the weights on their grid, `round_weights`.
        peak: the largest of them; infinite where it is not known.
    """

    def __init__(
        self,
        weight_N: Tensor,
        *,
        divisor: Tensor | float,
        learning_rate: Tensor | float,
        weight_decay: Tensor | float,
        momentum: float,
    ) -> None:
        self.weight_N = weight_N
        self.grid_N = round_weights(weight_N)
        self.peak = float(self.grid_N.abs().max()) if len(weight_N) else 0.0
        self._divisor, self._learning_rate, self._momentum = divisor, learning_rate, momentum
        # Where none decays, a weight that is not finite must not become one that is not a number.
        decays = isinstance(weight_decay, Tensor) or weight_decay != 0.0
        self._weight_decay = weight_decay if decays else None
        self._velocity_N = torch.zeros_like(weight_N)
        self._library = open_library() if weight_N.device.type == "cpu" else None
        if self._library is not None:
            numbers = (divisor, self._weight_decay, learning_rate)
            self._differ = any(isinstance(each, Tensor) for each in numbers)
            self._at = [self._expand(each) for each in numbers]

    def _expand(self, value: Tensor | float | None) -> Tensor | None:
        """Returns a number of each weight, or one alone where every number is the same for all weights."""
        if value is None or isinstance(value, Tensor):
            return value
        return torch.full_like(self.weight_N if self._differ else self.weight_N[:1], value)

    def move(self, total_N: Tensor, noise_N: NDArray[np.int64], lattice: Lattice, stream: NoiseStream) -> None:
        """Moves the weights by a sum with noise; what follows the noise costs no privacy.

        Args:
            total_N: exact sum of clipped gradients.
            noise_N: noise drawn for it.
            lattice: of the release.
            stream: where the noise is from.
        """
        whole = noise_N.dtype == np.int64 and noise_N.flags.c_contiguous and total_N.dtype == torch.double
        if self._library is None or not whole:
            self.peak = math.inf
            step = lattice.release(total_N, noise_N, stream).div_(self._divisor)
            if self._weight_decay is not None:
                step.add_(self.weight_N * self._weight_decay)
            if self._momentum:
                step = self._velocity_N.mul_(self._momentum).add_(step)
            self.weight_N.sub_(step * self._learning_rate)
            self.grid_N.copy_(round_weights(self.weight_N))
            return
        stream.inspect(total_N, noise_N)
        divisor_N, decay_N, rate_N = self._at
        assert divisor_N is not None and rate_N is not None
        self.peak = self._library.code.update(
            *(total_N.data_ptr(), noise_N.ctypes.data, len(total_N), lattice.spacing, divisor_N.data_ptr()),
            *(None if decay_N is None else decay_N.data_ptr(), self._momentum, rate_N.data_ptr(), self._differ),
            *(self.weight_N.data_ptr(), self._velocity_N.data_ptr(), self.grid_N.data_ptr()),
        )
