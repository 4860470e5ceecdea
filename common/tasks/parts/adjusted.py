"""A head between two steps that do not train: its features are centred, its outputs have an offset.

Features of a pre-trained network share a large mean. Of a clipped gradient, and of the noise that hides it, the mean
takes the greater part and tells no class from another: without it the same noise leaves more signal. An offset of the
labels' logarithmic frequencies takes what only says which label is frequent out of the gradients, and is exchanged for
other frequencies when the head is used (logit adjustment: Menon et al. 2021, arXiv 2007.07314).

# Shapes: B examples, D features, K outputs.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from common.privacy.lattice import bound_norms

_BLOCK_VALUES = 2**20


class Fixed(nn.Module):
    """The numbers of a head that travel with it and never train (`common.types.FIXED`)."""

    centre: Tensor
    offset: Tensor


@final
class AdjustedHead(nn.Module):
    """x -> layers((u - centre) / |u - centre|) + offset, with u = x / |x|.

    Attributes:
        layers: the part that trains.
        fixed: `centre` [D] and `offset` [K], each where the head has it.
    """

    def __init__(self, layers: nn.Module, num_features: int | None, num_outputs: int | None) -> None:
        super().__init__()
        self.layers = layers
        self.fixed = Fixed()
        if num_features is not None:
            self.fixed.register_buffer("centre", torch.zeros(num_features))
        if num_outputs is not None:
            self.fixed.register_buffer("offset", torch.zeros(num_outputs))

    @property
    def offset_K(self) -> Tensor | None:
        """The numbers that are added to the outputs; None where there are none."""
        return self.fixed._buffers.get("offset")

    def forward(self, features_BD: Tensor) -> Tensor:
        """Returns outputs_BK."""
        centre_D = self.fixed._buffers.get("centre")
        if centre_D is not None:
            normalize = nn.functional.normalize
            features_BD = normalize(normalize(features_BD, dim=-1) - centre_D, dim=-1)
        outputs_BK: Tensor = self.layers(features_BD)
        return outputs_BK if self.offset_K is None else outputs_BK + self.offset_K

    def adjust(self, features_RD: Tensor) -> Tensor:
        """Returns the features that `layers` reads; a row's are the same to the bit wherever the row stands.

        `forward` computes the same up to rounding, and can be differentiated.

        Args:
            features_RD: R x D in any floating-point type.
        """
        centre_D = self.fixed._buffers.get("centre")
        return features_RD if centre_D is None else normalize_rows(features_RD, centre_D)


def normalize_rows(features_RD: Tensor, centre_D: Tensor | None = None) -> Tensor:
    """Returns rows of length 1 (or 0), and of length 1 again after a centre was subtracted from them.

    A row's values are the same to the bit wherever the row stands; one that is not finite stays so.

    Args:
        features_RD: R x D in any floating-point type.
        centre_D: what is subtracted; None for nothing.
    """
    size = max(1, _BLOCK_VALUES // max(1, features_RD.shape[-1]))
    parts = []
    for block_RD in torch.split(features_RD, size):
        rows_RD = _divide_by_length(block_RD.double())
        if centre_D is not None:
            rows_RD = _divide_by_length(rows_RD - centre_D.double())
        parts.append(rows_RD.to(features_RD.dtype))
    return torch.cat(parts)


def _divide_by_length(rows_RD: Tensor) -> Tensor:
    norm_R = bound_norms(rows_RD)
    return rows_RD / torch.where(norm_R > 0.0, norm_R, 1.0)[:, None]
