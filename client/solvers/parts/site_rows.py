"""The records of one head at many sites as compiled code reads them: a row of numbers and addresses for each site.

# Shapes: as in closed_form.py; S sites, V numbers of which each site has one more than units.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.solvers.parts.closed_form import BLOCK_OUTPUTS, LANES, Inputs, OutputGradient, bound_rounding, pad_rows
from client.solvers.parts.compiled_step import HEAD_FIELDS

HEAD = np.dtype([(name, np.float64 if kind is ctypes.c_double else np.int64) for name, kind in HEAD_FIELDS])
"""A head of one site in `exact.c`."""


@dataclass(frozen=True)
class SiteRows:
    """The places of each site's records in a head's inputs, and what counts from 0 at each site.

    Attributes:
        first_S: first record of each site.
        count_S: number of its records.
        first_unit_S: its first unit.
        num_units_S: number of its units.
        most_S: most records of one of its units.
        unit_R: index of each record's unit at its site.
        start_V: for each site, where its units start among its records: one number more than it has units.
        pairs: for each site that has any, its pairs of records, 3 x Q with its own indices.
        first_pair_S: first pair of each site.
        num_pairs_S: number of its pairs.
    """

    first_S: NDArray[np.int64]
    count_S: NDArray[np.int64]
    first_unit_S: NDArray[np.int64]
    num_units_S: NDArray[np.int64]
    most_S: NDArray[np.int64]
    unit_R: NDArray[np.int64]
    start_V: NDArray[np.int64]
    pairs: NDArray[np.int64]
    first_pair_S: NDArray[np.int64]
    num_pairs_S: NDArray[np.int64]

    @classmethod
    def of(cls, inputs: Inputs, start_S: NDArray[np.int64]) -> SiteRows:
        """Returns the places of sites whose first units are given, with the number of all units last."""
        start_U, unit_R = inputs.start_U.numpy(), inputs.unit_R.numpy()
        bounds_S, num_units_S = start_U[start_S], np.diff(start_S)
        site_R = np.searchsorted(start_S, unit_R, side="right") - 1
        own_V = np.repeat(np.arange(len(num_units_S)), num_units_S + 1)
        unit_V = np.arange(len(own_V)) - own_V  # Each site's last number is its next site's first.
        counts_U = np.diff(start_U)
        most_S = np.zeros(len(num_units_S), np.int64)
        np.maximum.at(most_S, np.repeat(np.arange(len(num_units_S)), num_units_S), counts_U)
        pairs_3Q = inputs.pairs_3Q.numpy()
        site_Q = np.searchsorted(start_S, pairs_3Q[2], side="right") - 1
        first_pair_S = np.searchsorted(site_Q, np.arange(len(num_units_S) + 1))
        own_3Q = pairs_3Q - np.stack([bounds_S[site_Q], bounds_S[site_Q], start_S[site_Q]])
        pairs = [own_3Q[:, low:high].ravel() for low, high in pairwise(first_pair_S) if high > low]
        return cls(
            first_S=bounds_S[:-1],
            count_S=np.diff(bounds_S),
            first_unit_S=start_S[:-1],
            num_units_S=num_units_S,
            most_S=most_S,
            unit_R=np.ascontiguousarray(unit_R - start_S[site_R]),
            start_V=np.ascontiguousarray(start_U[unit_V] - bounds_S[own_V]),
            pairs=np.concatenate([np.empty(0, np.int64), *pairs]),
            first_pair_S=first_pair_S[:-1],
            num_pairs_S=np.diff(first_pair_S),
        )


@final
class SiteBlock:
    """One head's records at a block of sites as compiled code reads them, and room for what it computes."""

    def __init__(
        self,
        labels: Tensor,
        outputs_RK: Tensor,
        heads_S: NDArray[np.void],
        num_units_S: NDArray[np.int64],
        kept: list[object],
    ) -> None:
        self.heads_S, self.num_units_S = heads_S, num_units_S
        self._labels, self._outputs_RK, self._kept = labels, outputs_RK, kept

    @classmethod
    def of(cls, inputs: Inputs, rows: SiteRows, sites: NDArray[np.int64], width: int) -> SiteBlock:
        """Returns a block.

        Args:
            inputs: inputs of all sites.
            rows: the places of each site's records in them.
            sites: sites of the block, ascending.
            width: number of outputs K.
        """
        first_S, count_S, dim = rows.first_S[sites], rows.count_S[sites], inputs.rows.integers.shape[-1]
        at_S = np.concatenate([[0], np.cumsum(count_S)])
        total = int(at_S[-1])
        # Sites side by side are one slice, which copies nothing.
        together = total == int((first_S[-1] + count_S[-1]) - first_S[0])
        place = slice(int(first_S[0]), int(first_S[0]) + total)
        labels = inputs.labels[place]
        if not together:
            chosen = [np.arange(first, first + count) for first, count in zip(first_S, count_S, strict=True)]
            labels = inputs.labels[torch.from_numpy(np.concatenate(chosen))]
        outputs_RK = torch.zeros(total + -total % LANES, width, dtype=torch.double)
        whole_2RK = np.empty((2, total, width))
        sizes_3R = np.empty(3 * total)
        heads = np.zeros(len(sites), HEAD)
        heads["R"], heads["padded"], heads["D"], heads["K"], heads["P"] = count_S, count_S, dim, width, 1
        heads["Q"], heads["several"] = rows.num_pairs_S[sites], rows.most_S[sites] > 1
        heads["rounding"], heads["slack"] = bound_rounding(width)
        kept = [inputs.rows.integers, inputs.rows.scale, inputs.factor_R, inputs.reach_R, inputs.product_Q]
        assert all(each.is_contiguous() for each in kept)
        heads["integers_RD"] = inputs.rows.integers.data_ptr() + 2 * dim * first_S
        for field, values in (
            ("scale_R", inputs.rows.scale),
            ("factor_R", inputs.factor_R),
            ("reach_R", inputs.reach_R),
        ):
            heads[field] = values.data_ptr() + 8 * first_S
        heads["unit_R"] = rows.unit_R.ctypes.data + 8 * first_S
        heads["start_U"] = rows.start_V.ctypes.data + 8 * (rows.first_unit_S[sites] + sites)
        heads["pairs_3Q"] = rows.pairs.ctypes.data + 24 * rows.first_pair_S[sites]
        heads["product_Q"] = inputs.product_Q.data_ptr() + 8 * rows.first_pair_S[sites]
        if inputs.offset_K is not None:
            heads["offset_K"] = inputs.offset_K.data_ptr()
        heads["outputs_RK"] = outputs_RK.data_ptr() + 8 * width * at_S[:-1]
        heads["whole_RK"] = whole_2RK[0].ctypes.data + 8 * width * at_S[:-1]
        heads["weighted_RK"] = whole_2RK[1].ctypes.data + 8 * width * at_S[:-1]
        heads["sizes_2R"] = sizes_3R.ctypes.data + 24 * at_S[:-1]
        heads["norm_R"] = heads["sizes_2R"] + 16 * count_S
        # The heads' pointers are into these.
        room: list[object] = [whole_2RK, sizes_3R, *kept, inputs.offset_K, rows]
        return cls(pad_rows(labels, LANES), outputs_RK, heads, rows.num_units_S[sites], room)

    def evaluate_slopes(self, output_gradient: OutputGradient) -> Tensor:
        """Evaluates the slopes of all rows, on whole lanes, and returns them."""
        count = int(self.heads_S["R"].sum())
        # As `pad_rows`: rows that are added are the first one's.
        self._outputs_RK[count:] = self._outputs_RK[:1]
        # Threads would divide more outputs between lanes, where a row's last bits depend on how many others there are.
        size = max(1, BLOCK_OUTPUTS // (LANES * self._outputs_RK.shape[1])) * LANES
        parts = zip(torch.split(self._outputs_RK, size), torch.split(self._labels, size), strict=True)
        return torch.cat([output_gradient(*part) for part in parts])[:count].double().contiguous()
