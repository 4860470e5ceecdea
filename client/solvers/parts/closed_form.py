"""The clipped sum of a step in closed form and in integers, for heads that are one affine map.

A record's gradient is the outer product of its slope s (the derivative of its loss by the head's outputs) and its
features x; no gradient of a record is ever formed. With x = a q, q the integers of `QuantisedRows`:

    outputs     w . x = a (w_q . q) 2**-24          w_q: the weights on their grid; the product is an exact integer
    norm        |sum_r s_r x_r'|**2 = sum_rs (s_r . s_t)(x_r . x_t + 1)     + 1 only with a bias; rounded up
    part        sum_r t_r q_r',   t_r = trunc(s_r a_r f / spacing)          f: the unit's clip factor; an integer matrix

(Goodfellow 2015, arXiv 1510.01799; Rochette et al. 2019.) Records of several positions (1x1 convolutions) have their
small gradient formed, and so have the units with more than `MOST_RECORDS` records.

Guarantees, whatever features, labels and weights are:
- A unit's part is an integer array that follows from that unit alone: every number it is computed from is an exact
  integer, or comes from operations on single values that are rounded correctly (products, sums of two, square
  roots), or from a task's slopes, which are evaluated on whole blocks of `LANES` rows.
- The part's L2 norm over all heads is at most `Lattice.bound`: slopes are truncated toward zero; where a unit has
  several records its own threshold is lowered by the largest rounding they can have.
- The sum of the parts is exact.

# Shapes: R records, U units, D features, K outputs, P positions, Q pairs of records of one unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor, nn

from client.data.quantised import NORM_BITS, QuantisedRows
from client.data.units import TaskRecords
from common.privacy.compiled import open_library
from common.privacy.lattice import MAX_UNITS, Lattice, bound_norms
from common.tasks.parts.adjusted import AdjustedHead
from common.types import BadInput

WEIGHT_BITS = 24
"""Weights are multiples of 2**-24 while a step is computed."""


MOST_RECORDS = 32
"""Most records of a unit whose norm comes from pairs of them; the pairs of more would outgrow its gradient."""

MOST_CANCELLATION = 16
"""A unit's norm counts as at least a 16th of the sum of its records' norms: the terms of its part are then at most so
many times the part."""

LANES = 64
"""Rows on which a task's slopes are evaluated are a multiple of this, so that no row is in a loop's scalar remainder,
where an exponential may have other last bits."""

SLOPE_BITS = 20
_BLOCK_VALUES = 2**20
"""Features of a block in double precision: 8 MiB."""

BLOCK_OUTPUTS = 2**15
"""Outputs of a block: below torch's grain, so that no operation on single values is divided among threads."""

_MOST_REFINED = 2**22
"""Outputs at once at the places of masks: 32 MiB in double precision."""

_FEW_OUTPUTS = 3
_POINTWISE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

OutputGradient = Callable[[Tensor, Tensor], Tensor]
"""A head's outputs and the records' labels -> gradient of each record's loss by its outputs."""


def get_affine(head: nn.Module) -> nn.Module:
    """Returns the layer of a head that trains: the head itself, or what stands between its fixed steps."""
    return head.layers if type(head) is AdjustedHead else head


def describe_head(head: nn.Module) -> tuple[object, ...]:
    """Returns everything of an affine head that its `Inputs` follow from, beside the records: nothing that trains."""
    layer = get_affine(head)
    return type(head), type(layer), layer.bias is not None, *(each.cpu().numpy().tobytes() for each in head.buffers())


def check_affine(heads: Mapping[str, nn.Module], solver: str = "dp_gd") -> None:
    """Refuses heads for which the formula is not exact, and trunks.

    Args:
        heads: parameter group -> head or trunk.
        solver: kind of the solver, for the message.

    Raises:
        BadInput: a head is anything but one linear layer or 1x1 convolution with all its parameters trainable.
    """
    for name, head in heads.items():
        if "." in name:
            raise BadInput(
                f"trainable: solver {solver} trains heads on frozen features and no part of a backbone; kind dp_sgd "
                "does"
            )
        reason = _explain_not_affine(get_affine(head))
        if reason:
            raise BadInput(
                f"tasks.{name}.head: solver {solver} is exact only for a linear head or a 1x1 convolution, got "
                f"{reason}; kind dp_sgd trains it"
            )


def _explain_not_affine(head: nn.Module) -> str | None:
    """Returns why a head is not one affine map; None where it is one."""
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


def round_weights(weights: Tensor) -> Tensor:
    """Returns weights on their grid, in double precision."""
    return weights.double().mul(2.0**WEIGHT_BITS).round_().mul_(2.0**-WEIGHT_BITS)


def compute_outputs(rows: QuantisedRows, weight_KD: Tensor, bias_K: Tensor | None) -> Tensor:
    """Returns ... x K outputs of an affine map in double precision; a row's depend on that row alone.

    Args:
        rows: ... x D.
        weight_KD: on the grid (`round_weights`), each row of norm at most MAX_ROW_NORM.
        bias_K: added to the exact product.
    """
    # Multiples of 2**-24 are as exact as whole numbers.
    integers = rows.integers.double()
    # The same numbers in either order; each is faster where it is taken.
    product = (weight_KD @ integers.mT).mT if len(weight_KD) <= _FEW_OUTPUTS else integers @ weight_KD.mT
    product.mul_(rows.scale.unsqueeze(-1))
    return product if bias_K is None else product.add_(bias_K)


@dataclass(frozen=True)
class Inputs:
    """One head's records, those of a unit side by side, and what of them stays the same while weights move.

    Attributes:
        rows: R x D, or R x P x D.
        labels: R x the task's label shape.
        unit_R: index of the record's unit in [0, num_units), ascending.
        start_U: first record of each unit, and R: U + 1 values.
        factor_R: float64, the record's weight in its unit times the task's scale.
        reach_R: float64, an upper bound of sqrt(|x|**2, + 1 with a bias); zeros for maps, whose gradients
            are formed.
        pairs_3Q: r, t and unit of all pairs of different records of a unit that is not too large, by unit.
        product_Q: float64, x_r . x_t, + 1 with a bias.
        bias: whether the head has one.
        offset_K: float64, what is added to the outputs and does not train; None where nothing is.
        positions: shape of a record's positions; None where it has one only.
        maps: whether the head's outputs have their K before the positions, as a convolution's.
    """

    rows: QuantisedRows
    labels: Tensor
    unit_R: Tensor
    start_U: Tensor
    factor_R: Tensor
    reach_R: Tensor
    pairs_3Q: Tensor
    product_Q: Tensor
    bias: bool
    offset_K: Tensor | None
    positions: torch.Size | None
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
        order_R = torch.argsort(records.unit_R, stable=True)
        sorted_records = records if bool((records.unit_R.diff() >= 0).all()) else records.taken(order_R, records.unit_R)
        unit_R, maps = sorted_records.unit_R, isinstance(head, _POINTWISE)
        features = sorted_records.features_RD.movedim(1, -1) if maps else sorted_records.features_RD
        offset_K = None
        if isinstance(head, AdjustedHead):
            features, offset_K = head.adjust(features), head.offset_K
        vectors = features.dim() == 2
        # Of the store where a head reads just these: quantised again they would be the same.
        rows = sorted_records.rows if features is sorted_records.features_RD else None
        rows = QuantisedRows.of(features) if rows is None else rows.typed()
        rows = rows if vectors else QuantisedRows(rows.integers.flatten(1, -2), rows.scale.flatten(1))
        bias = get_affine(head).bias is not None
        counts_U = torch.bincount(unit_R, minlength=num_units)
        pairs_3Q = _pair_records(unit_R, counts_U) if vectors else unit_R.new_empty((3, 0))
        return cls(
            rows,
            sorted_records.labels,
            unit_R,
            torch.cat([counts_U.new_zeros(1), counts_U.cumsum(0)]),
            factor_R=sorted_records.weight_R.double() * scale,
            reach_R=_bound_reach(rows, bias) if vectors else rows.scale.new_zeros(len(rows)),
            pairs_3Q=pairs_3Q,
            product_Q=_pair_products(rows, pairs_3Q, bias),
            bias=bias,
            offset_K=None if offset_K is None else offset_K.double(),
            positions=None if vectors else features.shape[1:-1],
            maps=maps,
        )

    @property
    def num_units(self) -> int:
        """U."""
        return len(self.start_U) - 1

    @property
    def lanes(self) -> int:
        """Records of whole lanes: the places of a record fill lanes of their own."""
        return LANES // math.gcd(LANES, math.prod(self.positions or ()))

    @cached_property
    def counts_U(self) -> Tensor:
        """Records of each unit."""
        return self.start_U.diff()

    @cached_property
    def most_records(self) -> int:
        """Records of the unit that has most."""
        return int(self.counts_U.max()) if len(self.counts_U) else 0

    @cached_property
    def formed_U(self) -> Tensor:
        """The units whose gradients are formed."""
        if self.positions is not None:
            return torch.arange(self.num_units, device=self.unit_R.device)
        return (self.counts_U > MOST_RECORDS).nonzero().squeeze(1)

    def select(self, members: Tensor) -> Inputs:
        """Returns the records of some units, in ascending order, which become units 0, 1, ..."""
        position_U = torch.full((self.num_units,), -1, device=self.unit_R.device)
        position_U[members] = torch.arange(len(members), device=self.unit_R.device)
        position_R = position_U[self.unit_R]
        rows = (position_R >= 0).nonzero().squeeze(1)
        row_R = torch.full_like(position_R, -1)
        row_R[rows] = torch.arange(len(rows), device=rows.device)
        chosen_Q = position_U[self.pairs_3Q[2]] >= 0
        first_Q, second_Q, unit_Q = self.pairs_3Q[:, chosen_Q]
        counts_U = self.start_U.diff()[members]
        return replace(
            self,
            rows=self.rows[rows],
            labels=self.labels[rows],
            unit_R=position_R[rows],
            start_U=torch.cat([counts_U.new_zeros(1), counts_U.cumsum(0)]),
            factor_R=self.factor_R[rows],
            reach_R=self.reach_R[rows],
            pairs_3Q=torch.stack([row_R[first_Q], row_R[second_Q], position_U[unit_Q]]),
            product_Q=self.product_Q[chosen_Q],
        )

    def slice(self, first: int, last: int) -> Inputs:
        """Returns the records of the units `first` to `last` - 1; views, nothing is copied."""
        if (first, last) == (0, self.num_units):
            return self
        start, end = int(self.start_U[first]), int(self.start_U[last])
        bounds = torch.searchsorted(self.pairs_3Q[2], torch.tensor([first, last], device=self.unit_R.device))
        low, high = bounds.tolist()
        offsets = torch.tensor([[start], [start], [first]], device=self.unit_R.device)
        return replace(
            self,
            rows=self.rows[start:end],
            labels=self.labels[start:end],
            unit_R=self.unit_R[start:end] - first,
            start_U=self.start_U[first : last + 1] - start,
            factor_R=self.factor_R[start:end],
            reach_R=self.reach_R[start:end],
            pairs_3Q=self.pairs_3Q[:, low:high] - offsets,
            product_Q=self.product_Q[low:high],
        )


@final
class _Gradients:
    """One head's gradients of a block's units, kept as slopes and features; nothing of size U x K x D but where said.

    Attributes:
        norm_U: upper bounds of the gradients' norms, in the units of features; infinite or NaN where there is none.
        slack_U: the largest norm of what truncating the slopes adds to a unit's part, in steps of the lattice.
    """

    def __init__(self, inputs: Inputs, slopes: Tensor) -> None:
        self._inputs = inputs
        self._slopes_RK = slopes * inputs.factor_R.view(-1, *(1,) * (slopes.dim() - 1))
        self._formed: list[_Formed] = []
        self.slack_U: Tensor | float = 0.0
        if inputs.positions is None:
            self.norm_U = self._bound_norms()
        else:
            self.norm_U = torch.zeros(inputs.num_units, dtype=torch.double, device=slopes.device)
        if not len(inputs.formed_U):
            return
        for units in torch.split(inputs.formed_U, _count_formed(inputs, slopes.shape[-1])):
            formed = _Formed.of(inputs, self._slopes_RK, units)
            self._formed.append(formed)
            self.norm_U[units] = formed.norm_U
            if isinstance(self.slack_U, Tensor):
                self.slack_U[units] = 0.0

    def _bound_norms(self) -> Tensor:
        """Returns norm_U from pairs of records, and sets the slack where a unit has several."""
        inputs, num_outputs = self._inputs, self._slopes_RK.shape[1]
        peak_R = self._slopes_RK.abs().amax(dim=1)
        # Slopes below 2**-1000 add nothing to any part.
        whole_RK = (self._slopes_RK * (2.0**SLOPE_BITS / peak_R.clamp(min=2.0**-1000))[:, None]).round_()
        square_R = whole_RK.square().sum(dim=1).mul_(2.0 ** (-2 * SLOPE_BITS))
        # What rounding `whole` may have taken from the norm, for each record.
        rounding, slack = bound_rounding(num_outputs)
        weight_R = peak_R * inputs.reach_R
        norm_R: Tensor = square_R.sqrt().add_(rounding).mul_(weight_R).mul_(1.0 + 2.0**-40)
        # Also where each unit has one record: a single missing label would show in the time.
        zero_U = torch.zeros(inputs.num_units, dtype=torch.double, device=norm_R.device)
        reach_U = zero_U.index_add(0, inputs.unit_R, norm_R)
        if inputs.most_records <= 1:
            return reach_U
        square_U = zero_U.index_add(0, inputs.unit_R, square_R * weight_R.square())
        first_Q, second_Q, unit_Q = inputs.pairs_3Q
        dot_Q = (whole_RK[first_Q] * whole_RK[second_Q]).sum(dim=1).mul_(2.0 ** (1 - 2 * SLOPE_BITS))
        square_U.index_add_(0, unit_Q, dot_Q * peak_R[first_Q] * peak_R[second_Q] * inputs.product_Q)
        norm_U = (square_U.clamp_(min=0.0) + reach_U.square() * 2.0**-40).sqrt_()
        norm_U += zero_U.index_add(0, inputs.unit_R, weight_R * rounding)
        several_U = inputs.counts_U > 1
        self.slack_U = torch.where(several_U, inputs.counts_U.double() * slack, 0.0)
        # A unit of one record has the norm that it has in a block of such units alone.
        return torch.where(several_U, torch.maximum(norm_U, reach_U / MOST_CANCELLATION), reach_U)

    def add_clipped(self, factor_U: Tensor, lattice: Lattice, totals: Sequence[Tensor], exact: Tensor) -> None:
        """Adds the units' parts to integer totals.

        Args:
            factor_U: clip factors; a unit of factor 0 adds nothing, whatever its slopes are.
            lattice: of the release.
            totals: weight's K x D and the bias's K where there is one.
            exact: the block's integers in double precision.
        """
        inputs = self._inputs
        for formed in self._formed:
            formed.add_clipped(factor_U[formed.units], lattice, totals)
            factor_U = factor_U.index_fill(0, formed.units, 0.0)
        if inputs.positions is not None:
            return
        factor_R = factor_U[inputs.unit_R].div_(lattice.spacing)
        # A slope that is not finite has the factor 0.
        slopes_RK = self._slopes_RK.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        parts_RK = (slopes_RK * (factor_R * inputs.rows.scale)[:, None]).trunc_()
        if totals[0].is_floating_point():
            totals[0].addmm_(parts_RK.mT, exact)
        else:
            totals[0].add_((parts_RK.mT @ exact).long())
        if inputs.bias:
            totals[1].add_(slopes_RK.mul_(factor_R[:, None]).trunc_().sum(dim=0).to(totals[1].dtype))


def bound_rounding(num_outputs: int) -> tuple[float, float]:
    """Returns what rounding its slopes to 20 bits may take from a record's norm, in units of its largest slope, and the
    largest norm of what truncating them adds to its part, in steps of the lattice."""
    return 0.501 * num_outputs**0.5 * 2.0**-SLOPE_BITS, num_outputs**0.5 * (2.0**NORM_BITS + 1.0)


@dataclass(frozen=True)
class _Formed:
    """Gradients of some units of a block as they are: integers, and a scale for each unit.

    Attributes:
        units: their indices in the block.
        weight_UKD: exact integers below 2**53.
        bias_UK: likewise; None without a bias.
        scale_U2: what an integer of the weight and of the bias is worth.
        norm_U: upper bounds of the gradients' norms.
    """

    units: Tensor
    weight_UKD: Tensor
    bias_UK: Tensor | None
    scale_U2: Tensor
    norm_U: Tensor

    @classmethod
    def of(cls, inputs: Inputs, slopes: Tensor, units: Tensor) -> _Formed:
        """Returns the gradients of some units; nothing of a unit depends on the others.

        Args:
            inputs: the block's.
            slopes: R x K, or R x P x K, weighted.
            units: indices in the block.
        """
        counts_U = inputs.counts_U[units]
        most = int(counts_U.max())
        place_UN = torch.arange(most, device=units.device)
        there_UN = place_UN < counts_U[:, None]
        record_UN = torch.where(there_UN, inputs.start_U[units][:, None] + place_UN, 0)
        rows = inputs.rows[record_UN]
        own = torch.where(there_UN.view(*there_UN.shape, *(1,) * (slopes.dim() - 1)), slopes[record_UN], 0.0)
        slopes_UNK, scale_UN = own.flatten(1, -2), rows.scale.flatten(1)
        integers_UND = rows.integers.flatten(1, -2).double()
        # A unit's own number of rows decides how many bits of each product there are.
        positions = slopes_UNK.shape[1] // most
        bits_U = 52 - NORM_BITS - torch.bucketize(counts_U * positions, 2 ** torch.arange(40, device=units.device))
        weight, weight_scale_U = _to_integers(slopes_UNK * scale_UN[..., None], bits_U)
        weight_UKD = weight.mT @ integers_UND
        norm_U = bound_norms(weight_UKD.flatten(1)) * weight_scale_U
        if not inputs.bias:
            return cls(units, weight_UKD, None, torch.stack([weight_scale_U, weight_scale_U], dim=1), norm_U)
        bias, bias_scale_U = _to_integers(slopes_UNK, bits_U)
        bias_UK = bias.sum(dim=1)
        norm_U = (norm_U.square() + (bound_norms(bias_UK) * bias_scale_U).square()).sqrt_() * (1.0 + 2.0**-40)
        return cls(units, weight_UKD, bias_UK, torch.stack([weight_scale_U, bias_scale_U], dim=1), norm_U)

    def add_clipped(self, factor_U: Tensor, lattice: Lattice, totals: Sequence[Tensor]) -> None:
        """Adds the units' parts to integer totals.

        Args:
            factor_U: clip factors of these units.
            lattice: of the release.
            totals: weight's K x D and the bias's K where there is one.
        """
        factor_U2 = torch.where(factor_U[:, None] > 0.0, self.scale_U2 * (factor_U / lattice.spacing)[:, None], 0.0)
        for total, whole, factor in zip(totals, (self.weight_UKD, self.bias_UK), factor_U2.unbind(1), strict=False):
            assert whole is not None
            factor = factor.view(-1, *(1,) * (whole.dim() - 1))
            total.add_(torch.where(factor > 0.0, whole * factor, 0.0).trunc_().sum(dim=0).long())


def split_blocks(
    inputs: Mapping[str, Inputs], num_units: int, widths: Mapping[str, int]
) -> Iterator[dict[str, Inputs]]:
    """Yields the inputs of consecutive units, few enough for a core's cache; heads without a record are left out.

    Args:
        inputs: task -> its inputs, of the same units.
        num_units: U.
        widths: task -> K.
    """
    # Units of a block: by the mean number of records, which no exactness rests on.
    cost, lanes = 1.0, 1
    for name, own in inputs.items():
        values = own.rows.integers[0].numel() if len(own.unit_R) else 0
        positions = max(1, values // max(1, own.rows.integers.shape[-1])) if values else 1
        outputs = positions * widths[name] * (_BLOCK_VALUES / BLOCK_OUTPUTS)
        cost = max(cost, max(values, outputs) * len(own.unit_R) / max(1, num_units))
        # Fewer records would be filled up to whole lanes, and the slopes of what is added be computed in vain.
        lanes = max(lanes, min(own.lanes, _BLOCK_VALUES // max(1, values)) if own.positions is not None else 1)
    size = max(1, min(_count_exact(inputs), max(lanes, int(_BLOCK_VALUES / cost))))
    size -= size % LANES if size > LANES else 0
    for first in range(0, num_units, size):
        block = {name: own.slice(first, min(first + size, num_units)) for name, own in inputs.items()}
        yield {name: own for name, own in block.items() if len(own.unit_R)}


def choose_total_type(inputs: Mapping[str, Inputs], num_units: int) -> torch.dtype:
    """Returns the type in which the parts of all units add exactly: double precision where they are few, else int64."""
    return torch.double if num_units <= _count_exact(inputs) else torch.int64


def _count_exact(inputs: Mapping[str, Inputs]) -> int:
    """Returns the number of units whose parts, and all terms of these, add exactly in double precision."""
    several = any(own.most_records > 1 for own in inputs.values())
    most: int = MAX_UNITS // (MOST_CANCELLATION if several else 1)
    return most


def add_clipped_parts(
    block: Mapping[str, Inputs],
    weights: Mapping[str, Sequence[Tensor]],
    output_gradients: Mapping[str, OutputGradient],
    lattice: Lattice,
    totals: Mapping[str, Sequence[Tensor]],
) -> None:
    """Adds the jointly clipped gradients of a block's units, in steps of the lattice, to integer totals.

    Args:
        block: task -> its inputs, of the same units.
        weights: task -> weight_KD and, where there is one, bias_K, on the grid.
        output_gradients: task -> gradient of its loss by the head's outputs.
        lattice: of the release.
        totals: task -> sums of the weights' shapes, of the type that `choose_total_type` returns or int64; changed in
            place.
    """
    gradients, exact = {}, {}
    for name, inputs in block.items():
        rows = inputs.rows.widen()
        exact[name] = rows.integers
        gradients[name] = _Gradients(inputs, _compute_slopes(inputs, rows, weights[name], output_gradients[name]))
    parts = list(gradients.values())
    if not parts:
        return
    norm_U, slack_U = parts[0].norm_U, parts[0].slack_U
    for part in parts[1:]:
        norm_U, slack_U = (norm_U.square() + part.norm_U.square()).sqrt(), slack_U + part.slack_U
    factor_U = lattice.compute_factors(norm_U, slack_U)
    for name, part in gradients.items():
        part.add_clipped(factor_U, lattice, totals[name], exact[name])


def _compute_slopes(
    inputs: Inputs, rows: QuantisedRows, weights: Sequence[Tensor], output_gradient: OutputGradient
) -> Tensor:
    """Returns R x K, or R x P x K, of a block: evaluated on whole lanes, the added rows cut off again."""
    outputs = compute_outputs(rows, weights[0], weights[1] if inputs.bias else None)
    if inputs.offset_K is not None:
        outputs = outputs + inputs.offset_K
    padded, labels = (pad_rows(values, inputs.lanes) for values in (outputs, inputs.labels))
    return evaluate_slopes(inputs, padded, labels, output_gradient)


def pad_rows(values: Tensor, lanes: int) -> Tensor:
    """Returns whole lanes of rows: those added are the first row's."""
    missing = -len(values) % lanes
    return torch.cat([values, values[:1].expand(missing, *values.shape[1:])]) if missing else values


def evaluate_slopes(inputs: Inputs, padded: Tensor, labels: Tensor, output_gradient: OutputGradient) -> Tensor:
    """Returns R x K, or R x P x K, slopes in double precision.

    Args:
        inputs: a block's.
        padded: outputs of whole lanes.
        labels: labels of whole lanes.
        output_gradient: gradient of the task's loss by the head's outputs.
    """
    count = len(inputs.labels)
    if inputs.positions is None:
        return output_gradient(padded, labels)[:count].double()
    shaped = padded.view(len(padded), *inputs.positions, -1)
    shaped = shaped.movedim(-1, 1) if inputs.maps else shaped
    # A task may refine outputs to as many places as a mask has: few records at once.
    size = max(1, _MOST_REFINED // (labels[0].numel() * padded.shape[-1]) // inputs.lanes) * inputs.lanes
    parts = zip(torch.split(shaped, size), torch.split(labels, size), strict=True)
    found = torch.cat([output_gradient(*part) for part in parts])[:count].double()
    return found.flatten(2).mT if inputs.maps else found.flatten(1, -2)


def _bound_reach(rows: QuantisedRows, bias: bool) -> Tensor:
    return (rows.bound_norms().square_() + float(bias)).sqrt_()


def _pair_records(unit_R: Tensor, counts_U: Tensor) -> Tensor:
    """Returns r, t and unit of every pair of records of a unit of at most `MOST_RECORDS` records, by unit."""
    found = [torch.empty((3, 0), dtype=torch.long, device=unit_R.device)]
    count_R = counts_U[unit_R]
    most = min(int(counts_U.max()), MOST_RECORDS) if len(unit_R) else 0
    for apart in range(1, most):
        same = (unit_R[apart:] == unit_R[:-apart]) & (count_R[apart:] <= MOST_RECORDS)
        at = same.nonzero().squeeze(1)
        found.append(torch.stack([at, at + apart, unit_R[at]]))
    pairs_3Q = torch.cat(found, dim=1)
    return pairs_3Q[:, torch.argsort(pairs_3Q[2], stable=True)]


def _pair_products(rows: QuantisedRows, pairs_3Q: Tensor, bias: bool) -> Tensor:
    """Returns x_r . x_t, + 1 with a bias, of pairs of records; the integers' product is exact."""
    integers, (first_Q, second_Q, _) = rows.integers, pairs_3Q
    if not len(first_Q):
        return torch.empty(0, dtype=torch.double, device=integers.device)
    if integers.dtype == torch.int16 and integers.device.type == "cpu" and (library := open_library()) is not None:
        whole_Q = library.multiply_pairs(integers.contiguous(), first_Q, second_Q)
    else:
        at_once = max(1, _BLOCK_VALUES // max(1, integers.shape[-1]))
        blocks = zip(torch.split(first_Q, at_once), torch.split(second_Q, at_once), strict=True)
        whole_Q = torch.cat([(integers[first].double() * integers[second]).sum(dim=1) for first, second in blocks])
    return whole_Q * rows.scale[first_Q] * rows.scale[second_Q] + float(bias)


def _count_formed(inputs: Inputs, num_outputs: int) -> int:
    """Returns how many units' gradients are formed at once: their features and gradients fit into memory."""
    record = inputs.rows.integers[0].numel()
    values: int = inputs.most_records * record + num_outputs * inputs.rows.integers.shape[-1]
    return max(1, _BLOCK_VALUES * 8 // max(1, values))


def _divide(values: Tensor, peak: Tensor) -> Tensor:
    """Returns values / peak; zeros where the peak is zero."""
    return values / torch.where(peak > 0.0, peak, 1.0)


def _to_integers(values_UNK: Tensor, bits_U: Tensor) -> tuple[Tensor, Tensor]:
    """Returns values as integers of at most 2**bits, truncated toward zero, and each unit's scale."""
    peak_U = values_UNK.abs().amax(dim=(1, 2))
    powers = torch.tensor([2.0**-bits for bits in range(53)], dtype=torch.double, device=values_UNK.device)
    scale_U = peak_U * powers[bits_U]
    return _divide(values_UNK, scale_U.view(-1, 1, 1)).trunc_(), scale_U
