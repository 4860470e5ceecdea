"""Time series as float32 arrays T, or T x C channels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.inputs import parse_number
from common.types import BadRecord


def read_series(data: bytes, *, binary: bool) -> NDArray[np.float32]:
    """A series from a file's bytes: NumPy's own format, or text with one time step a line.

    Raises:
        BadRecord: unreadable, empty, or not numbers; nothing of it is repeated.
    """
    try:
        # NumPy's warnings describe the file.
        with warnings.catch_warnings(action="ignore"):
            if binary:
                values = np.load(io.BytesIO(data), allow_pickle=False)
            else:
                text = data.decode("utf-8-sig").replace(",", " ").replace(";", " ")
                values = np.loadtxt(io.StringIO(text), dtype=np.float64, ndmin=1)
    except (EOFError, MemoryError, OSError, OverflowError, SyntaxError, TypeError, ValueError):
        # From None: NumPy's messages quote the file.
        raise BadRecord("unreadable series") from None
    return checked(values)


def checked(values: NDArray[np.generic]) -> NDArray[np.float32]:
    """The values as float32. Raises BadRecord: no finite numbers T or T x C."""
    if values.dtype.kind not in "fiu" or values.ndim not in (1, 2) or values.size == 0:
        raise BadRecord("expected a series of numbers, one or several for each time step")
    series = values.astype(np.float32)
    if not np.isfinite(series).all():
        raise BadRecord("expected a series of finite numbers")
    return series


def series_of_cells(cells: Sequence[str], channels: int) -> NDArray[np.float32]:
    """A series from cells, time step by time step; empty cells at its end are no steps. Raises BadRecord."""
    filled = list(cells)
    while filled and not filled[-1]:
        filled.pop()
    values = [parse_number(cell) for cell in filled]
    if not values or len(values) % channels or any(value is None for value in values):
        raise BadRecord(f"expected a series of finite numbers, {channels} for each time step")
    series = checked(np.array(values, dtype=np.float64))
    return series if channels == 1 else series.reshape(-1, channels)
