"""A recording's average spectrum and how much it varies: mean and deviation over time of log-mel bands. No weights.

What a recording sounds like rather than what is said: a plain baseline for voices and music. Loudness is taken out, and
what lies more than 80 dB below the loudest is silence.

# Shapes: L samples, F frames, S spectral bins, M mel bands.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from common.backbones import Architecture, Example, Projection, RawInputs
from common.backbones.parts.audio import build_triangles, resample
from common.inputs import Audio
from common.plugins import Plugin

if TYPE_CHECKING:
    from torch import Tensor

_WINDOW_S, _HOP_S, _FLOOR_NEPER = 0.025, 0.010, 80.0 / 10.0 * np.log(10.0)


@final
class LogMel(Plugin):
    """Settings of the statistics.

    Attributes:
        sample_rate: recordings are resampled to it.
        bands: number of mel bands; there are two features for each.
        range_hz: lowest and highest frequency.
        projection: its `dim` and `shift: batch_norm` are not possible here.
    """

    kind: Literal["log_mel"] = "log_mel"
    sample_rate: Annotated[int, Field(ge=1000, le=192_000)] = 16_000
    bands: Annotated[int, Field(ge=2, le=512)] = 40
    range_hz: tuple[Annotated[float, Field(ge=0)], float] = (60.0, 7600.0)
    projection: Projection | None = None

    @model_validator(mode="after")
    def _range_fits(self) -> LogMel:
        low, high = self.range_hz
        if not low < high <= self.sample_rate / 2:
            raise ValueError(f"range_hz: expected [lowest, highest] up to half of sample_rate, got {[low, high]}")
        return self

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns tones of different pitch."""
        del folder
        time = np.arange(2000) / 8000
        tones = [np.sin(2 * np.pi * pitch * time) / 4 for pitch in (200, 500, 1100, 3000)]
        settings = {"kind": "log_mel", "sample_rate": 8000, "bands": 12, "range_hz": [60, 3800]}
        return Example(settings, [Audio(tone.astype(np.float32), 8000) for tone in tones])

    def architecture(self) -> Architecture:
        """Returns the identity: the statistics are made of each recording alone, whatever its length."""
        from torch import nn

        return Architecture(nn.Identity(), 2 * self.bands, open_raw=self._open_raw)

    def _open_raw(self) -> RawInputs:
        from common.backbones.parts.raw import open_given

        step = {
            "step": "log_mel_statistics",
            "sample_rate": self.sample_rate,
            "bands": self.bands,
            "range_hz": list(self.range_hz),
            "window_s": _WINDOW_S,
            "hop_s": _HOP_S,
            "window": "hann, zero-padded to a power of two",
            "mel": "2595 log10(1 + f / 700), triangles of height 1 on the power spectrum",
            "logarithm": "natural, of at least 1e-12, and at least the loudest value less 8 ln 10",
            "statistics": "mean over time of each band less the mean of all, then deviation over time of each band",
        }
        meaning = "means, then deviations, of the log-mel bands of one recording"
        return open_given("statistics", (2 * self.bands,), meaning, self.preprocess, [step])

    def preprocess(self, item: Any) -> Tensor:
        """Returns means, then deviations, of the bands of one recording. Raises BadRecord."""
        import torch

        samples_L = resample(item, self.sample_rate).astype(np.float64)
        width, hop = round(_WINDOW_S * self.sample_rate), round(_HOP_S * self.sample_rate)
        if len(samples_L) < width:
            samples_L = np.pad(samples_L, (0, width - len(samples_L)))
        frames_FW = np.lib.stride_tricks.sliding_window_view(samples_L, width)[::hop] * np.hanning(width)
        size = 1 << (width - 1).bit_length()
        power_FS = np.abs(np.fft.rfft(frames_FW, size)) ** 2
        bands_FM = np.log(
            np.maximum(power_FS @ build_mel_filters(self.bands, size, self.sample_rate, self.range_hz), 1e-12)
        )
        bands_FM = np.maximum(bands_FM, bands_FM.max() - _FLOOR_NEPER)
        mean_M = bands_FM.mean(axis=0)
        return torch.from_numpy(np.concatenate([mean_M - mean_M.mean(), bands_FM.std(axis=0)]).astype(np.float32))


def build_mel_filters(bands: int, size: int, sample_rate: int, range_hz: tuple[float, float]) -> NDArray[np.float64]:
    """Returns triangular filters [S, M], evenly spaced in mel (O'Shaughnessy's 2595 log10(1 + f / 700)).

    Args:
        bands: number of mel bands M.
        size: samples of the Fourier transform.
        sample_rate: samples per second.
        range_hz: lowest and highest frequency.
    """
    low, high = (2595.0 * np.log10(1.0 + frequency / 700.0) for frequency in range_hz)
    edges = 700.0 * (10.0 ** (np.linspace(low, high, bands + 2) / 2595.0) - 1.0)
    return build_triangles(edges, size, sample_rate)
