"""A run's head behind an alignment of the features, with outputs for another class mix.

# Shapes: B records, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from client.aligners import Alignment, Array, SourceMoments
from client.aligners.parts.linear import make_discriminant
from common.tasks.parts.adjusted import AdjustedHead


@final
class AlignedHead(nn.Module):
    """x -> outputs of the head at |x| (z scale + shift) + log(mix / shares of the head), with z = x / |x|.

    Where the alignment has found means of the site's classes, their linear discriminant takes the place of the head.

    Attributes:
        head: the run's head.
        scale: [D] or [D, D].
        shift_D: [D].
        weights_CD: weights of the discriminant; None where the head is used.
        bias_C: its bias.
        log_mix_C: logarithm of the class mix for which outputs are.
        log_shares_C: logarithm of that for which the head's outputs are.
        temperature: number by which the head's outputs are divided.
        aligner: kind of the alignment; empty where it is not known, or is none.
    """

    scale: Tensor
    shift_D: Tensor
    weights_CD: Tensor | None
    bias_C: Tensor | None
    log_mix_C: Tensor
    log_shares_C: Tensor
    temperature: Tensor

    def __init__(
        self,
        head: nn.Module,
        alignment: Alignment,
        discriminant: tuple[Array, Array] | None,
        log_mix_C: Array,
        log_shares_C: Array,
        temperature: float = 1.0,
        aligner: str = "",
    ) -> None:
        super().__init__()
        self.head = head
        self.aligner = aligner
        weights, bias = (None, None) if discriminant is None else discriminant
        for name, values in (
            ("scale", alignment.scale),
            ("shift_D", alignment.shift_D),
            ("weights_CD", weights),
            ("bias_C", bias),
            ("log_mix_C", log_mix_C),
            ("log_shares_C", log_shares_C),
            ("temperature", np.array(temperature)),
        ):
            self.register_buffer(name, None if values is None else torch.from_numpy(np.asarray(values, np.float32)))

    def forward(self, features_BD: Tensor) -> Tensor:
        """Returns outputs_BC for the site's own mix."""
        return self.compute_uniform(features_BD) + self.log_mix_C

    def compute_uniform(self, features_BD: Tensor) -> Tensor:
        """Returns outputs_BC for equally frequent classes."""
        length_B1 = features_BD.norm(dim=1, keepdim=True)
        rows_BD = features_BD / torch.where(length_B1 > 0.0, length_B1, 1.0)
        moved_BD = (rows_BD * self.scale if self.scale.ndim == 1 else rows_BD @ self.scale) + self.shift_D
        if self.weights_CD is not None:
            return linear(moved_BD, self.weights_CD, self.bias_C)
        outputs_BC: Tensor = self.head(length_B1 * moved_BD)
        offset_C = self.head.offset_K if isinstance(self.head, AdjustedHead) else None
        inside_C = torch.zeros(()) if offset_C is None else offset_C
        return inside_C + (outputs_BC - inside_C) / self.temperature - self.log_shares_C


@final
class UniformHead(nn.Module):
    """An aligned head with its outputs for equally frequent classes."""

    def __init__(self, head: AlignedHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features_BD: Tensor) -> Tensor:
        """Returns outputs_BC."""
        return self.head.compute_uniform(features_BD)


def serve_equal_classes(heads: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns heads by name, those behind an alignment with their outputs for equally frequent classes."""
    return {name: UniformHead(head) if isinstance(head, AlignedHead) else head for name, head in heads.items()}


def read_log_shares(head: nn.Module, source: SourceMoments) -> Array:
    """Returns the logarithm of the class mix for which a head's outputs are.

    A head whose outputs have an offset is served for that; any other has the shares of its training records in it.
    """
    offset_K = head.offset_K if isinstance(head, AdjustedHead) else None
    log_C = np.log(source.shares_C) if offset_K is None else offset_K.detach().cpu().numpy().astype(np.float64)
    normalised_C: Array = log_C - np.log(np.exp(log_C - log_C.max()).sum()) - log_C.max()
    return normalised_C


def place_head(
    head: nn.Module,
    source: SourceMoments,
    alignment: Alignment,
    mix_C: Array,
    *,
    temperature: float = 1.0,
    aligner: str = "",
) -> AlignedHead:
    """Returns a run's head behind an alignment.

    Args:
        head: the run's head, as it is served.
        source: the released moments.
        alignment: the alignment.
        mix_C: the site's own class mix.
        temperature: number by which the head's outputs are divided.
        aligner: kind of the alignment.
    """
    found = None if alignment.means_CD is None else make_discriminant(source, alignment.means_CD)
    return AlignedHead(head, alignment, found, np.log(mix_C), read_log_shares(head, source), temperature, aligner)


def keep_head(head: nn.Module, source: SourceMoments) -> AlignedHead:
    """Returns a run's head as it is: features are not moved, outputs stay for the mix that they are for."""
    num_features = source.means_CD.shape[1]
    unmoved = Alignment(np.ones(num_features), np.zeros(num_features))
    log_shares_C = read_log_shares(head, source)
    return AlignedHead(head, unmoved, None, log_shares_C, log_shares_C)


def list_alignments(heads: Mapping[str, object]) -> dict[str, str]:
    """Returns task -> which alignment a site took for its head, in words, for those that one was tried for."""
    none = "no alignment: the head as it is served is better here, or cannot be told from it"
    return {name: head.aligner or none for name, head in heads.items() if isinstance(head, AlignedHead)}
