"""The clipped sum of a step in closed form, for heads that are one affine map: linear, or a 1x1 convolution.

A record's gradient is Delta' X, where Delta is the gradient of its loss by the head's outputs and X its features.
Delta comes from autograd on the outputs alone, so every per-example loss works. For records of one position (a linear
head on vectors) no gradient is ever formed: |Delta' x| = |Delta| |x|, and for several records of a unit

    |sum_r Delta_r' x_r|^2 = sum_rs (Delta_r . Delta_s)(x_r . x_s + 1),        + 1 only with a bias.

For records of several positions (1x1 convolutions, linear heads on sequences) the record's small gradient is formed:
its norm does not follow from the positions' norms. (Goodfellow 2015, arXiv 1510.01799; Rochette et al. 2019.)

Invariant, as in `common.privacy.clipping`: whatever a unit's records hold, its part of the sum is finite and at most
`clip_norm`, jointly over all heads, and depends on that unit alone.

# Shapes: R records, U units, D features, K outputs, P positions, Q pairs of records of one unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, final

import torch
from torch import Tensor, nn

from client.data.units import TaskRecords
from common.privacy.clipping import compute_row_norms, sum_by_unit
from common.types import BadInput

_MOST_RECORDS = 32
"""Records of a unit whose pairs are still used; beyond it the pairs would outgrow the gradient, which is formed."""

_MOST_CANCELLATION = 16.0
"""Sum of the norms of a unit's records over the norm of their sum. Beyond it the unit's gradient is formed too:
added record by record to a float32 sum, its large parts would leave rounding errors that no clip norm bounds."""

_POINTWISE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_affine(heads: Mapping[str, nn.Module]) -> None:
    """Refuses heads for which the formula is not exact, and trunks.

    Raises:
        BadInput: a head is anything but one linear layer or 1x1 convolution with all its parameters trainable.
    """
    for name, head in heads.items():
        if "." in name:
            raise BadInput(
                "trainable: solver dp_gd trains heads on frozen features and no part of a backbone; kind dp_sgd does"
            )
        reason = _explain_not_affine(head)
        if reason:
            raise BadInput(
                f"tasks.{name}.head: solver dp_gd is exact only for a linear head or a 1x1 convolution, got {reason}; "
                "kind dp_sgd trains it"
            )


def _explain_not_affine(head: nn.Module) -> str | None:
    # The exact type: a subclass or a parametrised layer computes something else.
    if type(head) is not nn.Linear and type(head) not in _POINTWISE:
        return type(head).__name__
    if head._forward_hooks or head._forward_pre_hooks:
        return "a layer with hooks"
    if not all(parameter.requires_grad for parameter in head.parameters()):
        return "one with frozen parameters"
    if isinstance(head, _POINTWISE):
        ones, zeros = (1,) * len(head.kernel_size), (0,) * len(head.kernel_size)
        if head.kernel_size != ones or head.stride != ones or head.padding != zeros or head.groups != 1:
            return f"a convolution with kernel {head.kernel_size}, stride {head.stride}, {head.groups} group(s)"
    return None


@dataclass(frozen=True)
class Inputs:
    """One head's records, and what follows from them alone, whatever the weights are.

    Attributes:
        records: usable ones, their features' last axis being D; a record's unit is an index in [0, U).
        reach_R: sqrt(|x|^2, + 1 with a bias), in double precision; None for records of several positions.
        factor_R: a record's weight times the task's scale; None where it is 1 for all.
        pairs_3Q: r, s and unit of all pairs of different records of a unit that is not too large.
        product_Q: x_r . x_s, + 1 with a bias, in double precision.
        single: whether record i is unit i's only one, for all units.
        most_records: largest number of records of one unit.
        bias: whether the head has one.
        maps: whether the head's outputs have their K before the positions, as a convolution's.
    """

    records: TaskRecords
    reach_R: Tensor | None
    factor_R: Tensor | None
    pairs_3Q: Tensor
    product_Q: Tensor
    single: bool
    most_records: int
    bias: bool
    maps: bool

    @classmethod
    def from_records(cls, head: nn.Module, records: TaskRecords, num_units: int, scale: float = 1.0) -> Inputs:
        """Returns the inputs of an affine head.

        Args:
            head: the head, of which only kind and shapes are used.
            records: usable records of its task.
            num_units: number of units U, with or without records.
            scale: public factor on the task's loss.
        """
        unit_R = records.unit_R
        single = len(unit_R) == num_units and torch.equal(unit_R, torch.arange(num_units, device=unit_R.device))
        most = min(1, len(unit_R)) if single else int(torch.bincount(unit_R, minlength=1).max())
        factor_R = records.weight_R * scale
        bias, maps = head.bias is not None, isinstance(head, _POINTWISE)
        if maps:  # The values of one position side by side: both products of a step then read in order.
            records = replace(records, features_RD=records.features_RD.movedim(1, -1).contiguous())
        features = records.features_RD
        vectors = features.dim() == 2
        pairs_3Q = _list_pairs(unit_R) if vectors and most > 1 else unit_R.new_empty((3, 0))
        if vectors:
            first, second = features[pairs_3Q[0]], features[pairs_3Q[1]]
            product_Q = torch.linalg.vecdot(first.double(), second.double()) + float(bias)
        return cls(
            records,
            reach_R=compute_row_norms(features).square_().add_(float(bias)).sqrt_() if vectors else None,
            factor_R=None if bool((factor_R == 1.0).all()) else factor_R,
            pairs_3Q=pairs_3Q,
            product_Q=product_Q if vectors else pairs_3Q[0].double(),
            single=single,
            most_records=most,
            bias=bias,
            maps=maps,
        )

    def compute_outputs(self, parts: Sequence[Tensor]) -> Tensor:
        """Returns the head's outputs, in the shape that its task expects.

        Args:
            parts: the head's weight_KD, and its bias_K if it has one.
        """
        outputs = nn.functional.linear(self.records.features_RD, parts[0], parts[1] if self.bias else None)
        return outputs.movedim(-1, 1) if self.maps else outputs

    def select_units(self, position_U: Tensor) -> Inputs:
        """Returns the records of some units; `position_U` is a unit's new index, or -1 for one that is left out."""
        records = self.records
        position_R = position_U[records.unit_R]
        rows = (position_R >= 0).nonzero().squeeze(1)
        chosen = records.taken(rows, position_R)
        reach_R = None if self.reach_R is None else self.reach_R[rows]
        factor_R = None if self.factor_R is None else self.factor_R[rows]
        kept = replace(self, records=chosen, reach_R=reach_R, factor_R=factor_R)
        if not len(self.product_Q):
            return kept
        row_R = torch.empty_like(position_R)
        row_R[rows] = torch.arange(len(rows), device=rows.device)
        both_Q = position_U[self.pairs_3Q[2]] >= 0
        first_Q, second_Q, unit_Q = self.pairs_3Q[:, both_Q]
        pairs_3Q = torch.stack([row_R[first_Q], row_R[second_Q], position_U[unit_Q]])
        return replace(kept, pairs_3Q=pairs_3Q, product_Q=self.product_Q[both_Q])


def _list_pairs(unit_R: Tensor) -> Tensor:
    """Returns r, s and unit of every pair of records of a unit of at most `_MOST_RECORDS` records."""
    order_R = torch.argsort(unit_R, stable=True)
    sorted_R = unit_R[order_R]
    count_R = torch.bincount(unit_R)[sorted_R] if len(unit_R) else unit_R
    pairs = [torch.empty((3, 0), dtype=torch.long, device=unit_R.device)]
    most = min(int(count_R.max()), _MOST_RECORDS) if len(unit_R) else 0
    for apart in range(1, most):
        # Records of a unit are neighbours in this order: all pairs with `apart - 1` records between them.
        same = (sorted_R[apart:] == sorted_R[:-apart]) & (count_R[apart:] <= _MOST_RECORDS)
        at = same.nonzero().squeeze(1)
        pairs.append(torch.stack([order_R[at], order_R[at + apart], sorted_R[at]]))
    return torch.cat(pairs, dim=1)


class Gradients(Protocol):
    """One head's gradients of all units of a batch, stored in any form.

    Attributes:
        norm_U: L2 norms, in double precision; infinite or NaN for a unit that must be left out.
    """

    norm_U: Tensor

    def add_weighted(self, factor_U: Tensor, sums: Sequence[Tensor]) -> None:
        """Adds factor times gradient of all units to the sums, the weight's first.

        Factor 0 adds nothing, not even a NaN.
        """


def compute_gradients(inputs: Inputs, delta: Tensor, num_units: int) -> Gradients:
    """Returns the units' gradients of an affine head.

    Args:
        inputs: the head's records in a batch.
        delta: gradient of the objective by the head's outputs, in their shape.
        num_units: number of units U in the batch.
    """
    if inputs.reach_R is not None:
        return _VectorGradients(inputs, delta, num_units)
    features_RPD = inputs.records.features_RD.flatten(1, -2)
    delta_RPK = delta.flatten(2).mT if inputs.maps else delta.flatten(1, -2)
    # One small product for each record; nothing of size R x P x D is made.
    weight_RKD = torch.bmm(delta_RPK.mT, features_RPD)
    formed_R = [weight_RKD] if not inputs.bias else [weight_RKD, delta_RPK.sum(dim=1)]
    return _FormedGradients([sum_by_unit(part, inputs.records.unit_R, num_units) for part in formed_R])


@final
class _FormedGradients:
    """Units' gradients, each stored whole."""

    def __init__(self, parts_U: Sequence[Tensor]) -> None:
        self._parts_U = [part.flatten(1) for part in parts_U]
        norm_U = compute_row_norms(self._parts_U[0])
        self.norm_U = norm_U if len(parts_U) == 1 else torch.hypot(norm_U, compute_row_norms(self._parts_U[1]))

    def add_weighted(self, factor_U: Tensor, sums: Sequence[Tensor]) -> None:
        left_out_U = factor_U == 0.0
        spoiled = bool(left_out_U.any())
        for total, part in zip(sums, self._parts_U, strict=True):
            finite = part.masked_fill(left_out_U[:, None], 0.0) if spoiled else part
            total.view(-1).addmv_(finite.mT, factor_U)


@final
class _VectorGradients:
    """Units' gradients of a linear head on vectors, stored as their two factors."""

    def __init__(self, inputs: Inputs, delta_RK: Tensor, num_units: int) -> None:
        assert inputs.reach_R is not None
        self._inputs = inputs
        self._delta_RK = delta_RK
        self._formed_U: dict[int, list[Tensor]] = {}
        norm_R = torch.linalg.vector_norm(delta_RK, dim=1, dtype=torch.double).mul_(inputs.reach_R)
        if inputs.single:
            self.norm_U = norm_R
            return
        unit_R = inputs.records.unit_R
        zero_U = norm_R.new_zeros(num_units)
        if inputs.most_records <= 1:
            self.norm_U = zero_U.index_add_(0, unit_R, norm_R)
            return
        square_U = zero_U.index_add(0, unit_R, norm_R.square())
        first_Q, second_Q, unit_Q = inputs.pairs_3Q
        exact_RK = delta_RK.double()
        cross_Q = 2.0 * torch.linalg.vecdot(exact_RK[first_Q], exact_RK[second_Q]) * inputs.product_Q
        self.norm_U = square_U.index_add_(0, unit_Q, cross_Q).clamp_(min=0.0).sqrt_()
        reach_U = zero_U.index_add_(0, unit_R, norm_R)
        unpaired_U = torch.bincount(unit_R, minlength=num_units) > _MOST_RECORDS
        self._form_gradients((unpaired_U | (reach_U > _MOST_CANCELLATION * self.norm_U)).nonzero().squeeze(1))

    def _form_gradients(self, units: Tensor) -> None:
        records = self._inputs.records
        for unit in units.tolist():
            rows = (records.unit_R == unit).nonzero().squeeze(1)
            delta_rK = self._delta_RK[rows]
            parts = [delta_rK.mT @ records.features_RD[rows]]
            if self._inputs.bias:
                parts.append(delta_rK.sum(dim=0))
            self._formed_U[unit] = parts
            self.norm_U[unit] = compute_row_norms(torch.cat([part.flatten() for part in parts])[None])[0]

    def add_weighted(self, factor_U: Tensor, sums: Sequence[Tensor]) -> None:
        for unit, parts in self._formed_U.items():
            if factor_U[unit] > 0.0:
                for total, part in zip(sums, parts, strict=True):
                    total.add_(factor_U[unit] * part)
        if self._formed_U:
            factor_U = factor_U.index_fill(0, torch.tensor(list(self._formed_U), device=factor_U.device), 0.0)
        records = self._inputs.records
        factor_R1 = (factor_U if self._inputs.single else factor_U[records.unit_R])[:, None]
        scaled_RK = self._delta_RK * factor_R1
        if float(factor_U.min()) == 0.0:
            scaled_RK = torch.where(factor_R1 > 0.0, scaled_RK, 0.0)
        sums[0].addmm_(scaled_RK.mT, records.features_RD)
        if self._inputs.bias:
            sums[1].add_(scaled_RK.sum(dim=0))
