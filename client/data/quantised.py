"""Features as 16-bit integers with one scale for each row: what makes outputs and sums exact.

A row is x = scale * q, where q holds integers with |q| < 2**15 in L2 and the scale is a power of two: float32 holds x
exactly, and quantising x again changes nothing. A row's integers and scale follow from that row alone.

For weights that are integers w_q with |w_q| <= 2**38 every partial sum of q . w_q is an integer of at most 2**53, which
double precision holds exactly: a row's output does not depend on the other rows of the product, on their number or on
the machine's way of adding.

# Shapes: R rows (records, or positions of records), D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.privacy.compiled import open_library

_BLOCK_VALUES = 2**16
_WIDE_VALUES = 2**21
"""Up to so many integers are kept in double precision (16 MiB), as products want them; more as 16 bits."""

_ZERO_EXPONENT = -(2**15)
"""Packed exponent of a row of zeros: two to this power is zero."""

_SMALL_BITS = 7
_SMALL_ZERO = -(2**7)
"""Bits of a value of a row in 8 bits, without its sign, and the exponent of a row of zeros."""

_PEAK_BITS = 16
NORM_BITS = 15
"""A row of integers has an L2 norm of at most 2**15."""


@dataclass(frozen=True)
class QuantisedRows:
    """Rows of features.

    Attributes:
        integers: ... x D, of type float64, or int16 where they are many or compiled code reads them; the norm over the
            last axis is at most 2**15.
        scale: float64, of the integers' shape without D; a row that could not be used has NaN.
        norms: what `bound_norms` returns, where it is known already.
    """

    integers: Tensor
    scale: Tensor
    norms: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor) -> QuantisedRows:
        """Returns rows truncated toward zero, so that none gets longer.

        Args:
            values: ... x D in any floating-point type.
        """
        library = open_library()
        if library is not None and values.dtype == torch.float32 and values.device.type == "cpu" and values.numel():
            integers, scale, norms = library.quantise(values.reshape(-1, values.shape[-1]).contiguous())
            shape = values.shape[:-1]
            return cls(integers.view(values.shape), scale.view(shape), norms.view(shape))
        # In blocks that a core's cache holds: a row's integers are the same in any block.
        blocks = torch.split(values, max(1, _BLOCK_VALUES // max(1, values[:1].numel())))
        parts = [cls._of_block(block, wide=values.numel() <= _WIDE_VALUES) for block in blocks]
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([part.integers for part in parts]), torch.cat([part.scale for part in parts]))

    @classmethod
    def _of_block(cls, values: Tensor, *, wide: bool) -> QuantisedRows:
        exact = values.to(torch.double, copy=True)
        width = exact.shape[-1]
        magnitude = exact.abs()
        peak = magnitude.amax(dim=-1, keepdim=True) if width else exact.new_zeros((*exact.shape[:-1], 1))
        usable = torch.isfinite(peak) & (peak > 0.0)
        unusable_scale = torch.where(torch.isfinite(peak), 0.0, torch.nan)
        peak = _round_up_to_power(torch.where(usable, peak, 1.0))
        # Rounded away from zero; sums of squares of whole numbers below 2**53 are the same in any order.
        whole = magnitude.mul_(2.0**_PEAK_BITS / peak).ceil_()
        norm = torch.linalg.vector_norm(whole, dim=-1, keepdim=True)
        scale = _round_up_to_power(torch.where(usable, norm, 1.0)) * peak * 2.0 ** -(_PEAK_BITS + NORM_BITS)
        # A power of two has an exact inverse.
        integers = exact.mul_(1.0 / scale).trunc_().masked_fill_(~usable, 0.0)
        scale = torch.where(usable, scale, unusable_scale)
        return cls(integers.to(torch.double if wide else torch.int16), scale.squeeze(-1))

    def __len__(self) -> int:
        return len(self.integers)

    def __getitem__(self, rows: Tensor | slice) -> QuantisedRows:
        return QuantisedRows(self.integers[rows], self.scale[rows])

    def widen(self) -> QuantisedRows:
        """Returns the same rows in double precision, as products want them."""
        return QuantisedRows(self.integers.double(), self.scale)

    def typed(self) -> QuantisedRows:
        """Returns the same rows in the type that `of` gives to so many: what is compiled reads 16 bits."""
        is_wide = self.integers.numel() <= _WIDE_VALUES and open_library() is None
        return self.widen() if is_wide else self

    def to(self, device: torch.device) -> QuantisedRows:
        """Returns the same rows on a device."""
        return QuantisedRows(self.integers.to(device), self.scale.to(device))

    def bound_norms(self) -> Tensor:
        """Returns an upper bound (float64) of each row's L2 norm, of the scale's shape: the squares add exactly."""
        if self.norms is not None:
            return self.norms.clone()
        norm: Tensor = torch.linalg.vector_norm(self.integers.double(), dim=-1)
        return norm.mul_(1.0 + 2.0**-50).mul_(self.scale)

    def decode(self) -> Tensor:
        """Returns the rows as float32, ... x D."""
        decoded = torch.empty(self.integers.shape, dtype=torch.float32, device=self.integers.device)
        at_once = max(1, _BLOCK_VALUES // max(1, self.integers[:1].numel()))
        parts = (torch.split(each, at_once) for each in (decoded, self.integers, self.scale))
        for part, integers, scale in zip(*parts, strict=True):
            part.copy_(integers * scale.unsqueeze(-1))
        return decoded

    @classmethod
    def unpack(cls, packed: NDArray[np.int16]) -> QuantisedRows:
        """Returns rows as `pack_rows` packed them, ... x (1 + D)."""
        return cls(torch.from_numpy(packed[..., 1:]), torch.from_numpy(np.ldexp(1.0, packed[..., 0].astype(np.int32))))


def pack_rows(values: Tensor) -> NDArray[np.int16]:
    """Returns finite rows ... x D as ... x (1 + D): each row's exponent of two, then its integers.

    What is unpacked has the same integers and scales as the decoded rows have when they are quantised again.
    """
    # Truncation may bring a row's norm below a power of two: the second time its scale is half as large, then it stays.
    rows = QuantisedRows.of(QuantisedRows.of(values).decode())
    mantissa, exponent = np.frexp(rows.scale.numpy())
    packed = np.empty((*values.shape[:-1], 1 + values.shape[-1]), np.int16)
    packed[..., 0] = np.where(mantissa > 0.0, exponent - 1, _ZERO_EXPONENT)
    packed[..., 1:] = rows.integers.numpy()
    return packed


def pack_small_rows(values: Tensor) -> NDArray[np.int8]:
    """Returns finite rows ... x D in 8 bits, ... x (1 + D): each row's exponent of two, then its integers.

    A value is off by at most a 128th of its row's largest. Training's 16-bit integers keep exactly what is decoded.
    """
    peak = values.abs().amax(dim=-1, keepdim=True).double()
    # A row of less than 2**-121, the shortest that an exponent of 8 bits holds, is one of zeros.
    _, exponent = torch.frexp(peak)
    exponent = torch.where(peak > 0.0, exponent - _SMALL_BITS, _SMALL_ZERO).clamp(min=_SMALL_ZERO)
    whole = torch.ldexp(values.double(), -exponent).round_().clamp_(-(2**_SMALL_BITS - 1), 2**_SMALL_BITS - 1)
    whole.masked_fill_(exponent == _SMALL_ZERO, 0.0)
    return torch.cat([exponent.to(torch.int8), whole.to(torch.int8)], dim=-1).numpy()


def unpack_small_rows(packed: NDArray[np.int8]) -> Tensor:
    """Returns rows as `pack_small_rows` packed them, as float32."""
    return torch.from_numpy(np.ldexp(packed[..., 1:].astype(np.float32), packed[..., :1].astype(np.int32)))


def _round_up_to_power(values: Tensor) -> Tensor:
    """Returns for each positive value the least power of two above it, exactly."""
    mantissa, _ = torch.frexp(values)
    return values / mantissa
