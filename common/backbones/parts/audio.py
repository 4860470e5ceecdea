"""Recordings at the rate and length a backbone expects, and filters for their spectra."""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.inputs import Audio
from common.types import BadRecord


def resample(item: Any, sample_rate: int) -> NDArray[np.float32]:
    """Returns mono samples at a rate, resampled by a polyphase filter where the recording has another.

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
        from scipy.signal import resample_poly

        common = gcd(item.sample_rate, sample_rate)
        up, down = sample_rate // common, item.sample_rate // common
        samples_T = resample_poly(samples_T.astype(np.float64), up, down).astype(np.float32)
    return samples_T


def fit_length(samples_T: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """Returns exactly `length` samples: the middle of a longer recording, a shorter one between two silences."""
    if len(samples_T) >= length:
        start = (len(samples_T) - length) // 2
        return samples_T[start : start + length]
    before = (length - len(samples_T)) // 2
    return np.pad(samples_T, (before, length - len(samples_T) - before))


def build_triangles(edges_hz: NDArray[np.float64], size: int, sample_rate: int) -> NDArray[np.float64]:
    """Returns filters for spectra, one in each column.

    A filter rises from its edge to 1 at the next edge and falls to 0 at the one after.

    Args:
        edges_hz: ascending frequencies, two more than there are filters.
        size: samples of the Fourier transform, which has size / 2 + 1 bins.
        sample_rate: samples per second.
    """
    bins_S1 = np.fft.rfftfreq(size, 1.0 / sample_rate)[:, None]
    rising = (bins_S1 - edges_hz[:-2]) / (edges_hz[1:-1] - edges_hz[:-2])
    falling = (edges_hz[2:] - bins_S1) / (edges_hz[2:] - edges_hz[1:-1])
    return np.clip(np.minimum(rising, falling), 0.0, None)
