"""A release in integers: what units contribute and what hides it are whole multiples of one public number.

Let C be the clip norm, sigma the noise multiplier and s the spacing, chosen so that sigma C = 2**m s for an integer
m. Every unit's part is an integer vector in multiples of s, truncated toward zero, of L2 norm at most C / s. Integers
below 2**53 add exactly in double precision, in any order, on any machine; so one unit more adds its own part to
the sum and changes nothing else. The noise is floor(2**m X) (`common.privacy.rounded_gaussian`): sum plus noise is the
Gaussian mechanism's output, rounded down to the lattice afterwards, and costs what the Gaussian mechanism costs.

Only the last step, back to floating point, rounds; it comes after the noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.privacy.rounded_gaussian import MAX_LOG2, MIN_LOG2
from common.types import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from common.privacy.noise import NoiseStream

BOUND_BITS = 42
"""A unit's part has a norm of at most 2**42 steps, less where the noise is very large."""

MAX_UNITS = 2 ** (53 - BOUND_BITS)
"""So many units' parts add exactly in double precision; sums of more are kept in int64."""


def bound_norms(values_UN: Tensor) -> Tensor:
    """Returns an upper bound (float64) of each row's L2 norm, the same wherever and beside whatever the row stands.

    Squares of whole numbers add exactly, in any order. The bound exceeds the norm by at most sqrt(N) 2**-b of the row's
    largest value, where b = (50 - log2 N) / 2; it is infinite or NaN for a row that is not finite.
    """
    import torch

    bits = (52 - max(0, values_UN.shape[1] - 1).bit_length()) // 2 - 1
    magnitude_UN = values_UN.double().abs()
    peak_U = magnitude_UN.amax(dim=1) if values_UN.shape[1] else magnitude_UN.new_zeros(len(values_UN))
    whole_UN = magnitude_UN.div_(torch.where(peak_U > 0.0, peak_U, 1.0)[:, None]).mul_(2.0**bits).ceil_()
    norm_U: Tensor = whole_UN.square_().sum(dim=1).sqrt_()
    return norm_U * peak_U * (2.0**-bits * (1.0 + 2.0**-40))


def check_unit_count(num_units: int) -> None:
    """Refuses more units than whose parts surely add up within 64 bits.

    Raises:
        BadInput: there are more than two million.
    """
    if num_units >= 2 ** (63 - BOUND_BITS):
        raise BadInput(f"expected fewer than {2 ** (63 - BOUND_BITS):,} units at one site")


@dataclass(frozen=True)
class Lattice:
    """The integers of one release.

    Attributes:
        spacing: s, the size of one integer step.
        log2_deviation: m; the noise has a standard deviation of 2**m steps.
        bound: C / s, the largest norm of one unit's part in steps; at most 2**BOUND_BITS.
    """

    spacing: float
    log2_deviation: int
    bound: float

    @classmethod
    def of(cls, clip_norm: float, noise_multiplier: float, *, bound_bits: int = BOUND_BITS) -> Lattice:
        """Returns the lattice of a release.

        Args:
            clip_norm: C.
            noise_multiplier: sigma.
            bound_bits: a unit's part has a norm of at most 2**bound_bits steps, where there is noise enough.

        Raises:
            BadInput: the noise is none, or too small or too large for any privacy.
        """
        if not 2.0**-22 <= noise_multiplier <= 2.0**40:
            raise BadInput(f"noise_multiplier: expected {2.0**-22:.0e} to {2.0**40:.0e}, got {noise_multiplier}")
        exponent = bound_bits + math.floor(math.log2(noise_multiplier))
        log2_deviation = min(max(exponent, MIN_LOG2), MAX_LOG2)
        spacing = noise_multiplier * clip_norm * 2.0**-log2_deviation
        return cls(spacing, log2_deviation, 2.0**log2_deviation / noise_multiplier)

    def compute_factors(self, norm_U: Tensor, slack_U: Tensor | float = 0.0) -> Tensor:
        """Returns factor_U, float64 from 0 to 1, that brings every unit's part within the bound.

        Args:
            norm_U: float64, upper bounds of the units' joint norms; infinite or NaN gives the factor 0.
            slack_U: largest norm, in steps, of what rounding may add to a unit's part.
        """
        # 2**-36 covers the rounding of these few operations.
        room_U = norm_U.new_full((), self.bound * (1.0 - 2.0**-36)).sub(slack_U).mul_(self.spacing)
        # What is not a number stays so up to the end; an infinite norm gives zero.
        return room_U.div(norm_U.clamp(min=2.0**-1000)).clamp_(0.0, 1.0).nan_to_num_(nan=0.0)

    def truncate(self, values_UP: Tensor, factor_U: Tensor) -> Tensor:
        """Returns factor * values in steps, truncated toward zero: exact integers, of no larger norm.

        Args:
            values_UP: U x ... in any precision.
            factor_U: a unit of factor 0 gives zeros, whatever its values are.
        """
        scale_U = (factor_U / self.spacing).view(-1, *(1,) * (values_UP.dim() - 1))
        return (values_UP.double() * scale_U).nan_to_num_(nan=0.0).trunc_()

    def release(self, total: Tensor, noise: NDArray[np.int64], stream: NoiseStream) -> Tensor:
        """Returns a sum with noise, in double precision.

        Args:
            total: the exact sum of units' parts in steps, whole numbers of any type.
            noise: drawn for this release alone, of deviation 2**log2_deviation.
            stream: the stream it was drawn from, which an audit looks through.
        """
        return self.add_noise(total, noise, stream).double().mul_(self.spacing)

    def add_noise(self, total: Tensor, noise: NDArray[np.int64], stream: NoiseStream) -> Tensor:
        """Returns a sum with noise in steps, int64.

        Args:
            total: the exact sum of units' parts in steps, whole numbers of any type.
            noise: drawn for this release alone, of deviation 2**log2_deviation.
            stream: the stream it was drawn from, which an audit looks through.
        """
        import torch

        stream.inspect(total, noise)
        added = torch.from_numpy(noise).to(total.device).view(total.shape)
        return added.add(total.long())
