"""A frozen backbone made fast without changing what it computes: BatchNorm folded into convolutions, channels last.

The digest names the original: this copy is derived from it at the place that encodes, never sent and never hashed. In
float32 it is used only where it gives the original's features, which is checked on the first items it encodes; in
bfloat16, which a site must ask for, the difference is measured there and reported.
"""

from __future__ import annotations

import copy
from typing import final

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError

from common.backbones import Precision

TOLERANCE = 1e-4
"""Largest distance of the float32 copy's features from the original's, relative to their norm."""

_CHECKED = 4


@final
class FastBackbone:
    """Encodes batches as a `FrozenBackbone` does, faster.

    Attributes:
        error: the largest distance of a checked item's features from the original's, relative to their norm; None
            before the first batch.
    """

    def __init__(self, original: nn.Module, precision: Precision, device: torch.device) -> None:
        """Makes the fast copy.

        Args:
            original: a `FrozenBackbone`; it stays as it is.
            precision: number format inside the network.
            device: the device that it encodes on.
        """
        self.error: float | None = None
        self._original = original
        self._precision = precision
        self._dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._images = any(isinstance(part, nn.Conv2d) for part in original.modules())
        self._fast = self._copy(original).to(device)

    def __call__(self, items_B: Tensor) -> Tensor:
        """Returns features_BD in float32, on the backbone's device."""
        if self.error is None:
            first_B = items_B[:_CHECKED]
            original_BD: Tensor = self._original(first_B)
            self.error = _compute_error(self._encode(first_B), original_BD)
            if self._precision == "float32" and not self.error <= TOLERANCE:
                self._fast, self._images, self.error = self._original, False, 0.0
        return self._encode(items_B)

    def _encode(self, items_B: Tensor) -> Tensor:
        if items_B.is_floating_point():
            items_B = items_B.to(self._dtype)
        if self._images and items_B.dim() == 4:
            items_B = items_B.contiguous(memory_format=torch.channels_last)
        features_BD: Tensor = self._fast(items_B)
        return features_BD

    def _copy(self, original: nn.Module) -> nn.Module:
        fast = copy.deepcopy(original)
        network = fast.encoder
        assert isinstance(network, nn.Module)
        if any(isinstance(part, nn.BatchNorm2d) for part in network.modules()):
            network = _fold_batch_norms(network)
        # The projection stays in float32: it is small, and it amplifies what differs.
        network = network.to(self._dtype).requires_grad_(False).train(False)
        fast.encoder = network.to(memory_format=torch.channels_last) if self._images else network
        return fast


def _fold_batch_norms(network: nn.Module) -> nn.Module:
    try:
        folded: nn.Module = fuse(network)
    except (TraceError, TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError):
        return network  # A forward pass that depends on values cannot be traced: it keeps its BatchNorms.
    return folded


def _compute_error(features_BD: Tensor, original_BD: Tensor) -> float:
    distance_B = (features_BD - original_BD).double().flatten(1).norm(dim=1)
    return float((distance_B / original_BD.double().flatten(1).norm(dim=1).clamp(min=1e-12)).max())
