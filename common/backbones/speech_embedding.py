"""Google's speech embedding: 96 numbers for each window of 0.76 s of speech, averaged over the windows of a recording.

A small convolutional net on log-mel frames (Lin et al. 2020, arXiv 2002.01322); weights in the layout that the ONNX
files of openWakeWord convert to.

# Shapes: B recordings, L samples, F frames of 10 ms, W windows, M mel bands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, final

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from common.backbones import Architecture, Example, Pretrained
from common.backbones.parts.audio import fitted, samples_at
from common.backbones.parts.projection import Projection
from common.backbones.parts.random import random_weights
from common.backbones.parts.weights import read_state
from common.items import Audio
from common.plugins import LocalPath, Plugin
from common.types import BadInput

_RATE, _HOP, _FFT, _MELS = 16_000, 160, 512, 32
_WINDOW, _STEP = 76, 8
_SHORTEST_S = ((_WINDOW - 1) * _HOP + _FFT) / _RATE
# Of each stage: channels, the pooling (time, mel bands) that ends it, and how many convolutions it has.
_STAGES = ((24, (2, 2), 3), (48, (1, 2), 4), (72, (2, 2), 4), (96, (1, 2), 4), (96, (2, 2), 4))


@final
class SpeechEmbedding(Plugin):
    """Settings of the speech embedding.

    Attributes:
        weights: its file.
        seconds: every recording is brought to this length: a longer one gives its middle, a shorter one stands between
            two silences.
        projection: what happens to the features before they leave the backbone; `dim` is not possible here.
    """

    kind: Literal["speech_embedding"] = "speech_embedding"
    weights: LocalPath | None = None
    seconds: Annotated[float, Field(ge=_SHORTEST_S, le=60)] = 1.0
    projection: Projection | None = None

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Random weights in a file, and noises of different pitch and loudness."""
        path = folder / "speech.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_file(_Encoder().state_dict(), path)
        rng = np.random.default_rng(0)
        noises = [np.convolve(rng.normal(size=9000), np.ones(width)) / 10**width for width in (1, 2, 3, 4)]
        items = [Audio(noise.astype(np.float32), 8000) for noise in noises]
        return Example({"kind": "speech_embedding", "weights": str(path), "seconds": 0.9}, items)

    def resolved(self) -> SpeechEmbedding:
        """Without weights."""
        return self.model_copy(update={"weights": None})

    def architecture(self) -> Architecture:
        """Samples B x L -> features B x 96."""
        return Architecture(_Encoder(), 96)

    def pretrained(self) -> Pretrained:
        """The weights, spectrogram included."""
        if self.weights is None:
            raise BadInput("weights: expected the file of the speech embedding, got nothing")
        return Pretrained(read_state(self.weights))

    def random(self) -> Pretrained:
        """The same spectrogram before random convolutions that keep the size of their inputs."""
        encoder = self.architecture()
        for module in encoder.module.children():
            if isinstance(module, nn.Conv2d):
                # Torch's own initialisation shrinks them at each of twenty layers: all recordings end in one point.
                nn.init.kaiming_normal_(module.weight, a=0.2)
        if self.weights is not None:
            known = read_state(self.weights)
            with torch.no_grad():
                for name, tensor in encoder.module.state_dict().items():
                    if name.startswith("frontend."):
                        tensor.copy_(known[name])
        noise = torch.randn(4, round(self.seconds * _RATE)) * 3000
        return random_weights(encoder, nn.Linear(96, 97).weight, noise)

    def weights_file(self) -> Path | None:
        """The local weights."""
        return self.weights

    def preprocess(self, item: Any) -> Tensor:
        """Samples at 16 kHz in the range of 16-bit integers. Raises BadRecord."""
        samples_L = fitted(samples_at(item, _RATE), round(self.seconds * _RATE))
        return torch.from_numpy(np.ascontiguousarray(samples_L) * np.float32(32768.0))


class _Mel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(_FFT // 2 + 1, _MELS))


class _Frontend(nn.Module):
    """Log-mel frames of a recording, at most 80 dB below its loudest."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_real = nn.Conv1d(1, _FFT // 2 + 1, _FFT, _HOP, bias=False)
        self.stft_imag = nn.Conv1d(1, _FFT // 2 + 1, _FFT, _HOP, bias=False)
        self.mel = _Mel()

    def forward(self, samples_BL: Tensor) -> Tensor:
        wave_B1L = samples_BL.unsqueeze(1)
        power = self.stft_real(wave_B1L) ** 2 + self.stft_imag(wave_B1L) ** 2
        decibel_BFM = 10.0 * torch.log10((power.transpose(1, 2) @ self.mel.weight).clamp(min=1e-10))
        loudest_B11 = decibel_BFM.amax((1, 2), keepdim=True)
        return torch.maximum(decibel_BFM, loudest_B11 - 80.0) / 10.0 + 2.0


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frontend = _Frontend()
        self.steps: list[str | tuple[int, int]] = []
        inner, number = 1, 0
        for width, pool, count in _STAGES:
            for index in range(count):
                first = number == 0
                across = first or (index % 2 == 1 if width == 24 else index % 2 == 0)
                kernel = (3, 3) if first else (1, 3) if across else (3, 1)
                name = f"conv{number}"
                self.add_module(name, nn.Conv2d(inner, width, kernel, padding=(0, 1) if across else 0))
                self.steps.append(name)
                inner, number = width, number + 1
            self.steps.append(pool)
        self.conv19 = nn.Conv2d(inner, 96, (3, 1), bias=False)

    def forward(self, samples_BL: Tensor) -> Tensor:
        frames_BFM = self.frontend(samples_BL)
        windows = frames_BFM.unfold(1, _WINDOW, _STEP).transpose(2, 3)
        x = windows.reshape(-1, 1, _WINDOW, _MELS)
        for step in self.steps:
            if isinstance(step, str):
                x = nn.functional.leaky_relu(self.get_submodule(step)(x), 0.2).clamp(min=-0.4)
            else:
                x = nn.functional.max_pool2d(x, step, step)
        averaged_B96: Tensor = self.conv19(x).reshape(len(windows), -1, 96).mean(1)
        return averaged_B96
