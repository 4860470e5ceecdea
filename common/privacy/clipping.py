"""Gradients of records summed by unit, their joint norms over several heads, and the factors that clip them.

Invariant: whatever a unit's records hold, absurd or not finite, the unit's joint gradient is finite afterwards and
depends on that unit's records alone. A clip factor applied to it then bounds the unit's part of any sum.

# Shapes: R records, U units, P parameters; a gradient is R x (parameter's shape) or U x (parameter's shape).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST_NORM = 2.0**63


def sum_by_unit(gradient_R: Tensor, unit_R: Tensor, num_units: int) -> Tensor:
    """Returns records' gradients of one parameter summed by unit; units without a record get zero.

    Args:
        gradient_R: one gradient for each record, already weighted.
        unit_R: index of the record's unit in [0, num_units).
        num_units: number of units U.
    """
    if len(unit_R) == num_units and torch.equal(unit_R, torch.arange(num_units, device=unit_R.device)):
        return gradient_R
    sums_U = gradient_R.new_zeros((num_units, *gradient_R.shape[1:]))
    return sums_U.index_add_(0, unit_R, gradient_R)


def compute_joint_norms(gradients_U: Sequence[Tensor]) -> Tensor:
    """Returns norm_U, each unit's L2 norm over all parameters of all heads."""
    norms_UP = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients_U], dim=1)
    norm_U: Tensor = torch.linalg.vector_norm(norms_UP, dim=1)
    return norm_U


def zero_nonfinite(gradients_U: Sequence[Tensor]) -> list[Tensor]:
    """Returns the same gradients with every unit set to zero whose joint norm is not finite.

    A clip factor cannot do this: 0 * inf and NaN are NaN, and one such unit would reach every weight.
    """
    spoiled_U = ~torch.isfinite(compute_joint_norms(gradients_U))
    if not bool(spoiled_U.any()):
        return list(gradients_U)
    return [gradient.masked_fill(spoiled_U.reshape(-1, *([1] * (gradient.dim() - 1))), 0.0) for gradient in gradients_U]


def compute_row_norms(values: Tensor) -> Tensor:
    """Returns each row's L2 norm, in double precision, right for every finite float32 value.

    Squares of values beyond 1e19 or below 1e-19 leave float32; such rows are computed again in double precision.
    """
    rows = values.flatten(1)
    norm_R: Tensor = torch.linalg.vector_norm(rows, dim=1).double()
    doubtful_R = ~((norm_R > 1e-15) & (norm_R < 1e15))
    if bool(doubtful_R.any()):
        norm_R[doubtful_R] = torch.linalg.vector_norm(rows[doubtful_R].double(), dim=1)
    return norm_R


def compute_clip_factors(norm_U: Tensor, clip_norm: float) -> Tensor:
    """Returns factor_U (float32), which brings every unit's norm to at most `clip_norm`; 0 where no factor could.

    Args:
        norm_U: joint norms in double precision.
        clip_norm: bound on a unit's joint norm after scaling.
    """
    # Opacus' 1e-6, so that both solvers agree to the last digits.
    factor_U = (norm_U + 1e-6).reciprocal_().mul_(clip_norm).clamp_(max=1.0)
    # Beyond 2**63 a factor times a gradient would fall among float32's subnormals, whose rounding is coarse. One look
    # at the least factor, which is NaN where any is, says whether there is such a norm.
    if len(factor_U) and not float(factor_U.min()) > clip_norm / _LARGEST_NORM:
        factor_U = torch.where(norm_U < _LARGEST_NORM, factor_U, 0.0)
    return factor_U.float()
