"""Whisper's encoder over spectra of any length; its own `forward` reads thirty seconds and nothing else.

# Shapes: B recordings, C bands of a spectrum, S steps of it, T frames, D features.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

STEPS_OF_FRAME = 2
"""Steps of a spectrum that Whisper's encoder makes one frame of."""

SILENCE_FRAMES = 50
"""Frames of silence that Whisper's encoder reads behind a recording: one second. It expects some; thirty seconds of it
take ten times as long and are no better."""


def encode_spectra(model: WhisperEncoder, spectra_BCS: Tensor) -> Tensor:
    """Returns the frames [B, T, D] of as many steps as there are; the model's own `forward` takes thirty seconds alone.

    Args:
        model: the encoder.
        spectra_BCS: log-mel spectra, [B, C, S]; S at most what the model has positions for.
    """
    hidden_BDT = nn.functional.gelu(model.conv2(nn.functional.gelu(model.conv1(spectra_BCS))))
    hidden_BTD = hidden_BDT.movedim(1, 2) + model.embed_positions.weight[: hidden_BDT.shape[2]]
    for layer in model.layers:
        output = layer(hidden_BTD, None)
        hidden_BTD = output[0] if isinstance(output, tuple) else output
    normed_BTD: Tensor = model.layer_norm(hidden_BTD)
    return normed_BTD
