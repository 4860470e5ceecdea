"""The freeze boundary inside a backbone: below it everything is frozen and encoded once, above it something trains.

A kind that can be divided (`common.backbones.Divisible`) names its blocks and returns both sides of one. Invariant,
checked on a public probe whenever weights are there: the upper part, applied to the outputs of the lower, gives the
features of the whole network.

# Shapes: B examples, F values at the boundary, D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from common.backbones import Divided
from common.backbones.parts.projection import ProjectionLayer
from common.types import BadInput

INPUT = "input"
"""The boundary in front of everything: nothing is frozen but what must be."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TOLERANCE = 1e-3


def list_chain(network: nn.Module) -> dict[str, nn.Module]:
    """Returns a network's children in their order; a sequence that comes first is replaced by its own children."""
    parts = dict(network.named_children())
    first = next(iter(parts))
    inner = parts[first]
    if not isinstance(inner, nn.Sequential) or isinstance(network, nn.Sequential):
        return parts
    return {f"{first}.{name}": part for name, part in inner.named_children()} | {
        name: part for name, part in parts.items() if name != first
    }


def list_blocks(network: nn.Module) -> list[str]:
    """Returns the names of a chain's parts that hold something to train."""
    return [name for name, part in list_chain(network).items() if list_trainable(part)]


def count_depths(trunk: nn.Module) -> dict[str, int]:
    """Returns for each parameter that trains the number of blocks between its own and the last block of its trunk.

    A block is a part of the chain in which a weight of more than one dimension trains; others, such as norms, belong to
    the block before them.

    Args:
        trunk: a `Trunk`.
    """
    parts: dict[str, nn.Module] = {}
    for name, part in list_chain(trunk.get_submodule("above")).items():
        inner = part.named_children() if isinstance(part, nn.ModuleList) else ()
        parts |= {f"{name}.{key}": each for key, each in inner} or {name: part}
    num_blocks = 0
    blocks: dict[str, int] = {}
    for name, part in parts.items():
        trained = [(key, parameter.dim()) for key, parameter in part.named_parameters() if parameter.requires_grad]
        num_blocks += any(dims > 1 for _, dims in trained)
        blocks |= {f"above.{name}.{key}": max(1, num_blocks) for key, _ in trained}
    names = (name for name, parameter in trunk.named_parameters() if parameter.requires_grad)
    return {name: max(0, num_blocks - blocks.get(name, 1)) for name in names}


def divide_chain(
    network: nn.Module, block: str, item_shape: tuple[int, ...], parts: Mapping[str, nn.Module] | None = None
) -> Divided:
    """Returns both sides of a block of a network whose forward pass begins with its parts, one after the other.

    Names stay the network's own: each part below the block is replaced by the identity.

    Args:
        network: the network, in eval mode; it becomes the upper part.
        block: a name in `parts`.
        item_shape: shape of a preprocessed item.
        parts: name -> part, in the order in which they are applied; None for those of `list_chain`.

    Raises:
        BadInput: the two sides do not make the whole.
    """
    chain = list_chain(network) if parts is None else parts
    before = list(chain)[: list(chain).index(block)]
    with torch.no_grad():
        probe_B = create_probe(item_shape, network)
        whole_BD = network(probe_B)
        below = nn.Sequential(*(chain[name] for name in before))
        for name in before:
            network.set_submodule(name, nn.Identity())
        at_boundary_B = below(probe_B)
        check_whole(network(at_boundary_B), whole_BD, block)
    return Divided(below, network, tuple(at_boundary_B.shape[1:]))


def create_probe(item_shape: tuple[int, ...], network: nn.Module) -> Tensor:
    """Returns two public inputs, always the same."""
    device = next(network.parameters()).device
    values = torch.cos(0.37 * torch.arange(2 * math.prod(item_shape), dtype=torch.float32, device=device))
    return values.view(2, *item_shape)


def check_whole(composed_BD: Tensor, whole_BD: Tensor, block: str) -> None:
    """Checks that both sides of a boundary make the whole network; without weights it checks nothing.

    Args:
        composed_BD: [B, D], features through both sides.
        whole_BD: [B, D], features of the whole network for the same inputs.
        block: name of the block, for the message.

    Raises:
        BadInput: the features differ.
    """
    if composed_BD.device.type == "meta":
        return
    distance, size = (composed_BD - whole_BD).double().norm(), whole_BD.double().norm()
    if not bool(distance <= _TOLERANCE * size):
        raise BadInput(f"from: expected a block at which this backbone can be divided, got {block!r}, where it cannot")


def list_trainable(module: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of a module that may train: all but BatchNorms' and embeddings'.

    A frozen BatchNorm is one affine map for every example; a trained one would need statistics of a batch. Embeddings
    inside of layers are those of distances, which all examples share: none has a gradient of its own.
    """
    owners = [part for part in module.modules() if not isinstance(part, (*_BATCH_NORMS, nn.Embedding))]
    return [parameter for part in owners for parameter in part.parameters(recurse=False)]


def drop_nothing(module: nn.Module) -> None:
    """Makes a module compute the same in training as in use, in a way that Opacus' hooks bear; in place."""
    for part in module.modules():
        if getattr(part, "inplace", False):
            # Opacus' hooks return views, which nothing may change in place.
            setattr(part, "inplace", False)  # noqa: B010
        # A part with weights of its own is put in training mode, where some drop attention weights themselves, at a
        # rate of their own or that of the dropout beside them.
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in [name for name, value in vars(part).items() if "drop" in name and isinstance(value, float)]:
            setattr(part, name, 0.0)


def train_opened_parts(module: nn.Module, mode: bool) -> None:
    """Sets the mode of those parts of a module that hold something to train: Opacus looks there, dropout does not."""
    for part in module.modules():
        if any(parameter.requires_grad for parameter in part.parameters(recurse=False)):
            part.training = mode


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
        drop_nothing(self)

    def open(self, parameters: list[nn.Parameter]) -> Trunk:
        """Lets these parameters train; returns the trunk itself, in training mode."""
        for parameter in parameters:
            parameter.requires_grad_(True)
        return self.train()

    def train(self, mode: bool = True) -> Trunk:
        """Puts only those parts in training mode that hold something to train: Opacus looks there, dropout does not."""
        super().train(False)
        self.training = mode
        train_opened_parts(self, mode)
        return self

    def forward(self, boundary_BF: Tensor) -> Tensor:
        """Returns features_BD in float32."""
        raw_BD: Tensor = self.above(boundary_BF.view(boundary_BF.shape[0], *self.shape))
        features_BD: Tensor = self.projection(raw_BD * self.scale)
        return features_BD
