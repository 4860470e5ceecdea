"""A frozen encoder made fast without changing what it computes: BatchNorm folded into convolutions, channels last.

The digest names the original: this copy is derived from it at the place that encodes, never sent and never hashed. In
float32 it is used only where it gives the original's features, which is checked on the first items it encodes; in
bfloat16, which a site must ask for, the difference is measured there and reported.
"""

from __future__ import annotations

import copy
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError

Precision = Literal["float32", "bfloat16"]
"""Of the encoder's inside; features are float32 in any case."""

TOLERANCE = 1e-4
"""How far features of the float32 copy may be from the original's, relative to their norm."""

_CHECKED = 4


@final
class FastEncoder:
    """Encodes batches as a `FrozenEncoder` does, faster.

    Attributes:
        error: the largest distance of a checked item's features from the original's, relative to their norm; None
            before the first batch.
    """

    def __init__(self, original: nn.Module, precision: Precision, device: torch.device) -> None:
        """Of a frozen encoder, scale and projection; the original stays as it is."""
        self.error: float | None = None
        self._original = original
        self._precision = precision
        self._dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._images = any(isinstance(part, nn.Conv2d) for part in original.modules())
        self._fast = self._copy(original).to(device)

    def __call__(self, items_B: Tensor) -> Tensor:
        """features_BD in float32, on the encoder's device."""
        if self.error is None:
            few = items_B[:_CHECKED]
            original_BD: Tensor = self._original(few)
            self.error = _relative_error(self._encoded(few), original_BD)
            if self._precision == "float32" and not self.error <= TOLERANCE:
                self._fast, self._images, self.error = self._original, False, 0.0
        return self._encoded(items_B)

    def _encoded(self, items_B: Tensor) -> Tensor:
        if items_B.is_floating_point():
            items_B = items_B.to(self._dtype)
        if self._images and items_B.dim() == 4:
            items_B = items_B.contiguous(memory_format=torch.channels_last)
        features_BD: Tensor = self._fast(items_B)
        return features_BD

    def _copy(self, original: nn.Module) -> nn.Module:
        fast = copy.deepcopy(original)
        encoder = fast.encoder
        assert isinstance(encoder, nn.Module)
        if any(isinstance(part, nn.BatchNorm2d) for part in encoder.modules()):
            encoder = _folded(encoder)
        # The projection stays in float32: it is small, and it amplifies what differs.
        encoder = encoder.to(self._dtype).requires_grad_(False).train(False)
        fast.encoder = encoder.to(memory_format=torch.channels_last) if self._images else encoder
        return fast


def _folded(encoder: nn.Module) -> nn.Module:
    try:
        folded: nn.Module = fuse(encoder)
    except (TraceError, TypeError, ValueError, NotImplementedError, AttributeError):
        return encoder  # A forward pass that depends on values cannot be traced: it keeps its BatchNorms.
    return folded


def _relative_error(features_BD: Tensor, original_BD: Tensor) -> float:
    distance_B = (features_BD - original_BD).double().norm(dim=1)
    return float((distance_B / original_BD.double().norm(dim=1).clamp(min=1e-12)).max())
