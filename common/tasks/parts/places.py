"""Outputs and labels of places: from the grid of a head's outputs to the finer one of masks, and back for gradients.

Only operations on single values and sums of two: what is computed of a record does not depend on the records beside it.

# Shapes: B records, G places along a side of the outputs' grid, S along one of the labels', K outputs of a place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from common.plugins import Plugin

if TYPE_CHECKING:
    from torch import Tensor


class PicturePlaces(Plugin):
    """Base of the task kinds whose heads read the places of pictures."""

    @property
    def reads_places(self) -> bool:
        """The head's outputs are those of places."""
        return True

    @property
    def stays_curved(self) -> bool:
        """Features are not centred and most places are alike: along these the loss is curved (docs/results.md)."""
        return True

    @property
    def tolerated_noise(self) -> float:
        """That of a logit (docs/results.md)."""
        return 0.5

    @property
    def centres(self) -> bool:
        """The mean of a picture's features tells how much of what is on it."""
        return False


_LANES = 64
"""A multiple of the numbers that one instruction of any processor takes."""


@dataclass(frozen=True)
class _Taps:
    """The two places of the coarse grid between which each place of the fine one lies, and the weight of the second."""

    first: list[int]
    second: list[int]
    weight: list[float]


@cache
def _find_taps(coarse: int, fine: int) -> _Taps:
    at = np.clip((np.arange(fine) + 0.5) * coarse / fine - 0.5, 0.0, coarse - 1.0)
    first = np.floor(at).astype(int)
    second = np.minimum(first + 1, coarse - 1)
    return _Taps(first.tolist(), second.tolist(), (at - first).tolist())


def refine(outputs_BGGK: Tensor, side: int) -> Tensor:
    """Returns outputs on a finer grid, B x S x S x K: between places on straight lines.

    Args:
        outputs_BGGK: outputs of a head.
        side: S.
    """
    for axis in (1, 2):
        if outputs_BGGK.shape[axis] == side:
            continue
        taps = _find_taps(outputs_BGGK.shape[axis], side)
        weight = outputs_BGGK.new_tensor(taps.weight).view(*(-1 if each == axis else 1 for each in range(4)))
        first = outputs_BGGK.index_select(axis, _as_index(taps.first, outputs_BGGK))
        second = outputs_BGGK.index_select(axis, _as_index(taps.second, outputs_BGGK))
        outputs_BGGK = first * (1.0 - weight) + second * weight
    return outputs_BGGK


def gather_slopes(slopes_BSSK: Tensor, grid: int) -> Tensor:
    """Returns the gradient by outputs on a grid, B x G x G x K, of one by what `refine` made of them.

    Args:
        slopes_BSSK: gradient by the finer outputs.
        grid: G.
    """
    for axis in (1, 2):
        if slopes_BSSK.shape[axis] == grid:
            continue
        taps = _find_taps(grid, slopes_BSSK.shape[axis])
        weight = slopes_BSSK.new_tensor(taps.weight).view(*(-1 if each == axis else 1 for each in range(4)))
        shape = list(slopes_BSSK.shape)
        shape[axis] = grid
        # Each place after the other, so that a picture's sums are the same beside any other picture.
        gathered = slopes_BSSK.new_zeros(shape)
        gathered.index_add_(axis, _as_index(taps.first, slopes_BSSK), slopes_BSSK * (1.0 - weight))
        gathered.index_add_(axis, _as_index(taps.second, slopes_BSSK), slopes_BSSK * weight)
        slopes_BSSK = gathered
    return slopes_BSSK


def compute_probabilities(logits_BSSK: Tensor) -> Tensor:
    """Returns the softmax over classes as K x B x S x S; a place's is the same to the bit wherever the place is.

    Over the first axis torch's softmax is many times faster where classes are few; whole lanes of places leave none to
    a loop's remainder, where an exponential may have other last bits.
    """
    logits_KN = logits_BSSK.flatten(0, -2).mT
    missing = -logits_KN.shape[1] % _LANES
    from torch.nn import functional

    padded_KN = functional.pad(logits_KN, (0, missing)) if missing else logits_KN.contiguous()
    probability_KN: Tensor = padded_KN.softmax(dim=0)[:, : logits_KN.shape[1]]
    return probability_KN.reshape(-1, *logits_BSSK.shape[:-1])


def _as_index(places: list[int], like: Tensor) -> Tensor:
    import torch

    return torch.tensor(places, device=like.device)
