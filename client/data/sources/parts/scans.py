"""From stored values of a scan to 8-bit pictures: a window of intensities becomes black to white."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.types import BadRecord

MAX_VALUES = 1 << 30
"""Pixels or voxels of one record."""


def windowed(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Returns values between `low` and `high` as 0 to 255, values beyond at the ends.

    Args:
        values: intensities of any shape.
        low: intensity that becomes 0.
        high: intensity that becomes 255.

    Raises:
        BadRecord: a value is not finite.
    """
    if not np.isfinite(values).all():
        raise BadRecord("expected finite intensities")
    if not high > low:
        # A picture of one value: black, not a division by zero.
        return np.zeros(values.shape, dtype=np.uint8)
    scaled = (values.astype(np.float64) - low) / (high - low)
    pixels: NDArray[np.uint8] = (255.0 * scaled.clip(0.0, 1.0)).round().astype(np.uint8)
    return pixels


def spread(count: int, most: int | None) -> list[int]:
    """Positions of at most `most` slices, evenly spread over all and always the same."""
    if most is None or count <= most:
        return list(range(count))
    return [int((2 * number + 1) * count / (2 * most)) for number in range(most)]
