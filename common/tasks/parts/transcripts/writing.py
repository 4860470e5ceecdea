"""The head of a task whose backbone's decoder is a part of it: the decoder, of which a part trains, and a linear map.

# Shapes: B records, P places of a source, T places of a text, M features of a place, D features of a state.
"""

from __future__ import annotations

from typing import final

from torch import Tensor, nn


@final
class WritingHead(nn.Module):
    """Encoded sources [B, P, M] and the tokens before each place [B, T] -> outputs [B, T, K]."""

    def __init__(self, decoder: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.last = last

    def forward(self, features_BPM: Tensor, before_BT: Tensor) -> Tensor:
        """Returns the outputs from which the token behind each is told."""
        outputs_BTK: Tensor = self.last(self.decoder(features_BPM, before_BT))
        return outputs_BTK
