"""A speaker encoder trained with the GE2E loss: 256 numbers for each window of 1.6 s of speech, averaged over windows.

Three LSTM layers on mel spectra (Wan et al. 2018, arXiv 1710.10467); weights in the layout of the package resemblyzer,
whose wheel holds them. Its spectra and windows are followed; what it does before, cutting long silences, is not.

# Shapes: B recordings, L samples, F frames of 10 ms, W windows, S spectral bins, M mel bands.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from common.backbones import Architecture, Example, Pretrained, Projection, RawInputs
from common.backbones.parts.audio import build_triangles, fit_length, resample
from common.inputs import Audio
from common.plugins import LocalPath, Plugin
from common.types import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from common.backbones.parts.nets import SpeakerNet

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
        """Returns random weights in a file as training leaves it, and noises of different pitch and loudness."""
        import torch

        from common.backbones.parts.nets import initialise_speaker_net

        path = folder / "speaker.pt"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            state = initialise_speaker_net(_build_network(), _MELS).state_dict()
            trained = {**state, "similarity_weight": torch.ones(1), "similarity_bias": torch.ones(1)}
            torch.save({"step": 1, "model_state": trained, "optimizer_state": {"param_groups": [{"lr": 0.1}]}}, path)
        rng = np.random.default_rng(0)
        noises = [np.convolve(rng.normal(size=9000), np.ones(width)) / 10**width for width in (1, 2, 3, 4)]
        items = [Audio(noise.astype(np.float32), 8000) for noise in noises]
        return Example({"kind": "speaker_encoder", "weights": str(path), "seconds": 1.6}, items)

    def architecture(self) -> Architecture:
        """Returns mel spectra B x F x M -> features B x 256."""
        return Architecture(_build_network(), _WIDTH, open_raw=self._open_raw)

    def pretrained(self) -> Pretrained:
        """Returns the weights, without the scale and shift of similarities that only training needs."""
        from common.backbones.parts.weights import read_state

        if self.weights is None:
            raise BadInput("weights: expected the file of the speaker encoder, got nothing")
        state = read_state(self.weights, entry="model_state")
        return Pretrained({name: value for name, value in state.items() if not name.startswith("similarity_")})

    def random(self) -> Pretrained:
        """Returns random layers that pass differences between recordings on."""
        import torch

        from common.backbones.parts.nets import initialise_speaker_net
        from common.backbones.parts.weights import scale_random_weights

        noise_BL = torch.randn(4, round(self.seconds * _RATE)) * _QUIETEST
        spectra_BFM = torch.stack([_compute_spectra(noise_L) for noise_L in noise_BL.numpy()])
        architecture = Architecture(initialise_speaker_net(_build_network(), _MELS), _WIDTH)
        return scale_random_weights(architecture, torch.nn.Linear(_WIDTH, _WIDTH + 1).weight, spectra_BFM)

    def _open_raw(self) -> RawInputs:
        from common.backbones.parts.raw import open_given

        num_samples = round(self.seconds * _RATE)
        steps = [
            {"step": "resample", "sample_rate": _RATE, "channels": 1, "range": [-1, 1]},
            {"step": "raise_loudness", "root_mean_square": _QUIETEST, "when": "below it, and not silent"},
            {"step": "fit_length", "samples": num_samples, "longer": "middle", "shorter": "between two silences"},
            {
                "step": "mel_spectrum",
                "window": f"hann of {_FFT} samples, periodic, centred, zeros beyond the ends",
                "hop": _HOP,
                "bands": _MELS,
                "mel": "Slaney, triangles of equal area",
                "value": "power, not its logarithm",
            },
        ]
        shape = (1 + num_samples // _HOP, _MELS)
        return open_given("spectra", shape, "mel spectra, time by band", self.preprocess, steps)

    def preprocess(self, item: Any) -> Tensor:
        """Returns mel spectra F x M of a recording at 16 kHz that is not too quiet. Raises BadRecord."""
        samples_L = resample(item, _RATE)
        loudness = float(np.sqrt(np.mean(np.square(samples_L, dtype=np.float64))))
        if 0 < loudness < _QUIETEST:
            samples_L = samples_L * np.float32(_QUIETEST / loudness)
        return _compute_spectra(fit_length(samples_L, round(self.seconds * _RATE)))


def _build_network() -> SpeakerNet:
    from common.backbones.parts.nets import SpeakerNet

    return SpeakerNet(_MELS, _WIDTH, _WINDOW, _STEP)


def _compute_spectra(samples_L: NDArray[np.float32]) -> Tensor:
    """Returns the power in mel bands, F x M: not its logarithm."""
    import torch

    frames_FL = np.lib.stride_tricks.sliding_window_view(np.pad(samples_L, _FFT // 2), _FFT)[::_HOP]
    hann_L = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)
    power_FS = np.abs(np.fft.rfft(frames_FL * hann_L)) ** 2
    return torch.from_numpy((power_FS @ _build_mel_filters()).astype(np.float32))


@cache
def _build_mel_filters() -> NDArray[np.float64]:
    """Returns triangular filters [S, M] of equal area, evenly spaced in mel.

    Slaney's mel (1998) is linear to 1 kHz and logarithmic above.
    """
    per_neper = 27 / np.log(6.4)
    mels = np.linspace(0.0, 15.0 + per_neper * np.log(_RATE / 2 / 1000.0), _MELS + 2)
    edges = np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * np.exp((mels - 15.0) / per_neper))
    filters_SM: NDArray[np.float64] = build_triangles(edges, _FFT, _RATE) * 2.0 / (edges[2:] - edges[:-2])
    return filters_SM
