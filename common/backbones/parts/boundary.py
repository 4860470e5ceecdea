"""The freeze boundary inside an encoder: below it everything is frozen and encoded once, above it something trains.

A kind that can be divided says which blocks it has and returns both sides of one. Invariant, checked on a public probe
whenever weights are there: what lies above, applied to what lies below, is the whole encoder.

# Shapes: B examples, F values at the boundary, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor, nn

from common.backbones.parts.projection import ProjectionLayer
from common.types import BadInput

INPUT = "input"
"""The boundary in front of everything: nothing is frozen but what must be."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Divided:
    """Both sides of a boundary.

    Attributes:
        below: batch of preprocessed items -> outputs at the boundary, B x `shape`.
        above: outputs at the boundary -> raw features.
        shape: of one example's output at the boundary.
    """

    below: nn.Module
    above: nn.Module
    shape: tuple[int, ...]


@runtime_checkable
class Divisible(Protocol):
    """What a kind has besides where its encoder can be divided (see `common.backbones.Kind`)."""

    def blocks(self, encoder: nn.Module) -> list[str]:
        """Names of the blocks that something trainable can begin with, in order."""

    def divide(self, encoder: nn.Module, block: str) -> Divided:
        """Both sides of a block's input. The encoder is in eval mode, and used up.

        Args:
            encoder: the module of `Kind.architecture`, perhaps without memory (device meta).
            block: one of `blocks`.

        Raises:
            BadInput: this encoder cannot be divided there.
        """


def chain_of(encoder: nn.Module) -> dict[str, nn.Module]:
    """An encoder's parts, one after the other: its children, a first child that is a sequence as its own children."""
    parts = dict(encoder.named_children())
    first = next(iter(parts))
    inner = parts[first]
    if not isinstance(inner, nn.Sequential) or isinstance(encoder, nn.Sequential):
        return parts
    return {f"{first}.{name}": part for name, part in inner.named_children()} | {
        name: part for name, part in parts.items() if name != first
    }


def blocks_of(encoder: nn.Module) -> list[str]:
    """Names of a chain's parts that hold something to train."""
    return [name for name, part in chain_of(encoder).items() if trainable_in(part)]


def divide_chain(encoder: nn.Module, block: str, item_shape: tuple[int, ...]) -> Divided:
    """Both sides of a block of an encoder whose forward pass begins with its parts, one after the other.

    Names stay the encoder's own: what lies below is replaced by the identity.

    Args:
        encoder: such an encoder, in eval mode.
        block: a name in `chain_of`.
        item_shape: of a preprocessed item.
    """
    chain = chain_of(encoder)
    before = list(chain)[: list(chain).index(block)]
    with torch.no_grad():
        probe_B = probe(item_shape, encoder)
        whole_BD = encoder(probe_B)
        below = nn.Sequential(*(chain[name] for name in before))
        for name in before:
            encoder.set_submodule(name, nn.Identity())
        at_boundary_B = below(probe_B)
        check_whole(encoder(at_boundary_B), whole_BD, block)
    return Divided(below, encoder, tuple(at_boundary_B.shape[1:]))


def probe(item_shape: tuple[int, ...], encoder: nn.Module) -> Tensor:
    """Two public inputs without any chance in them."""
    device = next(encoder.parameters()).device
    values = torch.cos(0.37 * torch.arange(2 * math.prod(item_shape), dtype=torch.float32, device=device))
    return values.view(2, *item_shape)


def check_whole(found_BD: Tensor, whole_BD: Tensor, block: str) -> None:
    """Raise BadInput where both sides of a boundary do not make the whole; without weights nothing is known."""
    if found_BD.device.type == "meta":
        return
    distance, size = (found_BD - whole_BD).double().norm(), whole_BD.double().norm()
    if not bool(distance <= _TOLERANCE * size):
        raise BadInput(f"from: expected a block at which this encoder can be divided, got {block!r}, where it cannot")


def trainable_in(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that may train: all but BatchNorms'.

    A frozen BatchNorm is one affine map for every example; a trained one would need statistics of a batch.
    """
    owners = [part for part in module.modules() if not isinstance(part, _BATCH_NORMS)]
    return [parameter for part in owners for parameter in part.parameters(recurse=False)]


@final
class Trunk(nn.Module):
    """The part of a backbone above the boundary, as a module to train: cached outputs -> features.

    It computes no example from another, and always the same: BatchNorms use their frozen statistics, and nothing drops
    out, in training too.
    """

    scale: Tensor

    def __init__(self, divided: Divided, scale: Tensor, projection: ProjectionLayer) -> None:
        super().__init__()
        self.shape = divided.shape
        self.above = divided.above.float().requires_grad_(False)
        self.register_buffer("scale", scale.clone())
        self.projection = projection
        for part in self.modules():
            if getattr(part, "inplace", False):
                # Opacus' hooks return views, which nothing may change in place.
                setattr(part, "inplace", False)  # noqa: B010

    def open(self, parameters: list[nn.Parameter]) -> Trunk:
        """Let these train; the trunk itself, in training mode."""
        for parameter in parameters:
            parameter.requires_grad_(True)
        return self.train()

    def train(self, mode: bool = True) -> Trunk:
        """Put only those parts in training mode that hold something to train: Opacus looks there, dropout does not."""
        super().train(False)
        self.training = mode
        for part in self.modules():
            if any(parameter.requires_grad for parameter in part.parameters(recurse=False)):
                part.training = mode
        return self

    def forward(self, boundary_BF: Tensor) -> Tensor:
        """features_BD in float32."""
        raw_BD: Tensor = self.above(boundary_BF.view(len(boundary_BF), *self.shape))
        features_BD: Tensor = self.projection(raw_BD * self.scale)
        return features_BD
