"""Google's speech embedding: 96 numbers for each window of 0.76 s of speech, averaged over the windows of a recording.

A small convolutional net on log-mel frames (Lin et al. 2020, arXiv 2002.01322); weights in the layout that the ONNX
files of openWakeWord convert to.

# Shapes: B recordings, L samples, F frames of 10 ms, W windows, M mel bands.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from pydantic import Field

from common.backbones import Architecture, Divided, Example, Pretrained, Projection
from common.backbones.parts.audio import fit_length, resample
from common.inputs import Audio
from common.plugins import LocalPath, Plugin
from common.types import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn

_RATE, _HOP, _FFT, _MELS = 16_000, 160, 512, 32
_WINDOW, _STEP = 76, 8
_SHORTEST_S = ((_WINDOW - 1) * _HOP + _FFT) / _RATE


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
        """Returns random weights in a file, and noises of different pitch and loudness."""
        import torch
        from safetensors.torch import save_file

        path = folder / "speech.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_file(cls().architecture().module.state_dict(), path)
        rng = np.random.default_rng(0)
        noises = [np.convolve(rng.normal(size=9000), np.ones(width)) / 10**width for width in (1, 2, 3, 4)]
        items = [Audio(noise.astype(np.float32), 8000) for noise in noises]
        return Example({"kind": "speech_embedding", "weights": str(path), "seconds": 0.9}, items)

    def architecture(self) -> Architecture:
        """Returns samples B x L -> features B x 96."""
        from common.backbones.parts.nets import SpeechNet
        from common.backbones.parts.raw import open_samples

        network = SpeechNet(num_mels=_MELS, fft_size=_FFT, hop=_HOP, window=_WINDOW, step=_STEP)
        length = round(self.seconds * _RATE)
        return Architecture(network, 96, open_raw=lambda: open_samples(_RATE, length, 32768.0))

    def pretrained(self) -> Pretrained:
        """Returns the weights, spectrogram included."""
        from common.backbones.parts.weights import read_state

        if self.weights is None:
            raise BadInput("weights: expected the file of the speech embedding, got nothing")
        return Pretrained(read_state(self.weights))

    def random(self) -> Pretrained:
        """Returns the same spectrogram before random convolutions that keep the size of their inputs."""
        import torch
        from torch import nn

        from common.backbones.parts.weights import read_state, scale_random_weights

        architecture = self.architecture()
        for module in architecture.module.children():
            if isinstance(module, nn.Conv2d):
                # Torch's own initialisation shrinks them at each of twenty layers: all recordings end in one point.
                nn.init.kaiming_normal_(module.weight, a=0.2)
        if self.weights is not None:
            known = read_state(self.weights)
            with torch.no_grad():
                for name, tensor in architecture.module.state_dict().items():
                    if name.startswith("frontend."):
                        tensor.copy_(known[name])
        noise = torch.randn(4, round(self.seconds * _RATE)) * 3000
        return scale_random_weights(architecture, nn.Linear(96, 97).weight, noise)

    def blocks(self, network: nn.Module) -> list[str]:
        """Returns the convolutions; the spectrogram before them is a fixed transform and stays frozen."""
        return [name for name, _ in network.named_children() if name != "frontend"]

    def divide(self, network: nn.Module, block: str) -> Divided:
        """Returns both sides of a convolution's input."""
        import torch

        from common.backbones.parts.boundary import check_whole
        from common.backbones.parts.nets import LowerSpeechNet, SpeechNet, UpperSpeechNet

        assert isinstance(network, SpeechNet)
        below, above = LowerSpeechNet(network, block), UpperSpeechNet(network, block)
        with torch.no_grad():
            length = round(self.seconds * _RATE)
            probe_BL = 3000.0 * torch.cos(0.37 * torch.arange(2 * length, dtype=torch.float32)).view(2, length)
            probe_BL = probe_BL.to(next(network.parameters()).device)
            at_boundary_B = below(probe_BL)
            check_whole(above(at_boundary_B), network(probe_BL), block)
        return Divided(below, above, tuple(at_boundary_B.shape[1:]))

    def preprocess(self, item: Any) -> Tensor:
        """Returns samples at 16 kHz in the range of 16-bit integers. Raises BadRecord."""
        import torch

        samples_L = fit_length(resample(item, _RATE), round(self.seconds * _RATE))
        return torch.from_numpy(np.ascontiguousarray(samples_L) * np.float32(32768.0))
