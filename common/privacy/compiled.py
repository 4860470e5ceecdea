"""The compiled form of exact sums and of their noise: `exact.c` and `products.c`, built where the package is installed.

It returns what the Python code returns, to the bit; where it is missing, or `HEADWATER_COMPILED=0`, that code runs.

# Shapes: R rows, D features.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from common.privacy.rounded_gaussian import Tables

SWITCH = "HEADWATER_COMPILED"
"""Environment variable: 0 leaves the compiled code out."""

_VERSION = 3
_MODULE = "headwater_exact"
_KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_long, "d": ctypes.c_double, "i": ctypes.c_int}
_ARGUMENTS = {
    "draw_gaussian": "ppnpnppppipp",
    "quantise": "pnnppp",
    "compute_block": "pn",
    "add_block": "pnndddp",
    "multiply_exactly": "pnnpnp",
    "add_exactly": "ppnnnip",
    "multiply_pairs": "pnppnp",
    "limit_width": "i",
    "update": "ppndppdpippp",
}
"""Function -> kinds of its arguments: pointer, number, double, int."""


@cache
def open_library() -> Library | None:
    """Returns the compiled code; None where there is none for this processor, or it is left out."""
    if os.environ.get(SWITCH) == "0":
        return None
    # Beside the installed packages: a Flower app has its own copy of this room, without what is compiled.
    found = find_spec(_MODULE)
    if found is None or found.origin is None:
        return None
    code = ctypes.CDLL(found.origin)
    return Library(code) if code.version() == _VERSION else None


@final
class Library:
    """The functions of `exact.c` on contiguous tensors of this machine's memory; other threads run meanwhile."""

    def __init__(self, code: ctypes.CDLL) -> None:
        self.code = code
        for name, kinds in _ARGUMENTS.items():
            getattr(code, name).argtypes = [_KINDS[kind] for kind in kinds]
        code.update.restype = ctypes.c_double

    def draw_gaussian(
        self, drawn: NDArray[np.uint64], tables: Tables, samples: NDArray[np.int64], log2_deviation: int
    ) -> bool:
        """Writes integers as `draw_rounded_gaussian` does; returns False where the words do not decide them all.

        Args:
            drawn: fresh words.
            tables: numbers that are looked up.
            samples: receives the integers.
            log2_deviation: m.
        """
        count = len(samples)
        points = (count + 1) // 2
        spare = points + count
        start = drawn.ctypes.data
        waiting = np.empty(count + 1, np.int32)
        decided = self.code.draw_gaussian(
            *(start, start + 8 * points, count, start + 8 * spare, len(drawn) - spare),
            *(*tables.addresses, log2_deviation, waiting.ctypes.data, samples.ctypes.data),
        )
        return bool(decided)

    def draw_many_gaussians(
        self, drawn_SW: NDArray[np.uint64], tables: Tables, samples_SN: NDArray[np.int64], log2_deviation: int
    ) -> list[int]:
        """Writes rows of integers as `draw_gaussian` does; returns the rows that their words do not decide.

        Args:
            drawn_SW: fresh words of each row.
            tables: numbers that are looked up.
            samples_SN: receives the integers.
            log2_deviation: m.
        """
        (num_rows, num_words), count = drawn_SW.shape, samples_SN.shape[1]
        points = (count + 1) // 2
        spare = points + count
        assert drawn_SW.flags.c_contiguous and samples_SN.flags.c_contiguous
        waiting = np.empty(count + 1, np.int32)
        draw, at, into = self.code.draw_gaussian, drawn_SW.ctypes.data, samples_SN.ctypes.data
        looked_up = (*tables.addresses, log2_deviation, waiting.ctypes.data)
        undecided = []
        for row in range(num_rows):
            start = at + 8 * num_words * row
            ends = (start, start + 8 * points, count, start + 8 * spare, num_words - spare)
            if not draw(*ends, *looked_up, into + 8 * count * row):
                undecided.append(row)
        return undecided

    def quantise(self, values_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns integers_RD (int16), scale_R and bounds of norms of float32 rows, as `QuantisedRows` has them."""
        import torch  # Here: noise is drawn without it.

        integers_RD = values_RD.new_empty(values_RD.shape, dtype=torch.int16)
        scale_R, norm_R = values_RD.new_empty((2, len(values_RD)), dtype=torch.double)
        self.code.quantise(*_at(values_RD), *values_RD.shape, *_at(integers_RD, scale_R, norm_R))
        return integers_RD, scale_R, norm_R

    def multiply_pairs(self, integers_RD: Tensor, first_Q: Tensor, second_Q: Tensor) -> Tensor:
        """Returns the exact products of pairs of 16-bit rows, float64.

        Args:
            integers_RD: int16, as `QuantisedRows` has them.
            first_Q: int64, the first rows.
            second_Q: int64, the second rows.
        """
        import torch

        product_Q = torch.empty(len(first_Q), dtype=torch.double)
        assert integers_RD.is_contiguous() and first_Q.is_contiguous() and second_Q.is_contiguous()
        self.code.multiply_pairs(
            *(integers_RD.data_ptr(), integers_RD.shape[1], first_Q.data_ptr(), second_Q.data_ptr()),
            *(len(first_Q), product_Q.data_ptr()),
        )
        return product_Q


def _at(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
