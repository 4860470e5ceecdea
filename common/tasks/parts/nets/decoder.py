"""A head that looks around each place: two convolutions over the places of a picture.

No place outside the picture exists: where a square reaches beyond its edge, zeros stand there.

# Shapes: B pictures, G places along a side, D features, K outputs of a place.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn


@final
class PlacesDecoder(nn.Module):
    """Convolution, tanh, convolution: features_BGGD -> outputs_BGGK; the last layer starts at zero."""

    def __init__(self, feature_dim: int, hidden: int, num_outputs: int, *, kernel: int, bias: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(feature_dim, hidden, kernel, padding=kernel // 2, bias=bias)
        self.last = nn.Conv2d(hidden, num_outputs, kernel, padding=kernel // 2, bias=bias)
        nn.init.zeros_(self.last.weight)
        if self.last.bias is not None:
            nn.init.zeros_(self.last.bias)

    def forward(self, features_BGGD: Tensor) -> Tensor:
        """Returns outputs_BGGK."""
        # Opacus 1.6 computes wrong gradients of a convolution, silently, when its input is stored channels-last.
        features_BDGG = features_BGGD.movedim(-1, 1).contiguous()
        outputs_BKGG: Tensor = self.last(torch.tanh(self.first(features_BDGG)).contiguous())
        return outputs_BKGG.movedim(1, -1)
