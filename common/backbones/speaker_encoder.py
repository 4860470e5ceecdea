"""A speaker encoder trained with the GE2E loss: 256 numbers for each window of 1.6 s of speech, averaged over windows.

Three LSTM layers on mel spectra (Wan et al. 2018, arXiv 1710.10467); weights in the layout of the package resemblyzer,
whose wheel holds them. Its spectra and windows are followed; what it does before, cutting long silences, is not.

# Shapes: B recordings, L samples, F frames of 10 ms, W windows, S spectral bins, M mel bands.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from common.backbones import Architecture, Example, Pretrained
from common.backbones.parts.audio import fitted, samples_at, triangles
from common.backbones.parts.projection import Projection
from common.backbones.parts.random import random_weights
from common.backbones.parts.weights import read_state
from common.items import Audio
from common.plugins import LocalPath, Plugin
from common.types import BadInput

_RATE, _FFT, _HOP, _MELS, _WIDTH = 16_000, 400, 160, 40, 256
_WINDOW, _STEP = 160, 77
_WINDOW_S = _WINDOW * _HOP / _RATE
# Root mean square of -30 dB of full scale: quieter recordings are brought to it.
_QUIETEST = 10 ** (-30 / 20)


@final
class SpeakerEncoder(Plugin):
    """Settings of the speaker encoder.

    Attributes:
        weights: its file, or the wheel that holds it.
        seconds: every recording is brought to this length: a longer one gives its middle, a shorter one stands between
            two silences. There is a window every 0.77 s; what remains after the last whole one is not heard.
        projection: what happens to the features before they leave the backbone; `dim` is not possible here.
    """

    kind: Literal["speaker_encoder"] = "speaker_encoder"
    weights: LocalPath | None = None
    seconds: Annotated[float, Field(ge=_WINDOW_S, le=60)] = _WINDOW_S
    projection: Projection | None = None

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Random weights in a file as training leaves it, and noises of different pitch and loudness."""
        path = folder / "speaker.pt"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            trained = {**_drawn().state_dict(), "similarity_weight": torch.ones(1), "similarity_bias": torch.ones(1)}
            torch.save({"step": 1, "model_state": trained, "optimizer_state": {"param_groups": [{"lr": 0.1}]}}, path)
        rng = np.random.default_rng(0)
        noises = [np.convolve(rng.normal(size=9000), np.ones(width)) / 10**width for width in (1, 2, 3, 4)]
        items = [Audio(noise.astype(np.float32), 8000) for noise in noises]
        return Example({"kind": "speaker_encoder", "weights": str(path), "seconds": 2.4}, items)

    def resolved(self) -> SpeakerEncoder:
        """Without weights."""
        return self.model_copy(update={"weights": None})

    def architecture(self) -> Architecture:
        """Mel spectra B x F x M -> features B x 256."""
        return Architecture(_Encoder(), _WIDTH)

    def pretrained(self) -> Pretrained:
        """The weights, without the scale and shift of similarities that only training needs."""
        if self.weights is None:
            raise BadInput("weights: expected the file of the speaker encoder, got nothing")
        state = read_state(self.weights, entry="model_state")
        return Pretrained({name: value for name, value in state.items() if not name.startswith("similarity_")})

    def random(self) -> Pretrained:
        """Random layers that pass differences between recordings on."""
        noise_BL = torch.randn(4, round(self.seconds * _RATE)) * _QUIETEST
        spectra_BFM = torch.stack([_spectra(noise_L) for noise_L in noise_BL.numpy()])
        return random_weights(Architecture(_drawn(), _WIDTH), nn.Linear(_WIDTH, _WIDTH + 1).weight, spectra_BFM)

    def weights_file(self) -> Path | None:
        """The local weights."""
        return self.weights

    def preprocess(self, item: Any) -> Tensor:
        """Mel spectra F x M of a recording at 16 kHz that is not too quiet. Raises BadRecord."""
        samples_L = samples_at(item, _RATE)
        loudness = float(np.sqrt(np.mean(np.square(samples_L, dtype=np.float64))))
        if 0 < loudness < _QUIETEST:
            samples_L = samples_L * np.float32(_QUIETEST / loudness)
        return _spectra(fitted(samples_L, round(self.seconds * _RATE)))


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(_MELS, _WIDTH, num_layers=3, batch_first=True)
        self.linear = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, spectra_BFM: Tensor) -> Tensor:
        windows_BWFM = spectra_BFM.unfold(1, _WINDOW, _STEP).transpose(2, 3)
        _, (last, _) = self.lstm(windows_BWFM.flatten(0, 1))
        directions = normalize(torch.relu(self.linear(last[-1])), dim=1)
        return normalize(directions.reshape(*windows_BWFM.shape[:2], _WIDTH).mean(1), dim=1)


def _drawn() -> _Encoder:
    encoder = _Encoder()
    for values in encoder.parameters():
        if values.dim() == 1:
            # Spectra are small numbers: torch's own initialisation hears little but its biases.
            nn.init.zeros_(values)
        else:
            nn.init.normal_(values, std=1.0 if values.shape[1] == _MELS else 2.0 / _WIDTH**0.5)
    return encoder


def _spectra(samples_L: NDArray[np.float32]) -> Tensor:
    """Power in mel bands, F x M: not its logarithm."""
    frames_FL = np.lib.stride_tricks.sliding_window_view(np.pad(samples_L, _FFT // 2), _FFT)[::_HOP]
    hann_L = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)
    power_FS = np.abs(np.fft.rfft(frames_FL * hann_L)) ** 2
    return torch.from_numpy((power_FS @ _mel_filters()).astype(np.float32))


@cache
def _mel_filters() -> NDArray[np.float64]:
    """S x M: triangles of equal area, evenly spaced in Slaney's mel: linear to 1 kHz, logarithmic above (1998)."""
    per_neper = 27 / np.log(6.4)
    mels = np.linspace(0.0, 15.0 + per_neper * np.log(_RATE / 2 / 1000.0), _MELS + 2)
    edges = np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * np.exp((mels - 15.0) / per_neper))
    filters_SM: NDArray[np.float64] = triangles(edges, _FFT, _RATE) * 2.0 / (edges[2:] - edges[:-2])
    return filters_SM
