"""Time series as float32 arrays T, or T x C channels."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.inputs import parse_number
from common.types import BadRecord

Gaps = Literal["refuse", "hold", "interpolate", "keep"]
"""The meaning of an empty value in a series: a bad record, the value before it, a straight line between its neighbours
(before the first value and behind the last, that value), or that nothing was observed there: not a number, which only
some backbones read."""

_MISSING = frozenset({"", "nan", "na", "n/a", "null"})
_WAVEFORMS = frozenset({".hea", ".edf", ".bdf", ".scp"})


def read_series(data: bytes, suffix: str, gaps: Gaps = "refuse") -> NDArray[np.float32]:
    """A series from a file's bytes: NumPy's own format, or text with one time step a line.

    Text is separated by commas, semicolons, tabs or blanks, and may have a first line of names.

    Args:
        data: the file.
        suffix: ending of its name.
        gaps: what an empty value means.

    Raises:
        BadRecord: unreadable, empty, or not numbers; nothing of it is repeated.
    """
    if suffix.lower() in _WAVEFORMS:
        raise BadRecord("expected a series as .npy or text; other files have a source of kind waveforms (WFDB, EDF)")
    try:
        # NumPy's warnings describe the file.
        with warnings.catch_warnings(action="ignore"):
            if suffix.lower() == ".npy":
                values = np.load(io.BytesIO(data), allow_pickle=False)
            else:
                values = _read_text(data.decode("utf-8-sig"))
    except (EOFError, MemoryError, OSError, OverflowError, SyntaxError, TypeError, ValueError):
        # From None: NumPy's messages quote the file.
        raise BadRecord("unreadable series") from None
    return checked(values, gaps)


def _read_text(text: str) -> NDArray[np.float64]:
    """Returns the numbers of a text, NaN where a cell is empty. Raises ValueError."""
    separator = next((each for each in (";", "\t", ",") if each in text), None)
    try:
        fast: NDArray[np.float64] = np.loadtxt(io.StringIO(text), dtype=np.float64, ndmin=1, delimiter=separator)
        return fast
    except ValueError:
        rows = [[cell.strip() for cell in line.split(separator)] for line in text.splitlines() if line.strip()]
    # A first line of names, and an end of line that is one more separator; a channel with a name and no value stays.
    names = rows[0] if rows and all(parse_number(cell) is None for cell in rows[0]) else []
    rows = rows[1:] if names else rows
    if rows and not (names and names[-1]) and all(len(row) > 1 and not row[-1] for row in rows):
        rows = [row[:-1] for row in rows]
    values = np.array([[read_cell(cell) for cell in row] for row in rows], dtype=np.float64)
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


def read_cell(cell: str) -> float:
    """Returns a number, or not a number for an empty cell and for words that mean nothing. Raises ValueError."""
    value = parse_number(cell)
    if value is None and cell.lower() not in _MISSING:
        raise ValueError
    return math.nan if value is None else value


def checked(values: NDArray[np.generic], gaps: Gaps = "refuse") -> NDArray[np.float32]:
    """Returns the values as float32. Raises BadRecord: no finite numbers T or T x C, or gaps that are refused."""
    if values.dtype.kind not in "fiu" or values.ndim not in (1, 2) or values.size == 0:
        raise BadRecord("expected a series of numbers, one or several for each time step")
    with np.errstate(over="ignore"):
        series = values.astype(np.float32)
    if np.isnan(series).any():
        if gaps == "refuse":
            raise BadRecord(
                "expected a series without gaps; write `gaps: hold` (the value before), `interpolate`, or `keep` for a "
                "backbone that reads gaps (time_series), or fill them"
            )
        if np.isnan(series).all():
            raise BadRecord("expected a series with a value, got empty ones only")
        series = series if gaps == "keep" else _fill_gaps(series, gaps)
    if np.isinf(series).any():
        raise BadRecord("expected a series of finite numbers")
    return series


def _fill_gaps(series: NDArray[np.float32], gaps: Gaps) -> NDArray[np.float32]:
    """Returns a series whose channels are filled one by one. Raises BadRecord: a channel has no value at all."""
    filled = series.reshape(len(series), -1).copy()
    for channel_T in filled.T:
        known = np.flatnonzero(~np.isnan(channel_T))
        if not len(known):
            raise BadRecord("expected a value in each channel of a series; `gaps: keep` reads one without any as a gap")
        steps = np.arange(len(channel_T))
        if gaps == "hold":
            before = known[np.maximum(np.searchsorted(known, steps, side="right") - 1, 0)]
            channel_T[:] = channel_T[before]
        else:
            channel_T[:] = np.interp(steps, known, channel_T[known])
    return filled.reshape(series.shape)


def series_of_cells(cells: Sequence[str], channels: int, gaps: Gaps = "refuse") -> NDArray[np.float32]:
    """Returns a series from cells, time step by time step; empty cells at its end are no steps.

    Args:
        cells: the cells.
        channels: number of values of each time step.
        gaps: what an empty cell means that is not at the end.

    Raises:
        BadRecord: they are no numbers, or no whole time steps.
    """
    filled = list(cells)
    while filled and not filled[-1]:
        filled.pop()
    # The last time step may end with channels that are empty.
    filled += [""] * (min(-len(filled) % channels, len(cells) - len(filled)) if gaps != "refuse" else 0)
    try:
        values = [read_cell(cell) for cell in filled]
    except ValueError:
        values = []
    if not values or len(values) % channels:
        raise BadRecord(f"expected a series of finite numbers, {channels} for each time step")
    # In its final shape: gaps are filled within a channel.
    shaped = np.array(values, dtype=np.float64)
    return checked(shaped if channels == 1 else shaped.reshape(-1, channels), gaps)
