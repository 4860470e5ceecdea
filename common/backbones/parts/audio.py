"""Recordings at the rate and length an encoder expects, and filters for their spectra."""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from common.items import Audio
from common.types import BadRecord


def samples_at(item: Any, sample_rate: int) -> NDArray[np.float32]:
    """Mono samples at a rate, resampled by a polyphase filter where the recording has another.

    Raises:
        BadRecord: no recording, an empty one, or one with values that are not finite.
    """
    if not isinstance(item, Audio):
        raise BadRecord("expected a recording")
    if item.samples_T.ndim != 1 or len(item.samples_T) == 0:
        raise BadRecord("expected a recording of one channel with at least one sample")
    if not np.isfinite(item.samples_T).all():
        raise BadRecord("expected a recording of finite values")
    samples_T = item.samples_T.astype(np.float32)
    if item.sample_rate != sample_rate:
        common = gcd(item.sample_rate, sample_rate)
        up, down = sample_rate // common, item.sample_rate // common
        samples_T = resample_poly(samples_T.astype(np.float64), up, down).astype(np.float32)
    return samples_T


def fitted(samples_T: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """Exactly `length` samples: the middle of a longer recording, a shorter one between two silences."""
    if len(samples_T) >= length:
        start = (len(samples_T) - length) // 2
        return samples_T[start : start + length]
    before = (length - len(samples_T)) // 2
    return np.pad(samples_T, (before, length - len(samples_T) - before))


def triangles(edges_hz: NDArray[np.float64], size: int, sample_rate: int) -> NDArray[np.float64]:
    """Filters for spectra, one a column: each rises from its edge to 1 at the next one and falls to the one after it.

    Args:
        edges_hz: ascending, two more than there are filters.
        size: samples of the Fourier transform, which has half as many bins and one.
        sample_rate: of the recording.
    """
    bins_S1 = np.fft.rfftfreq(size, 1.0 / sample_rate)[:, None]
    rising = (bins_S1 - edges_hz[:-2]) / (edges_hz[1:-1] - edges_hz[:-2])
    falling = (edges_hz[2:] - bins_S1) / (edges_hz[2:] - edges_hz[1:-1])
    return np.clip(np.minimum(rising, falling), 0.0, None)
